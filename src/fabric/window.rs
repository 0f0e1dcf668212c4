//! Memory windows: keys to a part of a registration, for one lane, taken back at once. Plain data.
//!
//! A registration's key opens all of it, for every peer that knows the key, until the registration ends. A window's key
//! opens a range of it for the peer of one lane, until [`Context::invalidate_window`](super::Context::invalidate_window)
//! has completed. On verbs it is a memory window of type 2 (InfiniBand Architecture Specification, vol. 1, 10.6.7); the
//! software fabrics enforce the same themselves. What a device does not enforce, its [`WindowCaps`] say.

use crate::wire::RemoteKey;

use super::{Access, MrId};

/// What the windows of a rail are good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowCaps {
    /// Most windows at a time, over all lanes. On verbs processes that share the device share this number.
    pub max: u32,
    /// Whether the device promises that a key opens its window for the peer of its own lane only. Windows of type 2B
    /// do; of type 2A only the number of the queue pair is compared, not its protection domain.
    pub per_lane: bool,
    /// Whether accesses are held to the range of the window. Soft-RoCE compares them with the range of the registration
    /// (`check_rkey` in the kernel's `rxe_resp.c`), so a key opens all of that, though for one lane and one binding
    /// only.
    pub bounded: bool,
    /// Whether no byte can land any more once an invalidation has completed. Soft-RoCE may still be copying one packet
    /// that it had checked before; every packet after that is refused.
    pub final_when_done: bool,
}

/// A window within its context. Identifiers are not reused while a process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WindowId(pub u64);

/// What [`Context::bind_window`](super::Context::bind_window) is to bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowBind {
    /// Returned in the completion.
    pub id: u64,
    /// The registration. It must have been made with at least `access`.
    pub mr: MrId,
    /// First byte, at any address within the registration.
    pub address: u64,
    /// Bytes, at least one.
    pub length: u64,
    /// What the peer may do. Local rights mean nothing here.
    pub access: Access,
}

/// A window that is bound, or about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// For invalidation.
    pub id: WindowId,
    /// For the peer, once the binding has completed.
    pub remote: RemoteKey,
}
