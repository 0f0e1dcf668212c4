//! kvpush

pub(crate) mod fabric;

/// The raw verbs binding, reachable only by the oracle that checks it against the system's own headers.
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub mod oracle {
    pub use crate::fabric::verbs::sys::*;
}
