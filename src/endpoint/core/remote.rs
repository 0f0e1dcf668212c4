//! What a writer knows of the pool it writes into, and the checks before it believes that.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{Core, Rail, session::Session, writer::PushEntry};
use crate::{
    endpoint::{PeerError, PushError, config::Config, regions::Grid, shared::PoolRecord},
    fabric::RemoteKey,
    kv::{HeadRange, KvLayout, PlanError, PlanLimits, Planner, Range, Side, cover},
    protocol::Blocks,
    wire::{Accept, GrantWindows, Imm, PoolDescriptor, PoolId, RegionKey, TailHeader},
};

/// Where a region of the peer is, through one of its rails.
#[derive(Clone, Debug)]
pub(super) struct Target {
    grid: Grid,
    /// The key of the first extent.
    first: RemoteKey,
    /// Those of all, if there are several.
    keys: Option<Arc<[RemoteKey]>>,
    /// What was granted, if only that can be reached; the rest says nothing then.
    windows: Option<Arc<[Opened]>>,
}

/// A window of the peer into a region.
#[derive(Clone, Copy, Debug)]
struct Opened {
    /// In the region.
    offset: u64,
    end: u64,
    /// Of the first byte.
    address: u64,
    key: RemoteKey,
}

impl Target {
    /// Checks what the peer says of a region of `length` bytes: it lies in the address space, and there are as many
    /// keys as extents.
    pub(super) fn new(key: &RegionKey, length: u64) -> Option<Self> {
        let grid = Grid::peer(key.address, key.extent, length, key.rkeys.len())?;
        Some(Self {
            grid,
            first: *key.rkeys.first()?,
            keys: (!grid.is_whole()).then(|| key.rkeys.as_slice().into()),
            windows: None,
        })
    }

    /// A range under one key.
    pub(super) fn whole(address: u64, key: RemoteKey) -> Self {
        let grid = Grid { address, size: 0 };
        Self {
            grid,
            first: key,
            keys: None,
            windows: None,
        }
    }

    /// The address and key of a region that is not cut.
    #[inline]
    pub(super) fn first(&self) -> (u64, RemoteKey) {
        (self.grid.address, self.first)
    }

    pub(super) fn is_whole(&self) -> bool {
        self.grid.is_whole()
    }

    /// The address and key of the byte at `offset`, and how many bytes on the key is good for.
    #[inline]
    pub(super) fn at(&self, offset: u64) -> Option<(u64, RemoteKey, u64)> {
        if let Some(windows) = &self.windows {
            let index = windows.partition_point(|window| window.end <= offset);
            let window = windows.get(index)?;
            let skip = offset.checked_sub(window.offset)?;
            return Some((window.address + skip, window.key, window.end - offset));
        }
        let key = match &self.keys {
            None => self.first,
            Some(keys) => *keys.get(self.grid.index(offset))?,
        };
        Some((self.grid.address + offset, key, self.grid.rest(offset)))
    }
}

/// How one lane reaches what was granted, if that is by windows.
#[derive(Debug)]
pub(super) struct LaneTargets {
    /// One for each region.
    pub(super) regions: Arc<[Target]>,
    pub(super) tail: Target,
}

/// Checks the windows that the peer tells of, for the lane at `index`: they lie in the regions and in the address space,
/// in order, and hold all that is going to be written.
fn lane_targets(
    windows: &GrantWindows,
    index: usize,
    lengths: &[u64],
    needed: &[Range],
    tail_address: u64,
) -> Option<LaneTargets> {
    let lane = windows.lanes.get(index)?;
    if lane.keys.len() != windows.ranges.len() {
        return None;
    }
    let mut opened: Vec<Vec<Opened>> = vec![Vec::new(); lengths.len()];
    for (range, &(address, key)) in windows.ranges.iter().zip(&lane.keys) {
        let end = range.offset.checked_add(range.length)?;
        let length = *lengths.get(usize::from(range.region))?;
        let list = opened.get_mut(usize::from(range.region))?;
        let sorted = list.last().is_none_or(|last| last.end <= range.offset);
        if range.length == 0 || end > length || !sorted {
            return None;
        }
        address.checked_add(range.length)?;
        list.push(Opened {
            offset: range.offset,
            end,
            address,
            key,
        });
    }
    let regions: Arc<[Target]> = opened
        .into_iter()
        .map(|list| Target {
            windows: Some(list.into()),
            ..Target::whole(0, RemoteKey(0))
        })
        .collect();
    for range in needed {
        let target = regions.get(usize::from(range.region))?;
        let (mut offset, end) = (range.offset, range.offset.checked_add(range.length)?);
        while offset < end {
            let (_, _, rest) = target.at(offset)?;
            offset = offset.saturating_add(rest);
        }
    }
    Some(LaneTargets {
        regions,
        tail: Target::whole(tail_address, lane.tail),
    })
}

