//! The sending half of a lane: turns requests into packets, waits for answers, tries again, gives up.

use super::{
    config::SimConfig,
    event::Event,
    lane::{LaneState, Payload, Response},
    memory::Need,
    packet::{Body, Packet, ReadRange, WriteChunk},
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{Opcode, Status};

impl World {
    /// Sends one packet of `at` and says how many payload bytes it has, or nothing if there is none to send.
    pub(super) fn send_next(&mut self, at: At) -> Option<u64> {
        let lane = self.lane_mut(at)?;
        if lane.state != LaneState::Ready {
            return None;
        }
        if let Some(response) = lane.responses.pop_front() {
            return self.send_response(at, response);
        }
        if lane.may_send_request() {
            return self.send_request(at);
        }
        None
    }

    fn send_request(&mut self, at: At) -> Option<u64> {
        let mtu = self.config.mtu();
        let device = self.devices.get(at.device)?;
        let lane = device.lanes.get(&at.lane)?;
        let (psn, to) = (lane.next_send, lane.peer?);
        let request = lane.request_of(psn)?;
        if let Some((name, id, status)) = &self.faults.failing_request
            && (name, *id) == (&device.name, request.id)
        {
            let (first, status) = (request.first, *status);
            return self.fail_request(at, first, status);
        }
        let offset = (psn - request.first) * mtu;
        let left = request.length - offset;
        let length = left.min(mtu);
        let local = |length, need| match &request.payload {
            Payload::Inline(_) => Some(Vec::new()),
            Payload::Gather(sges) => device.regions.local(sges, offset, length, need),
        };
        let (body, next, bytes) = if request.is_read() {
            // Where the data will go is checked now and again when it comes.
            if local(left, Need::LocalWrite).is_none() {
                let first = request.first;
                self.refuse_gather(at, first);
                return None;
            }
            let range = ReadRange {
                key: request.key,
                address: request.address.wrapping_add(offset),
                length: left,
            };
            (Body::ReadRequest(range), request.end(), 0)
        } else {
            let Some(spans) = local(length, Need::LocalRead) else {
                let first = request.first;
                self.refuse_gather(at, first);
                return None;
            };
            let data = match &request.payload {
                Payload::Inline(data) => data
                    .get(offset as usize..(offset + length) as usize)?
                    .to_vec(),
                Payload::Gather(_) => {
                    let mut data = Vec::new();
                    spans.into_iter().for_each(|span| span.read(&mut data));
                    data
                }
            };
            let last = psn + 1 == request.end();
            let imm = match request.opcode {
                Opcode::WriteImm(imm) if last => Some(imm),
                _ => None,
            };
            let chunk = WriteChunk {
                key: request.key,
                address: request.address,
                length: request.length,
                offset,
                data,
                last,
                imm,
            };
            (Body::Write(chunk), psn + 1, length)
        };

        let deadline = self.now.saturating_add(self.config.timeout);
        let lane = self.lane_mut(at)?;
        lane.reading = matches!(body, Body::ReadRequest(_));
        lane.next_send = next;
        let again = psn < lane.never_sent;
        lane.never_sent = lane.never_sent.max(next);
        lane.deadline = Some(deadline);
        self.stats.retransmissions += u64::from(again);
        self.start_timer(at);
        self.send(Packet {
            from: at,
            to,
            psn,
            body,
        });
        Some(bytes)
    }

    /// A request is to fail on demand, once those before it are done.
    fn fail_request(&mut self, at: At, first: u64, status: Status) -> Option<u64> {
        let lane = self.lane_mut(at)?;
        if lane.acked < first {
            lane.stalled_until = first;
        } else {
            self.faults.failing_request = None;
            self.fail_oldest(at, status);
        }
        None
    }

    /// The gather list is not allowed: the request fails once those before it, which start below `first`, are done.
    fn refuse_gather(&mut self, at: At, first: u64) {
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        if lane.acked < first {
            lane.stalled_until = first;
        } else {
            self.fail_oldest(at, Status::LocalProtection);
        }
    }

    fn send_response(&mut self, at: At, response: Response) -> Option<u64> {
        let device = self.devices.get(at.device)?;
        let to = device.lanes.get(&at.lane)?.peer?;
        let Response { psn, range } = response;
        let mut data = Vec::new();
        if range.length > 0 {
            let span = device.regions.remote(
                at.lane,
                range.key,
                range.address,
                range.length,
                Need::RemoteRead,
            );
            let Some(span) = span else {
                self.refuse_access(at, to, psn);
                return None;
            };
            span.read(&mut data);
        }
        self.send(Packet {
            from: at,
            to,
            psn,
            body: Body::ReadResponse(data),
        });
        Some(range.length)
    }

    /// Puts a packet on the wire.
    pub(super) fn send(&mut self, packet: Packet) {
        let (at, psn) = (packet.from, packet.psn);
        let what = packet.name();
        self.stats.packets += u64::from(!packet.is_answer());
        self.trace(at, TraceEvent::Send { psn, what });
        if let Some(why) = self.lose(&packet) {
            self.stats.lost += 1;
            self.trace(at, TraceEvent::Lose { psn, why });
            return;
        }
        let delay = self.rng.within(&self.config.latency) + self.spike();
        let arrival = self.now.saturating_add(delay);
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        let arrival = arrival.max(lane.last_arrival + 1);
        lane.last_arrival = arrival;
        self.schedule(arrival, Event::Arrive(Box::new(packet)));
    }

    /// Everything below `psn` has been answered: the requests wholly below it are done.
    pub(super) fn on_ack(&mut self, at: At, psn: u64) {
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        lane.acknowledge(psn);
        self.finish_answered(at);
    }

    /// Completes the answered requests and restarts or stops the timer.
    pub(super) fn finish_answered(&mut self, at: At) {
        let timeout = self.now.saturating_add(self.config.timeout);
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        let done = lane
            .requests
            .partition_point(|request| request.end() <= lane.acked);
        let done: Vec<_> = lane.requests.drain(..done).collect();
        lane.deadline =
            (lane.acked < lane.next_send && lane.resume_at.is_none()).then_some(timeout);
        for request in done {
            if request.signaled {
                self.finish_request(at, request.id, Status::Success);
            } else if let Some(lane) = self.lane_mut(at) {
                lane.unreported += 1;
            }
        }
        self.start_timer(at);
        self.kick(at);
    }

    pub(super) fn on_sequence_nak(&mut self, at: At, psn: u64) {
        self.on_ack(at, psn);
        if let Some(lane) = self.lane_mut(at)
            && lane.acked == psn
        {
            lane.rewind();
            self.kick(at);
        }
    }

    pub(super) fn on_not_ready(&mut self, at: At, psn: u64) {
        self.on_ack(at, psn);
        let (limit, wait) = (self.config.rnr_retry, self.config.rnr_timer);
        let resume_at = self.now.saturating_add(wait);
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        if lane.acked != psn || lane.resume_at.is_some() {
            return;
        }
        if limit != SimConfig::RNR_FOREVER && lane.rnr_retries >= limit {
            self.fail_oldest(at, Status::RnrRetryExceeded);
            return;
        }
        lane.rnr_retries = lane.rnr_retries.saturating_add(1);
        // The peer is alive.
        lane.retries = 0;
        lane.rewind();
        lane.deadline = None;
        lane.resume_at = Some(resume_at);
        self.stats.rnr_waits += 1;
        self.trace(at, TraceEvent::RnrWait { psn });
        self.schedule(resume_at, Event::Resume(at));
    }

    pub(super) fn on_resume(&mut self, at: At) {
        if let Some(lane) = self.lane_mut(at) {
            lane.resume_at = None;
            self.kick(at);
        }
    }

    pub(super) fn on_access_nak(&mut self, at: At, psn: u64) {
        self.on_ack(at, psn);
        if self
            .lane(at)
            .is_some_and(|lane| lane.acked <= psn && psn < lane.never_sent)
        {
            self.fail_oldest(at, Status::RemoteAccess);
        }
    }

    pub(super) fn on_read_response(&mut self, at: At, psn: u64, data: &[u8]) {
        let mtu = self.config.mtu();
        // Data of a read answers all writes before it.
        let first = self
            .lane(at)
            .and_then(|lane| lane.request_of(psn))
            .map(|request| request.first);
        if let Some(first) = first {
            self.on_ack(at, first);
        }
        let Some(device) = self.devices.get_mut(at.device) else {
            return;
        };
        let Some(lane) = device.lanes.get_mut(&at.lane) else {
            return;
        };
        if psn > lane.acked && !lane.gap_seen {
            // Responses were lost: ask for the rest again, once.
            lane.gap_seen = true;
            lane.rewind();
            self.kick(at);
            return;
        }
        let Some(request) = lane.request_of(psn).filter(|request| request.is_read()) else {
            return;
        };
        if psn != lane.acked {
            return;
        }
        let offset = (psn - request.first) * mtu;
        let Payload::Gather(sges) = &request.payload else {
            return;
        };
        let length = data.len() as u64;
        let Some(spans) = device.regions.local(sges, offset, length, Need::LocalWrite) else {
            self.fail_oldest(at, Status::LocalProtection);
            return;
        };
        let done = psn + 1 == request.end();
        let mut rest = data;
        let mut place = 0;
        for span in spans {
            place = span.offset;
            let (head, tail) = rest.split_at(span.len().min(rest.len()));
            span.write(head);
            rest = tail;
        }
        lane.advance(psn + 1);
        lane.reading &= !done;
        self.stats.bytes += length;
        self.stats.messages += u64::from(done);
        self.trace(
            at,
            TraceEvent::Place {
                psn,
                offset: place,
                length,
            },
        );
        self.finish_answered(at);
    }

    pub(super) fn on_timeout(&mut self, at: At) {
        // Real time lets a peer connect before the retries are used up; virtual time of a free-running net would not.
        let patient = self.config.free_running
            && self
                .lane(at)
                .and_then(|lane| lane.peer)
                .and_then(|peer| self.lane(peer))
                .is_some_and(|peer| peer.state == LaneState::Unconnected);
        let limit = self.config.retry_count;
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        lane.timer_queued = false;
        lane.deadline = None;
        let psn = lane.acked;
        if lane.state != LaneState::Ready || psn >= lane.next_send {
            return;
        }
        let exhausted = !patient && lane.retries >= limit;
        lane.retries = lane.retries.saturating_add(u8::from(!patient));
        lane.gap_seen = false;
        lane.rewind();
        self.stats.timeouts += 1;
        self.trace(at, TraceEvent::Timeout { psn });
        if exhausted {
            self.fail_oldest(at, Status::RetryExceeded);
        } else {
            self.kick(at);
        }
    }

    /// The oldest request, which is the one in trouble since all before it are done, fails with `status`, and the rest
    /// is flushed.
    fn fail_oldest(&mut self, at: At, status: Status) {
        let oldest = self.lane_mut(at).and_then(|lane| lane.requests.pop_front());
        if let Some(oldest) = oldest {
            self.finish_request(at, oldest.id, status);
        }
        self.break_lane(at);
    }
}
