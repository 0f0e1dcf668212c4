//! The reader's side: a grant of a staged pool gets a landing in host memory when it is opened, and `Accept` tells the
//! writer of that in place of the pool. What has landed is copied to the device, part by part.

use std::sync::Arc;

use super::{Batch, finish, packed::packed, start};
use crate::{
    endpoint::{
        ArrivalError, StagingError,
        control::ConnId,
        core::Core,
        regions::{Arena, LandingRange},
        shared::PoolHandle,
    },
    kv::{KvLayout, Plan, PlanLimits, Planner},
    memory::{Copy, Direction},
    protocol::{Blocks, PartMap, PartOutcome, Time},
    wire::{Open, PoolDescriptor, RefuseCode, RegionDescriptor, RegionKey},
};

/// Copies that one part starts in one step: few enough not to hold up the driver.
const COPIES: usize = 256;
/// Grants that wait for a landing.
const MOST_WAITING: usize = 1024;

/// Where the bytes of one grant land.
#[derive(Debug)]
pub(in crate::endpoint::core) struct Landing {
    range: LandingRange,
    bytes: u64,
    layout: KvLayout,
    /// From the landing to the pool.
    planner: Planner,
}

/// The landing of an open grant, and the parts that are there.
#[derive(Debug)]
pub(in crate::endpoint::core) struct Landed {
    landing: Arc<Landing>,
    arrived: PartMap,
}

/// A part on its way to the device.
#[derive(Debug)]
pub(in crate::endpoint::core) struct Job {
    pub(super) slot: u32,
    part: u32,
    landing: Arc<Landing>,
    pub(super) pool: Arc<PoolHandle>,
    plan: Plan,
    /// The write whose copies are started next.
    next: usize,
    pub(super) batches: Vec<Batch>,
    /// When nobody waits for it any more; nothing while its arrival goes on.
    pub(super) until: Option<Time>,
}

impl Landed {
    /// What the writer is told in place of the pool.
    pub(in crate::endpoint::core) fn descriptor(
        &self,
        pool: &PoolHandle,
        rails: &[usize],
    ) -> PoolDescriptor {
        let Landing {
            range,
            bytes,
            layout,
            ..
        } = &*self.landing;
        let region = range.arena().region();
        let keys = rails.iter().filter_map(|&rail| {
            let keys = region.rails().get(rail)?;
            Some(RegionKey {
                rail: rail as u8,
                address: keys.grid().address + range.offset(),
                extent: 0,
                rkeys: keys.remote(),
            })
        });
        PoolDescriptor {
            pool: pool.record.id,
            layout: layout.clone(),
            regions: vec![RegionDescriptor {
                length: *bytes,
                keys: keys.collect(),
            }],
            distances: pool
                .record
                .rails
                .iter()
                .map(|rail| rail.unwrap_or(0))
                .collect(),
        }
    }

    /// The parts that are in this host's memory: they must not be sent again.
    pub(in crate::endpoint::core) fn arrived(&self) -> &PartMap {
        &self.arrived
    }

    /// Whether everything is in this host's memory, so that the writer is not needed any more.
    pub(in crate::endpoint::core) fn is_whole(&self) -> bool {
        self.arrived.is_complete()
    }
}

impl Job {
    /// Starts copies that have not been started. Returns whether there were any.
    fn go_on(&mut self, copies: &mut Vec<Copy>) -> Result<bool, StagingError> {
        let mut started = 0;
        while let Some(first) = self.plan.writes.get(self.next) {
            if started >= COPIES {
                break;
            }
            let region = first.region;
            let base = self.pool.record.regions[usize::from(region)].address();
            copies.clear();
            let mut next = self.next;
            let writes = self.plan.writes[next..].iter();
            for write in writes.take_while(|write| write.region == region) {
                let mut device = base + write.offset;
                for run in self.plan.sources_of(write) {
                    copies.push(Copy {
                        device,
                        host: self.landing.range.address() + run.offset,
                        length: run.length.into(),
                    });
                    device += u64::from(run.length);
                }
                next += 1;
                if started + copies.len() >= COPIES {
                    break;
                }
            }
            started += copies.len();
            let batch = start(&self.pool, region.into(), Direction::ToDevice, copies)?;
            self.batches.push(batch);
            self.next = next;
        }
        Ok(started > 0)
    }

    /// What has not been started is not wanted any more.
    pub(super) fn waive(&mut self) {
        self.next = self.plan.writes.len();
    }

    /// Whether all copies have been started and are done.
    fn is_done(&mut self) -> Result<bool, StagingError> {
        Ok(finish(&self.pool, &mut self.batches)? && self.next >= self.plan.writes.len())
    }
}

