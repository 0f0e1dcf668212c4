//! The send queue of a lane: from post to completion. The context's thread only.
//!
//! A request goes into its slot of the outbox when it is posted, and becomes the peer's business when it is
//! *published*: at once, unless it has to wait for a receive, for an earlier read, or for the peer to know a file.
//!
//! `head ≤ done ≤ published ≤ posted` are request numbers that only grow; a request's slot is its number modulo the
//! depth, so nothing is allocated after the lane has been created.

use std::collections::VecDeque;

use super::{
    super::{
        Completion, FabricErrorKind, LaneConfig, LaneId, LocalKey, Opcode, Sge, WorkRequest,
        software::{Failure, Finished},
    },
    memory::{InFile, Intent, MemoryView, Region, location},
    ring::{Descriptor, Outbox, Word},
    wire::{MAX_READS, Op, SIGNALED, pack},
};

/// What is kept of a posted request.
#[derive(Clone, Copy, Debug)]
struct Slot {
    id: u64,
    opcode: Opcode,
    signaled: bool,
    /// Payload bytes.
    length: u32,
    /// Gather elements kept; none for an inline request.
    elements: u32,
    /// Whether its gather list was refused at the post; it completes with [`Status::LocalProtection`] once all before
    /// it have completed.
    refused: bool,
    /// Whether it names memory that is in no file, so the peer must be able to read this process's memory.
    in_process: bool,
}

const EMPTY: Slot = Slot {
    id: 0,
    opcode: Opcode::Write,
    signaled: false,
    length: 0,
    elements: 0,
    refused: false,
    in_process: false,
};

/// See the module's description.
#[derive(Debug)]
pub(super) struct Requester {
    max_sge: usize,
    max_inline: u32,
    max_message: u64,
    slots: Box<[Slot]>,
    sges: Box<[Sge]>,
    finished: Finished,
    /// How many requests the peer has executed.
    done: u64,
    published: u64,
    posted: u64,
    /// How many writes with immediate the peer allows, and how many were published.
    credit: u64,
    imms: u64,
    /// Published reads that the peer has not declared executed, oldest first.
    reads: VecDeque<u64>,
    /// How many of them have been taken, and how many ever.
    taken_here: usize,
    taken: u64,
    /// How many reads were ever published.
    reads_published: u64,
    /// The file that the last gather element was in, which the peer knows.
    last_file: u32,
}

/// What holds the next request back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// Nothing; all are published.
    Nothing,
    /// It waits for a receive of the peer.
    Receive,
    /// It waits for earlier reads.
    Reads,
    /// It can never go: its gather list names what it must not, or what the peer cannot read.
    Refused,
}

impl Requester {
    pub(super) fn new(config: &LaneConfig, max_message: u64) -> Self {
        let depth = config.send_depth.max(1) as usize;
        let empty = Sge {
            address: 0,
            length: 0,
            key: LocalKey(0),
        };
        Self {
            max_sge: config.max_sge as usize,
            max_inline: config.max_inline,
            max_message,
            slots: vec![EMPTY; depth].into(),
            sges: vec![empty; depth * config.max_sge as usize].into(),
            finished: Finished::new(depth),
            done: 0,
            published: 0,
            posted: 0,
            credit: 0,
            imms: 0,
            reads: VecDeque::with_capacity(MAX_READS),
            taken_here: 0,
            taken: 0,
            reads_published: 0,
            last_file: 0,
        }
    }

    fn index(&self, sequence: u64) -> usize {
        // Less than the depth, which is a usize.
        (sequence % self.slots.len() as u64) as usize
    }

    fn slot(&self, sequence: u64) -> Option<&Slot> {
        self.slots.get(self.index(sequence))
    }

