//! The send queue of a lane: a ring of requests from post to completion. No I/O.
//!
//! `head ≤ acked, sent ≤ tail` are request numbers that only grow; a request's slot is its number modulo the depth, so
//! nothing is allocated after the lane has been created.

use std::collections::VecDeque;

use super::{
    super::{
        Completion, FabricErrorKind, LaneConfig, LaneId, LocalKey, Opcode, Sge, WorkRequest,
        software::{Failure, Finished},
    },
    memory::{Intent, MemoryView},
    sys,
    wire::MAX_READS,
};

/// A posted request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) request: WorkRequest,
    /// Payload bytes.
    pub(super) length: u32,
    /// Whether the gather list was refused at the post; the request completes with
    /// [`Status::LocalProtection`] once all before it have completed.
    pub(super) refused: bool,
}

const EMPTY: Slot = Slot {
    request: WorkRequest {
        id: 0,
        opcode: Opcode::Write,
        remote_address: 0,
        remote_key: super::super::RemoteKey(0),
        first_sge: 0,
        sge_count: 0,
        signaled: false,
        inline: false,
    },
    length: 0,
    refused: false,
};

/// See the module's description.
#[derive(Debug)]
pub(super) struct SendQueue {
    max_sge: usize,
    max_inline: usize,
    max_message: u64,
    slots: Box<[Slot]>,
    sges: Box<[Sge]>,
    inline: Box<[u8]>,
    finished: Finished,
    /// The number of the next post.
    tail: u64,
    /// The next request to transmit.
    pub(super) sent: u64,
    /// How much of it has been.
    pub(super) sent_offset: u32,
    /// How many requests the peer has executed.
    acked: u64,
    /// Reads on their way, oldest first.
    reads: VecDeque<u64>,
    /// How much of the oldest one has been placed.
    read_offset: u32,
}

impl SendQueue {
    pub(super) fn new(config: &LaneConfig, max_message: u64) -> Self {
        let depth = config.send_depth.max(1) as usize;
        let empty_sge = Sge {
            address: 0,
            length: 0,
            key: LocalKey(0),
        };
        Self {
            max_sge: config.max_sge as usize,
            max_inline: config.max_inline as usize,
            max_message,
            slots: vec![EMPTY; depth].into(),
            sges: vec![empty_sge; depth * config.max_sge as usize].into(),
            inline: vec![0; depth * config.max_inline as usize].into(),
            finished: Finished::new(depth),
            tail: 0,
            sent: 0,
            sent_offset: 0,
            acked: 0,
            reads: VecDeque::with_capacity(MAX_READS),
            read_offset: 0,
        }
    }

    fn index(&self, sequence: u64) -> usize {
        // Less than the depth, which is a usize.
        (sequence % self.slots.len() as u64) as usize
    }

