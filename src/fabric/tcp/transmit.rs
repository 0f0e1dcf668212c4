//! The sending half of a lane: builds trains and hands them to the socket. The context's thread only.
//!
//! A train, once built, is sent to its end before another is built; its pieces point at the train's headers, the send
//! queue's inline copies and registered memory, none of which moves or is reused before the train is out.

use std::{collections::VecDeque, io};

use zerocopy::IntoBytes;

use super::{
    super::{
        LaneId, Opcode, Status,
        mapping::{Brackets, Touch},
        software::{Failure, Iov, ReceiveQueue, Timing, after},
    },
    lane::{Fault, Lane, Phase, credit_due},
    memory::{Intent, MemoryView, Region},
    send::{Gather, SendQueue, pieces},
    sys,
    wire::{FLAG_ACK, Header, MAX_READS, Op, Refusal, TRAIN, TRAIN_BYTES},
};

/// Most pieces in a train.
const PIECES: usize = 512;

/// A read of the peer that is being answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serving {
    pub(super) sequence: u64,
    pub(super) key: u32,
    pub(super) address: u64,
    pub(super) remaining: u32,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Transmitter {
    headers: Vec<Header>,
    pieces: Vec<Iov>,
    /// The dmabufs that the pieces point into.
    dmabufs: Brackets,
    /// The first piece that is not out.
    at: usize,
    bytes: u32,
    /// Reads of the peer in order of arrival.
    serving: VecDeque<Serving>,
    refusal: Option<(u64, Refusal)>,
    refused: bool,
    /// How many writes with immediate the peer allows, and how many were sent.
    pub(super) credit: u64,
    imms_sent: u64,
    /// How many requests of the peer were executed, and how many of them the peer was told of.
    pub(super) executed: u64,
    told: u64,
    /// Whether the peer waits for an acknowledgement.
    ack_due: bool,
    /// Whether building a train may find something to send.
    pub(super) dirty: bool,
    /// Whether the head of the queue waits for the peer's receives.
    stalled: bool,
    /// The errno of a failed send. Whatever the peer had said before is read first.
    broken: Option<i32>,
}

impl Transmitter {
    pub(super) fn new() -> Self {
        Self {
            headers: Vec::with_capacity(TRAIN),
            pieces: Vec::with_capacity(PIECES),
            dmabufs: Brackets::default(),
            at: 0,
            bytes: 0,
            serving: VecDeque::new(),
            refusal: None,
            refused: false,
            credit: 0,
            imms_sent: 0,
            executed: 0,
            told: 0,
            ack_due: false,
            dirty: false,
            stalled: false,
            broken: None,
        }
    }

    /// Whether a writable socket has something to do.
    pub(super) fn wants(&self) -> bool {
        self.broken.is_none() && (self.at < self.pieces.len() || self.dirty)
    }

    /// The errno of a failed send.
    pub(super) fn broken(&self) -> Option<i32> {
        self.broken
    }

    /// The peer should hear of executed requests soon.
    pub(super) fn owe_ack(&mut self) {
        if self.told < self.executed {
            self.ack_due = true;
            self.dirty = true;
        }
    }

    /// Something that held back the next request may have changed.
    pub(super) fn resume(&mut self) {
        self.dirty = true;
    }

    /// Queues the answer to a read; `false` if the peer exceeds the bound.
    pub(super) fn serve(&mut self, serving: Serving) -> bool {
        let room = self.serving.len() < MAX_READS;
        if room {
            self.serving.push_back(serving);
            self.dirty = true;
        }
        room
    }

    /// Sends a refusal after everything that was promised before it, and nothing else.
    pub(super) fn refuse(&mut self, sequence: u64, why: Refusal) {
        self.refusal = Some((sequence, why));
        self.dirty = true;
    }

    /// Whether the train under way reads from `region`.
    pub(super) fn touches(&self, region: &Region) -> bool {
        let mut rest = self.pieces.iter().skip(self.at.max(1));
        rest.any(|piece| region.holds(piece.address as u64, piece.length as u64))
    }

    /// Nothing of the train under way goes out any more, so it holds no memory either.
    pub(super) fn abandon(&mut self) {
        self.pieces.clear();
        self.dmabufs.clear();
        self.at = 0;
    }

    fn has_room(&self) -> bool {
        self.headers.len() < TRAIN && self.bytes < TRAIN_BYTES && self.pieces.len() < PIECES
    }

