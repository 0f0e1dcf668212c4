//! The system calls of the shared-memory fabric. With `ring.rs`, the only unsafe code of it.
//!
//! Sockets are Unix sockets of the kind that keeps messages apart (`SOCK_SEQPACKET`), with names in the abstract name
//! space: they leave nothing behind, and only processes of one network name space of one host reach each other.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::{self, NonNull},
};

use super::super::software::{IOV_MAX, Iov};

/// `SO_PEERPIDFD` of Linux 6.5 (`asm-generic/socket.h`, which x86, Arm and RISC-V use).
const SO_PEERPIDFD: libc::c_int = 77;

/// Seals of the lanes' own memory: its size stays, and nobody but the mapping that exists can write it
/// (`F_SEAL_FUTURE_WRITE`, Linux 5.1).
pub(super) const RING_SEALS: libc::c_int =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;

const F_SEAL_FUTURE_WRITE: libc::c_int = 0x10;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes over a descriptor that a system call has just returned.
fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new memory file of `length` zero bytes that can be sealed.
pub(super) fn memory_file(length: usize) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a NUL-terminated name.
    let fd = owned(unsafe { libc::memfd_create(c"kvpush-lane".as_ptr(), flags) })?;
    let length = libc::off_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: no pointers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), length) })?;
    Ok(fd)
}

/// Adds seals (`fcntl(2)`, "File Sealing").
pub(super) fn seal(fd: BorrowedFd<'_>, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(|_| ())
}

/// What a file must be so that mapping it cannot harm the one who maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileFacts {
    /// Device and inode: the file's identity on this host.
    pub(super) identity: (u64, u64),
    pub(super) length: u64,
}

/// Looks at a file, which may come from somebody who is not trusted. `None` if it is none that can be mapped safely:
/// a memory file whose size can shrink (or another kind of file) would kill whoever reads beyond its end (`SIGBUS`).
///
/// Seals are asked for first, because they exist only for memory files, and asking never waits for a file server.
pub(super) fn facts(fd: BorrowedFd<'_>) -> io::Result<Option<FileFacts>> {
    // SAFETY: no pointers.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        if !is_dmabuf(fd) {
            return Ok(None);
        }
    } else if seals & libc::F_SEAL_SHRINK == 0 {
        return Ok(None);
    } else {
        // Huge pages can be missing when they are first touched, which is a SIGBUS, too.
        // SAFETY: all zeros is a valid statfs, and the kernel fills it in.
        let kind = unsafe {
            let mut kind: libc::statfs = std::mem::zeroed();
            check(libc::fstatfs(fd.as_raw_fd(), &raw mut kind))?;
            kind.f_type
        };
        if kind as u64 != libc::TMPFS_MAGIC as u64 {
            return Ok(None);
        }
    }
    // SAFETY: all zeros is a valid stat, and the kernel fills it in.
    let stat = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        check(libc::fstat(fd.as_raw_fd(), &raw mut stat))?;
        stat
    };
    let mut length = u64::try_from(stat.st_size).unwrap_or(0);
    if seals < 0 && length == 0 {
        // A dmabuf tells its size only so (`dma-buf.c`, `dma_buf_llseek`).
        // SAFETY: no pointers.
        let end = unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) };
        length = u64::try_from(end).unwrap_or(0);
    }
    Ok(Some(FileFacts {
        identity: (stat.st_dev, stat.st_ino),
        length,
    }))
}

/// Whether it is a dmabuf, whose size is fixed. By the name that the kernel gives it, which asks no file system.
fn is_dmabuf(fd: BorrowedFd<'_>) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.is_ok_and(|name| {
        let name = name.to_string_lossy();
        name.starts_with("/dmabuf:") || name == "anon_inode:dmabuf"
    })
}

/// The same file, opened for reading only.
pub(super) fn reopen_read_only(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let file = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(file.into())
}

/// A shared mapping of the beginning of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is tied to no thread, and it is accessed only through atomics and raw copies.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes, for writing too if `write` is set.
    pub(super) fn new(fd: BorrowedFd<'_>, length: usize, write: bool) -> io::Result<Self> {
        let protection = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping where the kernel likes; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, length })
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Where `length` bytes from `offset` are, if it has them.
    pub(super) fn at(&self, offset: u64, length: u64) -> Option<u64> {
        let end = offset.checked_add(length)?;
        (end <= self.length as u64).then(|| self.base.as_ptr().expose_provenance() as u64 + offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, once.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert_eq!(result, 0, "munmap of our own mapping");
    }
}

fn abstract_address(name: &[u8]) -> (libc::sockaddr_un, libc::socklen_t) {
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // A name that begins with NUL is abstract (unix(7)).
    let room = address.sun_path.iter_mut().skip(1);
    for (to, from) in room.zip(name) {
        *to = *from as libc::c_char;
    }
    let length = std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
    (address, length as libc::socklen_t)
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    owned(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })
}

/// Listens under the abstract `name`.
pub(super) fn listen(name: &[u8]) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, length) = abstract_address(name);
    // SAFETY: an address of that length, which lives through the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 4096) })?;
    Ok(socket)
}

/// Connects to whoever listens under the abstract `name`. Does not wait: it succeeds or fails at once.
pub(super) fn connect(name: &[u8]) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, length) = abstract_address(name);
    // SAFETY: an address of that length, which lives through the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the peer's address is not asked for.
    owned(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            ptr::null_mut(),
            ptr::null_mut(),
            flags,
        )
    })
}

