//! Errors of the fabrics: always with the device and port, and with the errno or verbs status where there is one.

use super::LaneId;

/// What went wrong on a rail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}/{port}: {operation}: {kind}{}", hint.map(|h| format!(" ({h})")).unwrap_or_default())]
pub struct FabricError {
    /// The device's name.
    pub device: String,
    /// The port, 0 where there is none.
    pub port: u8,
    /// The call that failed, in the fabric's own terms: `ibv_modify_qp(RTR)`, `connect`, `register`.
    pub operation: &'static str,
    /// Why.
    pub kind: FabricErrorKind,
    /// What the operator can do about it.
    pub hint: Option<&'static str>,
}

/// Why a fabric operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FabricErrorKind {
    /// The operating system or driver refused; the value is an errno.
    #[error("{} (errno {_0})", std::io::Error::from_raw_os_error(*_0))]
    Os(i32),
    /// The library or device needed is not there.
    #[error("not available: {0}")]
    Unavailable(String),
    /// A queue has no room; the caller posted beyond its reservation.
    #[error("{queue} is full ({depth} entries)")]
    QueueFull {
        /// Which queue.
        queue: &'static str,
        /// Its depth.
        depth: u32,
    },
    /// The lane does not exist or is in no state for the call.
    #[error("{lane} is {state}")]
    LaneState {
        /// The lane.
        lane: LaneId,
        /// Its state.
        state: &'static str,
    },
    /// The peer's lane address is not one of this fabric, or is malformed.
    #[error("bad lane address: {0}")]
    BadAddress(&'static str),
    /// A request or registration exceeds a limit of the device.
    #[error("{what} is {value}, the device allows {limit}")]
    Limit {
        /// What was exceeded.
        what: &'static str,
        /// The value asked for.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A key, or a range outside the registration it names.
    #[error("memory access outside a registration: {0}")]
    Memory(String),
    /// The rail itself is gone (device fatal, port removed).
    #[error("the rail is gone: {0}")]
    Fatal(String),
}

impl FabricError {
    /// Whether the same call can succeed later without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        match &self.kind {
            FabricErrorKind::Os(errno) => matches!(
                *errno,
                libc::EAGAIN
                    | libc::EINTR
                    | libc::ETIMEDOUT
                    | libc::ECONNREFUSED
                    | libc::ECONNRESET
                    | libc::EHOSTUNREACH
                    | libc::ENETUNREACH
                    | libc::ENOBUFS
            ),
            FabricErrorKind::QueueFull { .. } => true,
            _ => false,
        }
    }
}

/// A post that was accepted only in part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{posted} requests were posted before: {source}")]
pub struct PostError {
    /// How many requests, from the first, were accepted and will complete.
    pub posted: usize,
    /// Why the next one was not.
    pub source: FabricError,
}
