//! What the software fabrics that run in real time (TCP, shared memory) have in common, besides registered memory
//! (`fabric/registry.rs`, `fabric/mapping.rs`): how a lane fails, in which order its requests complete, its receives,
//! its timers, and pieces of memory for the kernel.
//!
//! The thread of a context owns all of it; nothing here locks.

mod alarm;
mod finished;
mod iov;
mod receives;

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use super::{FabricErrorKind, Status};

pub(super) use self::{
    alarm::Alarm,
    finished::Finished,
    iov::{IOV_MAX, Iov},
    receives::ReceiveQueue,
};

/// Why a lane failed: what its first unfinished request completes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) status: Status,
    /// The errno, 0 if there is none.
    pub(super) vendor: u32,
}

impl Failure {
    pub(super) fn new(status: Status) -> Self {
        Self { status, vendor: 0 }
    }

    /// The peer or the path to it is gone.
    pub(super) fn lost(errno: i32) -> Self {
        Self {
            status: Status::RetryExceeded,
            vendor: errno.unsigned_abs(),
        }
    }

    /// The system refused.
    pub(super) fn os(errno: i32) -> Self {
        Self {
            status: Status::Other(errno.unsigned_abs()),
            vendor: errno.unsigned_abs(),
        }
    }

    /// The exporter of a dmabuf did not let the CPU at it.
    pub(super) fn of_memory(error: &io::Error) -> Self {
        Self {
            status: Status::LocalProtection,
            vendor: error.raw_os_error().unwrap_or(libc::EIO).unsigned_abs(),
        }
    }

    /// The peer broke the protocol.
    pub(super) fn protocol() -> Self {
        Self::os(libc::EPROTO)
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) connect: Duration,
    pub(super) hello: Duration,
    pub(super) rnr: Duration,
    pub(super) peer: Duration,
}

/// The instant `time` from now; none if that is beyond what the clock can tell.
pub(super) fn after(time: Duration) -> Option<Instant> {
    Instant::now().checked_add(time)
}

/// The kind for an error of the standard library.
pub(super) fn os_error(error: &io::Error) -> FabricErrorKind {
    error.raw_os_error().map_or_else(
        || FabricErrorKind::Unavailable(error.to_string()),
        FabricErrorKind::Os,
    )
}

/// Makes room for one more accepted socket among at most `most`: the one that has been silent longest goes; those that
/// named a lane stay. Returns whether there is room.
pub(super) fn make_room<P>(
    pending: &mut BTreeMap<usize, P>,
    most: usize,
    is_silent: impl Fn(&P) -> bool,
) -> bool {
    if pending.len() < most {
        return true;
    }
    let silent = pending.iter().find(|(_, pending)| is_silent(pending));
    let silent = silent.map(|(key, _)| *key);
    silent.is_some_and(|key| pending.remove(&key).is_some())
}
