//! The receiving half of a lane: parses trains and aims `readv` at the destination pages. The context's thread only.
//!
//! All headers of a train are known before its payload is read, so one call fills many pages and the first header of
//! the next train. Keys, ranges and permissions are checked for every call, because a registration may end between two
//! calls; nothing is aimed at memory that was not checked in the same turn.

use std::io;

use zerocopy::FromBytes;

use super::{
    super::{
        Opcode, Status,
        mapping::{Brackets, Touch},
        software::{Failure, IOV_MAX, Iov},
    },
    lane::{Fault, Lane, Phase},
    memory::{Intent, MemoryView},
    send::{Gather, pieces},
    sys,
    transmit::Serving,
    wire::{FLAG_ACK, Header, Op, Refusal, TRAIN},
};

/// Calls of `readv` in one service of a lane, so that lanes share the thread fairly.
const SERVICE_READS: usize = 8;

/// A write whose first segments have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Partial {
    op: Op,
    key: u32,
    address: u64,
    remaining: u32,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Headers on their way in.
    stash: Box<[u8]>,
    have: usize,
    /// The train whose payload is being read.
    frames: Vec<(Op, Header)>,
    /// The first frame that is not finished, and how much of its payload is placed.
    at: usize,
    done: u32,
    pieces: Vec<Iov>,
    /// The dmabufs that the pieces point into.
    dmabufs: Brackets,
    /// The number of the peer's next request.
    expected: u64,
    partial: Option<Partial>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            stash: vec![0; TRAIN * Header::BYTES].into(),
            have: 0,
            frames: Vec::with_capacity(TRAIN),
            at: 0,
            done: 0,
            pieces: Vec::with_capacity(IOV_MAX),
            dmabufs: Brackets::default(),
            expected: 0,
            partial: None,
        }
    }

    /// How many header bytes the train under way is known to have.
    fn header_bytes(&self) -> usize {
        let first = self.stash.get(..Header::BYTES.min(self.have));
        match first.and_then(|bytes| Header::read_from_bytes(bytes).ok()) {
            Some(first) => (1 + usize::from(first.follow.get())) * Header::BYTES,
            None => Header::BYTES,
        }
    }

    /// Aims at the part of the stash up to `end`; `false` if no train has that many headers.
    fn aim_at_stash(&mut self, end: usize) -> bool {
        let Some(room) = self.stash.get_mut(self.have..end) else {
            return false;
        };
        self.pieces.push(Iov {
            address: room.as_mut_ptr().expose_provenance(),
            length: room.len(),
        });
        true
    }

    /// Takes the headers out of the stash and checks what does not depend on registrations.
    fn decode(&mut self) -> Option<()> {
        let (headers, have) = (&self.stash, std::mem::take(&mut self.have));
        self.frames.clear();
        self.at = 0;
        self.done = 0;
        let count = have / Header::BYTES;
        for (index, bytes) in headers.get(..have)?.chunks_exact(Header::BYTES).enumerate() {
            let header = Header::read_from_bytes(bytes).ok()?;
            let op = header.op()?;
            if usize::from(header.follow.get()) != count - 1 - index {
                return None;
            }
            match op {
                Op::Write | Op::WriteImm => {
                    let (length, remaining) = (header.length.get(), header.remaining.get());
                    let here = Partial {
                        op,
                        key: header.key.get(),
                        address: header.address.get(),
                        remaining,
                    };
                    if header.sequence.get() != self.expected
                        || self.partial.is_some_and(|partial| partial != here)
                    {
                        return None;
                    }
                    if header.is_last() {
                        self.expected += 1;
                        self.partial = None;
                    } else {
                        self.partial = Some(Partial {
                            // A range that wraps is refused before this matters.
                            address: here.address.wrapping_add(length.into()),
                            remaining: remaining - length,
                            ..here
                        });
                    }
                }
                Op::Read => {
                    if header.sequence.get() != self.expected || self.partial.is_some() {
                        return None;
                    }
                    self.expected += 1;
                }
                Op::ReadResponse | Op::Ack | Op::Nak => {}
            }
            self.frames.push((op, header));
        }
        Some(())
    }
}

