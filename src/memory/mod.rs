//! What NICs may touch: memory that stays where it is while it is registered.
//!
//! A peer writes registered memory at any moment, without this process taking part. So the library never makes a Rust
//! reference to it; bytes go in and out by copies through raw pointers, and an arrival that has completed is what says
//! that a range is at rest.

mod device;
pub mod dmabuf;
mod error;
pub mod gpu;
mod host;
#[cfg(test)]
pub(crate) mod testing;

pub use device::{
    BadPciAddress, Copier, Copy, DeviceMemory, Direction, Dmabuf, PciAddress, Span, Ticket,
    Visibility,
};
pub use dmabuf::{DmabufError, DmabufMemory};
pub use error::MemoryError;
pub use gpu::{CudaMemory, HipMemory};
pub use host::{HostMemory, HugePages};

use std::os::fd::BorrowedFd;

/// The kind of a piece of memory, for people and for choosing how to register it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Anonymous host memory of ordinary pages.
    Host,
    /// Host memory of huge pages of this many bytes.
    HugePages(u64),
    /// A memory file, which another process can map.
    Memfd,
    /// Host memory that the caller owns.
    Borrowed,
    /// Memory of the AMD GPU with this number in HIP.
    Hip(u32),
    /// Memory of the NVIDIA GPU with this number in CUDA.
    Cuda(u32),
    /// A range of a dmabuf.
    Dmabuf,
}

/// A range of memory that can be registered with NICs.
///
/// # Safety
///
/// The range `[address, address + length)` must stay mapped, readable and writable, at the same place, until the value
/// is dropped, and nobody may hold a Rust reference into it while it is registered.
pub unsafe trait Memory: Send + Sync + std::fmt::Debug {
    /// Address of the first byte.
    fn address(&self) -> u64;

    /// Bytes.
    fn length(&self) -> u64;

    /// What kind it is.
    fn kind(&self) -> MemoryKind;

    /// The file that it is a shared mapping of, and where in the file it begins, if another process may map it too.
    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// Tells apart what has been at the same address at different times, where memory can be freed and allocated again
    /// without this value noticing: an allocation's number in its runtime. A registration is shared only between values
    /// of one generation.
    fn generation(&self) -> u64 {
        0
    }

    /// What it can do beyond being addresses, if it lives on a device. Host memory has nothing.
    fn device(&self) -> Option<&dyn DeviceMemory> {
        None
    }
}
