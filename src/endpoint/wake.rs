//! Waking the driver thread, at the cost of a system call only when it sleeps. Who must call whom is decided in
//! [`super::sleep`], where the argument is.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use super::sleep::Sleep;

/// Wakes the driver. Any thread may call.
#[derive(Clone, Debug)]
pub(crate) struct WakeHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    sleep: Sleep,
    event: OwnedFd,
}

impl WakeHandle {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain system call; the flags are valid.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and belongs to nobody else.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(Arc::new(Inner {
            sleep: Sleep::new(),
            event,
        })))
    }

    /// Wakes the driver if it sleeps or is about to. Call after the work has been made visible.
    pub(crate) fn wake(&self) {
        if self.0.sleep.wake() {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight readable bytes and a descriptor we own. The only failure is a counter that is full, and
            // then the driver has a wake-up waiting anyway.
            unsafe { libc::write(self.0.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }

    /// The driver is about to sleep: from here on [`WakeHandle::wake`] reaches it. It must look for work once more
    /// before it sleeps.
    pub(crate) fn announce_sleep(&self) {
        self.0.sleep.announce();
    }

    /// The driver is awake.
    pub(crate) fn awake(&self) {
        if self.0.sleep.awake() {
            let mut count = [0u8; 8];
            // SAFETY: eight writable bytes and a descriptor we own, which does not block.
            unsafe {
                libc::read(
                    self.0.event.as_raw_fd(),
                    count.as_mut_ptr().cast(),
                    count.len(),
                )
            };
        }
    }

    /// Readable when the driver has been woken.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}