/// Ends the connection for every process that has the socket.
pub(super) fn shut_down(socket: &OwnedFd) {
    // SAFETY: no pointers. It fails only if the connection has ended.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Room for one descriptor beside a message, aligned as `struct cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([u8; 32]);

const _: () = {
    // SAFETY: arithmetic on a constant.
    let space = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) };
    assert!(space as usize <= size_of::<Control>());
};

/// Sends one message, and a descriptor with it.
pub(super) fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut control = Control([0; 32]);
    let piece = Iov {
        address: bytes.as_ptr().expose_provenance(),
        length: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is valid; its pointers are set below.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = (&raw const piece).cast_mut().cast();
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        message.msg_control = (&raw mut control).cast();
        // SAFETY: the control buffer has room (asserted above) and the alignment of a header, so the first header
        // exists and its data holds one descriptor.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header)
                .cast::<RawFd>()
                .write_unaligned(fd.as_raw_fd());
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the message names buffers that live through the call.
    let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Receives one message into `room` and the descriptor that came with it, if any. 0 bytes is the end.
pub(super) fn receive(socket: &OwnedFd, room: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = Control([0; 32]);
    let piece = Iov {
        address: room.as_mut_ptr().expose_provenance(),
        length: room.len(),
    };
    // SAFETY: an all-zero msghdr is valid; its pointers are set below.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = (&raw const piece).cast_mut().cast();
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    // Room for one descriptor and no more: the kernel drops what does not fit (unix(7)).
    // SAFETY: arithmetic on a constant.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as _;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the message names buffers that live through the call and may be written.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled in the control buffer; the first header, if there is one, lies in it. A header of
    // SCM_RIGHTS whose length says so holds one fresh descriptor that nobody else owns.
    let fd = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let wanted = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        let present = !header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS
            && (*header).cmsg_len as usize >= wanted;
        present.then(|| {
            let fd = libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned();
            OwnedFd::from_raw_fd(fd)
        })
    };
    Ok((n, fd))
}

/// The process at the other end of a socket, held so that its number cannot come to mean another one unnoticed.
#[derive(Debug)]
pub(super) struct Process {
    pid: libc::pid_t,
    handle: OwnedFd,
}

impl Process {
    /// Who connected, or who listens, at the other end. An error if the process cannot be seen from here.
    pub(super) fn at(socket: &OwnedFd) -> io::Result<Self> {
        let mut who = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        option(socket, libc::SO_PEERCRED, &mut who)?;
        if who.pid <= 0 {
            // Of a process name space that this process does not see (pid_namespaces(7)).
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let mut fd: libc::c_int = -1;
        let handle = match option(socket, SO_PEERPIDFD, &mut fd) {
            Ok(()) => owned(fd)?,
            // SAFETY: no pointers.
            Err(_) => owned(unsafe { libc::syscall(libc::SYS_pidfd_open, who.pid, 0) } as i32)?,
        };
        let pid = who.pid;
        Ok(Self { pid, handle })
    }

    /// As if the process that `alive` names had the number `pid`.
    #[cfg(test)]
    pub(super) fn with_number(pid: libc::pid_t, alive: libc::pid_t) -> io::Result<Self> {
        // SAFETY: no pointers.
        let handle = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, alive, 0) } as i32)?;
        Ok(Self { pid, handle })
    }

    /// Whether it runs, rather than having ended. As long as it does, its number is its own.
    pub(super) fn is_alive(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.handle.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // A handle becomes readable when its process ends (pidfd_open(2)).
        // SAFETY: one entry that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
    }

    /// Copies `remote` pieces of the process's memory to `local` ones; the number of bytes copied, which are the
    /// first ones. The caller must ask [`Process::is_alive`] afterwards before it believes the bytes.
    ///
    /// # Safety
    ///
    /// The local pieces must be memory that may be overwritten now: registered memory, or buffers that the caller owns.
    pub(super) unsafe fn read(&self, local: &[Iov], remote: &[Iov]) -> io::Result<usize> {
        // SAFETY: both have the layout of iovec arrays (asserted above); the caller promises the local pieces. The
        // kernel checks both mappings (EFAULT) and the permission (EPERM).
        let n = unsafe {
            libc::process_vm_readv(
                self.pid,
                local.as_ptr().cast(),
                local.len().min(IOV_MAX) as libc::c_ulong,
                remote.as_ptr().cast(),
                remote.len().min(IOV_MAX) as libc::c_ulong,
                0,
            )
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Reads 16 bytes at `address` of the process.
    pub(super) fn peek(&self, address: u64) -> io::Result<[u8; 16]> {
        let mut bytes = [0u8; 16];
        let local = Iov {
            address: bytes.as_mut_ptr().expose_provenance(),
            length: bytes.len(),
        };
        let remote = Iov {
            address: address as usize,
            length: bytes.len(),
        };
        // SAFETY: the local piece is a buffer of this function.
        let n = unsafe { self.read(&[local], &[remote]) }?;
        if n != bytes.len() || !self.is_alive() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(bytes)
    }
}

fn option<T>(socket: &OwnedFd, name: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the callers pass plain structures that any bytes of the kernel fill validly, with their size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            ptr::from_mut(value).cast(),
            &raw mut length,
        )
    };
    check(result).map(|_| ())
}

/// Copies `length` bytes from `source` to `destination`. Done by the C library, which the compiler does not look into:
/// either side may be changed by others meanwhile, and then any mix of bytes arrives.
///
/// # Safety
///
/// Both ranges must be mapped, the destination writable, and they must not overlap.
pub(super) unsafe fn copy(source: u64, destination: u64, length: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        libc::memcpy(
            ptr::with_exposed_provenance_mut(destination as usize),
            ptr::with_exposed_provenance(source as usize),
            length,
        );
    }
}
