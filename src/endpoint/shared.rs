//! What callers and the driver thread share: pools with their reservations, grant slots with their tail buffers, and
//! the states that callers wait for.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use crossbeam::channel::Sender;
use parking_lot::Mutex;

use super::{
    AccessError, ArrivalError, EndpointError, FlushError, GrantKeys, IssueError, PeerError,
    PushError, PushReport,
    choice::RailDistance,
    config::Config,
    core::{Command, ExportRecord, RegionKeys},
    drain::DrainShared,
    prepared::PlanBudget,
    regions::{AddressIndex, Arena, Entry, Exports, Policy, Region, Registry},
    signal::Signal,
    telemetry::{Event, Telemetry},
    wake::WakeHandle,
};
use crate::{
    fabric::{Access, Device, LocalKey, MrId, RemoteKey},
    kv::{HeadRange, KvLayout},
    memory::{HostMemory, Memory, Visibility},
    topology::Topology,
    wire::{GrantId, Incarnation, PoolId, TailHeader},
};

/// What every handle of an endpoint has.
#[derive(Debug)]
pub(crate) struct EndpointShared {
    pub(crate) config: Arc<Config>,
    pub(crate) incarnation: Incarnation,
    pub(crate) addresses: Vec<String>,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    /// This host's, read when it is needed first.
    pub(crate) topology: OnceLock<Topology>,
    pub(crate) tails: Arc<TailArena>,
    pub(crate) registry: Arc<Registry>,
    /// What plans of unprepared pages take.
    pub(crate) plans: Arc<PlanBudget>,
    /// Made when the first pool needs it.
    pub(crate) staging: Mutex<Option<Arc<Arena>>>,
    pub(crate) closed: AtomicBool,
    pub(crate) drain: DrainShared,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) next_pool: AtomicU32,
    pub(crate) next_export: AtomicU32,
    pub(crate) next_push: AtomicU64,
    pub(crate) commands: Sender<Command>,
    pub(crate) wake: WakeHandle,
}

impl EndpointShared {
    /// Hands `command` to the driver. Returns `false` if there is no driver any more; the command is dropped then.
    pub(crate) fn command(&self, command: Command) -> bool {
        if self.closed.load(Ordering::Acquire) || self.commands.send(command).is_err() {
            return false;
        }
        self.wake.wake();
        true
    }

    /// Registers memory on all rails. What a failing registration leaves behind is handed to the driver.
    pub(crate) fn register(
        &self,
        memory: Arc<dyn crate::memory::Memory>,
        access: Access,
        exports: &mut Exports<'_>,
    ) -> Result<Region, EndpointError> {
        let (devices, policy) = (&self.devices, &self.config.policy);
        let result = self
            .registry
            .register(memory, access, devices, policy, exports);
        result.map_err(|failed| {
            let (error, partial) = *failed;
            self.command(Command::Deregister(partial));
            error.into()
        })
    }
}

impl EndpointShared {
    /// The memory through which pushes go that a rail cannot fetch or place by itself.
    pub(crate) fn staging_arena(&self) -> Result<Arc<Arena>, String> {
        let mut staging = self.staging.lock();
        if let Some(arena) = &*staging {
            return Ok(Arc::clone(arena));
        }
        let bytes = self.config.staging_memory;
        if bytes == 0 {
            return Err("there is no staging memory (Builder::staging_memory)".to_owned());
        }
        let memory = Arc::new(HostMemory::new(bytes).map_err(|error| error.to_string())?);
        let shared = Arc::clone(&memory) as Arc<dyn Memory>;
        let policy = Policy::default();
        let region = Region::register(shared, Access::REMOTE_WRITE, &self.devices, &policy);
        let region = region.map_err(|failed| {
            let (error, partial) = *failed;
            self.command(Command::Deregister(partial));
            EndpointError::from(error).to_string()
        })?;
        if region.is_cut() {
            self.command(Command::Deregister(region));
            return Err("staging memory is longer than a device registers at once".to_owned());
        }
        let arena = Arc::new(Arena::new(memory, region));
        *staging = Some(Arc::clone(&arena));
        Ok(arena)
    }
}

