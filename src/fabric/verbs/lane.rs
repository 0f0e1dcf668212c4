//! A lane: one reliable-connected queue pair and its account of outstanding requests.
//!
//! # Naming requests
//!
//! The `wr_id` given to the device is not the caller's. It says which lane the request belongs to and its sequence
//! number there; the lane remembers the caller's id in a ring of `send_depth` slots. So
//!
//! * a completion finds its lane without the queue pair number, which a device may reuse while completions of an
//!   earlier queue pair are still in the queue;
//! * a failed completion, whose opcode is undefined, is still known to be a send or a receive;
//! * one signalled completion retires all requests up to it, which makes the account of send-queue slots exact;
//! * whatever the device did not report when the queue pair went away is known and can be reported as flushed, in
//!   order.
//!
//! Owned by the thread of its context.

use crate::fabric::{LaneConfig, LaneId};

use super::{address::VerbsAddress, sys};

/// What a `wr_id` stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WrId {
    /// The request of this sequence number.
    Send { lane: LaneId, sequence: u32 },
    /// A receive. With a shared receive queue no lane is known when it is posted.
    Receive { lane: Option<LaneId> },
}

const RECEIVE: u64 = 1 << 63;
const NO_LANE: u32 = LaneId::LAST.0 + 1;

impl LaneId {
    /// The greatest identifier a `wr_id` can carry besides its tag and [`NO_LANE`].
    pub(super) const LAST: Self = Self(0x7fff_fffe);
}

impl WrId {
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Send { lane, sequence } => u64::from(lane.0) << 32 | u64::from(sequence),
            Self::Receive { lane } => {
                RECEIVE | u64::from(lane.map_or(NO_LANE, |lane| lane.0)) << 32
            }
        }
    }

    /// The encoding of a lane's request 0; that of another has its sequence number in the lower half.
    pub(super) fn first_send(lane: LaneId) -> u64 {
        Self::Send { lane, sequence: 0 }.encode()
    }

    pub(super) fn decode(value: u64) -> Self {
        let lane = (value & !RECEIVE) >> 32;
        let lane = u32::try_from(lane).unwrap_or(NO_LANE);
        if value & RECEIVE == 0 {
            Self::Send {
                lane: LaneId(lane),
                sequence: value as u32,
            }
        } else {
            Self::Receive {
                lane: (lane != NO_LANE).then_some(LaneId(lane)),
            }
        }
    }
}

/// Where a lane stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneState {
    /// In INIT, not connected.
    Created,
    /// In RTS.
    Connected,
    /// In ERR, flushing.
    Failed,
    /// Its queue pair is gone; a tombstone that flushes what is posted.
    Fenced,
}

impl LaneState {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Created => "not connected",
            Self::Connected => "connected",
            Self::Failed => "failed",
            Self::Fenced => "fenced",
        }
    }
}

/// The ids of the requests on a send queue, oldest first.
#[derive(Debug)]
pub(super) struct Outstanding {
    ids: Box<[u64]>,
    depth: u32,
    /// Sequence number of the oldest request, and of the next one.
    tail: u32,
    head: u32,
}

impl Outstanding {
    pub(super) fn new(depth: u32) -> Self {
        let slots = depth.max(1).next_power_of_two() as usize;
        Self {
            ids: vec![0; slots].into(),
            depth,
            tail: 0,
            head: 0,
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.head.wrapping_sub(self.tail)
    }

    pub(super) fn depth(&self) -> u32 {
        self.depth
    }

    pub(super) fn room(&self) -> u32 {
        self.depth.saturating_sub(self.len())
    }

    /// Sequence number that the request `ahead` places after the next one will have.
    pub(super) fn sequence(&self, ahead: u32) -> u32 {
        self.head.wrapping_add(ahead)
    }

    /// Notes the id of the request `ahead` places after the next one, which the device has not accepted yet. There is
    /// [room](Self::room) for it.
    #[inline]
    pub(super) fn note(&mut self, ahead: u32, id: u64) {
        let slot = self.slot(self.head.wrapping_add(ahead));
        if let Some(place) = self.ids.get_mut(slot) {
            *place = id;
        }
    }

    /// Takes in `count` requests that have been noted and that the device has accepted.
    pub(super) fn advance(&mut self, count: u32) {
        self.head = self.head.wrapping_add(count);
    }

    /// Takes in one request that the device has accepted.
    pub(super) fn push(&mut self, id: u64) {
        self.note(0, id);
        self.advance(1);
    }

    /// Retires everything up to `sequence` and gives that request's id; `None` if it is not outstanding.
    pub(super) fn retire(&mut self, sequence: u32) -> Option<u64> {
        if sequence.wrapping_sub(self.tail) >= self.len() {
            return None;
        }
        self.tail = sequence.wrapping_add(1);
        self.ids.get(self.slot(sequence)).copied()
    }

    /// Retires the oldest request.
    pub(super) fn pop(&mut self) -> Option<u64> {
        self.retire(self.tail)
    }

    fn slot(&self, sequence: u32) -> usize {
        sequence as usize & (self.ids.len() - 1)
    }
}

/// One queue pair with its account.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) id: LaneId,
    pub(super) state: LaneState,
    pub(super) config: LaneConfig,
    /// Null once fenced.
    pub(super) qp: *mut sys::ibv_qp,
    pub(super) qpn: u32,
    /// What the peer was told, and the index of the GID in it.
    pub(super) address: VerbsAddress,
    pub(super) gid_index: u8,
    pub(super) sent: Outstanding,
    /// Receives posted and not consumed.
    pub(super) receives: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_names_survive_the_device() {
        for id in [
            WrId::Send {
                lane: LaneId(0),
                sequence: 0,
            },
            WrId::Send {
                lane: LaneId::LAST,
                sequence: u32::MAX,
            },
            WrId::Receive {
                lane: Some(LaneId(0)),
            },
            WrId::Receive {
                lane: Some(LaneId::LAST),
            },
            WrId::Receive { lane: None },
        ] {
            assert_eq!(WrId::decode(id.encode()), id);
        }
        let (lane, sequence) = (LaneId::LAST, u32::MAX);
        let whole = WrId::Send { lane, sequence }.encode();
        assert_eq!(WrId::first_send(lane) | u64::from(sequence), whole);
    }

    #[test]
    fn one_completion_retires_all_before_it_and_none_twice() {
        let mut sent = Outstanding::new(5);
        for id in 0..5 {
            sent.push(id * 10);
        }
        assert_eq!(sent.room(), 0);
        assert_eq!(sent.retire(2), Some(20));
        assert_eq!(sent.room(), 3);
        assert_eq!(sent.retire(2), None, "again");
        assert_eq!(sent.retire(1), None, "earlier");
        assert_eq!(sent.retire(5), None, "not posted yet");
        assert_eq!(sent.pop(), Some(30));
        assert_eq!(sent.pop(), Some(40));
        assert_eq!(sent.pop(), None);
    }

    #[test]
    fn sequence_numbers_wrap() {
        let mut sent = Outstanding::new(3);
        (sent.tail, sent.head) = (u32::MAX - 1, u32::MAX - 1);
        for id in 0..3 {
            sent.push(id);
        }
        assert_eq!(sent.sequence(0), 1);
        assert_eq!(sent.retire(0), Some(2));
        assert_eq!(sent.len(), 0);
    }
}