impl Core {
    /// Gets a landing for the grant that `open` names, if it needs one. Returns whether the opening can go on now; if
    /// not, it will when there is room.
    pub(in crate::endpoint::core) fn land_grant(
        &mut self,
        conn: ConnId,
        open: &Open,
        again: bool,
    ) -> Result<bool, (RefuseCode, &'static str)> {
        let kind = self.sessions.get(&conn).and_then(|session| {
            let lane = session.lanes.first()?;
            Some(self.rails[lane.rail].kind)
        });
        let incarnation = self.incarnation;
        let (Some(kind), Some(arrival)) = (kind, self.arrivals.get_mut(&open.grant.slot)) else {
            return Ok(true);
        };
        // Whatever is wrong with the opening is found out by those who look at every one.
        let record = &arrival.pool.record;
        if !arrival.is_meant(open, incarnation)
            || !Self::is_staged(&self.rails, kind, &record.staged)
        {
            return Ok(true);
        }
        let Some(arena) = record.arena().cloned() else {
            return Err((RefuseCode::Other, "its pool has no staging memory"));
        };
        let grant = &arrival.grant;
        let pages = grant.pages().len() as u32;
        let (layout, bytes) = packed(&record.layout, pages, grant.heads())
            .filter(|(_, bytes)| *bytes <= arena.landing_bytes())
            .ok_or((
                RefuseCode::Other,
                "the grant is larger than the reader's staging memory (Builder::staging_memory)",
            ))?;
        if !again && !self.staging.waiting.is_empty() {
            return self.wait(conn, open, &arena);
        }
        let Some(range) = arena.take_landing(bytes) else {
            return match again {
                true => Ok(false),
                false => self.wait(conn, open, &arena),
            };
        };
        let limits = PlanLimits {
            max_sge: 1 << 16,
            max_write: 1 << 30,
        };
        let planner = Planner::new(&layout, &record.layout, grant.heads(), limits)
            .map_err(|_| (RefuseCode::Other, "its landing cannot be planned"))?;
        let landing = Arc::new(Landing {
            range,
            bytes,
            layout,
            planner,
        });
        arrival.landed = Some(Landed {
            landing,
            arrived: PartMap::new(arrival.blocks()),
        });
        Ok(true)
    }

    fn wait(
        &mut self,
        conn: ConnId,
        open: &Open,
        arena: &Arena,
    ) -> Result<bool, (RefuseCode, &'static str)> {
        if self.staging.waiting.len() >= MOST_WAITING {
            return Err((RefuseCode::Busy, "too many grants wait for staging memory"));
        }
        arena.counters.waits.add(1);
        self.staging.waiting.push_back((conn, open.clone()));
        Ok(false)
    }

    /// Opens grants that have waited for room, in their order.
    pub(super) fn open_waiting(&mut self) -> bool {
        let mut active = false;
        while let Some((conn, open)) = self.staging.waiting.front().cloned() {
            let session = self.sessions.contains_key(&conn);
            match self.land_grant(conn, &open, true) {
                Ok(false) if session => return active,
                _ => {
                    self.staging.waiting.pop_front();
                    self.open_landed(conn, &open);
                    active = true;
                }
            }
        }
        active
    }

    /// A part of a grant with a landing is in host memory. Returns `false` if there is no such part.
    pub(in crate::endpoint::core) fn part_landed(&mut self, slot: u32, part: u32) -> bool {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return true;
        };
        let blocks = arrival.blocks();
        let Some(landed) = &mut arrival.landed else {
            return true;
        };
        match landed.arrived.arrive(part) {
            PartOutcome::Unknown => return false,
            // It is sent again only if nobody knew that it had arrived.
            PartOutcome::Duplicate => return true,
            PartOutcome::Tail => {
                self.count_part(None, slot, part);
                return true;
            }
            PartOutcome::Counted | PartOutcome::LayerComplete(_) => {}
        }
        let Some(layer) = blocks.layer_of(part) else {
            return true;
        };
        let landing = Arc::clone(&landed.landing);
        let (first, end) = positions(&blocks, layer, part);
        let positions: Vec<u32> = (first..end).collect();
        let to = arrival.grant.pages().get(first as usize..end as usize);
        let mut plan = Plan::default();
        let planned = landing
            .planner
            .plan(layer, &positions, to.unwrap_or_default(), &mut plan);
        // Both layouts and the pages were checked when the landing was made and the grant issued.
        debug_assert!(planned.is_ok(), "{planned:?}");
        self.staging.jobs.push(Job {
            slot,
            part,
            landing,
            pool: Arc::clone(&arrival.pool),
            plan,
            next: 0,
            batches: Vec::new(),
            until: None,
        });
        self.step_landings();
        true
    }

    /// Starts copies to devices, and counts the parts of which they are done.
    pub(super) fn step_landings(&mut self) -> bool {
        let mut copies = std::mem::take(&mut self.staging.copies);
        let mut ended = Vec::new();
        let mut active = false;
        self.staging.jobs.retain_mut(|job| {
            let result = job.go_on(&mut copies).and_then(|started| {
                active |= started;
                job.is_done()
            });
            match result {
                Ok(false) => true,
                Ok(true) => {
                    ended.push((job.slot, job.part, None));
                    false
                }
                Err(error) => {
                    ended.push((job.slot, job.part, Some(error)));
                    false
                }
            }
        });
        self.staging.copies = copies;
        active |= !ended.is_empty();
        for (slot, part, error) in ended {
            match error {
                None => self.count_part(None, slot, part),
                Some(error) => self.fail_arrival(slot, ArrivalError::Staging(error)),
            }
            self.unpark(slot);
        }
        active | self.leak_landings()
    }
}

/// The positions of a part's block.
fn positions(blocks: &Blocks, layer: u32, part: u32) -> (u32, u32) {
    let block = part - blocks.part(layer, 0);
    blocks.positions(block)
}
