//! Memory that is known by a dmabuf, and where to get one without a GPU.
//!
//! A dmabuf is a file that stands for memory of some driver (the exporter). Its size never changes. NICs whose driver
//! knows dmabufs are given the file; software fabrics map it. [`DmabufMemory`] is a range of such a file, from any
//! exporter. `/dev/udmabuf` ([`Udmabuf`]) and `/dev/dma_heap` ([`heap`]) export host memory, so that everything about
//! dmabufs can be tried, and is tested, on hosts without a GPU.
//!
//! Any thread may call. Copies in and out may race with a peer's write, as for [`HostMemory`](super::HostMemory).

mod error;
mod exporters;
mod sys;
#[cfg(test)]
mod tests;

use std::{
    fs,
    io::{self, Seek, SeekFrom},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

pub use error::DmabufError;
pub use exporters::{Udmabuf, heap};

use super::{
    Copier, Copy, DeviceMemory, Direction, Dmabuf, Memory, MemoryError, MemoryKind, PciAddress,
    Ticket,
};

/// A range of a dmabuf.
///
/// Requests and peers name its bytes by addresses of this process: those of a mapping, where the exporter allows one,
/// and otherwise reserved ones, which only a NIC can use.
#[derive(Debug)]
pub struct DmabufMemory {
    fd: OwnedFd,
    exporter: String,
    /// Of the first byte, in the file.
    offset: u64,
    length: u64,
    /// Whole pages around the range.
    mapping: sys::Mapping,
    /// Why the host cannot reach the bytes, if it cannot.
    refused: Option<io::Error>,
    location: Option<PciAddress>,
    /// Whether the file is a dmabuf, and not a memory file in place of one.
    is_dmabuf: bool,
}

impl DmabufMemory {
    /// Takes the range `[offset, offset + length)` of a dmabuf.
    ///
    /// A memory file (`memfd_create(2)`) that is sealed against shrinking is accepted as well: software fabrics treat it
    /// alike. NICs will not.
    ///
    /// # Errors
    ///
    /// [`DmabufError`]: the file is neither, or the range is empty or not within it.
    pub fn import(fd: OwnedFd, offset: u64, length: u64) -> Result<Self, MemoryError> {
        let is_dmabuf = sys::is_dmabuf(fd.as_fd());
        if !is_dmabuf && !sys::is_sealed(fd.as_fd()) {
            return Err(DmabufError::NotDmabuf.into());
        }
        let size = size_of_file(&fd).map_err(|source| DmabufError::Refused {
            operation: "look at the size",
            length,
            source,
            hint: None,
        })?;
        let page = sys::page_size();
        let outside = DmabufError::Range {
            offset,
            length,
            size,
        };
        let Some(end) = offset
            .checked_add(length)
            .filter(|&end| length > 0 && end <= size)
        else {
            return Err(outside.into());
        };
        let first = offset - offset % page;
        let Some(bytes) = end
            .checked_next_multiple_of(page)
            .and_then(|end| usize::try_from(end - first).ok())
        else {
            return Err(outside.into());
        };
        let (mapping, refused) = match sys::Mapping::of_file(fd.as_fd(), first, bytes) {
            Ok(mapping) => (mapping, None),
            Err(refused) => {
                let reserved = sys::Mapping::reserved(bytes);
                let reserved = reserved.map_err(|source| DmabufError::Refused {
                    operation: "reserve addresses",
                    length,
                    source,
                    hint: None,
                })?;
                (reserved, Some(refused))
            }
        };
        Ok(Self {
            exporter: exporter_of(&fd, is_dmabuf),
            fd,
            offset,
            length,
            mapping,
            refused,
            location: None,
            is_dmabuf,
        })
    }

    /// Says which PCI device holds the memory, for choosing the nearest rail. A dmabuf does not tell.
    pub fn at(mut self, location: PciAddress) -> Self {
        self.location = Some(location);
        self
    }

    /// A part of this range, as memory of its own: what an allocator does that cuts buffers out of one allocation.
    ///
    /// # Errors
    ///
    /// [`DmabufError::Range`], or too many open files.
    pub fn part(&self, offset: u64, length: u64) -> Result<Self, MemoryError> {
        self.check(offset, length)?;
        let fd = self.duplicate()?;
        let mut part = Self::import(fd, self.offset + offset, length)?;
        part.location = self.location;
        Ok(part)
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where in the file the first byte lies.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The exporter, as the kernel names it: `udmabuf`, `system`, `amdgpu`.
    pub fn exporter(&self) -> &str {
        &self.exporter
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// Outside of the range, or [`DmabufError::NotMappable`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.reachable(offset, out.len() as u64)?;
        self.with_access(|| {
            // SAFETY: `reachable` checked that the mapping is one of the file, and that the range lies in it.
            unsafe { self.mapping.read(at, out) }
        })
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// As for [`DmabufMemory::read`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let at = self.reachable(offset, bytes.len() as u64)?;
        self.with_access(|| {
            // SAFETY: as in `read`.
            unsafe { self.mapping.write(at, bytes) }
        })
    }

    /// Sets `length` bytes from `offset` to `byte`.
    ///
    /// # Errors
    ///
    /// As for [`DmabufMemory::read`].
    pub fn fill(&self, offset: u64, length: u64, byte: u8) -> Result<(), MemoryError> {
        let at = self.reachable(offset, length)?;
        self.with_access(|| {
            // SAFETY: as in `read`; a range within a mapping fits `usize`.
            unsafe { self.mapping.fill(at, length as usize, byte) }
        })
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), MemoryError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(MemoryError::OutOfRange {
                offset,
                length,
                capacity: self.length,
            }),
        }
    }

    /// Where in the mapping a range begins that the host can reach.
    fn reachable(&self, offset: u64, length: u64) -> Result<usize, MemoryError> {
        self.check(offset, length)?;
        self.mappable()?;
        Ok((self.offset % sys::page_size() + offset) as usize)
    }

    fn mappable(&self) -> Result<(), DmabufError> {
        match &self.refused {
            None => Ok(()),
            Some(refused) => Err(DmabufError::NotMappable {
                exporter: self.exporter.clone(),
                source: io::Error::from_raw_os_error(refused.raw_os_error().unwrap_or(libc::EIO)),
            }),
        }
    }

    /// Runs `access` between the announcements that keep the host's caches and the device's agreed.
    fn with_access(&self, access: impl FnOnce()) -> Result<(), MemoryError> {
        self.sync(false)?;
        access();
        self.sync(true)
    }

    fn sync(&self, end: bool) -> Result<(), MemoryError> {
        if !self.is_dmabuf {
            return Ok(());
        }
        sys::sync(self.fd.as_fd(), end).map_err(|source| {
            let refused = DmabufError::Refused {
                operation: "DMA_BUF_IOCTL_SYNC",
                length: self.length,
                source,
                hint: None,
            };
            refused.into()
        })
    }

    fn duplicate(&self) -> Result<OwnedFd, MemoryError> {
        self.fd.try_clone().map_err(|source| {
            let refused = DmabufError::Refused {
                operation: "duplicate the descriptor",
                length: self.length,
                source,
                hint: Some("raise the limit of open files"),
            };
            refused.into()
        })
    }
}