    /// Accepts one request. Calls `announce` for a file that it names and the one before did not.
    ///
    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`] of this request.
    pub(super) unsafe fn push(
        &mut self,
        request: &WorkRequest,
        sges: &[Sge],
        memory: &mut MemoryView,
        outbox: &Outbox,
        mut announce: impl FnMut(&InFile),
    ) -> Result<(), FabricErrorKind> {
        self.check_room()?;
        let limit = |what, value, limit| Err(FabricErrorKind::Limit { what, value, limit });
        let (first, count) = (request.first_sge as usize, request.sge_count as usize);
        let Some(list) = first
            .checked_add(count)
            .and_then(|end| sges.get(first..end))
        else {
            let end = u64::from(request.first_sge) + u64::from(request.sge_count);
            return limit("end of the gather list", end, sges.len() as u64);
        };
        let length = list.iter().map(|sge| u64::from(sge.length)).sum::<u64>();
        let (op, is_read) = match request.opcode {
            Opcode::Write => (Op::Write, false),
            Opcode::WriteImm(imm) => (Op::WriteImm(imm), false),
            Opcode::Read => (Op::Read, true),
        };
        let sequence = self.posted;
        let index = self.index(sequence);
        let mut slot = Slot {
            id: request.id,
            opcode: request.opcode,
            signaled: request.signaled,
            length: length as u32,
            ..EMPTY
        };
        if request.inline {
            if is_read {
                return limit("inline read", 1, 0);
            }
            if length > u64::from(self.max_inline) {
                return limit("inline payload", length, self.max_inline.into());
            }
            let mut offset = 0;
            for sge in list {
                let piece = sge.length as usize;
                // SAFETY: the caller promises that the elements of an inline request are readable, and written by
                // nobody, during the post.
                unsafe { outbox.put_inline(sequence, offset, sge.address, piece) };
                offset += piece;
            }
        } else {
            if count > self.max_sge {
                return limit("gather elements", count as u64, self.max_sge as u64);
            }
            if length > self.max_message {
                return limit("message length", length, self.max_message);
            }
            let start = index * self.max_sge;
            let Some(room) = self.sges.get_mut(start..start + count) else {
                return limit("gather elements", count as u64, 0);
            };
            room.copy_from_slice(list);
            slot.elements = count as u32;
            let intent = if is_read {
                Intent::LocalWrite
            } else {
                Intent::LocalRead
            };
            for (element, sge) in list.iter().enumerate() {
                if sge.length == 0 {
                    outbox.put_element(sequence, element, 0, Default::default());
                    continue;
                }
                let Some(found) = memory.local(sge.key, sge.address, sge.length.into(), intent)
                else {
                    slot.refused = true;
                    continue;
                };
                if is_read {
                    continue;
                }
                match found.own {
                    Some(file) if file.file.number != self.last_file => {
                        announce(file);
                        self.last_file = file.file.number;
                    }
                    Some(_) => {}
                    None => slot.in_process = true,
                }
                outbox.put_element(sequence, element, sge.length, location(&found));
            }
        }
        let elements = if is_read { 0 } else { slot.elements };
        let signaled = if request.signaled { SIGNALED } else { 0 };
        outbox.put_request(
            sequence,
            &Descriptor {
                what: pack(op, request.inline, elements) | signaled,
                address: request.remote_address,
                key_length: u64::from(request.remote_key.0) << 32 | length,
            },
        );
        if let Some(room) = self.slots.get_mut(index) {
            *room = slot;
        }
        self.posted += 1;
        Ok(())
    }

    /// An error if every slot is in use.
    pub(super) fn check_room(&self) -> Result<(), FabricErrorKind> {
        self.finished.check_room(self.posted, self.slots.len())
    }

    /// Takes a slot, which must be free, for something that is done already.
    pub(super) fn push_done(&mut self, id: u64) {
        self.finished.push_done(id);
    }

    /// A file is not known to the peer any more.
    pub(super) fn forget_file(&mut self) {
        self.last_file = 0;
    }

    /// Publishes what can go; returns what holds the rest back, and whether anything was published.
    pub(super) fn publish(&mut self, outbox: &Outbox, peer_reads_process: bool) -> (Hold, bool) {
        let before = self.published;
        let hold = loop {
            if self.published == self.posted {
                break Hold::Nothing;
            }
            let Some(slot) = self.slot(self.published) else {
                break Hold::Nothing;
            };
            if slot.refused || (slot.in_process && !peer_reads_process) {
                break Hold::Refused;
            }
            match slot.opcode {
                Opcode::WriteImm(_) if self.imms == self.credit => break Hold::Receive,
                Opcode::WriteImm(_) => self.imms += 1,
                Opcode::Read if self.reads.len() >= MAX_READS => break Hold::Reads,
                Opcode::Read => {
                    self.reads.push_back(self.published);
                    self.reads_published += 1;
                }
                Opcode::Write => {}
            }
            self.published += 1;
        };
        let moved = self.published != before;
        if moved {
            outbox.store(Word::Published, self.published);
        }
        (hold, moved)
    }

    /// Whether the next request can never go, and fails the lane once all before it have been executed.
    pub(super) fn is_doomed(&self, peer_reads_process: bool) -> bool {
        let next = self.slot(self.published);
        self.published < self.posted
            && next.is_some_and(|slot| slot.refused || (slot.in_process && !peer_reads_process))
    }

    /// Whether the peer has executed everything that was published.
    pub(super) fn is_quiet(&self) -> bool {
        self.done == self.published
    }

    /// Whether there are requests that are not published.
    pub(super) fn has_held_back(&self) -> bool {
        self.published < self.posted
    }

    /// How many requests the peer has executed.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// Takes over the peer's counters; `None` if they are impossible, else whether anything is new.
    pub(super) fn take_counters(&mut self, executed: u64, credit: u64) -> Option<bool> {
        let untaken = self.reads.get(self.taken_here);
        let most = untaken.map_or(self.published, |&read| read);
        if executed < self.done || executed > most || credit < self.credit {
            return None;
        }
        let news = executed != self.done || credit != self.credit;
        self.done = executed;
        self.credit = credit;
        while self.reads.front().is_some_and(|&read| read < executed) {
            self.reads.pop_front();
            self.taken_here -= 1;
        }
        Some(news)
    }

    /// Whether the peer's counters are not those that were taken over last.
    pub(super) fn is_news(&self, executed: u64, credit: u64) -> bool {
        executed != self.done || credit != self.credit
    }

    /// Takes over only the executed requests, at the end of a lane; impossible figures are ignored.
    pub(super) fn take_last(&mut self, executed: u64) {
        let credit = self.credit;
        let _ = self.take_counters(executed, credit);
    }

    /// The peer refused request `sequence`, so it executed those before; `false` if that is impossible.
    pub(super) fn refused_at(&mut self, sequence: u64) -> bool {
        let credit = self.credit;
        sequence >= self.done
            && sequence < self.published
            && self.take_counters(sequence, credit).is_some()
    }

    /// How many reads were taken.
    pub(super) fn reads_taken(&self) -> u64 {
        self.taken
    }

    /// How many reads were published.
    pub(super) fn reads_published(&self) -> u64 {
        self.reads_published
    }

    /// The next read to take: its length and gather list.
    pub(super) fn next_read(&self) -> Option<(u32, &[Sge])> {
        let sequence = *self.reads.get(self.taken_here)?;
        let slot = self.slot(sequence)?;
        let start = self.index(sequence) * self.max_sge;
        let list = self.sges.get(start..start + slot.elements as usize)?;
        Some((slot.length, list))
    }

    /// The read of [`Requester::next_read`] has been taken.
    pub(super) fn read_taken(&mut self) {
        self.taken_here += 1;
        self.taken += 1;
    }

    /// Whether a published or waiting request names memory of `region`.
    pub(super) fn touches(&self, region: &Region) -> bool {
        (self.done..self.posted).any(|sequence| {
            let Some(slot) = self.slot(sequence) else {
                return false;
            };
            let start = self.index(sequence) * self.max_sge;
            let list = self.sges.get(start..start + slot.elements as usize);
            list.unwrap_or_default()
                .iter()
                .any(|sge| sge.length > 0 && region.names(sge.address, sge.length.into()))
        })
    }

    /// Whether [`Requester::take`] would make progress.
    pub(super) fn has_finished(&self, failed: bool) -> bool {
        let head = self.finished.head();
        self.finished.has_local() || (head < self.posted && (failed || head < self.done))
    }

    /// Appends finished requests to `out` while it is shorter than `limit`. Once the lane has failed, `failure` holds
    /// the reason for the first unfinished request, and [`Status::Flushed`] after it was given out.
    pub(super) fn take(
        &mut self,
        lane: LaneId,
        mut failure: Option<&mut Failure>,
        out: &mut Vec<Completion>,
        limit: usize,
    ) {
        self.finished.take_local(lane, out, limit);
        while self.finished.head() < self.posted && out.len() < limit {
            let head = self.finished.head();
            let Some(slot) = self.slot(head).copied() else {
                return;
            };
            let oldest = (slot.id, slot.signaled, head < self.done);
            let failure = failure.as_deref_mut();
            if !self.finished.take_oldest(lane, oldest, failure, out) {
                return;
            }
        }
    }
}
