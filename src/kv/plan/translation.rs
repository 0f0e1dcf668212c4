//! Layers of the same geometry: a plan of one is a plan of the other, moved.
//!
//! Two layers have the same geometry if their pages fall into the same pieces, and if what lies in one region of the
//! first, and nothing else, lies in one region of the second, all of it moved by the same distance. Then what was
//! contiguous still is, and nothing else has become so. Invariant: the translated plan is exactly the one that
//! [`Planner::plan`](super::Planner::plan) would have made.

use std::sync::Arc;

use super::compile::LayerPlan;

/// Where everything in one region has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shift {
    from: u16,
    to: u16,
    /// Modulo 2^64.
    by: u64,
}

/// From the regions and offsets of one layer to those of another. The default moves nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Translation {
    destination: Vec<Shift>,
    source: Vec<Shift>,
}

impl Translation {
    /// Moves nothing.
    pub(crate) fn reset(&mut self) {
        self.destination.clear();
        self.source.clear();
    }

    /// The region that `region` of the destination has become, and what is added to offsets there, modulo 2^64.
    pub(crate) fn destination(&self, region: u16) -> (u16, u64) {
        look_up(&self.destination, region)
    }

    /// The same for the source.
    pub(crate) fn source(&self, region: u16) -> (u16, u64) {
        look_up(&self.source, region)
    }

    pub(super) fn fill(&mut self, from: &LayerPlan, to: &LayerPlan) -> bool {
        self.reset();
        let same = from.groups.len() == to.groups.len()
            && from.groups.iter().zip(&to.groups).all(|(from, to)| {
                // Layers of one planner share the pieces of the same geometry.
                let pieces = Arc::ptr_eq(&from.pieces, &to.pieces);
                pieces
                    && from.page_stride == to.page_stride
                    && from.slots.len() == to.slots.len()
                    && note(
                        &mut self.destination,
                        (from.region, from.base),
                        (to.region, to.base),
                    )
                    && from.slots.iter().zip(&to.slots).all(|(from, to)| {
                        from.page_stride == to.page_stride
                            && note(
                                &mut self.source,
                                (from.region, from.base),
                                (to.region, to.base),
                            )
                    })
            });
        if !same {
            self.reset();
        }
        same
    }
}

/// Adds that one place has become the other. Returns whether that agrees with what else has moved in its region.
fn note(shifts: &mut Vec<Shift>, from: (u16, u64), to: (u16, u64)) -> bool {
    let shift = Shift {
        from: from.0,
        to: to.0,
        by: to.1.wrapping_sub(from.1),
    };
    let known = |known: &&Shift| known.from == shift.from || known.to == shift.to;
    match shifts.iter().find(known) {
        Some(known) => *known == shift,
        None => {
            shifts.push(shift);
            true
        }
    }
}

fn look_up(shifts: &[Shift], region: u16) -> (u16, u64) {
    shifts
        .iter()
        .find(|shift| shift.from == region)
        .map_or((region, 0), |shift| (shift.to, shift.by))
}

#[cfg(test)]
impl super::Plan {
    /// The plan that this one is for the other layer.
    pub(crate) fn translated(&self, translation: &Translation) -> Self {
        let mut plan = self.clone();
        for write in &mut plan.writes {
            let (region, by) = translation.destination(write.region);
            (write.region, write.offset) = (region, write.offset.wrapping_add(by));
        }
        for run in &mut plan.sources {
            let (region, by) = translation.source(run.region);
            (run.region, run.offset) = (region, run.offset.wrapping_add(by));
        }
        plan
    }
}