/// A pool: memory, where the pages are in it, and which of them belong to live grants.
#[derive(Debug)]
pub(crate) struct PoolRecord {
    pub(crate) id: PoolId,
    pub(crate) layout: KvLayout,
    pub(crate) regions: Vec<Region>,
    /// How far each rail is, in the endpoint's order.
    pub(crate) rails: Vec<RailDistance>,
    /// Whether some region is cut on some rail, so that writes may have to be.
    pub(crate) is_cut: bool,
    /// For each rail, whether it does not reach some region, so that what goes over its fabric is staged.
    pub(crate) staged: Vec<bool>,
    /// Which region holds an address.
    pub(crate) index: AddressIndex,
    /// Regions in memory of devices, one for each device that has to be told of a NIC's writes.
    pub(crate) flushed: Vec<usize>,
    /// For each page, a bit for each head (or group of heads) that a live grant has.
    reserved: Mutex<Vec<u128>>,
}

impl PoolRecord {
    pub(crate) fn new(
        id: PoolId,
        layout: KvLayout,
        regions: Vec<Region>,
        rails: Vec<RailDistance>,
    ) -> Self {
        let pages = layout.pages as usize;
        let entries: Vec<Entry> = (0..)
            .zip(&regions)
            .map(|(rank, region)| Entry {
                address: region.address(),
                length: region.length(),
                rank,
            })
            .collect();
        Self {
            id,
            layout,
            is_cut: regions.iter().any(Region::is_cut),
            staged: staged_rails(&regions),
            index: AddressIndex::new(&entries),
            flushed: flushed(&regions),
            regions,
            rails,
            reserved: Mutex::new(vec![0; pages]),
        }
    }

    /// The arena, if it is staged on some rail.
    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        let staged = self.regions.iter().find_map(Region::staged)?;
        Some(&staged.arena)
    }

    /// Whether its pages may go through `rail`.
    pub(crate) fn uses(&self, rail: usize) -> bool {
        self.rails.get(rail).is_some_and(Option::is_some)
    }

    /// Makes what NICs have written visible to kernels that the devices start afterwards.
    pub(crate) fn flush(&self) -> Result<(), FlushError> {
        self.flushed.iter().try_for_each(|&at| {
            let memory = self.regions[at].memory();
            let Some(device) = memory.device() else {
                return Ok(());
            };
            device.flush().map_err(|error| FlushError {
                kind: memory.kind(),
                device: device.location(),
                reason: error.to_string(),
            })
        })
    }

    /// Reserves `heads` of `pages`, all or nothing. The pages are known to be in range and unique.
    pub(crate) fn reserve(&self, pages: &[u32], heads: HeadRange) -> Result<(), IssueError> {
        let bits = self.head_bits(heads);
        let mut reserved = self.reserved.lock();
        if let Some(&page) = pages
            .iter()
            .find(|&&page| reserved[page as usize] & bits != 0)
        {
            return Err(IssueError::PageBusy { page });
        }
        for &page in pages {
            reserved[page as usize] |= bits;
        }
        Ok(())
    }

    /// Gives back what [`PoolRecord::reserve`] took.
    pub(crate) fn release(&self, pages: &[u32], heads: HeadRange) {
        let bits = self.head_bits(heads);
        let mut reserved = self.reserved.lock();
        for &page in pages {
            if let Some(page) = reserved.get_mut(page as usize) {
                *page &= !bits;
            }
        }
    }

    /// Pages of which some head is reserved.
    pub(crate) fn reserved_pages(&self) -> usize {
        self.reserved
            .lock()
            .iter()
            .filter(|&&bits| bits != 0)
            .count()
    }

    /// All heads that the pool holds.
    pub(crate) fn heads(&self) -> HeadRange {
        let planes = self.layout.layers.iter().flat_map(|layer| &layer.planes);
        planes
            .filter(|plane| plane.role != crate::kv::PlaneRole::Auxiliary)
            .map(|plane| plane.heads)
            .next()
            .unwrap_or(HeadRange { first: 0, count: 0 })
    }

    /// A bit for each head; heads share bits, rounded outwards, where there are more heads than bits.
    fn head_bits(&self, heads: HeadRange) -> u128 {
        let all = self.heads();
        let group = all.count.div_ceil(128).max(1);
        let first = heads.first.saturating_sub(all.first) / group;
        let last = (heads.first.saturating_sub(all.first) + heads.count.saturating_sub(1)) / group;
        (first.min(127)..=last.min(127)).fold(0, |bits, bit| bits | 1 << bit)
    }
}

