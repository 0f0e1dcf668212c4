//! Executing the peer's requests: the side that is written to, or read from. The context's thread only.
//!
//! A write is executed by copying from the peer's memory into our own. Nobody else ever writes our memory, so a lane is
//! fenced by not copying any more.
//!
//! A request counts as executed only when its bytes have been copied and the peer has been seen to be there *after*
//! that: it may have given the request up and used its memory for something else (see
//! [`Outbox::end`](super::ring::Outbox::end)).
//!
//! A read is executed by the requester, who copies from our memory: we say where (the answer), it says when it has
//! finished, and we look once more whether the registration still stands. So bytes of memory that was taken back in
//! the middle are never reported as read. A write that follows a read waits until the read is over.

use std::collections::VecDeque;

use super::{
    super::{
        LaneId,
        registry::Found,
        software::{Failure, ReceiveQueue},
    },
    copier::{Copier, CopyFault},
    files::PeerFiles,
    lane::Fault,
    memory::{Intent, MemoryView, Own, location},
    notes::Notes,
    ring::{Outbox, PeerBox, Word},
    sys::Process,
    wire::{Location, MAX_READS, Op, Refusal, SIGNALED, unpack},
};

/// A write that is being copied. Its description has been read once; the slot is not looked at again.
#[derive(Clone, Copy, Debug)]
struct Current {
    imm: Option<u32>,
    signaled: bool,
    key: u32,
    address: u64,
    length: u32,
    inline: bool,
    /// Bytes copied, or handed to the copier.
    done: u32,
    /// The gather element that is next, and how much of it is done.
    element: usize,
    element_done: u32,
}

/// A read of the peer that has been answered.
#[derive(Clone, Copy, Debug)]
struct Serving {
    key: u32,
    address: u64,
    length: u32,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Responder {
    /// The next request to look at.
    next: u64,
    /// How many have been executed.
    executed: u64,
    current: Option<Current>,
    /// The gather list of `current`.
    elements: Vec<(u32, Location)>,
    /// The immediates of writes that have been copied and not counted yet.
    staged: Vec<Option<u32>>,
    /// How many of them there are.
    staged_imms: u32,
    /// Whether the peer waits for one of them.
    staged_signals: bool,
    /// Whether something has been executed that the peer waits for, and it was not woken yet.
    is_awaited: bool,
    reads: VecDeque<Serving>,
    answered: u64,
    /// Whether the next request is a write that waits for the reads before it.
    is_blocked: bool,
    /// Rounds that moved bytes.
    rounds: u64,
}

/// What executing needs from around it.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    pub(super) lane: LaneId,
    pub(super) memory: &'a mut MemoryView,
    pub(super) copier: &'a mut Copier,
    pub(super) files: &'a mut PeerFiles,
    pub(super) process: Option<&'a Process>,
    pub(super) peer: &'a PeerBox,
    pub(super) outbox: &'a Outbox,
    pub(super) receives: &'a mut ReceiveQueue,
    pub(super) notes: &'a mut Notes,
}

/// How a round went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// There was nothing to do.
    Idle,
    /// Something was done.
    Moved,
    /// A request names a file that has not been announced; its announcement must be in the socket.
    UnknownFile,
}

impl Responder {
    /// Whether requests of the peer are unfinished, which is known without looking at its outbox.
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// Whether the peer should be woken, since it was asked last.
    pub(super) fn take_awaited(&mut self) -> bool {
        std::mem::take(&mut self.is_awaited)
    }

    /// How many reads have been answered. The peer may be told once it knows the files.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Whether the peer's counters say that there is something to execute.
    pub(super) fn has_news(&self, published: u64, reads_taken: u64) -> bool {
        let finished = self.answered - self.reads.len() as u64;
        (published != self.next && !self.is_blocked) || reads_taken != finished
    }

    /// Executes what has been published, up to about `budget` bytes and [`MOST_REQUESTS`].
    pub(super) fn run(
        &mut self,
        around: &mut Surroundings<'_>,
        published: u64,
        reads_taken: u64,
        budget: u32,
    ) -> Result<Round, Fault> {
        let depth = around.peer.geometry().depth;
        if published < self.next || published - self.executed > u64::from(depth) {
            return Err(Fault::Fail(Failure::protocol()));
        }
        let before = (self.next, self.executed, self.current.map(|c| c.done));
        self.finish_reads(around, reads_taken)?;
        let stopped = self.fill(around, published, budget);
        let flushed = around.copier.flush(around.process);
        let copied = match stopped {
            Err(Stop::Copy(fault)) if fault != CopyFault::UnknownFile => flushed.and(Err(fault)),
            _ => flushed,
        };
        // What was before a refusal counts.
        self.count(around, copied)?;
        let unknown = match stopped {
            Ok(()) => false,
            Err(Stop::Copy(_)) => true,
            Err(Stop::Refuse(why)) => {
                let sequence = self.next;
                return Err(Fault::Refuse { sequence, why });
            }
            Err(Stop::Protocol) => return Err(Fault::Fail(Failure::protocol())),
        };
        let moved = before != (self.next, self.executed, self.current.map(|c| c.done));
        if moved {
            self.rounds += 1;
            around.outbox.store(Word::Rounds, self.rounds);
        }
        Ok(match (unknown, moved) {
            (true, _) => Round::UnknownFile,
            (false, true) => Round::Moved,
            (false, false) => Round::Idle,
        })
    }

