//! The system calls of the TCP fabric. All of its `unsafe` that touches the operating system is here.

use std::{io, os::fd::RawFd, time::Duration};

use super::super::software::{IOV_MAX, Iov};

/// Reads into `pieces` in order; 0 is the end of the stream.
///
/// # Safety
///
/// The pieces must be memory that may be overwritten now: registered memory, or buffers the caller owns exclusively.
pub(super) unsafe fn read_vectored(fd: RawFd, pieces: &[Iov]) -> io::Result<usize> {
    let count = pieces.len().min(IOV_MAX) as libc::c_int;
    // SAFETY: `pieces` has the layout of an iovec array (asserted above) of at least `count` entries, and the caller
    // promises that they may be written. The kernel checks the mapping (EFAULT).
    let n = unsafe { libc::readv(fd, pieces.as_ptr().cast(), count) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Sends `pieces` in order, without SIGPIPE.
pub(super) fn send_vectored(fd: RawFd, pieces: &[Iov]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is valid; its pointers are set below.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut().cast();
    message.msg_iovlen = pieces.len().min(IOV_MAX) as _;
    // SAFETY: `message` names an iovec array (layout asserted above) that lives through the call and is not written.
    // The kernel only reads the pieces and checks their mapping (EFAULT).
    let n = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Copies `destination.len()` bytes from `address`.
///
/// # Safety
///
/// `[address, address + destination.len())` must be mapped and readable.
pub(super) unsafe fn copy_from(address: u64, destination: &mut [u8]) {
    // SAFETY: the caller promises the source; the destination is an exclusive slice that the source cannot overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::with_exposed_provenance::<u8>(address as usize),
            destination.as_mut_ptr(),
            destination.len(),
        );
    }
}

fn set_option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option value is an int of the size given.
    let rc = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Buffer sizes (0 leaves the kernel's tuning on), no Nagle delay, and loss of the peer noticed within about
/// `peer_timeout`, whether data is in flight (`TCP_USER_TIMEOUT`) or not (keep-alive); see `tcp(7)`.
pub(super) fn tune_socket(
    fd: RawFd,
    send_buffer: u32,
    receive_buffer: u32,
    peer_timeout: Duration,
) -> io::Result<()> {
    let clamp = |value: u128| i32::try_from(value).unwrap_or(i32::MAX);
    let seconds = clamp(u128::from(peer_timeout.as_secs())).max(1);
    if send_buffer > 0 {
        set_option(
            fd,
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            clamp(send_buffer.into()),
        )?;
    }
    if receive_buffer > 0 {
        set_option(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            clamp(receive_buffer.into()),
        )?;
    }
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    let millis = clamp(peer_timeout.as_millis()).max(1);
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, millis)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(
        fd,
        libc::IPPROTO_TCP,
        libc::TCP_KEEPIDLE,
        (seconds / 2).max(1),
    )?;
    set_option(
        fd,
        libc::IPPROTO_TCP,
        libc::TCP_KEEPINTVL,
        (seconds / 4).max(1),
    )?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 2)
}