// SAFETY: the mapping lives and stays in place until drop, its file cannot shrink (`import` made sure), and no
// reference into it is ever handed out. Where the addresses are only reserved, `is_host_accessible` says so.
unsafe impl Memory for DmabufMemory {
    fn address(&self) -> u64 {
        self.mapping.address() + self.offset % sys::page_size()
    }

    fn length(&self) -> u64 {
        self.length
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Dmabuf
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }
}

impl DeviceMemory for DmabufMemory {
    fn is_host_accessible(&self) -> bool {
        self.refused.is_none()
    }

    fn location(&self) -> Option<PciAddress> {
        self.location
    }

    fn export(&self) -> Result<Dmabuf, MemoryError> {
        Ok(Dmabuf {
            fd: self.duplicate()?,
            offset: self.offset,
        })
    }

    fn peer_memory(&self) -> Result<(), MemoryError> {
        // The pages of a memory file can be pinned through a mapping; those of a dmabuf are their exporter's.
        match self.is_dmabuf {
            false => Ok(()),
            true => Err(DmabufError::NotPinnable {
                exporter: self.exporter.clone(),
            }
            .into()),
        }
    }

    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError> {
        self.mappable()?;
        Ok(Box::new(MappedCopier { next: 0 }))
    }

    /// The host's writes (a software fabric's) go through its caches; this makes the exporter write them back.
    fn flush(&self) -> Result<(), MemoryError> {
        match &self.refused {
            None => self.with_access(|| ()),
            Some(_) => Ok(()),
        }
    }
}

/// Copies by the host itself, through a mapping: done as soon as started.
#[derive(Debug)]
struct MappedCopier {
    next: u64,
}

impl Copier for MappedCopier {
    unsafe fn pin(&mut self, _address: u64, _length: u64) -> Result<(), MemoryError> {
        Ok(())
    }

    unsafe fn start(
        &mut self,
        direction: Direction,
        copies: &[Copy],
    ) -> Result<Ticket, MemoryError> {
        for copy in copies {
            let (from, to) = match direction {
                Direction::ToHost => (copy.device, copy.host),
                Direction::ToDevice => (copy.host, copy.device),
            };
            let length = usize::try_from(copy.length).map_err(|_| MemoryError::BadLength {
                length: copy.length,
            })?;
            // SAFETY: the caller's contract: both ranges are mapped (the device's by the memory that this copier is of,
            // which the host can reach), and under no Rust reference.
            unsafe { sys::copy(from, to, length) };
        }
        self.next += 1;
        Ok(Ticket(self.next))
    }

    fn is_done(&mut self, _ticket: Ticket) -> Result<bool, MemoryError> {
        Ok(true)
    }
}

/// Dmabufs, like memory files, tell their size by the place of their end.
fn size_of_file(fd: &OwnedFd) -> io::Result<u64> {
    let mut file = fs::File::from(fd.try_clone()?);
    file.seek(SeekFrom::End(0))
}

/// The exporter's name, from the kernel's notes about the descriptor.
fn exporter_of(fd: &OwnedFd, is_dmabuf: bool) -> String {
    if !is_dmabuf {
        return "memfd".to_owned();
    }
    let notes = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
    let notes = notes.unwrap_or_default();
    let name = notes
        .lines()
        .find_map(|line| line.strip_prefix("exp_name:"));
    name.map_or("unknown", str::trim).to_owned()
}