impl Lane {
    /// Reads up to [`SERVICE_READS`] times, or until the socket is drained.
    pub(super) fn receive(&mut self, memory: &mut MemoryView) -> Result<(), Fault> {
        for _ in 0..SERVICE_READS {
            let Some(fd) = self.fd().filter(|_| self.readable) else {
                break;
            };
            let wanted = self.aim(memory)?;
            let receiver = &self.receiver;
            let read = receiver.dmabufs.around(Touch::Write, || {
                // SAFETY: `aim` has just filled the pieces with the lane's own stash and with ranges of live
                // registrations that allow this write; nothing ran in between.
                unsafe { sys::read_vectored(fd, &receiver.pieces) }
            });
            // Nothing is aimed at any more, so a registration may end.
            self.receiver.dmabufs.clear();
            match read.map_err(|error| Fault::Fail(Failure::of_memory(&error)))? {
                Ok(0) => {
                    return Err(Fault::Fail(Failure::lost(
                        self.transmitter.broken().unwrap_or(0),
                    )));
                }
                Ok(n) => {
                    // epoll(7): a short read of a stream means it is drained; its end makes another event.
                    if n < wanted && !self.hangup {
                        self.readable = false;
                    }
                    self.place(n, memory)?;
                }
                Err(error) => match (error.kind(), error.raw_os_error()) {
                    (io::ErrorKind::WouldBlock, _) => self.readable = false,
                    (io::ErrorKind::Interrupted, _) => {}
                    (_, Some(libc::EFAULT)) => return Err(self.unmapped()),
                    (_, errno) => return Err(Fault::Fail(Failure::lost(errno.unwrap_or(0)))),
                },
            }
        }
        match self.transmitter.broken() {
            Some(errno) if !self.readable => Err(Fault::Fail(Failure::lost(errno))),
            _ => {
                if !self.readable && self.transmitter.executed > 0 {
                    // Nothing more to wait for: tell the peer of what was executed.
                    self.transmitter.owe_ack();
                }
                if self.is_credit_due() {
                    self.transmitter.dirty = true;
                }
                Ok(())
            }
        }
    }

    /// The kernel found registered memory that is not mapped.
    fn unmapped(&self) -> Fault {
        match self.receiver.frames.get(self.receiver.at) {
            Some((Op::Write | Op::WriteImm, header)) => Fault::Refuse {
                sequence: header.sequence.get(),
                why: Refusal::Access,
            },
            _ => Fault::Fail(Failure::new(Status::LocalProtection)),
        }
    }

    /// Points `pieces` at where the next bytes of the stream go, and says how many bytes that is.
    fn aim(&mut self, memory: &mut MemoryView) -> Result<usize, Fault> {
        let receiver = &mut self.receiver;
        receiver.pieces.clear();
        receiver.dmabufs.clear();
        let mut fault = None;
        // Read responses are matched with the oldest outstanding reads.
        let (mut ahead, mut answered) = (0, None);
        for index in receiver.at..receiver.frames.len() {
            let Some((op, header)) = receiver.frames.get(index) else {
                break;
            };
            let done = if index == receiver.at {
                receiver.done
            } else {
                0
            };
            let left = header.length.get() - done;
            match op {
                Op::Write | Op::WriteImm if left > 0 => {
                    let (address, whole) = (header.address.get(), header.remaining.get());
                    let key = header.key.get();
                    let found =
                        memory.remote(self.id, key, address, whole.into(), Intent::RemoteWrite);
                    let Some(found) = found else {
                        fault = Some(Fault::Refuse {
                            sequence: header.sequence.get(),
                            why: Refusal::Access,
                        });
                        break;
                    };
                    receiver.dmabufs.add(found.mapping);
                    receiver.pieces.push(Iov {
                        address: (found.host + u64::from(done)) as usize,
                        length: left as usize,
                    });
                }
                Op::ReadResponse => {
                    let Some((sequence, slot, placed)) = self.send.read_in_flight(ahead) else {
                        fault = Some(Fault::Fail(Failure::protocol()));
                        break;
                    };
                    let offset = answered.unwrap_or(placed);
                    if header.sequence.get() != sequence
                        || header.remaining.get() != slot.length - offset
                    {
                        fault = Some(Fault::Fail(Failure::protocol()));
                        break;
                    }
                    let Gather::List(list) = self.send.gather(sequence, &slot) else {
                        break;
                    };
                    let mut refused = false;
                    let (room, dmabufs) = (&mut receiver.pieces, &mut receiver.dmabufs);
                    let aimed = pieces(list, offset + done, left, |sge, address, length| {
                        let found =
                            memory.local(sge.key, address, length.into(), Intent::LocalWrite);
                        refused = found.is_none();
                        let found = found.filter(|_| room.len() < IOV_MAX - 1);
                        if let Some(found) = found {
                            dmabufs.add(found.mapping);
                            room.push(Iov {
                                address: found.host as usize,
                                length: length as usize,
                            });
                        }
                        found.is_some()
                    });
                    if refused {
                        fault = Some(Fault::Fail(Failure::new(Status::LocalProtection)));
                    }
                    if aimed < left {
                        break;
                    }
                    if header.is_last() {
                        ahead += 1;
                        answered = None;
                    } else {
                        answered = Some(offset + header.length.get());
                    }
                }
                _ => {}
            }
            if index + 1 == receiver.frames.len() {
                receiver.aim_at_stash(Header::BYTES);
            }
        }
        if receiver.frames.is_empty() && !receiver.aim_at_stash(receiver.header_bytes()) {
            return Err(Fault::Fail(Failure::protocol()));
        }
        match fault {
            Some(fault) if receiver.pieces.is_empty() => Err(fault),
            _ => Ok(receiver.pieces.iter().map(|piece| piece.length).sum()),
        }
    }