    /// Accepts one request.
    ///
    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`] of this request.
    pub(super) unsafe fn push(
        &mut self,
        request: &WorkRequest,
        sges: &[Sge],
        memory: &mut MemoryView,
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
        let index = self.index(self.tail);
        let mut refused = false;
        if request.inline {
            if request.opcode == Opcode::Read {
                return limit("inline read", 1, 0);
            }
            if length > self.max_inline as u64 {
                return limit("inline payload", length, self.max_inline as u64);
            }
            let start = index * self.max_inline;
            let Some(mut room) = self.inline.get_mut(start..start + self.max_inline) else {
                return limit("inline payload", length, 0);
            };
            for sge in list {
                let Some((piece, rest)) = room.split_at_mut_checked(sge.length as usize) else {
                    return limit("inline payload", length, self.max_inline as u64);
                };
                // SAFETY: the caller promises that the elements of an inline request are readable during the post, as
                // with IBV_SEND_INLINE (ibv_post_send(3)).
                unsafe { sys::copy_from(sge.address, piece) };
                room = rest;
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
            let intent = match request.opcode {
                Opcode::Read => Intent::LocalWrite,
                Opcode::Write | Opcode::WriteImm(_) => Intent::LocalRead,
            };
            refused = list.iter().any(|sge| {
                sge.length > 0
                    && memory
                        .local(sge.key, sge.address, sge.length.into(), intent)
                        .is_none()
            });
        }
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = Slot {
                request: *request,
                length: length as u32,
                refused,
            };
        }
        self.tail += 1;
        Ok(())
    }

    /// An error if every slot is in use.
    pub(super) fn check_room(&self) -> Result<(), FabricErrorKind> {
        self.finished.check_room(self.tail, self.slots.len())
    }

    /// Takes a slot, which must be free, for something that is done already.
    pub(super) fn push_done(&mut self, id: u64) {
        self.finished.push_done(id);
    }

    /// The next request to transmit.
    pub(super) fn next(&self) -> Option<Slot> {
        (self.sent < self.tail)
            .then(|| self.slot(self.sent))
            .flatten()
    }

    fn slot(&self, sequence: u64) -> Option<Slot> {
        self.slots.get(self.index(sequence)).copied()
    }

    /// The gather list of request `sequence`. For an inline request its copied payload stands in for it.
    pub(super) fn gather(&self, sequence: u64, slot: &Slot) -> Gather<'_> {
        let index = self.index(sequence);
        if slot.request.inline {
            let start = index * self.max_inline;
            let end = start + slot.length as usize;
            Gather::Inline(self.inline.get(start..end).unwrap_or_default())
        } else {
            let start = index * self.max_sge;
            let end = start + slot.request.sge_count as usize;
            Gather::List(self.sges.get(start..end).unwrap_or_default())
        }
    }

    /// Marks the request at `sent` as handed to the socket.
    pub(super) fn mark_sent(&mut self, is_read: bool) {
        if is_read {
            self.reads.push_back(self.sent);
        }
        self.sent += 1;
        self.sent_offset = 0;
    }

    /// Whether another read may be outstanding.
    pub(super) fn may_read(&self) -> bool {
        self.reads.len() < MAX_READS
    }

    /// Takes over the peer's count of executed requests; `false` if it is impossible.
    pub(super) fn acknowledge(&mut self, executed: u64) -> bool {
        let possible = executed >= self.acked && executed <= self.sent;
        if possible {
            self.acked = executed;
        }
        possible
    }

    /// The peer refused request `sequence`, so it executed those before; `false` if that is impossible.
    pub(super) fn refused_at(&mut self, sequence: u64) -> bool {
        let possible = sequence < self.sent || (sequence == self.sent && self.sent_offset > 0);
        if possible {
            self.acked = self.acked.max(sequence);
        }
        possible
    }

    /// The `ahead`-th outstanding read: number, slot, and how much of it is placed.
    pub(super) fn read_in_flight(&self, ahead: usize) -> Option<(u64, Slot, u32)> {
        let sequence = *self.reads.get(ahead)?;
        let offset = if ahead == 0 { self.read_offset } else { 0 };
        Some((sequence, self.slot(sequence)?, offset))
    }

    /// Counts `length` bytes of the oldest read as placed.
    pub(super) fn advance_read(&mut self, length: u32, is_last: bool) {
        if is_last {
            self.reads.pop_front();
            self.read_offset = 0;
        } else {
            self.read_offset += length;
        }
    }

    /// Whether nothing posted is unfinished before the request at `sent`.
    pub(super) fn all_sent_done(&self) -> bool {
        (self.finished.head()..self.sent).all(|sequence| self.is_done(sequence))
    }

    fn is_done(&self, sequence: u64) -> bool {
        let Some(slot) = self.slot(sequence) else {
            return false;
        };
        match slot.request.opcode {
            // Reads finish in order, so one that was sent and is not on its way is done.
            Opcode::Read => {
                sequence < self.sent && self.reads.front().is_none_or(|first| sequence < *first)
            }
            Opcode::Write | Opcode::WriteImm(_) => sequence < self.acked,
        }
    }

    /// Whether [`SendQueue::take`] would make progress.
    pub(super) fn has_finished(&self, failed: bool) -> bool {
        let head = self.finished.head();
        self.finished.has_local() || (head < self.tail && (failed || self.is_done(head)))
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
        while self.finished.head() < self.tail && out.len() < limit {
            let head = self.finished.head();
            let Some(slot) = self.slot(head) else {
                return;
            };
            let oldest = (slot.request.id, slot.request.signaled, self.is_done(head));
            let failure = failure.as_deref_mut();
            if !self.finished.take_oldest(lane, oldest, failure, out) {
                return;
            }
        }
    }
}

/// Where the payload of a request lies.
pub(super) enum Gather<'a> {
    /// In the queue itself.
    Inline(&'a [u8]),
    /// In registered memory.
    List(&'a [Sge]),
}

/// Calls `each` with the pieces of `list` that cover `[offset, offset + length)` of its concatenation, until it returns
/// `false`. Returns how many bytes were covered.
pub(super) fn pieces(
    list: &[Sge],
    offset: u32,
    length: u32,
    mut each: impl FnMut(&Sge, u64, u32) -> bool,
) -> u32 {
    let (mut skip, mut left) = (offset, length);
    for sge in list {
        if left == 0 {
            break;
        }
        if skip >= sge.length {
            skip -= sge.length;
            continue;
        }
        let take = (sge.length - skip).min(left);
        // Cannot wrap: the range was checked to lie in a registration.
        if !each(sge, sge.address.wrapping_add(skip.into()), take) {
            break;
        }
        skip = 0;
        left -= take;
    }
    length - left
}
