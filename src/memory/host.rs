//! Host memory: ordinary pages, huge pages, memory files, or the caller's own.
//!
//! Any thread may call. Copies in and out may race with a peer's write; what is read then is unspecified bytes, never
//! undefined behaviour of this process, because no reference is made and the copies are volatile-free byte copies of
//! memory that the compiler knows nothing about (it came from `mmap` or the caller).

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
};

use super::{Memory, MemoryError, MemoryKind};

/// A size of huge page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePages {
    /// Bytes of one page.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// A range of host memory, zeroed when it is allocated here.
///
/// ```
/// # fn main() -> Result<(), kvpush::memory::MemoryError> {
/// let memory = kvpush::memory::HostMemory::new(1 << 20)?;
/// memory.write(4096, b"page")?;
/// let mut bytes = [0; 4];
/// memory.read(4096, &mut bytes)?;
/// assert_eq!(&bytes, b"page");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct HostMemory {
    base: NonNull<u8>,
    length: usize,
    /// Bytes mapped, 0 when the caller owns the memory.
    mapped: usize,
    kind: MemoryKind,
    fd: Option<OwnedFd>,
}

// SAFETY: the mapping is owned by this value (or promised by the caller of `from_raw`) and reached only through raw
// byte copies; nothing in it is tied to a thread.
unsafe impl Send for HostMemory {}
// SAFETY: as for Send; shared access goes through raw copies, for which no Rust aliasing rule is at stake.
unsafe impl Sync for HostMemory {}

// SAFETY: the mapping lives and stays in place until drop, and no reference into it is ever handed out.
unsafe impl Memory for HostMemory {
    fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn length(&self) -> u64 {
        self.length as u64
    }

    fn kind(&self) -> MemoryKind {
        self.kind
    }

    fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.fd().map(|fd| (fd, 0))
    }
}

impl HostMemory {
    /// Allocates `length` bytes of ordinary pages.
    pub fn new(length: u64) -> Result<Self, MemoryError> {
        Self::map(
            length,
            0,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
            MemoryKind::Host,
        )
    }