fn staged_rails(regions: &[Region]) -> Vec<bool> {
    let rails = regions.iter().map(|region| region.rails().len()).max();
    (0..rails.unwrap_or(0))
        .map(|rail| regions.iter().any(|region| !region.is_reached(rail)))
        .collect()
}

/// The regions to flush: a device is told once, however many of its regions there are, if it says which it is.
fn flushed(regions: &[Region]) -> Vec<usize> {
    let mut devices = Vec::new();
    let mut flushed = Vec::new();
    for (at, region) in regions.iter().enumerate() {
        let Some(device) = region.memory().device() else {
            continue;
        };
        if device.visibility() == Visibility::Ordered {
            continue;
        }
        let location = device.location();
        if location.is_none() || !devices.contains(&location) {
            devices.push(location);
            flushed.push(at);
        }
    }
    flushed
}

/// A pool as long as somebody needs it: a caller, a grant or a push. The last one gone ends the registrations.
#[derive(Debug)]
pub(crate) struct PoolHandle {
    pub(crate) record: Arc<PoolRecord>,
    pub(crate) endpoint: Arc<EndpointShared>,
}

impl Drop for PoolHandle {
    fn drop(&mut self) {
        // Without a driver the contexts are gone, and with them the registrations.
        self.endpoint.command(Command::ReleasePool(self.record.id));
    }
}

/// An exported region as long as its owner or an access of this side needs it.
#[derive(Debug)]
pub(crate) struct ExportHandle {
    pub(crate) record: Arc<ExportRecord>,
    pub(crate) endpoint: Arc<EndpointShared>,
}

impl Drop for ExportHandle {
    fn drop(&mut self) {
        // Without a driver the contexts are gone, and with them the registrations.
        self.endpoint
            .command(Command::ReleaseExport(Arc::clone(&self.record)));
    }
}

/// Buffers for tails, one for each grant of this side and each push of this side, in one registered region.
#[derive(Debug)]
pub(crate) struct TailArena {
    memory: Arc<HostMemory>,
    region: Region,
    stride: u64,
    capacity: u32,
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    free: Vec<u32>,
    /// How often each slot has been used.
    generations: Vec<u32>,
}

/// One buffer of the arena, in use until dropped.
#[derive(Debug)]
pub(crate) struct TailSlot {
    arena: Arc<TailArena>,
    id: GrantId,
}

impl TailArena {
    /// Bytes that `slots` buffers of `capacity` bytes of payload need.
    pub(crate) fn length(slots: u32, capacity: u32) -> u64 {
        u64::from(slots) * Self::stride(capacity)
    }

    fn stride(capacity: u32) -> u64 {
        (u64::from(capacity) + TailHeader::SIZE as u64).next_multiple_of(64)
    }

    pub(crate) fn new(memory: Arc<HostMemory>, region: Region, slots: u32, capacity: u32) -> Self {
        let slots = Slots {
            free: (0..slots).rev().collect(),
            generations: vec![0; slots as usize],
        };
        Self {
            memory,
            region,
            stride: Self::stride(capacity),
            capacity,
            slots: Mutex::new(slots),
        }
    }

    /// Takes a free buffer. Its generation has never been used before.
    pub(crate) fn take(self: &Arc<Self>) -> Option<TailSlot> {
        let mut slots = self.slots.lock();
        let slot = slots.free.pop()?;
        let generation = &mut slots.generations[slot as usize];
        *generation = generation.wrapping_add(1);
        let id = GrantId {
            slot,
            generation: *generation,
        };
        Some(TailSlot {
            arena: Arc::clone(self),
            id,
        })
    }