    /// Counts the reads that the peer has finished.
    fn finish_reads(&mut self, around: &mut Surroundings<'_>, taken: u64) -> Result<(), Fault> {
        let finished = self.answered - self.reads.len() as u64;
        if taken < finished || taken > self.answered {
            return Err(Fault::Fail(Failure::protocol()));
        }
        for _ in finished..taken {
            let Some(read) = self.reads.pop_front() else {
                break;
            };
            if read.length > 0 && find_read(around.memory, around.lane, &read).is_none() {
                let (sequence, why) = (self.executed, Refusal::Access);
                return Err(Fault::Refuse { sequence, why });
            }
            self.executed += 1;
        }
        if taken > finished {
            self.is_blocked = false;
            self.is_awaited = true;
            around.outbox.store(Word::Executed, self.executed);
        }
        Ok(())
    }

    /// Takes requests and copies, or has the copier collect, what they name.
    fn fill(
        &mut self,
        around: &mut Surroundings<'_>,
        published: u64,
        mut budget: u32,
    ) -> Result<(), Stop> {
        for _ in 0..MOST_REQUESTS {
            if budget == 0 {
                break;
            }
            if self.current.is_none() {
                if self.next == published || !self.take(around)? {
                    break;
                }
                if self.current.is_none() {
                    continue;
                }
            }
            self.advance(around, &mut budget)?;
        }
        Ok(())
    }

    /// Reads the next request. Returns whether to go on; a write is then `current`, a read has been answered.
    fn take(&mut self, around: &mut Surroundings<'_>) -> Result<bool, Stop> {
        let request = around.peer.request(self.next);
        let (op, inline, count) = unpack(request.what).ok_or(Stop::Protocol)?;
        let (key, length) = ((request.key_length >> 32) as u32, request.key_length as u32);
        if u64::from(length) > MAX_MESSAGE || count > around.peer.max_elements() {
            return Err(Stop::Protocol);
        }
        let imm = match op {
            Op::Read => {
                let read = Serving {
                    key,
                    address: request.address,
                    length,
                };
                return self.answer(around, read);
            }
            // What the reads before it saw must not change.
            Op::Write | Op::WriteImm(_) if !self.reads.is_empty() => {
                self.is_blocked = true;
                return Ok(false);
            }
            Op::WriteImm(imm) => {
                if around.receives.posted() <= self.staged_imms {
                    return Err(Stop::Refuse(Refusal::NoReceive));
                }
                Some(imm)
            }
            Op::Write => None,
        };
        self.elements.clear();
        if !inline {
            let mut total = 0u64;
            for index in 0..count {
                let element = around.peer.element(self.next, index);
                total += u64::from(element.0);
                self.elements.push(element);
            }
            if total != u64::from(length) {
                return Err(Stop::Protocol);
            }
        }
        self.current = Some(Current {
            imm,
            signaled: request.what & SIGNALED != 0,
            key,
            address: request.address,
            length,
            inline,
            done: 0,
            element: 0,
            element_done: 0,
        });
        Ok(true)
    }

