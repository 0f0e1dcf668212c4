//! A dmabuf as this process sees it: the mapping through which the software fabrics reach its bytes.
//!
//! A range may begin and end anywhere in its file; what is mapped are the whole pages that hold it. Requests and peers
//! name the range by an I/O virtual address of the caller's choice, so a fabric translates before it touches a byte.
//!
//! # When the caches are told
//!
//! The kernel wants every access of the CPU to a dmabuf between `DMA_BUF_IOCTL_SYNC` start and end (`dma-buf.rst`, "CPU
//! Access to DMA Buffer Objects"). The fabrics do so around each system call that moves bytes, once for each dmabuf it
//! touches: two calls for a train of up to 512 pieces over TCP, not for each page. On hosts with coherent DMA they cost
//! about as much as two empty system calls. A longer bracket would be cheaper, but its end is when the exporter's device
//! may look, and that is when a peer learns that its write has been placed. A file that is no dmabuf (a memory file)
//! answers `ENOTTY` when it is mapped and is not asked again.
//!
//! A mapping may be shared by threads. Its owner drops it only when nothing can touch it any more.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use super::{DmabufRange, FabricErrorKind};

/// `_IOW('b', 0, struct dma_buf_sync)` of `linux/dma-buf.h`.
const DMA_BUF_IOCTL_SYNC: libc::c_ulong = 1 << 30 | 8 << 16 | (b'b' as libc::c_ulong) << 8;
const DMA_BUF_SYNC_READ: u64 = 1;
const DMA_BUF_SYNC_WRITE: u64 = 2;
const DMA_BUF_SYNC_END: u64 = 4;

/// Which way the CPU is about to access a dmabuf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    Read,
    Write,
}

impl Touch {
    fn flag(self) -> u64 {
        match self {
            Self::Read => DMA_BUF_SYNC_READ,
            Self::Write => DMA_BUF_SYNC_WRITE,
        }
    }
}

/// A mapped range of a dmabuf.
#[derive(Debug)]
pub(super) struct Mapping {
    /// The first mapped page.
    base: usize,
    mapped: usize,
    /// The range's first byte.
    first: u64,
    /// For the brackets; nothing if the file wants none.
    fd: Option<OwnedFd>,
}

/// Why a range cannot be mapped, and what can be done about it.
pub(super) type Refusal = (FabricErrorKind, Option<&'static str>);

impl Mapping {
    /// Maps `range`, for writing too if `write`.
    pub(super) fn new(range: &DmabufRange<'_>, write: bool) -> Result<Self, Refusal> {
        let refuse = |what: String| (FabricErrorKind::Memory(what), None);
        if range.length == 0 || range.address.checked_add(range.length).is_none() {
            let what = format!("{} bytes at {:#x}", range.length, range.address);
            return Err(refuse(format!("{what} are no range")));
        }
        let size = file_size(range.fd).map_err(|error| (os(&error), None))?;
        let end = range.offset.checked_add(range.length);
        if end.is_none_or(|end| end > size) {
            let (offset, length) = (range.offset, range.length);
            return Err(refuse(format!(
                "bytes {offset}..+{length} are outside of a dmabuf of {size} bytes"
            )));
        }
        let lead = range.offset % page_size();
        let too_long = |_| refuse(format!("{} bytes cannot be mapped", range.length));
        let mapped = usize::try_from(lead + range.length).map_err(too_long)?;
        let start = libc::off_t::try_from(range.offset - lead).map_err(too_long)?;
        let protection = match write {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                protection,
                libc::MAP_SHARED,
                range.fd.as_raw_fd(),
                start,
            )
        };
        if base == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            let hint = match error.raw_os_error() {
                Some(libc::EACCES) => "export the dmabuf for reading and writing",
                _ => {
                    "the exporter lets no process map this dmabuf: only a device can reach it directly"
                }
            };
            return Err((os(&error), Some(hint)));
        }
        let mut mapping = Self {
            base: base.expose_provenance(),
            mapped,
            first: base.expose_provenance() as u64 + lead,
            fd: None,
        };
        match sync(range.fd.as_raw_fd(), DMA_BUF_SYNC_READ) {
            Ok(()) => {
                let fd = range.fd.try_clone_to_owned();
                mapping.fd = Some(fd.map_err(|error| (os(&error), None))?);
                let ended = mapping.end(Touch::Read);
                ended.map_err(|error| (os(&error), None))?;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
            Err(error) => return Err((os(&error), None)),
        }
        Ok(mapping)
    }

    /// Where the range's first byte is in this process.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Whether the exporter wants to be told of accesses.
    pub(super) fn is_bracketed(&self) -> bool {
        self.fd.is_some()
    }

    /// Tells the exporter that the CPU is about to access the range.
    pub(super) fn begin(&self, touch: Touch) -> io::Result<()> {
        self.fd
            .as_ref()
            .map_or(Ok(()), |fd| sync(fd.as_raw_fd(), touch.flag()))
    }

    /// Tells the exporter that the CPU has done so.
    pub(super) fn end(&self, touch: Touch) -> io::Result<()> {
        self.fd.as_ref().map_or(Ok(()), |fd| {
            sync(fd.as_raw_fd(), touch.flag() | DMA_BUF_SYNC_END)
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let base = std::ptr::with_exposed_provenance_mut(self.base);
        // SAFETY: exactly what `new` mapped, unmapped once. Whoever holds a translated address holds the mapping.
        let result = unsafe { libc::munmap(base, self.mapped) };
        debug_assert_eq!(result, 0, "munmap of our own mapping");
    }
}

/// The dmabufs that a system call touches. Holding them keeps their memory mapped.
#[derive(Debug, Default)]
pub(super) struct Brackets(Vec<Arc<Mapping>>);

impl Brackets {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn add(&mut self, mapping: Option<&Arc<Mapping>>) {
        let Some(mapping) = mapping else { return };
        if !self.0.iter().rev().any(|held| Arc::ptr_eq(held, mapping)) {
            self.0.push(Arc::clone(mapping));
        }
    }

    /// Calls `access` between the start and the end of the CPU's access to all of them.
    ///
    /// # Errors
    ///
    /// An exporter refused. Before the call: nothing has been accessed. After it: the bytes may not be where the
    /// exporter's device sees them.
    pub(super) fn around<R>(&self, touch: Touch, access: impl FnOnce() -> R) -> io::Result<R> {
        let mut begun = 0;
        let mut outcome = Ok(());
        for mapping in &self.0 {
            outcome = mapping.begin(touch);
            if outcome.is_err() {
                break;
            }
            begun += 1;
        }
        let result = outcome.is_ok().then(access);
        for mapping in self.0.iter().take(begun) {
            outcome = outcome.and(mapping.end(touch));
        }
        // There is a result whenever nothing was refused before.
        outcome.and_then(|()| result.ok_or_else(|| io::ErrorKind::Other.into()))
    }
}

/// The size of a page.
pub(super) fn page_size() -> u64 {
    // SAFETY: no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|&n| n > 0).unwrap_or(4096)
}

fn os(error: &io::Error) -> FabricErrorKind {
    FabricErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO))
}

