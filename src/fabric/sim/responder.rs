//! The receiving half of a lane: checks what arrives, places it, answers.

use super::{
    lane::{LaneState, Response},
    memory::Need,
    packet::{Body, Packet, ReadRange, WriteChunk},
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{CompletionKind, Status};

impl World {
    /// A packet reaches the device of its lane.
    pub(super) fn arrive(&mut self, packet: Packet) {
        let Packet {
            from,
            to,
            psn,
            body,
        } = packet;
        let refused = match self.lane(to) {
            None => Some("no such lane"),
            Some(lane) if lane.state != LaneState::Ready => Some(lane.state.name()),
            Some(lane) if lane.peer != Some(from) => Some("connected to another lane"),
            Some(_) => None,
        };
        if let Some(why) = refused {
            self.stats.refused += 1;
            self.trace(to, TraceEvent::Refuse { psn, why });
            return;
        }
        match body {
            Body::Write(chunk) => self.on_write(to, from, psn, chunk),
            Body::ReadRequest(range) => self.on_read_request(to, from, psn, range),
            Body::ReadResponse(data) => self.on_read_response(to, psn, &data),
            Body::Ack => self.on_ack(to, psn),
            Body::SequenceNak => self.on_sequence_nak(to, psn),
            Body::NotReady => self.on_not_ready(to, psn),
            Body::AccessNak => self.on_access_nak(to, psn),
        }
    }

    fn answer(&mut self, at: At, to: At, psn: u64, body: Body) {
        self.send(Packet {
            from: at,
            to,
            psn,
            body,
        });
    }

    /// Whether `psn` is the packet expected next; asks again for a lost one and acknowledges a repeated one.
    fn in_sequence(&mut self, at: At, from: At, psn: u64) -> bool {
        let Some(lane) = self.lane_mut(at) else {
            return false;
        };
        let expected = lane.expected;
        if psn > expected && !std::mem::replace(&mut lane.nak_sent, true) {
            self.answer(at, from, expected, Body::SequenceNak);
        } else if psn < expected {
            self.answer(at, from, expected, Body::Ack);
        }
        psn == expected
    }

    fn on_write(&mut self, at: At, from: At, psn: u64, chunk: WriteChunk) {
        if !self.in_sequence(at, from, psn) {
            return;
        }
        let length = chunk.data.len() as u64;
        let starved = &self.faults.starved;
        let Some(device) = self.devices.get_mut(at.device) else {
            return;
        };
        let starved = starved.contains(&device.name);
        // An empty message touches no memory and needs no key. Others are checked with every packet, since the
        // registration can end in between.
        let span = if chunk.length == 0 {
            None
        } else {
            let whole = device.regions.remote(
                at.lane,
                chunk.key,
                chunk.address,
                chunk.length,
                Need::RemoteWrite,
            );
            let part = whole.and_then(|whole| whole.part(chunk.offset, chunk.data.len()));
            if part.is_none() {
                self.refuse_access(at, from, psn);
                return;
            }
            part
        };
        let claimed = chunk.imm.is_some() && self.claims_no_receive();
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        if claimed || (chunk.imm.is_some() && (lane.receives == 0 || starved)) {
            lane.nak_sent = true;
            self.stats.unready += u64::from(!claimed && !starved);
            self.answer(at, from, psn, Body::NotReady);
            return;
        }
        lane.expected = psn + 1;
        lane.nak_sent = false;
        if chunk.imm.is_some() {
            lane.receives -= 1;
        }
        if let Some(span) = span {
            let offset = span.offset;
            span.write(&chunk.data);
            self.stats.bytes += length;
            self.trace(
                at,
                TraceEvent::Place {
                    psn,
                    offset,
                    length,
                },
            );
        }
        if chunk.last {
            self.stats.messages += 1;
            self.answer(at, from, psn + 1, Body::Ack);
        }
        if let Some(imm) = chunk.imm {
            self.complete(at, CompletionKind::Received { imm }, Status::Success, 1);
        }
    }

    fn on_read_request(&mut self, at: At, from: At, psn: u64, range: ReadRange) {
        let mtu = self.config.mtu();
        let packets = range.length.div_ceil(mtu).max(1);
        let Some(device) = self.devices.get_mut(at.device) else {
            return;
        };
        let Some(lane) = device.lanes.get_mut(&at.lane) else {
            return;
        };
        // A repeated read is served again, since its data may have been lost; anything else is as with a write.
        if psn > lane.expected {
            self.in_sequence(at, from, psn);
            return;
        }
        let allowed = range.length == 0
            || device
                .regions
                .remote(
                    at.lane,
                    range.key,
                    range.address,
                    range.length,
                    Need::RemoteRead,
                )
                .is_some();
        if !allowed {
            self.refuse_access(at, from, psn);
            return;
        }
        lane.expected = lane.expected.max(psn + packets);
        lane.nak_sent = false;
        lane.responses.clear();
        lane.responses.extend((0..packets).map(|index| {
            let offset = index * mtu;
            Response {
                psn: psn + index,
                range: ReadRange {
                    key: range.key,
                    address: range.address.wrapping_add(offset),
                    length: (range.length - offset).min(mtu),
                },
            }
        }));
        self.kick(at);
    }

    /// Tells the requester that it asked for what it may not have. Both sides of the lane fail.
    pub(super) fn refuse_access(&mut self, at: At, from: At, psn: u64) {
        self.stats.access_errors += 1;
        self.answer(at, from, psn, Body::AccessNak);
        self.break_lane(at);
    }
}