    /// Copies more of the current write.
    fn advance(&mut self, around: &mut Surroundings<'_>, budget: &mut u32) -> Result<(), Stop> {
        let Some(mut current) = self.current else {
            return Ok(());
        };
        if current.length > 0 {
            // The whole range, each time: the registration may have ended since.
            let (address, length) = (current.address, current.length.into());
            let found = around.memory.remote(
                around.lane,
                current.key,
                address,
                length,
                Intent::RemoteWrite,
            );
            let Some(to) = found else {
                return Err(Stop::Refuse(Refusal::Access));
            };
            if current.inline {
                let from = around.peer.inline(self.next, current.length);
                let from = from.ok_or(Stop::Protocol)?;
                // SAFETY: the source lies in the peer's outbox, which is mapped while `peer` lives; the destination in
                // a live registration of our own that peers may write.
                unsafe { around.copier.copy_here(from, &to, current.length) }
                    .map_err(Stop::Copy)?;
                current.done = current.length;
                *budget = budget.saturating_sub(current.length);
            }
            while current.done < current.length && *budget > 0 {
                // The lengths add up to the message, so there is one.
                let Some(&(whole, from)) = self.elements.get(current.element) else {
                    return Err(Stop::Protocol);
                };
                let length = (whole - current.element_done).min(*budget);
                if length > 0 {
                    let from = Location {
                        place: from.place.wrapping_add(current.element_done.into()),
                        ..from
                    };
                    let to = Found {
                        host: to.host + u64::from(current.done),
                        ..to
                    };
                    let (copier, files) = (&mut *around.copier, &mut *around.files);
                    let owner = self.staged.len();
                    // SAFETY: the destination lies in a live registration of our own that peers may write; nothing
                    // ends registrations before the flush.
                    unsafe { copier.copy(owner, files, around.process, (from, &to), length) }
                        .map_err(Stop::Copy)?;
                    *budget -= length;
                    current.done += length;
                    current.element_done += length;
                }
                if current.element_done == whole {
                    current.element += 1;
                    current.element_done = 0;
                }
                self.current = Some(current);
            }
        }
        if current.done == current.length {
            self.current = None;
            self.staged.push(current.imm);
            self.staged_imms += u32::from(current.imm.is_some());
            self.staged_signals |= current.signaled;
            self.next += 1;
        } else {
            self.current = Some(current);
        }
        Ok(())
    }

    /// Answers a read. Returns `false` if writes before it must be counted first.
    fn answer(&mut self, around: &mut Surroundings<'_>, read: Serving) -> Result<bool, Stop> {
        if !self.staged.is_empty() {
            return Ok(false);
        }
        if self.reads.len() >= MAX_READS {
            return Err(Stop::Protocol);
        }
        let mut from = Location::default();
        if read.length > 0 {
            let found = find_read(around.memory, around.lane, &read);
            let found = found.ok_or(Stop::Refuse(Refusal::Access))?;
            if let Some(file) = found.own {
                around.notes.announce(file);
            }
            from = location(&found);
        }
        around.outbox.put_answer(self.answered, from);
        self.reads.push_back(read);
        self.next += 1;
        self.answered += 1;
        Ok(true)
    }

    /// Counts the writes that have been copied, if the peer still stands by them.
    fn count(
        &mut self,
        around: &mut Surroundings<'_>,
        copied: Result<(), CopyFault>,
    ) -> Result<(), Fault> {
        let whole = match copied {
            Ok(()) => self.staged.len(),
            Err(CopyFault::Missing { owner }) => owner.min(self.staged.len()),
            Err(fault) => return Err(self.copy_fault(fault)),
        };
        if (whole > 0 || copied.is_err()) && around.peer.has_ended() {
            // Nothing of it counts; the state says the rest.
            return Err(Fault::Ended);
        }
        let first = self.executed;
        if whole > 0 {
            for imm in self.staged.iter().take(whole) {
                if let Some(imm) = imm
                    && !around.receives.consume(*imm)
                {
                    return Err(Fault::Fail(Failure::protocol()));
                }
                self.executed += 1;
            }
            around.outbox.store(Word::Executed, self.executed);
            self.is_awaited |= self.staged_signals;
        }
        self.staged.clear();
        self.staged_imms = 0;
        self.staged_signals = false;
        if copied.is_err() {
            return Err(Fault::Refuse {
                sequence: first + whole as u64,
                why: Refusal::Source,
            });
        }
        Ok(())
    }

    fn copy_fault(&self, fault: CopyFault) -> Fault {
        match fault {
            CopyFault::UnknownFile | CopyFault::Missing { .. } => Fault::Fail(Failure::protocol()),
            CopyFault::Gone => Fault::Fail(Failure::lost(libc::ESRCH)),
            CopyFault::Exporter(errno) => Fault::Fail(Failure::os(errno)),
            CopyFault::NotAllowed(errno) => {
                tracing::warn!(
                    errno,
                    "reading the peer's memory was refused in mid-stream; memory files need no such permission"
                );
                Fault::Refuse {
                    sequence: self.executed,
                    why: Refusal::Source,
                }
            }
        }
    }
}

/// What `read` may read; nothing if it must not (any more).
fn find_read<'a>(
    memory: &'a mut MemoryView,
    lane: LaneId,
    read: &Serving,
) -> Option<Found<'a, Own>> {
    memory.remote(
        lane,
        read.key,
        read.address,
        read.length.into(),
        Intent::RemoteRead,
    )
}

/// Why no more requests are taken in this round.
enum Stop {
    Copy(CopyFault),
    Refuse(Refusal),
    Protocol,
}

/// Most requests of one round, so that lanes share the thread fairly.
const MOST_REQUESTS: usize = 1024;

/// Most bytes of a message.
pub(super) const MAX_MESSAGE: u64 = 1 << 31;