fn file_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the descriptor is open and the struct has room.
    if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zero is valid, and the call has filled it in.
    let size = unsafe { stat.assume_init() }.st_size;
    if size > 0 {
        return Ok(size as u64);
    }
    // Kernels before 4.17 say the size of a dmabuf only this way, which does not move its position.
    // SAFETY: no pointers.
    let end = unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

fn sync(fd: RawFd, flags: u64) -> io::Result<()> {
    loop {
        // SAFETY: `struct dma_buf_sync` is one 64-bit word, which the kernel reads.
        if unsafe { libc::ioctl(fd, DMA_BUF_IOCTL_SYNC as _, &raw const flags) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{
            fd::{AsFd, FromRawFd},
            unix::fs::FileExt,
        },
    };

    use super::*;

    fn memory_file(size: u64) -> File {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"kvpush-mapping".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a fresh descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).unwrap();
        file
    }

    fn map(file: &impl AsFd, offset: u64, length: u64) -> Result<Mapping, Refusal> {
        let range = DmabufRange {
            fd: file.as_fd(),
            offset,
            length,
            address: 0xdead_beef_0000,
        };
        Mapping::new(&range, true)
    }

    #[test]
    fn a_range_begins_anywhere_in_its_file() {
        let file = memory_file(5 * 4096);
        for offset in [0, 1, 4095, 4096, 4097, 8191, 12288] {
            let mapping = map(&file, offset, 100).unwrap();
            file.write_all_at(&[7; 100], offset).unwrap();
            let from = std::ptr::with_exposed_provenance::<u8>(mapping.first() as usize);
            // SAFETY: 100 bytes are mapped there, which nobody writes now.
            let seen = unsafe { std::slice::from_raw_parts(from, 100) }.to_vec();
            assert_eq!(seen, [7; 100], "at {offset}");
            file.write_all_at(&[0; 100], offset).unwrap();
        }
    }

    #[test]
    fn ranges_beyond_the_file_are_refused() {
        let file = memory_file(8192);
        for (offset, length) in [(0, 8193), (8192, 1), (u64::MAX, 2), (1, u64::MAX), (0, 0)] {
            let (kind, _) = map(&file, offset, length).expect_err("outside of the file");
            assert!(matches!(kind, FabricErrorKind::Memory(_)), "{kind}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_mapped_says_so() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(map(&reader, 0, 4096).is_err());
    }
}
