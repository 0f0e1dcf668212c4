//! What can be wrong with a dmabuf, its exporter, or a mapping of it.

use std::io;

/// Why a dmabuf could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmabufError {
    /// A device node of an exporter is not there, or may not be opened.
    #[error("{node} cannot be opened: {source} ({hint})")]
    Node {
        /// The node.
        node: String,
        /// The kernel's answer.
        source: io::Error,
        /// What the operator can do about it.
        hint: &'static str,
    },
    /// An exporter refused.
    #[error("{operation} of {length} bytes: {source}{}", hint.map(|h| format!(" ({h})")).unwrap_or_default())]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// Bytes.
        length: u64,
        /// The kernel's answer.
        source: io::Error,
        /// What the operator can do about it.
        hint: Option<&'static str>,
    },
    /// The file is neither a dmabuf nor a memory file that is sealed against shrinking, so its size may change while
    /// peers write into it.
    #[error("the file is no dmabuf, nor a memory file sealed against shrinking")]
    NotDmabuf,
    /// A range outside of the file.
    #[error("bytes {offset}..+{length} are outside of a dmabuf of {size} bytes")]
    Range {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Bytes there are.
        size: u64,
    },
    /// The exporter does not let this process reach the bytes: only devices can.
    #[error("the exporter {exporter} does not let the host map its memory: {source}")]
    NotMappable {
        /// The exporter's name.
        exporter: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A NIC's driver cannot pin the pages behind a mapping of a dmabuf.
    #[error("a mapping of a dmabuf ({exporter}) has no pages that a NIC's driver could pin")]
    NotPinnable {
        /// The exporter's name.
        exporter: String,
    },
}

impl DmabufError {
    /// Whether the same call can succeed later without a change of configuration: only if memory was short.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOMEM))
    }
}
