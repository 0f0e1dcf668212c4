//! Whether the driver sleeps, and who has to wake it. No wake-up is lost, and none costs a system call while it works.
//!
//! The driver announces that it is about to sleep, looks once more for work, and only then sleeps. A caller adds its
//! work first and then looks whether the driver sleeps. Between the two steps of each there is a sequentially
//! consistent fence, so at least one of the two sees what the other did first (Dekker's argument).
//!
//! Any thread may call [`Sleep::wake`]; the rest is the driver's. `tests/loom` tries every order of these accesses, in
//! this very file.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Sleep(AtomicBool);

impl Sleep {
    /// Of a driver that is awake.
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// A caller has added work. Returns whether it must wake the driver: then nobody else does.
    pub(crate) fn wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.swap(false, Ordering::SeqCst)
    }

    /// The driver is about to sleep. It must look for work once more before it does.
    pub(crate) fn announce(&self) {
        self.0.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The driver is awake again. Returns whether somebody has woken it, or is about to.
    pub(crate) fn awake(&self) -> bool {
        !self.0.swap(false, Ordering::SeqCst)
    }
}
