//! Pushes of memory that a rail cannot reach: through pinned host memory.
//!
//! | File | What |
//! |---|---|
//! | `packed` | the layout of a landing |
//! | `outgoing` | the writer: source pages are copied into bounce buffers and sent from there |
//! | `incoming` | the reader: what lands in host memory is copied to the device before it counts |
//! | `ends` | pushes and arrivals that end while copies are under way, and copies that never end |
//!
//! Copies are started and asked for by the driver, which never waits for one: while some are under way it looks again
//! every [`LOOK_AGAIN`]. Whatever a copy may still touch is held by it: its buffer or landing, and its pool.
//!
//! * Writer: a buffer is filled while others are on their way, and is free again when the last request from it has been
//!   acknowledged (or its lane is gone) *and* no copy into it is under way.
//! * Reader: a part counts when its copies are done and the device has been flushed.
//! * A push or an arrival whose copies are under way ends when they are done, whatever ends it, so no copy reads or lands
//!   late. It waits `drain_timeout` or `revoke_grace` for that at most, and then ends as [`StuckCopy`](crate::endpoint::StuckCopy) says.
//! * A task that has to be sent again after its lane failed is copied again.
//! * A device that fails a copy is not asked to go on: the push or arrival ends with [`StagingError`].

mod ends;
mod incoming;
mod outgoing;
mod packed;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use self::incoming::Job;
pub(crate) use self::packed::landing_bytes;
pub(super) use self::{
    incoming::Landed,
    outgoing::{Ready, StagedTask},
};
use super::Core;
use crate::{
    endpoint::{
        ArrivalError, PushError, StagingError, control::ConnId, regions::Buffer, shared::PoolHandle,
    },
    fabric::FabricKind,
    memory::{Copy, Direction, Ticket},
    protocol::{ArrivalEnd, PushEnd, Time},
    wire::Open,
};

/// How long the driver sleeps at most while copies are under way.
const LOOK_AGAIN: Duration = Duration::from_micros(20);

/// A batch of copies of one region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    /// Its number in the pool.
    region: usize,
    ticket: Ticket,
}

/// Copies into a buffer that nobody wants any more. Nobody else may use it before they are done.
#[derive(Debug)]
pub(super) struct Orphan {
    push: u64,
    /// When nobody waits for it any more; known once it has been looked at.
    until: Option<Time>,
    _buffer: Arc<Buffer>,
    batches: Vec<Batch>,
    pool: Arc<PoolHandle>,
}

/// What the driver knows of staged transfers.
#[derive(Default)]
pub(super) struct Staging {
    /// Buffers with requests in flight: how many.
    flying: HashMap<u32, (Arc<Buffer>, u64)>,
    orphans: Arc<Mutex<Vec<Orphan>>>,
    /// Lanes whose task is staged and not wholly posted.
    lanes: Vec<(ConnId, usize)>,
    /// Pushes that a device has failed.
    pub(super) failed: Vec<(u64, StagingError)>,
    /// Parts on their way to a device.
    jobs: Vec<Job>,
    /// Arrivals that have ended but for their copies.
    parked: HashMap<u32, ArrivalEnd<ArrivalError>>,
    /// The same of pushes.
    parked_pushes: BTreeMap<u64, PushEnd<PushError>>,
    /// Grants that wait for a landing, in order.
    waiting: VecDeque<(ConnId, Open)>,
    copies: Vec<Copy>,
}

impl Staging {
    /// A request from `buffer` has been built, and will be handed to a device before anything else happens.
    pub(super) fn built(&mut self, buffer: Option<&Arc<Buffer>>) {
        if let Some(buffer) = buffer {
            let entry = self.flying.entry(buffer.number);
            entry.or_insert_with(|| (Arc::clone(buffer), 0));
        }
    }

    /// Requests from `buffer` have been handed to a device.
    pub(super) fn posted(&mut self, buffer: u32, requests: u32) {
        if let Some((_, count)) = self.flying.get_mut(&buffer) {
            *count += u64::from(requests);
        }
        self.settle(buffer);
    }

    /// Requests from `buffer` are no longer in flight.
    pub(super) fn retired(&mut self, buffer: u32, requests: u32) {
        if let Some((_, count)) = self.flying.get_mut(&buffer) {
            *count = count.saturating_sub(requests.into());
        }
        self.settle(buffer);
    }

    fn settle(&mut self, buffer: u32) {
        if self.flying.get(&buffer).is_some_and(|flying| flying.1 == 0) {
            self.flying.remove(&buffer);
        }
    }

    /// A device may read `buffer` for ever: it is never used again.
    pub(super) fn leak(&self, buffer: u32) {
        if let Some((buffer, _)) = self.flying.get(&buffer) {
            std::mem::forget(Arc::clone(buffer));
        }
    }

    /// A lane has a staged task that is not wholly posted.
    pub(super) fn watch(&mut self, conn: ConnId, lane: usize) {
        if !self.lanes.contains(&(conn, lane)) {
            self.lanes.push((conn, lane));
        }
    }

    fn is_copying(&self) -> bool {
        !self.jobs.is_empty() || !self.lanes.is_empty() || !self.orphans.lock().is_empty()
    }
}