    /// Accounts for `n` bytes that have landed where [`Lane::aim`] pointed.
    fn place(&mut self, mut n: usize, memory: &mut MemoryView) -> Result<(), Fault> {
        n = self.finish_frames(n, memory)?;
        if self.receiver.frames.is_empty() {
            self.receiver.have += n;
            let have = self.receiver.have;
            if have >= Header::BYTES && have == self.receiver.header_bytes() {
                self.receiver
                    .decode()
                    .ok_or(Fault::Fail(Failure::protocol()))?;
                // Frames without payload need no further bytes.
                self.finish_frames(0, memory)?;
            }
        }
        Ok(())
    }

    /// Spreads `n` placed bytes over the frames and finishes those that are complete. Returns what is left.
    fn finish_frames(&mut self, mut n: usize, memory: &mut MemoryView) -> Result<usize, Fault> {
        while let Some(&(op, header)) = self.receiver.frames.get(self.receiver.at) {
            let left = header.length.get() - self.receiver.done;
            let taken = left.min(u32::try_from(n).unwrap_or(u32::MAX));
            n -= taken as usize;
            self.receiver.done += taken;
            if taken < left {
                return Ok(n);
            }
            self.finish_frame(op, &header, memory)?;
            self.receiver.at += 1;
            self.receiver.done = 0;
        }
        self.receiver.frames.clear();
        self.receiver.at = 0;
        Ok(n)
    }

    fn finish_frame(
        &mut self,
        op: Op,
        header: &Header,
        memory: &mut MemoryView,
    ) -> Result<(), Fault> {
        self.take_counters(header)?;
        let sequence = header.sequence.get();
        match op {
            Op::Write if header.is_last() => self.count_executed(header),
            Op::WriteImm if header.is_last() => {
                if !self.receives.consume(header.imm.get()) {
                    let why = Refusal::NoReceive;
                    return Err(Fault::Refuse { sequence, why });
                }
                self.count_executed(header);
            }
            Op::Write | Op::WriteImm => {}
            Op::Read => {
                let serving = Serving {
                    sequence,
                    key: header.key.get(),
                    address: header.address.get(),
                    remaining: header.remaining.get(),
                };
                let allowed = serving.remaining == 0
                    || memory
                        .remote(
                            self.id,
                            serving.key,
                            serving.address,
                            serving.remaining.into(),
                            Intent::RemoteRead,
                        )
                        .is_some();
                if !allowed {
                    let why = Refusal::Access;
                    return Err(Fault::Refuse { sequence, why });
                }
                if !self.transmitter.serve(serving) {
                    return Err(Fault::Fail(Failure::protocol()));
                }
                self.count_executed(header);
            }
            Op::ReadResponse => {
                let expected = self
                    .send
                    .read_in_flight(0)
                    .is_some_and(|(number, slot, placed)| {
                        number == sequence
                            && slot.request.opcode == Opcode::Read
                            && slot.length - placed == header.remaining.get()
                    });
                if !expected {
                    return Err(Fault::Fail(Failure::protocol()));
                }
                self.send
                    .advance_read(header.length.get(), header.is_last());
                self.transmitter.dirty = true;
            }
            Op::Ack => {}
            Op::Nak => {
                let why = Refusal::from_wire(header.imm.get());
                if !self.send.refused_at(sequence) {
                    return Err(Fault::Fail(Failure::protocol()));
                }
                return Err(Fault::Fail(match why {
                    Some(Refusal::Access) => Failure::new(Status::RemoteAccess),
                    Some(Refusal::NoReceive) => Failure::new(Status::RnrRetryExceeded),
                    None => Failure::protocol(),
                }));
            }
        }
        Ok(())
    }

    fn count_executed(&mut self, header: &Header) {
        self.transmitter.executed += 1;
        if header.flags & FLAG_ACK != 0 {
            self.transmitter.owe_ack();
        }
    }

    /// Takes over the acknowledgement and the credit that every header carries.
    fn take_counters(&mut self, header: &Header) -> Result<(), Fault> {
        let credit = header.credit.get();
        if !self.send.acknowledge(header.ack.get()) || credit < self.transmitter.credit {
            return Err(Fault::Fail(Failure::protocol()));
        }
        if credit > self.transmitter.credit {
            self.transmitter.credit = credit;
            self.rnr_deadline = None;
        }
        self.transmitter.resume();
        Ok(())
    }

    /// Throws away what a refused peer still sends, until it has closed its end.
    pub(super) fn discard(&mut self) {
        debug_assert_eq!(self.phase, Phase::Lingering);
        let mut waste = [0u8; 16 << 10];
        for _ in 0..SERVICE_READS {
            let Some(fd) = self.fd() else {
                return;
            };
            let piece = Iov {
                address: waste.as_mut_ptr().expose_provenance(),
                length: waste.len(),
            };
            // SAFETY: a local buffer, not otherwise used.
            match unsafe { sys::read_vectored(fd, &[piece]) } {
                Ok(0) => return self.fail(Failure::new(Status::Flushed)),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return;
                    }
                    io::ErrorKind::Interrupted => {}
                    _ => return self.fail(Failure::new(Status::Flushed)),
                },
            }
        }
    }
}
