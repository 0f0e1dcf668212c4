//! Errors of memory allocation and access.

use std::io;

use super::dmabuf::DmabufError;

/// Why memory could not be had or reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A length of zero, or one that the address space cannot hold.
    #[error("{length} bytes cannot be allocated")]
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
    /// A dmabuf, its exporter, or a mapping of it.
    #[error(transparent)]
    Dmabuf(#[from] DmabufError),
}

impl MemoryError {
    /// Whether the same call can succeed later without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Dmabuf(error) if error.is_retryable())
    }
}