/// Starts `copies` of region `region` of `pool`.
fn start(
    pool: &PoolHandle,
    region: usize,
    direction: Direction,
    copies: &[Copy],
) -> Result<Batch, StagingError> {
    let region_ref = &pool.record.regions[region];
    let failed = |reason: String| StagingError {
        kind: region_ref.memory().kind(),
        reason,
    };
    let Some(staged) = region_ref.staged() else {
        return Err(failed("the region has no copier".to_owned()));
    };
    let mut copier = staged.copier.lock();
    let mut stuck = staged.stuck.lock();
    if let Some(ticket) = *stuck {
        // Copies end in order: none that is started now ends before that one.
        match copier.is_done(ticket) {
            Ok(true) => *stuck = None,
            Ok(false) | Err(_) => {
                staged.arena.counters.failures.add(1);
                return Err(failed("an earlier copy has not ended".to_owned()));
            }
        }
    }
    let bytes = copies.iter().map(|copy| copy.length).sum();
    let counters = &staged.arena.counters;
    // SAFETY: the host ranges lie in a bounce buffer or landing that the caller holds until the batch is done, as it
    // does the pool and with it the region's memory, in which the device ranges lie, because they were planned within
    // the layout that the pool was checked by. A bounce buffer that is filled is nobody else's, so nothing changes or
    // refers to it; a landing is read when the part in it has arrived. A peer that writes on changes what its own pages
    // get, as it may on any fabric. That source pages do not change is asked of the pusher.
    match unsafe { copier.start(direction, copies) } {
        Ok(ticket) => {
            let counter = match direction {
                Direction::ToHost => &counters.to_host,
                Direction::ToDevice => &counters.to_device,
            };
            counter.add(bytes);
            counters.copies.add(copies.len() as u64);
            Ok(Batch { region, ticket })
        }
        Err(error) => {
            counters.failures.add(1);
            Err(failed(error.to_string()))
        }
    }
}

/// Forgets the batches that are done. Returns whether none is left.
fn finish(pool: &PoolHandle, batches: &mut Vec<Batch>) -> Result<bool, StagingError> {
    while let Some(&batch) = batches.last() {
        let region = &pool.record.regions[batch.region];
        let Some(staged) = region.staged() else {
            return Ok(true);
        };
        match staged.copier.lock().is_done(batch.ticket) {
            Ok(true) => batches.pop(),
            Ok(false) => return Ok(false),
            Err(error) => {
                staged.arena.counters.failures.add(1);
                return Err(StagingError {
                    kind: region.memory().kind(),
                    reason: error.to_string(),
                });
            }
        };
    }
    Ok(true)
}

impl Core {
    /// Whether pushes over fabric `kind` go through the arena, as one of its rails does not reach `pool`. It is the same
    /// for all rails of the fabric, because lanes may move between them.
    pub(super) fn is_staged(rails: &[super::Rail], kind: FabricKind, staged: &[bool]) -> bool {
        let mut of_kind = rails
            .iter()
            .zip(staged)
            .filter(|(rail, _)| rail.kind == kind);
        of_kind.any(|(_, &staged)| staged)
    }

    /// Looks after copies: what is done goes on. Returns whether anything did.
    pub(super) fn step_staging(&mut self) -> bool {
        let staging = &mut self.staging;
        if !staging.is_copying() && staging.waiting.is_empty() && staging.failed.is_empty() {
            return false;
        }
        let mut active = self.step_orphans();
        active |= self.step_landings();
        for (conn, lane) in std::mem::take(&mut self.staging.lanes) {
            active |= self.pump_staged(conn, lane);
        }
        active | self.open_waiting()
    }

    /// Goes on with the staged task of a lane. Returns whether it got on.
    fn pump_staged(&mut self, conn: ConnId, lane: usize) -> bool {
        let state = |core: &Self| {
            let lane = core.sessions.get(&conn)?.lanes.get(lane)?;
            Some((lane.ledger.next_sequence(), lane.current.is_some()))
        };
        let before = state(self);
        self.pump(conn, lane);
        before != state(self)
    }

    /// Ends pushes whose source a device does not copy.
    pub(super) fn fail_staged(&mut self) {
        for (push, error) in std::mem::take(&mut self.staging.failed) {
            self.stop_push(push, PushEnd::Failed(PushError::Staging(error)));
        }
    }

    /// When copies are to be looked at again.
    pub(super) fn staging_deadline(&self) -> Option<Time> {
        let now = self.now;
        self.staging.is_copying().then(|| now + LOOK_AGAIN)
    }

    /// The endpoint shuts down: waits for all copies, so that what they touch may go, as long as anybody does. It is the
    /// one place where a core looks at a clock: no step comes after this one.
    pub(super) fn end_staging(&mut self) {
        let wait = self.config.revoke_grace.max(self.config.drain_timeout);
        let start = Instant::now();
        self.staging.waiting.clear();
        self.bound_landings(None);
        while !self.staging.jobs.is_empty() || !self.staging.orphans.lock().is_empty() {
            self.step_staging();
            if start.elapsed() > wait {
                self.now = self.now + wait;
            } else {
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }
}
