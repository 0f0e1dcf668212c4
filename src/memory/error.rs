//! Errors of memory allocation and registration.

use std::io;

use crate::fabric::FabricError;

/// Why memory could not be had, reached or registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A length of zero, or one that the address space cannot hold.
    #[error("{length} bytes cannot be allocated or registered")]
    BadLength {
        /// The length asked for.
        length: u64,
    },
    /// The operating system refused.
    #[error("{operation} of {length} bytes: {source}{}", hint.map(|h| format!(" ({h})")).unwrap_or_default())]
    Os {
        /// The call.
        operation: &'static str,
        /// Bytes asked for.
        length: u64,
        /// Its error.
        source: io::Error,
        /// What the operator can do about it.
        hint: Option<&'static str>,
    },
    /// An access outside of the range.
    #[error("bytes {offset}..+{length} are outside of a range of {capacity} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Bytes there are.
        capacity: u64,
    },
    /// A rail refused the registration.
    #[error("registration refused: {0}")]
    Register(#[from] FabricError),
}

impl MemoryError {
    /// Whether the same call can succeed later without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Register(error) => error.is_retryable(),
            Self::BadLength { .. } | Self::Os { .. } | Self::OutOfRange { .. } => false,
        }
    }
}