    /// Whether `id` was in use at some time, or is.
    pub(crate) fn knows(&self, id: GrantId) -> bool {
        let slots = self.slots.lock();
        slots
            .generations
            .get(id.slot as usize)
            .is_some_and(|&now| id.generation <= now && id.generation > 0)
    }
}

impl TailSlot {
    /// The name that the buffer gives its grant.
    pub(crate) fn id(&self) -> GrantId {
        self.id
    }

    /// Where the buffer is.
    pub(crate) fn address(&self) -> u64 {
        self.arena.region.address() + self.offset()
    }

    /// Its key for peers, on one rail.
    pub(crate) fn remote(&self, rail: usize) -> Option<RemoteKey> {
        let keys = self.arena.region.rails().get(rail)?;
        keys.remote().first().copied()
    }

    /// What a window for it is bound into on one rail: address, registration, bytes.
    pub(crate) fn window(&self, rail: usize) -> Option<(u64, MrId, u64)> {
        let keys = self.arena.region.rails().get(rail)?;
        let (address, mr) = keys.window(self.offset())?;
        let length = u64::from(self.arena.capacity) + TailHeader::SIZE as u64;
        Some((address, mr, length))
    }

    /// Its address and key for gather lists, on one rail.
    pub(crate) fn local(&self, rail: usize) -> Option<(u64, LocalKey)> {
        let (address, key, _) = self.arena.region.rails().get(rail)?.at(self.offset())?;
        Some((address, key))
    }

    /// Writes a tail to send. Its length is known to fit. Returns the bytes to send.
    pub(crate) fn store(&self, generation: u32, tail: &[u8]) -> u32 {
        let header = TailHeader::new(generation, tail.len() as u32);
        let payload = self.offset() + TailHeader::SIZE as u64;
        let written = self
            .arena
            .memory
            .write(self.offset(), &header.to_bytes())
            .and_then(|()| self.arena.memory.write(payload, tail));
        debug_assert!(written.is_ok(), "{written:?}");
        (TailHeader::SIZE + tail.len()) as u32
    }

    /// Reads a tail that has arrived; nothing if it is not of this generation or claims more than its room.
    pub(crate) fn load(&self, generation: u32) -> Option<Bytes> {
        let mut buffer = vec![0; TailHeader::SIZE + self.arena.capacity as usize];
        self.arena.memory.read(self.offset(), &mut buffer).ok()?;
        TailHeader::payload(&buffer, generation).map(Bytes::copy_from_slice)
    }

    fn offset(&self) -> u64 {
        u64::from(self.id.slot) * self.arena.stride
    }
}

impl Drop for TailSlot {
    fn drop(&mut self) {
        self.arena.slots.lock().free.push(self.id.slot);
    }
}

/// What a caller sees of an arrival.
#[derive(Debug)]
pub(crate) struct ArrivalState {
    /// A bit for each complete layer.
    layers: Vec<u64>,
    pub(crate) complete_layers: u32,
    pub(crate) tail: Option<Bytes>,
    pub(crate) keys: Option<GrantKeys>,
    pub(crate) end: Option<Result<(), ArrivalError>>,
}

/// See [`ArrivalState`].
#[derive(Debug)]
pub(crate) struct ArrivalShared {
    pub(crate) signal: Signal<ArrivalState>,
    /// What led to its end, if that was not a good one. Set before the end is.
    pub(crate) trace: OnceLock<Arc<[Event]>>,
}

impl ArrivalShared {
    pub(crate) fn new(layers: u32) -> Self {
        let layers = vec![0; layers.div_ceil(64) as usize];
        Self {
            signal: Signal::new(ArrivalState {
                layers,
                complete_layers: 0,
                tail: None,
                keys: None,
                end: None,
            }),
            trace: OnceLock::new(),
        }
    }

