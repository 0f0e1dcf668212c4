//! The memory of one region, of whatever kind: what the tool itself does with its bytes.

use std::sync::Arc;

use kvpush::memory::{
    CudaMemory, DmabufMemory, HipMemory, HostMemory, Memory, MemoryError, dmabuf::Udmabuf,
};

use crate::{
    cli::{MemoryChoice, MemoryKind},
    error::{Error, Result},
};

/// Bytes copied at a time where memory can only be copied.
const PIECE: u64 = 1 << 20;

/// The memory of one region.
#[derive(Clone, Debug)]
pub(crate) enum Block {
    Host(Arc<HostMemory>),
    Dmabuf(Arc<DmabufMemory>),
    Hip(Arc<HipMemory>),
    Cuda(Arc<CudaMemory>),
}

impl Block {
    /// Allocates `length` bytes of the kind that was asked for, or says what to do.
    pub(crate) fn allocate(choice: MemoryChoice, length: u64) -> Result<Self> {
        let made = match choice.kind {
            MemoryKind::Host => HostMemory::new(length).map(|made| Self::Host(Arc::new(made))),
            MemoryKind::Memfd => {
                HostMemory::memfd("kvpush-bench", length).map(|made| Self::Host(Arc::new(made)))
            }
            MemoryKind::Udmabuf => udmabuf(length).map(|made| Self::Dmabuf(Arc::new(made))),
            MemoryKind::Hip => {
                HipMemory::new(choice.device, length).map(|made| Self::Hip(Arc::new(made)))
            }
            MemoryKind::Cuda => {
                CudaMemory::new(choice.device, length).map(|made| Self::Cuda(Arc::new(made)))
            }
        };
        made.map_err(|error| {
            let next = match choice.kind {
                MemoryKind::Host | MemoryKind::Memfd => "take fewer --pages, --requests or --layers",
                MemoryKind::Udmabuf => {
                    "`kvpush-bench devices` says what this host has; --memory host needs nothing"
                }
                MemoryKind::Hip | MemoryKind::Cuda => {
                    "`kvpush-bench devices` lists the GPUs and what is missing; --memory host needs none"
                }
            };
            Error::failed(format!("--memory {choice}: {error}\n  next: {next}"))
        })
    }

    /// For registration.
    pub(crate) fn memory(&self) -> Arc<dyn Memory> {
        match self {
            Self::Host(memory) => Arc::clone(memory) as _,
            Self::Dmabuf(memory) => Arc::clone(memory) as _,
            Self::Hip(memory) => Arc::clone(memory) as _,
            Self::Cuda(memory) => Arc::clone(memory) as _,
        }
    }

    pub(crate) fn length(&self) -> u64 {
        match self {
            Self::Host(memory) => memory.length(),
            Self::Dmabuf(memory) => memory.length(),
            Self::Hip(memory) => memory.length(),
            Self::Cuda(memory) => memory.length(),
        }
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        match self {
            Self::Host(memory) => memory.read(offset, out),
            Self::Dmabuf(memory) => memory.read(offset, out),
            Self::Hip(memory) => memory.read(offset, out),
            Self::Cuda(memory) => memory.read(offset, out),
        }
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        match self {
            Self::Host(memory) => memory.write(offset, bytes),
            Self::Dmabuf(memory) => memory.write(offset, bytes),
            Self::Hip(memory) => memory.write(offset, bytes),
            Self::Cuda(memory) => memory.write(offset, bytes),
        }
    }

    /// Gives every byte the same value.
    pub(crate) fn fill(&self, byte: u8) -> Result<(), MemoryError> {
        let length = self.length();
        let piece = vec![byte; PIECE.min(length) as usize];
        let mut at = 0;
        while at < length {
            let count = PIECE.min(length - at);
            self.write(at, piece.get(..count as usize).unwrap_or(&piece))?;
            at += count;
        }
        Ok(())
    }
}

/// A region of its own dmabuf; whole pages are exported, and no more than the region is used.
fn udmabuf(length: u64) -> Result<DmabufMemory, MemoryError> {
    Udmabuf::new(length)?.memory()?.part(0, length)
}