/// A pool of the peer, checked.
#[derive(Debug)]
pub(super) struct RemotePool {
    layout: KvLayout,
    /// Bytes of each region.
    lengths: Vec<u64>,
    /// By the peer's rail: one target for each region.
    pub(super) targets: HashMap<u8, Arc<[Target]>>,
    /// How far the peer's rails are from it.
    distances: Vec<u8>,
    /// Whether each rail that was named has its keys. A rail that is not named is one that the pool does not use.
    is_sound: bool,
    /// Whether some region is cut on some rail, so that writes may have to be.
    pub(super) is_cut: bool,
    /// Made for this layout, so they live and end with it: by source pool, heads and limits.
    planners: Mutex<HashMap<(PoolId, HeadRange, PlanLimits), Arc<Planner>>>,
}

/// Planners kept for one pool of a peer. Grants name their heads, so a peer could ask for any number.
const MAX_PLANNERS: usize = 64;

impl RemotePool {
    /// Checks what the peer told: the layout must lie in the regions, the regions in the address space, and each rail
    /// that counts must have one key for each region.
    fn new(descriptor: PoolDescriptor) -> Result<Self, PlanError> {
        let lengths: Vec<u64> = descriptor
            .regions
            .iter()
            .map(|region| region.length)
            .collect();
        descriptor
            .layout
            .validate(&lengths)
            .map_err(|error| PlanError::Layout {
                side: Side::Destination,
                error,
            })?;
        let mut targets: HashMap<u8, Vec<Target>> = HashMap::new();
        for (index, region) in descriptor.regions.iter().enumerate() {
            for key in &region.keys {
                let list = targets.entry(key.rail).or_default();
                // Otherwise the list falls behind, and the rail is dropped below.
                if let Some(target) =
                    Target::new(key, region.length).filter(|_| list.len() == index)
                {
                    list.push(target);
                }
            }
        }
        let named = targets.len();
        targets.retain(|_, list| list.len() == lengths.len());
        Ok(Self {
            layout: descriptor.layout,
            lengths,
            distances: descriptor.distances,
            is_sound: targets.len() == named,
            is_cut: targets.values().flatten().any(|target| !target.is_whole()),
            targets: targets
                .into_iter()
                .map(|(rail, list)| (rail, list.into()))
                .collect(),
            planners: Mutex::default(),
        })
    }

    /// How far the peer's `rail` is from it; the peer's claim, good for a preference and nothing else.
    pub(super) fn distance(&self, rail: u8) -> u8 {
        self.distances.get(usize::from(rail)).copied().unwrap_or(0)
    }

    fn planner(
        &self,
        source: &PoolRecord,
        heads: HeadRange,
        limits: PlanLimits,
    ) -> Result<Arc<Planner>, PlanError> {
        let mut planners = self.planners.lock();
        if let Some(planner) = planners.get(&(source.id, heads, limits)) {
            return Ok(Arc::clone(planner));
        }
        let planner = Arc::new(Planner::new(&source.layout, &self.layout, heads, limits)?);
        if planners.len() >= MAX_PLANNERS {
            planners.clear();
        }
        planners.insert((source.id, heads, limits), Arc::clone(&planner));
        Ok(planner)
    }
}

