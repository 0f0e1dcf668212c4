//! Errors of memory allocation and access.

use std::io;

use super::{dmabuf::DmabufError, gpu::GpuError};

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
    /// A GPU's runtime, or something about a GPU's memory.
    #[error(transparent)]
    Gpu(#[from] Box<GpuError>),
}

impl From<GpuError> for MemoryError {
    fn from(error: GpuError) -> Self {
        Self::Gpu(Box::new(error))
    }
}

impl MemoryError {
    /// Whether the same call can succeed later without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Dmabuf(error) => error.is_retryable(),
            Self::Gpu(error) => error.is_retryable(),
            _ => false,
        }
    }
}
