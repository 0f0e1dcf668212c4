//! Ctrl-C and SIGTERM: set a flag that every loop of the tool looks at, so that memory is deregistered, peers are told
//! and children end.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::error::{Context, Error, Result};

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    // The only thing done here, and async-signal-safe. A second signal ends the process the ordinary way.
    STOP.store(true, Ordering::Release);
}

/// Installs the handlers.
pub(crate) fn catch() -> Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: an all-zero sigaction is valid: no flags, an empty mask, and a handler which is set next.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
        // Not SA_RESTART: a wait is to end. SA_RESETHAND: the second signal kills.
        action.sa_flags = libc::SA_RESETHAND;
        // SAFETY: the handler only stores to an atomic; the struct outlives the call.
        if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error()).context("install the signal handler");
        }
    }
    Ok(())
}

/// Whether to stop.
pub(crate) fn stopped() -> bool {
    STOP.load(Ordering::Acquire)
}

/// Fails once it is time to stop.
pub(crate) fn check() -> Result<()> {
    if stopped() {
        Err(Error::failed("interrupted"))
    } else {
        Ok(())
    }
}

/// Stops as a signal does.
pub(crate) fn stop() {
    STOP.store(true, Ordering::Release);
}