    /// Builds the next train; `false` if there is nothing to send.
    fn build(
        &mut self,
        send: &mut SendQueue,
        receives: &ReceiveQueue,
        advertised: &mut u64,
        memory: &mut MemoryView,
        lane: LaneId,
    ) -> Result<bool, Fault> {
        self.headers.clear();
        self.pieces.clear();
        self.dmabufs.clear();
        self.at = 0;
        self.bytes = 0;
        // The headers' own piece; filled in when they are complete.
        self.pieces.push(Iov {
            address: 0,
            length: 0,
        });
        let requests_wait = self.refusal.is_none() && send.next().is_some() && !self.stalled;
        self.add_responses(memory, lane, requests_wait)?;
        if self.refusal.is_none() {
            self.add_requests(send, memory)?;
        } else if let Some((sequence, why)) = self.refusal
            && self.serving.is_empty()
            && self.has_room()
            && !self.refused
        {
            let mut header = Header::new(Op::Nak, sequence);
            header.imm = (why as u32).into();
            self.headers.push(header);
            self.refused = true;
        }
        let owes = self.ack_due && self.told < self.executed || credit_due(receives, *advertised);
        if self.headers.is_empty() && owes {
            self.headers.push(Header::new(Op::Ack, 0));
        }
        self.dirty = !self.headers.is_empty();
        if self.headers.is_empty() {
            self.pieces.clear();
            return Ok(false);
        }
        self.ack_due = false;
        self.told = self.executed;
        *advertised = receives.granted();
        let mut follow = self.headers.len() as u16;
        for header in &mut self.headers {
            follow -= 1;
            header.follow = follow.into();
            header.ack = self.executed.into();
            header.credit = receives.granted().into();
        }
        let bytes = self.headers.as_slice().as_bytes();
        if let Some(first) = self.pieces.first_mut() {
            *first = Iov {
                address: bytes.as_ptr().expose_provenance(),
                length: bytes.len(),
            };
        }
        Ok(true)
    }

    /// Adds segments of read responses; only half a train if requests wait too.
    fn add_responses(
        &mut self,
        memory: &mut MemoryView,
        lane: LaneId,
        share: bool,
    ) -> Result<(), Fault> {
        let limit = if share { TRAIN_BYTES / 2 } else { TRAIN_BYTES };
        while self.has_room() && self.bytes < limit {
            let Some(serving) = self.serving.front_mut() else {
                return Ok(());
            };
            // A read of nothing touches no memory and needs no key.
            let empty = serving.remaining == 0;
            let found = memory.remote(
                lane,
                serving.key,
                serving.address,
                serving.remaining.into(),
                Intent::RemoteRead,
            );
            if found.is_none() && !empty {
                let sequence = serving.sequence;
                if self.refusal.is_some() {
                    self.serving.clear();
                    return Ok(());
                }
                if !self.headers.is_empty() {
                    // The answers before it go out first.
                    return Ok(());
                }
                self.serving.clear();
                self.pieces.clear();
                return Err(Fault::Refuse {
                    sequence,
                    why: Refusal::Access,
                });
            }
            let length = serving.remaining.min(limit - self.bytes);
            let mut header = Header::new(Op::ReadResponse, serving.sequence);
            header.length = length.into();
            header.remaining = serving.remaining.into();
            self.headers.push(header);
            if let Some(found) = found.filter(|_| length > 0) {
                self.dmabufs.add(found.mapping);
                self.pieces.push(Iov {
                    address: found.host as usize,
                    length: length as usize,
                });
                self.bytes += length;
            }
            serving.address = serving.address.wrapping_add(length.into());
            serving.remaining -= length;
            if serving.remaining == 0 {
                self.serving.pop_front();
            }
        }
        Ok(())
    }

    fn add_requests(&mut self, send: &mut SendQueue, memory: &mut MemoryView) -> Result<(), Fault> {
        self.stalled = false;
        while self.has_room() {
            let Some(slot) = send.next() else {
                return Ok(());
            };
            let sequence = send.sent;
            if slot.refused {
                if self.headers.is_empty() && send.all_sent_done() {
                    return Err(Fault::Fail(Failure::new(Status::LocalProtection)));
                }
                return Ok(());
            }
            let request = &slot.request;
            let (op, imm) = match request.opcode {
                Opcode::Write => (Op::Write, 0),
                Opcode::WriteImm(imm) => (Op::WriteImm, imm),
                Opcode::Read => (Op::Read, 0),
            };
            let offset = send.sent_offset;
            if op == Op::WriteImm && offset == 0 {
                if self.imms_sent >= self.credit {
                    self.stalled = true;
                    return Ok(());
                }
                self.imms_sent += 1;
            }
            let mut header = Header::new(op, sequence);
            header.imm = imm.into();
            header.key = request.remote_key.0.into();
            // A range that wraps is refused by the peer.
            header.address = request.remote_address.wrapping_add(offset.into()).into();
            let remaining = slot.length - offset;
            header.remaining = remaining.into();
            let mut length = 0;
            if op == Op::Read {
                if !send.may_read() {
                    return Ok(());
                }
            } else {
                length = self.add_payload(send, sequence, &slot, memory)?;
                if length == 0 && remaining > 0 {
                    return Ok(());
                }
            }
            header.length = length.into();
            if op == Op::Read || length == remaining {
                if request.signaled {
                    header.flags = FLAG_ACK;
                }
                send.mark_sent(op == Op::Read);
            } else {
                send.sent_offset += length;
            }
            self.headers.push(header);
        }
        Ok(())
    }

