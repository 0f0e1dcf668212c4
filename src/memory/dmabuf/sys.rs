//! The kernel's interface to dmabufs: all unsafe code about them is here.
//!
//! Structures and numbers are those of the kernel's `include/uapi/linux/dma-buf.h`, `dma-heap.h` and `udmabuf.h`. Any
//! thread may call.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::{self, NonNull},
};

/// `struct dma_buf_sync`.
#[repr(C)]
struct DmaBufSync {
    flags: u64,
}

/// `struct udmabuf_create`.
#[repr(C)]
struct UdmabufCreate {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// `struct dma_heap_allocation_data`.
#[repr(C)]
struct DmaHeapAllocation {
    len: u64,
    fd: u32,
    fd_flags: u32,
    heap_flags: u64,
}

/// `_IOW` of `asm-generic/ioctl.h`: direction, size, type, number.
const fn write_ioctl<T>(kind: u8, number: u8) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | (kind as u64) << 8 | number as u64
}

/// `_IOWR`.
const fn read_write_ioctl<T>(kind: u8, number: u8) -> u64 {
    2 << 30 | write_ioctl::<T>(kind, number)
}

const DMA_BUF_IOCTL_SYNC: u64 = write_ioctl::<DmaBufSync>(b'b', 0);
const UDMABUF_CREATE: u64 = write_ioctl::<UdmabufCreate>(b'u', 0x42);
const DMA_HEAP_IOCTL_ALLOC: u64 = read_write_ioctl::<DmaHeapAllocation>(b'H', 0);
const UDMABUF_FLAGS_CLOEXEC: u32 = 1;
const DMA_BUF_SYNC_RW: u64 = 3;
const DMA_BUF_SYNC_END: u64 = 4;

