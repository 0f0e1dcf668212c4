//! One simulated queue pair: its queues and the state of both of its halves, requester and responder.

use std::collections::VecDeque;

use super::{packet::ReadRange, windows::Asked, world::At};
use crate::fabric::{LaneConfig, Opcode, RemoteKey, Sge};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneState {
    /// Created, not connected.
    Unconnected,
    Ready,
    Error,
}

impl LaneState {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unconnected => "not connected",
            Self::Ready => "ready",
            Self::Error => "in error",
        }
    }
}

pub(super) enum Payload {
    Inline(Vec<u8>),
    Gather(Vec<Sge>),
}

/// A request on the send queue.
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) opcode: Opcode,
    pub(super) signaled: bool,
    pub(super) key: RemoteKey,
    pub(super) address: u64,
    pub(super) length: u64,
    pub(super) payload: Payload,
    /// It owns packets `[first, first + packets)`; even an empty message has one.
    pub(super) first: u64,
    pub(super) packets: u64,
}

impl Request {
    pub(super) fn end(&self) -> u64 {
        self.first + self.packets
    }

    pub(super) fn is_read(&self) -> bool {
        self.opcode == Opcode::Read
    }
}

pub(super) struct Lane {
    pub(super) state: LaneState,
    pub(super) config: LaneConfig,
    pub(super) peer: Option<At>,

    // Requester. Packets below `acked` are answered, below `next_send` sent, below `next_post` posted.
    pub(super) requests: VecDeque<Request>,
    pub(super) acked: u64,
    pub(super) next_send: u64,
    pub(super) next_post: u64,
    /// The first packet that was never sent, to tell retransmissions.
    pub(super) never_sent: u64,
    /// A read is unanswered; nothing more is sent until it is.
    pub(super) reading: bool,
    /// Nothing is sent until everything below is answered: the next request fails locally, and in its turn.
    pub(super) stalled_until: u64,
    /// The gap before the read response expected next has been asked for again.
    pub(super) gap_seen: bool,
    pub(super) retries: u8,
    pub(super) rnr_retries: u8,
    /// When the silence has lasted too long, if something is unanswered.
    pub(super) deadline: Option<u64>,
    /// Whether a `Timeout` event is in the queue.
    pub(super) timer_queued: bool,
    /// Waiting for the peer's receives until then.
    pub(super) resume_at: Option<u64>,
    /// Send slots in use: a slot is free again when a completion of its request or a later one has been polled.
    pub(super) send_used: u32,
    /// Requests done without a completion since the last completion.
    pub(super) unreported: u32,
    /// What is to be done with windows, in order; each has a `Window` event in the queue.
    pub(super) windows: VecDeque<Asked>,

    // Responder.
    pub(super) expected: u64,
    /// The packet expected next has been asked for; others are dropped in silence until it comes.
    pub(super) nak_sent: bool,
    pub(super) receives: u32,
    /// Receive slots in use: posted ones and those whose completion has not been polled.
    pub(super) receive_used: u32,
    pub(super) responses: VecDeque<Response>,

    /// When the last packet sent by either half arrives: the wire keeps the order of a lane.
    pub(super) last_arrival: u64,
    /// Whether it stands in line for the device's port.
    pub(super) queued: bool,
}

/// A packet of read data to be sent.
pub(super) struct Response {
    pub(super) psn: u64,
    pub(super) range: ReadRange,
}

impl Lane {
    pub(super) fn new(config: LaneConfig) -> Self {
        Self {
            state: LaneState::Unconnected,
            config,
            peer: None,
            requests: VecDeque::new(),
            acked: 0,
            next_send: 0,
            next_post: 0,
            never_sent: 0,
            reading: false,
            stalled_until: 0,
            gap_seen: false,
            retries: 0,
            rnr_retries: 0,
            deadline: None,
            timer_queued: false,
            resume_at: None,
            send_used: 0,
            unreported: 0,
            windows: VecDeque::new(),
            expected: 0,
            nak_sent: false,
            receives: config.receive_depth,
            receive_used: config.receive_depth,
            responses: VecDeque::new(),
            last_arrival: 0,
            queued: false,
        }
    }

    pub(super) fn may_send_request(&self) -> bool {
        self.state == LaneState::Ready
            && self.next_send < self.next_post
            && self.resume_at.is_none()
            && !self.reading
            && self.acked >= self.stalled_until
    }

    pub(super) fn has_work(&self) -> bool {
        self.state == LaneState::Ready && (!self.responses.is_empty() || self.may_send_request())
    }

    /// The request that owns packet `psn`, if it is still on the queue.
    pub(super) fn request_of(&self, psn: u64) -> Option<&Request> {
        let index = self
            .requests
            .partition_point(|request| request.end() <= psn);
        self.requests
            .get(index)
            .filter(|request| request.first <= psn)
    }

    /// Goes back to the oldest packet without answer.
    pub(super) fn rewind(&mut self) {
        self.next_send = self.acked;
        self.reading = false;
        self.stalled_until = 0;
    }

    /// Takes note of an answer: everything below `psn` has arrived. An unanswered read stops it, since only its data
    /// answers a read.
    pub(super) fn acknowledge(&mut self, psn: u64) {
        let first_read = self
            .requests
            .iter()
            .take_while(|request| request.first < psn)
            .find(|request| request.is_read())
            .map_or(psn, |read| read.first);
        self.advance(first_read.min(psn));
    }

    /// Everything below `psn` is answered.
    pub(super) fn advance(&mut self, psn: u64) {
        if psn > self.acked {
            self.acked = psn;
            self.next_send = self.next_send.max(psn);
            self.retries = 0;
            self.rnr_retries = 0;
            self.gap_seen = false;
        }
    }
}
