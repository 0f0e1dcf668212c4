//! Packets of the simulated transport: a reliable connection with go-back-N, as in the InfiniBand Architecture
//! Specification, vol. 1, ch. 9.7, without wrap-around of sequence numbers.

use super::world::At;
use crate::fabric::RemoteKey;

pub(super) struct Packet {
    pub(super) from: At,
    pub(super) to: At,
    /// Of a request or a read response: its own number. Of an acknowledgement: the number expected next, which for
    /// the negative ones is the number refused.
    pub(super) psn: u64,
    pub(super) body: Body,
}

pub(super) enum Body {
    Write(WriteChunk),
    ReadRequest(ReadRange),
    ReadResponse(Vec<u8>),
    Ack,
    SequenceNak,
    NotReady,
    AccessNak,
}

/// One packet of a write.
pub(super) struct WriteChunk {
    pub(super) key: RemoteKey,
    /// The whole message's range.
    pub(super) address: u64,
    pub(super) length: u64,
    /// Where this packet's bytes lie in the message.
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
    pub(super) last: bool,
    /// Only in the last packet.
    pub(super) imm: Option<u32>,
}

/// What is (still) to be read.
#[derive(Clone, Copy)]
pub(super) struct ReadRange {
    pub(super) key: RemoteKey,
    pub(super) address: u64,
    pub(super) length: u64,
}

impl Packet {
    /// Whether it is an answer that carries no payload.
    pub(super) fn is_answer(&self) -> bool {
        !matches!(
            self.body,
            Body::Write(_) | Body::ReadRequest(_) | Body::ReadResponse(_)
        )
    }

    pub(super) fn name(&self) -> &'static str {
        match self.body {
            Body::Write(_) => "write",
            Body::ReadRequest(_) => "read request",
            Body::ReadResponse(_) => "read response",
            Body::Ack => "ack",
            Body::SequenceNak => "sequence nak",
            Body::NotReady => "receiver not ready",
            Body::AccessNak => "access nak",
        }
    }
}
