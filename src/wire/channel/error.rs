//! Why a control connection cannot go on.

use super::super::MAX_MESSAGE;

/// Why a control connection cannot go on. The connection must be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The peer speaks another protocol.
    #[error(
        "the peer does not speak kvpush: it began with \"{}\" (hint: check that the address is a kvpush control port)",
        received.escape_ascii()
    )]
    NotKvpush {
        /// Its first bytes.
        received: [u8; 6],
    },
    /// The peer has another version of the protocol.
    #[error(
        "the peer speaks protocol version {theirs}, this endpoint version {ours} (hint: run the same kvpush release on both sides)"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
        /// This library's version.
        ours: u16,
    },
    /// One side has a key and the other is configured for plaintext.
    #[error(
        "the peer {}, this endpoint {} (hint: give both sides the same `Auth`)",
        mode(*theirs), mode(*ours)
    )]
    AuthModeMismatch {
        /// The peer's mode: 0 plaintext, 1 shared key.
        theirs: u8,
        /// This endpoint's mode.
        ours: u8,
    },
    /// The two sides do not have the same key.
    #[error("authentication failed{} (hint: both sides need the same key)", if *told_by_peer { " at the peer" } else { "" })]
    Authentication {
        /// Whether the peer said so, rather than this side having found it.
        told_by_peer: bool,
    },
    /// A handshake that no implementation sends.
    #[error("malformed handshake: {0}")]
    Handshake(&'static str),
    /// A record was changed on its way, or the peer is broken.
    #[error("a record failed its integrity check")]
    Decrypt,
    /// A message longer than any may be.
    #[error("a message of {length} bytes; the limit is {limit}", limit = MAX_MESSAGE)]
    Oversize {
        /// Its length.
        length: u64,
    },
    /// More was sent before the handshake than is held back.
    #[error("more than {limit} bytes were queued before the handshake was over")]
    HeldTooMuch {
        /// Most bytes held back.
        limit: usize,
    },
    /// The cryptography itself failed, for example for want of random numbers.
    #[error("cryptography failed: {0}")]
    Crypto(String),
}

fn mode(value: u8) -> &'static str {
    match value {
        super::MODE_PLAINTEXT => "is configured for plaintext",
        super::MODE_NOISE => "requires a key",
        _ => "has an unknown mode of authentication",
    }
}