    /// Adds pieces of the request's payload from where it stopped; returns how many bytes.
    fn add_payload(
        &mut self,
        send: &SendQueue,
        sequence: u64,
        slot: &super::send::Slot,
        memory: &mut MemoryView,
    ) -> Result<u32, Fault> {
        let offset = send.sent_offset;
        let room = (slot.length - offset).min(TRAIN_BYTES - self.bytes);
        let mut refused = false;
        let length = match send.gather(sequence, slot) {
            Gather::Inline(bytes) => {
                // An inline payload is far smaller than a train, but a train may be nearly full.
                let from = bytes.get(offset as usize..).unwrap_or_default();
                if room > 0 {
                    self.pieces.push(Iov {
                        address: from.as_ptr().expose_provenance(),
                        length: room as usize,
                    });
                }
                room
            }
            Gather::List(list) => pieces(list, offset, room, |sge, address, length| {
                if self.pieces.len() >= PIECES {
                    return false;
                }
                // Once more, because the registration may have ended since the post.
                let found = memory.local(sge.key, address, length.into(), Intent::LocalRead);
                let Some(found) = found else {
                    refused = true;
                    return false;
                };
                self.dmabufs.add(found.mapping);
                self.pieces.push(Iov {
                    address: found.host as usize,
                    length: length as usize,
                });
                true
            }),
        };
        if refused {
            return Err(Fault::Fail(Failure::new(Status::LocalProtection)));
        }
        self.bytes += length;
        Ok(length)
    }

    /// Drops `n` sent bytes from the front of the train.
    fn advance(&mut self, mut n: usize) {
        while let Some(piece) = self.pieces.get_mut(self.at) {
            if n < piece.length {
                piece.address += n;
                piece.length -= n;
                return;
            }
            n -= piece.length;
            self.at += 1;
        }
    }
}

impl Lane {
    /// Sends up to `trains` trains, or until the socket is full or there is nothing left.
    pub(super) fn flush(
        &mut self,
        memory: &mut MemoryView,
        timing: &Timing,
        trains: usize,
    ) -> Result<(), Fault> {
        let Some(fd) = self.fd() else {
            return Ok(());
        };
        let mut built = 0;
        while self.writable && self.transmitter.broken.is_none() {
            let transmitter = &mut self.transmitter;
            if transmitter.at >= transmitter.pieces.len() {
                if transmitter.refused {
                    self.linger(timing);
                    return Ok(());
                }
                if built == trains {
                    break;
                }
                built += 1;
                if !transmitter.build(
                    &mut self.send,
                    &self.receives,
                    &mut self.advertised,
                    memory,
                    self.id,
                )? {
                    break;
                }
            }
            let waiting = transmitter.pieces.get(transmitter.at..).unwrap_or_default();
            let sent = transmitter
                .dmabufs
                .around(Touch::Read, || sys::send_vectored(fd, waiting))
                .map_err(|error| Fault::Fail(Failure::of_memory(&error)))?;
            match sent {
                Ok(n) => transmitter.advance(n),
                Err(error) => match (error.kind(), error.raw_os_error()) {
                    (io::ErrorKind::WouldBlock, _) => self.writable = false,
                    (io::ErrorKind::Interrupted, _) => {}
                    (_, Some(libc::EFAULT)) => {
                        return Err(Fault::Fail(Failure::new(Status::LocalProtection)));
                    }
                    (_, errno) => {
                        // The peer may have said why before it went; its last words are read first.
                        transmitter.broken = Some(errno.unwrap_or(libc::EPIPE));
                        self.readable = true;
                        self.hangup = true;
                    }
                },
            }
        }
        if self.phase == Phase::Live {
            if !self.transmitter.stalled {
                self.rnr_deadline = None;
            } else if self.rnr_deadline.is_none() {
                self.rnr_deadline = after(timing.rnr);
            }
        }
        Ok(())
    }

    /// The refusal is out: fail, but let the peer read it.
    fn linger(&mut self, timing: &Timing) {
        if self.failure.is_none() {
            self.failure = Some(Failure::new(Status::Flushed));
        }
        if let Some(stream) = &self.stream {
            // Fails only if the peer has already gone, which the next read tells.
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        self.phase = Phase::Lingering;
        self.readable = true;
        self.deadline = after(timing.peer);
    }
}
