//! The hot loop: pieces of pages in, writes and runs out.
//!
//! The write and the run being built are held here and stored when the next byte does not continue them. Longest
//! first is also fewest: any part of an allowed write is allowed, so cutting as late as possible never costs a write.

use super::compile::{Group, Piece, Slot};
use super::{Plan, PlanLimits, PlannedWrite, SourceRun};

pub(super) struct Emitter<'a> {
    plan: &'a mut Plan,
    limits: PlanLimits,
    /// Being built; none while its length is 0.
    write: PlannedWrite,
    /// Where its next byte would go.
    write_end: u64,
    /// Last run of `write`, not stored yet.
    run: SourceRun,
    /// Where its next byte would come from.
    run_end: u64,
}

impl<'a> Emitter<'a> {
    /// Limits must not be 0.
    pub(super) fn new(plan: &'a mut Plan, limits: PlanLimits) -> Self {
        Self {
            plan,
            limits,
            write: PlannedWrite {
                region: 0,
                offset: 0,
                length: 0,
                first_source: 0,
                source_count: 0,
                first_page: 0,
            },
            write_end: 0,
            run: SourceRun {
                region: 0,
                offset: 0,
                length: 0,
            },
            run_end: 0,
        }
    }

    /// Emits one group for all pages. The lists are equally long and in range.
    pub(super) fn group(&mut self, group: &Group, source_pages: &[u32], destination_pages: &[u32]) {
        if self.write.region != group.region {
            self.close();
        }
        self.write.region = group.region;
        match (&*group.pieces, &*group.slots) {
            ([piece], [slot]) => self.pages(group, slot, piece, source_pages, destination_pages),
            (pieces, [slot]) if !group.page_inner => {
                for (page, (from, to)) in numbered(source_pages, destination_pages) {
                    let destination = group.base + to * group.page_stride;
                    let source = slot.base + from * slot.page_stride;
                    for piece in pieces {
                        let (to, from) = (destination + piece.destination, source + piece.source);
                        self.piece(to, slot.region, from, piece.length, page);
                    }
                }
            }
            (pieces, slots) if !group.page_inner => {
                for (page, (from, to)) in numbered(source_pages, destination_pages) {
                    let destination = group.base + to * group.page_stride;
                    for piece in pieces {
                        let slot = &slots[usize::from(piece.slot)];
                        let source = slot.base + from * slot.page_stride + piece.source;
                        self.piece(
                            destination + piece.destination,
                            slot.region,
                            source,
                            piece.length,
                            page,
                        );
                    }
                }
            }
            (pieces, slots) => {
                for piece in pieces {
                    let slot = &slots[usize::from(piece.slot)];
                    self.pages(group, slot, piece, source_pages, destination_pages);
                }
            }
        }
    }

    /// Emits one piece for all pages.
    fn pages(
        &mut self,
        group: &Group,
        slot: &Slot,
        piece: &Piece,
        source_pages: &[u32],
        destination_pages: &[u32],
    ) {
        let (to_base, from_base) = (group.base + piece.destination, slot.base + piece.source);
        for (page, (from, to)) in numbered(source_pages, destination_pages) {
            let destination = to_base + to * group.page_stride;
            let source = from_base + from * slot.page_stride;
            self.piece(destination, slot.region, source, piece.length, page);
        }
    }

    /// Continues the write being built, or starts another; cuts where a limit is met.
    #[inline(always)]
    fn piece(
        &mut self,
        mut destination: u64,
        region: u16,
        mut source: u64,
        mut length: u64,
        page: u32,
    ) {
        loop {
            let continues = destination == self.write_end && self.write.length != 0;
            let room = self.limits.max_write - self.write.length;
            let taken;
            if continues && room > 0 && source == self.run_end && region == self.run.region {
                taken = length.min(u64::from(room)) as u32;
                self.run.length += taken;
                self.write.length += taken;
            } else {
                if continues && room > 0 && self.write.source_count < self.limits.max_sge {
                    self.plan.sources.push(self.run);
                    self.write.source_count += 1;
                    taken = length.min(u64::from(room)) as u32;
                    self.write.length += taken;
                } else {
                    self.close();
                    taken = length.min(u64::from(self.limits.max_write)) as u32;
                    self.write = PlannedWrite {
                        region: self.write.region,
                        offset: destination,
                        length: taken,
                        first_source: self.plan.sources.len() as u32,
                        source_count: 1,
                        first_page: page,
                    };
                }
                self.run = SourceRun {
                    region,
                    offset: source,
                    length: taken,
                };
            }
            let taken = u64::from(taken);
            destination += taken;
            source += taken;
            self.write_end = destination;
            self.run_end = source;
            length -= taken;
            if length == 0 {
                return;
            }
        }
    }

    #[inline(always)]
    fn close(&mut self) {
        if self.write.length != 0 {
            self.plan.sources.push(self.run);
            self.plan.writes.push(self.write);
            self.write.length = 0;
        }
    }

    /// Stores the last write.
    pub(super) fn finish(mut self) {
        self.close();
    }
}

#[inline(always)]
fn numbered<'a>(
    source: &'a [u32],
    destination: &'a [u32],
) -> impl Iterator<Item = (u32, (u64, u64))> + use<'a> {
    let wide = |(&from, &to): (&u32, &u32)| (u64::from(from), u64::from(to));
    (0u32..).zip(source.iter().zip(destination).map(wide))
}