/// `ioctl(2)`, again when a signal interrupts it.
///
/// # Safety
///
/// `request` must be one that takes a pointer to a `T`, and reads or writes no more than that.
unsafe fn ioctl<T>(fd: RawFd, request: u64, argument: &mut T) -> io::Result<i32> {
    loop {
        // SAFETY: the caller's contract; `argument` is a live exclusive reference for the whole call.
        let result = unsafe { libc::ioctl(fd, request as _, ptr::from_mut(argument)) };
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes a dmabuf of the first `size` bytes of a memory file.
pub(super) fn udmabuf_create(
    device: &File,
    memfd: BorrowedFd<'_>,
    size: u64,
) -> io::Result<OwnedFd> {
    let mut create = UdmabufCreate {
        memfd: memfd.as_raw_fd() as u32,
        flags: UDMABUF_FLAGS_CLOEXEC,
        offset: 0,
        size,
    };
    // SAFETY: UDMABUF_CREATE takes a `struct udmabuf_create`, which this is.
    let fd = unsafe { ioctl(device.as_raw_fd(), UDMABUF_CREATE, &mut create) }?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Allocates a dmabuf of `length` bytes from a heap.
pub(super) fn heap_allocate(heap: &File, length: u64) -> io::Result<OwnedFd> {
    let mut allocation = DmaHeapAllocation {
        len: length,
        fd: 0,
        fd_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
        heap_flags: 0,
    };
    // SAFETY: DMA_HEAP_IOCTL_ALLOC takes a `struct dma_heap_allocation_data`, which this is.
    unsafe { ioctl(heap.as_raw_fd(), DMA_HEAP_IOCTL_ALLOC, &mut allocation) }?;
    // SAFETY: on success the kernel has put a new descriptor into `fd`.
    Ok(unsafe { OwnedFd::from_raw_fd(allocation.fd as RawFd) })
}

/// Begins or ends an access of the host through a mapping, for reading and writing.
pub(super) fn sync(fd: BorrowedFd<'_>, end: bool) -> io::Result<()> {
    let flags = DMA_BUF_SYNC_RW | if end { DMA_BUF_SYNC_END } else { 0 };
    let mut sync = DmaBufSync { flags };
    // SAFETY: DMA_BUF_IOCTL_SYNC takes a `struct dma_buf_sync`, which this is.
    unsafe { ioctl(fd.as_raw_fd(), DMA_BUF_IOCTL_SYNC, &mut sync) }.map(|_| ())
}

/// Whether a file is a dmabuf: those, and no others, know `DMA_BUF_IOCTL_SYNC`, and refuse flags that do not exist.
pub(super) fn is_dmabuf(fd: BorrowedFd<'_>) -> bool {
    let mut sync = DmaBufSync { flags: u64::MAX };
    // SAFETY: as in `sync`.
    let refused = unsafe { ioctl(fd.as_raw_fd(), DMA_BUF_IOCTL_SYNC, &mut sync) };
    matches!(refused, Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

/// Whether a file is a memory file that can never shrink.
pub(super) fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: a plain system call on an open descriptor; it touches no memory of ours.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Address space that is ours until dropped: a piece of a file, or nothing.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the range belongs to this value, and is reached only through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no reference to the bytes is ever made.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes from `offset`, which is a multiple of the page size, for reading and writing.
    pub(super) fn of_file(fd: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        Self::map(length, access, libc::MAP_SHARED, fd.as_raw_fd(), offset)
    }

    /// Takes `length` bytes of address space that nothing can read or write.
    pub(super) fn reserved(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(length, libc::PROT_NONE, flags, -1, 0)
    }

    fn map(
        length: usize,
        access: i32,
        flags: i32,
        fd: RawFd,
        offset: libc::off_t,
    ) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is touched.
        let base = unsafe { libc::mmap(ptr::null_mut(), length, access, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, length })
    }

    /// Its first address.
    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Copies bytes out.
    ///
    /// # Safety
    ///
    /// The mapping is one [of a file](Mapping::of_file), and the range lies in it.
    pub(super) unsafe fn read(&self, at: usize, out: &mut [u8]) {
        debug_assert!(at + out.len() <= self.length);
        // SAFETY: the caller's contract; `out` is a Rust slice, so it is outside of the mapping.
        unsafe { ptr::copy(self.base.as_ptr().add(at), out.as_mut_ptr(), out.len()) };
    }

    /// Copies bytes in.
    ///
    /// # Safety
    ///
    /// As for [`Mapping::read`].
    pub(super) unsafe fn write(&self, at: usize, bytes: &[u8]) {
        debug_assert!(at + bytes.len() <= self.length);
        // SAFETY: as in `read`.
        unsafe { ptr::copy(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) };
    }

    /// Sets bytes.
    ///
    /// # Safety
    ///
    /// As for [`Mapping::read`].
    pub(super) unsafe fn fill(&self, at: usize, length: usize, byte: u8) {
        debug_assert!(at + length <= self.length);
        // SAFETY: the caller's contract.
        unsafe { ptr::write_bytes(self.base.as_ptr().add(at), byte, length) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `map` mapped, unmapped once.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert_eq!(result, 0, "munmap of our own mapping");
    }
}

/// Copies between two ranges of this process.
///
/// # Safety
///
/// Both must be mapped, readable and writable, and under no Rust reference.
pub(super) unsafe fn copy(from: u64, to: u64, length: usize) {
    let (from, to) = (
        ptr::with_exposed_provenance::<u8>(from as usize),
        ptr::with_exposed_provenance_mut::<u8>(to as usize),
    );
    // SAFETY: the caller's contract.
    unsafe { ptr::copy(from, to, length) };
}

/// Bytes of a page.
pub(super) fn page_size() -> u64 {
    // SAFETY: sysconf(3) touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // As a C compiler makes them of the kernel's headers on x86_64 and aarch64.
        assert_eq!(DMA_BUF_IOCTL_SYNC, 0x4008_6200);
        assert_eq!(UDMABUF_CREATE, 0x4018_7542);
        assert_eq!(DMA_HEAP_IOCTL_ALLOC, 0xc018_4800);
    }
}
