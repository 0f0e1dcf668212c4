//! Ends of pushes and arrivals that copies are still under way for.
//!
//! A caller who is told of an end may use its pages again. So the end is kept here ("parked") until no copy reads or
//! writes them. Nobody can make a device end a copy, so the wait is bounded: after it the end is
//! [`PushError::Stuck`] or [`ArrivalError::Stuck`], and whatever the copies may still touch is leaked on purpose: the
//! buffer or landing, the pool with its memory, its registration and its copier (whose end would wait for them), and the
//! reservation of granted pages.

use std::time::Duration;

use super::{Batch, Orphan, Staging, finish, incoming::Job};
use crate::{
    endpoint::{ArrivalError, PushError, StuckCopy, core::Core, shared::PoolHandle},
    protocol::{ArrivalEnd, PushEnd},
};

/// Which copy has not ended, and a note for its copier that it starts no more until it has.
fn stuck(pool: &PoolHandle, batches: &[Batch], waited: Duration) -> StuckCopy {
    let regions = &pool.record.regions;
    for batch in batches {
        if let Some(staged) = regions[batch.region].staged() {
            staged.arena.counters.stuck.add(1);
            let mut stuck = staged.stuck.lock();
            *stuck = (*stuck).max(Some(batch.ticket));
        }
    }
    // The last is the one that was asked for.
    let region = batches.last().map_or(0, |batch| batch.region);
    let memory = regions[region].memory();
    let stuck = StuckCopy {
        kind: memory.kind(),
        device: memory.device().and_then(|device| device.location()),
        waited,
    };
    tracing::error!(error = %stuck, "copy given up");
    stuck
}

impl Staging {
    fn lands(&self, slot: u32) -> bool {
        self.jobs.iter().any(|job| job.slot == slot)
    }
}

impl Core {
    /// Parts of `slot`, or all, are waited for no longer than the grace from now on.
    pub(in crate::endpoint::core) fn bound_landings(&mut self, slot: Option<u32>) {
        let until = self.now + self.config.revoke_grace;
        for job in &mut self.staging.jobs {
            if slot.is_none_or(|slot| job.slot == slot) {
                job.waive();
                job.until.get_or_insert(until);
            }
        }
    }

    /// An arrival ends. If copies to its pages are under way its end has to wait for them: then `end` is kept, and comes
    /// back when they are done, or not to be waited for any more.
    pub(in crate::endpoint::core) fn park(
        &mut self,
        slot: u32,
        end: ArrivalEnd<ArrivalError>,
    ) -> Option<ArrivalEnd<ArrivalError>> {
        self.bound_landings(Some(slot));
        // A job whose copies have all been waived is done at once, too.
        match self.staging.lands(slot) {
            true => {
                self.staging.parked.insert(slot, end);
                None
            }
            false => Some(end),
        }
    }

    pub(super) fn unpark(&mut self, slot: u32) {
        if self.staging.lands(slot) {
            return;
        }
        if let Some(end) = self.staging.parked.remove(&slot) {
            self.end_arrival(slot, end);
        }
    }

    /// Gives up copies to devices that have been waited for long enough. Returns whether there were any.
    pub(super) fn leak_landings(&mut self) -> bool {
        let now = self.now;
        let is_late = |job: &Job| job.until.is_some_and(|until| until <= now);
        if !self.staging.jobs.iter().any(is_late) {
            return false;
        }
        let jobs = std::mem::take(&mut self.staging.jobs);
        let (late, jobs): (Vec<_>, _) = jobs.into_iter().partition(is_late);
        self.staging.jobs = jobs;
        for job in late {
            let error = stuck(&job.pool, &job.batches, self.config.revoke_grace);
            let slot = job.slot;
            // The device may write to the pool and read the landing at any time.
            std::mem::forget(job);
            // All jobs of an arrival are late at the same time; the first ends it.
            if self.staging.parked.remove(&slot).is_some() {
                self.end_arrival(slot, ArrivalEnd::Failed(ArrivalError::Stuck(error)));
            }
        }
        true
    }

    /// The same as [`Core::park`] for a push, whose source pages are read.
    pub(in crate::endpoint::core) fn park_push(
        &mut self,
        id: u64,
        end: PushEnd<PushError>,
    ) -> Option<PushEnd<PushError>> {
        let mut orphans = self.staging.orphans.lock();
        // Mostly they are done by now.
        orphans.retain_mut(|orphan| orphan.push != id || orphan.is_copying());
        if !orphans.iter().any(|orphan| orphan.push == id) {
            return Some(end);
        }
        self.staging.parked_pushes.insert(id, end);
        None
    }

    /// Looks after copies that nobody wants any more. Returns whether any is done or given up.
    pub(super) fn step_orphans(&mut self) -> bool {
        let (now, wait) = (self.now, self.config.drain_timeout);
        let mut late = Vec::new();
        let mut orphans = self.staging.orphans.lock();
        let before = orphans.len();
        let mut index = 0;
        while let Some(orphan) = orphans.get_mut(index) {
            if !orphan.is_copying() {
                orphans.remove(index);
            } else if *orphan.until.get_or_insert(now + wait) <= now {
                late.push(orphans.remove(index));
            } else {
                index += 1;
            }
        }
        let active = orphans.len() != before;
        drop(orphans);
        for orphan in late {
            let error = stuck(&orphan.pool, &orphan.batches, wait);
            if let Some(end) = self.staging.parked_pushes.get_mut(&orphan.push) {
                *end = PushEnd::Failed(PushError::Stuck(error));
            }
            // The device may write to the buffer and read the pool at any time.
            std::mem::forget(orphan);
        }
        if active {
            self.unpark_pushes();
        }
        active
    }

    fn unpark_pushes(&mut self) {
        let staging = &mut self.staging;
        let orphans = staging.orphans.lock();
        let waits = |id: &u64| orphans.iter().any(|orphan| orphan.push == *id);
        let parked = staging.parked_pushes.keys().copied();
        let over: Vec<u64> = parked.filter(|id| !waits(id)).collect();
        drop(orphans);
        for id in over {
            let Some(end) = self.staging.parked_pushes.remove(&id) else {
                continue;
            };
            self.end_push(id, end);
        }
    }
}

impl Orphan {
    /// Whether its copies are under way. Of a failed device nothing more is to be waited for.
    fn is_copying(&mut self) -> bool {
        matches!(finish(&self.pool, &mut self.batches), Ok(false))
    }
}
