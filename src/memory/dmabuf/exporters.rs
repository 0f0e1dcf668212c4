//! Dmabufs of host memory: `/dev/udmabuf` and `/dev/dma_heap`.

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{DmabufError, DmabufMemory, sys};
use crate::memory::{HostMemory, Memory, MemoryError};

const UDMABUF: &str = "/dev/udmabuf";
const HEAPS: &str = "/dev/dma_heap";

/// A memory file and the dmabuf that `/dev/udmabuf` makes of it.
#[derive(Debug)]
pub struct Udmabuf {
    host: HostMemory,
    fd: OwnedFd,
}

impl Udmabuf {
    /// Allocates `length` bytes, rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// [`DmabufError::Node`] where the kernel has no such device or the process may not open it;
    /// [`DmabufError::Refused`] above the limit of the device.
    pub fn new(length: u64) -> Result<Self, MemoryError> {
        let device = open(
            UDMABUF.to_owned(),
            "the kernel needs CONFIG_UDMABUF, and the process the right to open the node",
        )?;
        let length = length
            .checked_next_multiple_of(sys::page_size())
            .ok_or(MemoryError::BadLength { length })?;
        let host = HostMemory::memfd("kvpush-udmabuf", length)?;
        let fd = host.fd().ok_or(DmabufError::NotDmabuf)?;
        let fd =
            sys::udmabuf_create(&device, fd, length).map_err(|source| DmabufError::Refused {
                operation: "UDMABUF_CREATE",
                length,
                source,
                hint: Some("/sys/module/udmabuf/parameters/size_limit_mb is the most, in MiB"),
            })?;
        Ok(Self { host, fd })
    }

    /// The memory file's own mapping: the exporter's end.
    pub fn host(&self) -> &HostMemory {
        &self.host
    }

    /// The dmabuf.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// All of it, as memory for a pool. It lives as long as it is used, whatever becomes of this value.
    pub fn memory(&self) -> Result<DmabufMemory, MemoryError> {
        let fd = self.fd.try_clone().map_err(|source| DmabufError::Refused {
            operation: "duplicate the descriptor",
            length: self.host.length(),
            source,
            hint: Some("raise the limit of open files"),
        })?;
        DmabufMemory::import(fd, 0, self.host.length())
    }
}

/// Allocates a dmabuf of `length` bytes, rounded up to whole pages, from `/dev/dma_heap/name`; `system` is ordinary
/// memory.
///
/// # Errors
///
/// [`DmabufError::Node`] where there is no such heap or the process may not open it; [`DmabufError::Refused`].
pub fn heap(name: &str, length: u64) -> Result<DmabufMemory, MemoryError> {
    let device = open(
        format!("{HEAPS}/{name}"),
        "the kernel needs CONFIG_DMABUF_HEAPS with the heap, and the process the right to open the node",
    )?;
    let length = length
        .checked_next_multiple_of(sys::page_size())
        .ok_or(MemoryError::BadLength { length })?;
    let fd = sys::heap_allocate(&device, length).map_err(|source| DmabufError::Refused {
        operation: "DMA_HEAP_IOCTL_ALLOC",
        length,
        source,
        hint: None,
    })?;
    DmabufMemory::import(fd, 0, length)
}

fn open(node: String, hint: &'static str) -> Result<File, DmabufError> {
    let opened = OpenOptions::new().read(true).write(true).open(&node);
    opened.map_err(|source| DmabufError::Node { node, source, hint })
}
