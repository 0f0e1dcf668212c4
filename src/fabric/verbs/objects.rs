//! The verbs objects that others hang on: open devices and protection domains, freed on drop, in the right order.
//!
//! Any thread may call.

use std::sync::Arc;

use super::sys;

/// An open device (`ibv_context`), closed on drop.
pub(super) struct Opened {
    lib: &'static sys::Verbs,
    raw: *mut sys::ibv_context,
}

// SAFETY: libibverbs allows every thread to use a device; only closing must be last, and that is on drop.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

impl Opened {
    /// `ibv_open_device(3)`.
    pub(super) fn open(
        lib: &'static sys::Verbs,
        device: *mut sys::ibv_device,
    ) -> Result<Self, i32> {
        // SAFETY: the caller took `device` from a list that is still alive.
        match unsafe { lib.open_device(device) } {
            Ok(raw) => Ok(Self { lib, raw }),
            Err(errno) => Err(errno.code()),
        }
    }

    pub(super) fn lib(&self) -> &'static sys::Verbs {
        self.lib
    }

    pub(super) fn raw(&self) -> *mut sys::ibv_context {
        self.raw
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: the device is open, and every object on it holds it open, so none is left.
        if let Err(errno) = unsafe { self.lib.close_device(self.raw) } {
            tracing::warn!(%errno, "ibv_close_device");
        }
    }
}

/// A protection domain, freed on drop, before its device is closed.
pub(super) struct ProtectionDomain {
    raw: *mut sys::ibv_pd,
    opened: Arc<Opened>,
}

// SAFETY: as for `Opened`.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Opened`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(super) fn new(opened: Arc<Opened>) -> Result<Self, i32> {
        // SAFETY: the device is open.
        match unsafe { opened.lib().alloc_pd(opened.raw()) } {
            Ok(raw) => Ok(Self { raw, opened }),
            Err(errno) => Err(errno.code()),
        }
    }

    pub(super) fn raw(&self) -> *mut sys::ibv_pd {
        self.raw
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.opened
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: the domain is live, and whoever made objects in it holds it.
        if let Err(errno) = unsafe { self.opened.lib().dealloc_pd(self.raw) } {
            tracing::warn!(%errno, "ibv_dealloc_pd");
        }
    }
}
