//! kvpush moves LLM KV-cache pages from prefill memory straight into decode memory.

pub mod endpoint;
pub mod fabric;
pub mod kv;
pub mod memory;
mod protocol;
pub(crate) mod wire;

pub use endpoint::{Arrival, Endpoint, Pool, Push};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use wire::fuzzing;
pub use wire::{
    Auth, ChannelError, Digest, GoodbyeCode, Grant, GrantError, GrantId, Incarnation, PoolId,
    RefuseCode, RegionToken, RejectCode, RevokeReason, WireError, WireErrorKind,
};

/// The raw verbs binding, reachable only by the oracle that checks it against the system's own headers.
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub mod oracle {
    pub use crate::fabric::verbs::sys::*;
}