/// Makes an accepted push ready to plan.
pub(super) fn prepare(
    session: &mut Session,
    push: &mut PushEntry,
    accept: &Accept,
    descriptor: Option<PoolDescriptor>,
    config: &Config,
    rails: &[Rail],
) -> Result<(), PushError> {
    let protocol = |detail: &str| {
        PushError::Peer(PeerError::Protocol {
            peer: session.name(),
            detail: detail.to_owned(),
        })
    };
    let pool = push.grant.pool();
    let landing = accept.landing.clone();
    let is_landing = landing.is_some();
    let remote = match landing.or(descriptor) {
        Some(descriptor) if descriptor.pool == pool => Arc::new(RemotePool::new(descriptor)?),
        Some(_) => return Err(protocol("the description of another pool")),
        // What the opening relied on is kept by the push, whatever the session has forgotten since.
        None => push
            .remote
            .clone()
            .ok_or_else(|| protocol("no description of the pool"))?,
    };
    if accept.windows.is_none()
        && !session.lanes.iter().any(|lane| {
            push.source.record.uses(lane.rail) && remote.targets.contains_key(&lane.remote_rail)
        })
    {
        if !remote.is_sound {
            return Err(protocol("a rail without keys"));
        }
        let rails = |theirs| {
            let mut rails: Vec<String> = session
                .lanes
                .iter()
                .filter(|lane| match theirs {
                    true => remote.targets.contains_key(&lane.remote_rail),
                    false => push.source.record.uses(lane.rail),
                })
                .map(|lane| rails[lane.rail].device.info().name.clone())
                .collect();
            rails.sort();
            rails.dedup();
            rails
        };
        return Err(PushError::NoLane {
            ours: rails(false),
            theirs: rails(true),
        });
    }
    let limits = PlanLimits {
        max_sge: session
            .lanes
            .iter()
            .map(|lane| lane.config.max_sge)
            .min()
            .unwrap_or(1),
        max_write: session
            .lanes
            .iter()
            .map(|lane| rails[lane.rail].device.info().caps.max_message)
            .fold(u64::from(config.max_write), u64::min)
            .clamp(1, u32::MAX.into()) as u32,
    };
    let planner = remote.planner(&push.source.record, push.grant.heads(), limits)?;
    if is_landing {
        // Its page `i` is for the grant's position `i`.
        push.landing = Some((0..push.grant.pages().len() as u32).collect());
    }
    let pages = push.destination();
    if let Some(&page) = pages.iter().find(|&&page| page >= remote.layout.pages) {
        let error = PlanError::PageOutOfRange {
            side: Side::Destination,
            page,
            pages: remote.layout.pages,
        };
        return Err(error.into());
    }
    let blocks = u32::try_from(pages.len())
        .ok()
        .and_then(|count| Blocks::new(planner.layers(), count, push.grant.parts_per_layer()))
        .ok_or_else(|| protocol("a grant that cannot be counted"))?;
    if Imm::new(accept.slot, blocks.tail()).is_none() {
        return Err(protocol("a slot beyond the immediate"));
    }
    let mut remaining = vec![0; blocks.parts() as usize];
    for layer in 0..blocks.layers() {
        for block in 0..blocks.per_layer() {
            let (first, end) = blocks.positions(block);
            remaining[blocks.part(layer, block) as usize] = end - first;
        }
    }
    push.lane_of = vec![None; remaining.len()];
    push.remaining = remaining;
    let tail_room = u64::from(accept.tail.capacity) + TailHeader::SIZE as u64;
    if accept.tail.address.checked_add(tail_room).is_none()
        || accept.tail.capacity < push.grant.tail_capacity()
    {
        return Err(protocol(
            "a tail outside of the address space, or shorter than granted",
        ));
    }
    push.tail_targets = accept
        .tail
        .keys
        .iter()
        .map(|&(rail, key)| (rail, Target::whole(accept.tail.address, key)))
        .collect();
    if let Some(windows) = &accept.windows {
        let (needed, _) = cover(&remote.layout, push.destination(), usize::MAX);
        let lanes = session.lanes.iter().enumerate().map(|(index, lane)| {
            let address = accept.tail.address;
            let targets = lane_targets(windows, index, &remote.lengths, &needed, address)?;
            Some(((lane.rail, lane.id), targets))
        });
        let lanes: Option<HashMap<_, _>> = lanes.collect();
        let lanes = lanes.ok_or_else(|| protocol("windows that do not hold what was granted"))?;
        push.windows = Some(lanes);
    } else if session
        .lanes
        .iter()
        .any(|lane| !push.tail_targets.contains_key(&lane.remote_rail))
    {
        return Err(protocol("a rail without a key for the tail"));
    }
    let kind = session.lanes.first().map(|lane| rails[lane.rail].kind);
    let staged = &push.source.record.staged;
    push.is_staged = kind.is_some_and(|kind| Core::is_staged(rails, kind, staged));
    push.slot = accept.slot;
    push.blocks = Some(blocks);
    push.planner = Some(planner);
    push.remote = Some(Arc::clone(&remote));
    session.remote_pools.remember(pool, remote);
    Ok(())
}