    /// Allocates `length` bytes, rounded up to whole huge pages. Fails if the host has too few reserved.
    pub fn huge(length: u64, pages: HugePages) -> Result<Self, MemoryError> {
        let size = match pages {
            HugePages::Size2M => libc::MAP_HUGE_2MB,
            HugePages::Size1G => libc::MAP_HUGE_1GB,
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size;
        Self::map(
            length,
            pages.bytes(),
            flags,
            None,
            MemoryKind::HugePages(pages.bytes()),
        )
    }

    /// Allocates `length` bytes in a memory file (`memfd_create(2)`), which another process may map. Its size is sealed,
    /// because whoever has the file could otherwise cut off what is mapped here. Peers on the same host copy from such
    /// memory at the speed of `memcpy`, and need no permission to read this process's memory.
    pub fn memfd(name: &str, length: u64) -> Result<Self, MemoryError> {
        let fail = |operation| MemoryError::Os {
            operation,
            length,
            source: io::Error::last_os_error(),
            hint: None,
        };
        let name = CString::new(name.replace('\0', "")).unwrap_or_default();
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd = unsafe {
            libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(fail("memfd_create"));
        }
        // SAFETY: the descriptor was just created and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(length).map_err(|_| MemoryError::BadLength { length })?;
        // SAFETY: plain system call on a descriptor we own.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } != 0 {
            return Err(fail("ftruncate"));
        }
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: plain system call on a descriptor we own.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(fail("F_ADD_SEALS"));
        }
        Self::map(length, 0, libc::MAP_SHARED, Some(fd), MemoryKind::Memfd)
    }

    /// Wraps memory of the caller.
    ///
    /// # Safety
    ///
    /// `[base, base + length)` must be mapped, readable and writable until the value and everything it was registered
    /// with have been dropped, and the caller must not hold references into it while peers may write it.
    pub unsafe fn from_raw(base: NonNull<u8>, length: u64) -> Result<Self, MemoryError> {
        let bad = || MemoryError::BadLength { length };
        let bytes = usize::try_from(length)
            .ok()
            .filter(|&n| n > 0)
            .ok_or_else(bad)?;
        (base.as_ptr() as usize)
            .checked_add(bytes)
            .ok_or_else(bad)?;
        Ok(Self {
            base,
            length: bytes,
            mapped: 0,
            kind: MemoryKind::Borrowed,
            fd: None,
        })
    }

    /// The memory file, for memory made by [`HostMemory::memfd`].
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// The first byte. Reading through it races with peers that may write; see the module's documentation.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, out.len())?;
        // SAFETY: `at` checked the range against the live mapping; `out` is a Rust slice outside of it.
        unsafe { ptr::copy(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: as in `read`.
        unsafe { ptr::copy(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Sets `length` bytes from `offset` to `byte`.
    pub fn fill(&self, offset: u64, length: u64, byte: u8) -> Result<(), MemoryError> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        let to = self.at(offset, count)?;
        // SAFETY: `at` checked the range against the live mapping.
        unsafe { ptr::write_bytes(to, byte, count) };
        Ok(())
    }

    fn at(&self, offset: u64, length: usize) -> Result<*mut u8, MemoryError> {
        let error = || MemoryError::OutOfRange {
            offset,
            length: length as u64,
            capacity: self.length as u64,
        };
        let start = usize::try_from(offset).map_err(|_| error())?;
        match start.checked_add(length) {
            Some(end) if end <= self.length => Ok(self.base.as_ptr().wrapping_add(start)),
            _ => Err(error()),
        }
    }

    fn map(
        length: u64,
        granule: u64,
        flags: libc::c_int,
        fd: Option<OwnedFd>,
        kind: MemoryKind,
    ) -> Result<Self, MemoryError> {
        let bad = || MemoryError::BadLength { length };
        let rounded = length
            .checked_next_multiple_of(granule.max(1))
            .ok_or_else(bad)?;
        let mapped = usize::try_from(rounded)
            .ok()
            .filter(|&n| n > 0 && n < isize::MAX as usize)
            .ok_or_else(bad)?;
        let raw_fd = fd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                raw_fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let hint = matches!(kind, MemoryKind::HugePages(_)).then_some(
                "reserve huge pages: sysctl vm.nr_hugepages, or hugepagesz=1G hugepages=N at boot",
            );
            return Err(MemoryError::Os {
                operation: "mmap",
                length,
                source: io::Error::last_os_error(),
                hint,
            });
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(bad)?;
        Ok(Self {
            base,
            length: length as usize,
            mapped,
            kind,
            fd,
        })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.mapped > 0 {
            // SAFETY: exactly the range that `map` mapped, unmapped once. Registrations hold the value in an `Arc`, so
            // none is left.
            let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped) };
            debug_assert_eq!(result, 0, "munmap of our own mapping");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_outside_of_the_range_are_refused() {
        let memory = HostMemory::new(100).unwrap();
        assert!(memory.write(96, b"four").is_ok());
        assert!(matches!(
            memory.write(97, b"four"),
            Err(MemoryError::OutOfRange { offset: 97, .. })
        ));
        assert!(matches!(
            memory.read(u64::MAX, &mut [0]),
            Err(MemoryError::OutOfRange { .. })
        ));
        assert!(matches!(
            memory.fill(1, u64::MAX, 0),
            Err(MemoryError::OutOfRange { .. })
        ));
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for length in [0, u64::MAX, 1 << 63] {
            assert!(HostMemory::new(length).is_err());
        }
        assert!(HostMemory::huge(u64::MAX - 5, HugePages::Size2M).is_err());
    }

    #[test]
    fn a_memory_file_is_what_its_descriptor_shows() {
        let memory = HostMemory::memfd("kvpush-test", 8192).unwrap();
        memory.write(5000, b"seen").unwrap();
        let file = std::fs::File::from(memory.fd().unwrap().try_clone_to_owned().unwrap());
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 5000).unwrap();
        assert_eq!(&bytes, b"seen");
        assert!(file.set_len(4096).is_err(), "it can be cut off");
    }
}