    /// It is over.
    pub(crate) fn end(&self, result: Result<(), ArrivalError>, trace: Option<Arc<[Event]>>) {
        if let Some(trace) = trace {
            self.trace.get_or_init(|| trace);
        }
        self.signal.update(|state| state.end = Some(result));
    }
}

impl ArrivalState {
    pub(crate) fn layer_complete(&mut self, layer: u32) {
        if let Some(word) = self.layers.get_mut(layer as usize / 64) {
            *word |= 1 << (layer % 64);
            self.complete_layers += 1;
        }
    }

    pub(crate) fn is_layer_complete(&self, layer: usize) -> bool {
        self.layers
            .get(layer / 64)
            .is_some_and(|word| word & (1 << (layer % 64)) != 0)
    }
}

/// How far a push is.
#[derive(Debug)]
pub(crate) enum PushPhase {
    Opening,
    Active,
    Ended(Result<PushReport, PushError>),
}

/// What a caller sees of a push.
#[derive(Debug)]
pub(crate) struct PushShared {
    pub(crate) signal: Signal<PushPhase>,
    pub(crate) open_timeout: Option<Duration>,
    /// What led to its end, if that was not a good one. Set before the end is.
    pub(crate) trace: OnceLock<Arc<[Event]>>,
}

impl PushShared {
    /// It is over.
    pub(crate) fn end(&self, result: Result<PushReport, PushError>, trace: Option<Arc<[Event]>>) {
        if let Some(trace) = trace {
            self.trace.get_or_init(|| trace);
        }
        self.signal
            .update(|phase| *phase = PushPhase::Ended(result));
    }
}

/// What a caller sees of a session that it wants made.
pub(crate) type ConnectShared = Signal<Option<Result<Incarnation, PeerError>>>;

/// What a caller sees of a one-sided access.
#[derive(Debug)]
pub(crate) struct AccessShared {
    pub(crate) keys: Signal<Option<Arc<RegionKeys>>>,
    pub(crate) signal: Signal<Option<Result<(), AccessError>>>,
}

impl AccessShared {
    pub(crate) fn new() -> Self {
        Self {
            keys: Signal::new(None),
            signal: Signal::new(None),
        }
    }

    pub(crate) fn finish(&self, result: Result<(), AccessError>) {
        self.signal.update(|state| *state = Some(result));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{endpoint::regions::Policy, memory::Memory};

    fn arena(slots: u32, capacity: u32) -> Arc<TailArena> {
        let memory = Arc::new(HostMemory::new(TailArena::length(slots, capacity)).unwrap());
        let region = Region::register(
            Arc::clone(&memory) as Arc<dyn Memory>,
            Access::LOCAL,
            &[],
            &Policy::default(),
        )
        .unwrap();
        Arc::new(TailArena::new(memory, region, slots, capacity))
    }

    #[test]
    fn a_slot_used_again_has_a_new_generation() {
        let arena = arena(1, 100);
        let first = arena.take().unwrap();
        assert!(arena.take().is_none(), "there is only one");
        let id = first.id();
        drop(first);
        let second = arena.take().unwrap();
        assert_eq!(second.id().slot, id.slot);
        assert_ne!(second.id().generation, id.generation);
        assert!(
            arena.knows(id)
                && !arena.knows(GrantId {
                    slot: 0,
                    generation: id.generation + 2
                })
        );
    }

    #[test]
    fn a_tail_of_another_generation_or_size_is_refused() {
        let arena = arena(2, 100);
        let slot = arena.take().unwrap();
        let generation = slot.id().generation;
        assert_eq!(slot.load(generation), None, "nothing has been stored");
        slot.store(generation, b"token 42");
        assert_eq!(slot.load(generation).as_deref(), Some(&b"token 42"[..]));
        assert_eq!(slot.load(generation + 1), None);
        let absurd = TailHeader::new(generation, 1 << 20);
        arena
            .memory
            .write(slot.offset(), &absurd.to_bytes())
            .unwrap();
        assert_eq!(slot.load(generation), None);
    }
}
