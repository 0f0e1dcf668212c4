//! kvpush moves LLM KV-cache pages from prefill memory straight into decode memory.

// Until the endpoint uses all of it.
#[allow(dead_code)]
pub(crate) mod endpoint;
pub mod fabric;
pub mod kv;
// Until the endpoint uses all of it.
#[allow(dead_code, unused_imports)]
pub(crate) mod wire;

pub use endpoint::control::{CloseReason, DialError, DialFailure};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use wire::fuzzing;
pub use wire::{
    Auth, ChannelError, Digest, GoodbyeCode, Grant, GrantError, GrantId, Incarnation, PoolId,
    RefuseCode, RegionToken, RejectCode, RevokeReason, WireError, WireErrorKind,
};
