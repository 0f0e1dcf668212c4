//! Pools: registered memory with a layout, and the grants issued for its pages.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;

use super::{
    Arrival, Endpoint, EndpointError, FlushError, IssueError, RailChoice, choice,
    core::{ArrivalEntry, Command, landing_bytes},
    regions::{Exports, Region, RegionPaths},
    shared::{ArrivalShared, EndpointShared, PoolHandle, PoolRecord},
};
use crate::{
    fabric::Access,
    kv::{HeadRange, KvLayout, PlaneRole, pages},
    memory::Memory,
    protocol::Blocks,
    topology::Topology,
    wire::{Grant, GrantFields, PoolId, random_nonce},
};

/// Most registrations of a pool beyond one for each region and rail. All of them go into one message.
const MAX_POOL_EXTENTS: usize = 1 << 16;

/// A KV cache (or one shard of it) that can be pushed from and into.
///
/// Cloning is cheap. The memory stays registered until the last clone, and every grant and push that uses the pool,
/// has ended.
#[derive(Clone, Debug)]
pub struct Pool {
    pub(super) handle: Arc<PoolHandle>,
}

/// How a pool is registered, beyond its layout and memory.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PoolOptions {
    /// Which rails its pages go through, instead of [`super::Builder::rails`].
    pub rails: Option<RailChoice>,
}

impl PoolOptions {
    /// Uses `rails`.
    pub fn rails(mut self, rails: RailChoice) -> Self {
        self.rails = Some(rails);
        self
    }
}

/// What a grant is for, beyond its pages.
#[derive(Clone, Debug)]
pub struct GrantOptions {
    /// The caller's name for the request, at most 256 bytes; the writer can read it.
    pub request: Bytes,
    /// The writer has until then, counted from now.
    pub deadline: Duration,
    /// The heads the writer may write, by their number in the model; by default all that the pool holds. With tensor
    /// parallelism of different degrees, each source rank gets a grant of its own for the same pages; see
    /// [`crate::kv::shard::pairing`].
    pub heads: Option<HeadRange>,
    /// Overrides [`super::Builder::parts_per_layer`].
    pub parts_per_layer: Option<u16>,
    /// Overrides [`super::Builder::flush_arrivals`].
    pub flush: Option<bool>,
}

impl GrantOptions {
    /// A grant of all heads.
    pub fn new(request: impl Into<Bytes>, deadline: Duration) -> Self {
        Self {
            request: request.into(),
            deadline,
            heads: None,
            parts_per_layer: None,
            flush: None,
        }
    }

    /// Restricts it to `heads`.
    pub fn heads(mut self, heads: HeadRange) -> Self {
        self.heads = Some(heads);
        self
    }
}

impl Endpoint {
    /// Registers `memory` as a pool: region `i` of `layout` is `memory[i]`.
    ///
    /// Blocks while the memory is pinned, which takes long for gigabytes.
    ///
    /// # Errors
    ///
    /// The layout does not lie in the memory ([`EndpointError::Layout`]), or a rail refuses the registration.
    pub fn register_pool(
        &self,
        layout: KvLayout,
        memory: Vec<Arc<dyn Memory>>,
    ) -> Result<Pool, EndpointError> {
        self.register_pool_with(layout, memory, PoolOptions::default())
    }

    /// Like [`Endpoint::register_pool`], with all options.
    ///
    /// # Errors
    ///
    /// As there, or a rail is named that does not exist ([`EndpointError::Setting`]).
    pub fn register_pool_with(
        &self,
        layout: KvLayout,
        memory: Vec<Arc<dyn Memory>>,
        options: PoolOptions,
    ) -> Result<Pool, EndpointError> {
        self.shared().register_pool(layout, memory, options)
    }
}

impl EndpointShared {
    pub(super) fn register_pool(
        self: &Arc<Self>,
        layout: KvLayout,
        memory: Vec<Arc<dyn Memory>>,
        options: PoolOptions,
    ) -> Result<Pool, EndpointError> {
        let lengths: Vec<u64> = memory.iter().map(|memory| memory.length()).collect();
        layout.validate(&lengths)?;
        let shared = self;
        let choice = options.rails.as_ref().unwrap_or(&shared.config.rails);
        let rails: Vec<_> = shared.devices.iter().map(|device| device.info()).collect();
        let each = memory.iter().map(|memory| &**memory);
        let rails = choice::distances(choice, each, &rails, || {
            shared.topology.get_or_init(Topology::host)
        })?;
        let mut regions = Vec::with_capacity(memory.len());
        let give_up = |regions: Vec<Region>, error| {
            regions.into_iter().for_each(|region| {
                shared.command(Command::Deregister(region));
            });
            Err(error)
        };
        let arena = || shared.staging_arena();
        let mut exports = Exports::with_arena(&arena);
        for memory in memory {
            match shared.register(memory, Access::REMOTE_WRITE, &mut exports) {
                Ok(region) => regions.push(region),
                Err(error) => return give_up(regions, error),
            }
        }
        drop(exports);
        if regions.iter().any(|region| region.staged().is_some())
            && let Some(region) = regions.iter().position(|region| region.staged().is_none())
        {
            return give_up(regions, EndpointError::MixedPool { region });
        }
        let extents = regions.iter().flat_map(Region::rails);
        let extents = extents
            .map(|rail| rail.remote().len().saturating_sub(1))
            .sum();
        if extents > MAX_POOL_EXTENTS {
            let limit = MAX_POOL_EXTENTS;
            let error = EndpointError::TooManyExtents { extents, limit };
            return give_up(regions, error);
        }
        let id = PoolId(shared.next_pool.fetch_add(1, Ordering::Relaxed));
        let record = Arc::new(PoolRecord::new(id, layout, regions, rails));
        if !shared.command(Command::AddPool(Arc::clone(&record))) {
            return Err(EndpointError::Closed);
        }
        Ok(Pool {
            handle: Arc::new(PoolHandle {
                record,
                endpoint: Arc::clone(shared),
            }),
        })
    }
}

impl Pool {
    /// Its name within the endpoint.
    pub fn id(&self) -> PoolId {
        self.handle.record.id
    }

    /// Its layout.
    pub fn layout(&self) -> &KvLayout {
        &self.handle.record.layout
    }

    /// How each rail reaches each region, and why not in a better way.
    pub fn paths(&self) -> Vec<RegionPaths> {
        let (record, endpoint) = (&self.handle.record, &self.handle.endpoint);
        let regions = record.regions.iter();
        regions.map(|r| r.paths(&endpoint.devices)).collect()
    }

    /// The region that holds `address`, and how far it is from the region's first byte; in O(log n). Where regions
    /// overlap, the shortest.
    pub fn locate(&self, address: u64) -> Option<(usize, u64)> {
        let record = &self.handle.record;
        let region = record.index.find(address)?;
        Some((region, address - record.regions.get(region)?.address()))
    }

    /// Makes what NICs have written, and reported, visible to kernels that the devices of this pool's memory start
    /// afterwards. Arrivals do so by themselves, unless they were told not to
    /// ([`super::Builder::flush_arrivals`]). For host memory it does nothing.
    ///
    /// # Errors
    ///
    /// A device's runtime refuses. Nothing is known then of what its kernels see.
    pub fn flush(&self) -> Result<(), FlushError> {
        self.handle.record.flush()
    }

    /// Ends the pool's registrations, if nobody else needs them. They end, and the memory is given up, as soon as the
    /// driver thread gets to it. (Dropping the pool does the same without asking: it lasts until the last grant and push
    /// that uses it has ended.)
    ///
    /// # Errors
    ///
    /// A grant, a push or another clone of the pool lives, or the driver thread is about to let go of one that has just
    /// ended. Nothing has been ended then, and the pool comes back.
    pub fn close(self) -> Result<(), PoolInUse> {
        let granted_pages = self.granted_pages();
        match Arc::try_unwrap(self.handle) {
            // Dropping it tells the driver.
            Ok(_last) => Ok(()),
            Err(handle) => Err(PoolInUse {
                granted_pages,
                users: Arc::strong_count(&handle) - 1,
                pool: Self { handle },
            }),
        }
    }

    /// Pages that live grants hold.
    pub fn granted_pages(&self) -> usize {
        self.handle.record.reserved_pages()
    }

    /// Reserves `pages` and issues the right to write all layers of them, once, within `deadline` from now.
    ///
    /// `pages` is in the request's own order: position `i` of the grant is `pages[i]`, and the writer pushes its page
    /// for position `i` there. `request` is the caller's name for it, of at most 256 bytes.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn decode(pool: &kvpush::Pool, send_anywhere: impl Fn(bytes::Bytes))
    /// #     -> Result<(), Box<dyn std::error::Error>> {
    /// let arrival = pool.grant("request-17", &[4, 9, 10], Duration::from_secs(30))?;
    /// send_anywhere(arrival.grant().encode());
    /// let first_token = arrival.complete_blocking(Duration::from_secs(31)).expect("ends by its deadline")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`IssueError`]; nothing is reserved then.
    pub fn grant(
        &self,
        request: impl Into<Bytes>,
        pages: &[u32],
        deadline: Duration,
    ) -> Result<Arrival, IssueError> {
        self.grant_with(pages, GrantOptions::new(request, deadline))
    }

    /// Like [`Pool::grant`], with all options.
    pub fn grant_with(&self, pages: &[u32], options: GrantOptions) -> Result<Arrival, IssueError> {
        let (record, endpoint) = (&self.handle.record, &self.handle.endpoint);
        let config = &endpoint.config;
        if endpoint.drain.has_begun() {
            return Err(IssueError::Draining);
        }
        if options.deadline.is_zero() {
            return Err(IssueError::NoTime);
        }
        let heads = options.heads.unwrap_or_else(|| record.heads());
        check_heads(&record.layout, heads)?;
        let parts_per_layer = options.parts_per_layer.unwrap_or(config.parts_per_layer);
        let layers = record.layout.layers.len();
        let blocks = u32::try_from(pages.len())
            .ok()
            .filter(|_| pages.len() <= Grant::MAX_PAGES)
            .and_then(|count| Blocks::new(layers as u32, count, parts_per_layer))
            .ok_or(IssueError::Size {
                pages: pages.len(),
                layers,
                parts_per_layer,
            })?;
        pages::check_unique(pages, record.layout.pages)?;
        if let Some(arena) = record.arena().filter(|_| record.staged.iter().all(|&s| s)) {
            let bytes = landing_bytes(&record.layout, pages.len(), heads);
            let room = arena.landing_bytes();
            if bytes > room {
                return Err(IssueError::TooLargeToStage { bytes, room });
            }
        }
        let limit = config.max_transfers;
        let tail_slot = endpoint.tails.take().ok_or(IssueError::TooMany { limit })?;
        let grant = Grant::new(GrantFields {
            issuer: endpoint.incarnation,
            addresses: endpoint.addresses.clone(),
            pool: record.id,
            id: tail_slot.id(),
            nonce: random_nonce().map_err(|error| IssueError::Random(error.to_string()))?,
            heads,
            parts_per_layer,
            tail_capacity: config.tail_capacity,
            valid_for: options.deadline,
            request: options.request,
            pages: pages.to_vec(),
        })?;
        record.reserve(pages, heads)?;
        let shared = Arc::new(ArrivalShared::new(layers as u32));
        let entry = ArrivalEntry::new(
            grant.clone(),
            Arc::clone(&self.handle),
            Arc::clone(&shared),
            tail_slot,
            blocks,
            options.deadline,
            options.flush.unwrap_or(config.flush),
        );
        if !endpoint.command(Command::AddGrant(Box::new(entry))) {
            record.release(pages, heads);
            return Err(IssueError::Closed);
        }
        Ok(Arrival::new(grant, shared, Arc::clone(endpoint), layers))
    }
}

/// A pool cannot be closed, because something still uses it.
#[derive(thiserror::Error)]
#[error(
    "{} is used by {users} grants, pushes or other handles; {granted_pages} of its pages are granted (hint: wait for \
     their ends, or revoke and cancel)", pool.id()
)]
pub struct PoolInUse {
    /// The pool, as it was.
    pub pool: Pool,
    /// Who uses it beside the caller.
    pub users: usize,
    /// Pages that live grants hold.
    pub granted_pages: usize,
}

impl std::fmt::Debug for PoolInUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolInUse")
            .field("pool", &self.pool.id())
            .field("users", &self.users)
            .field("granted_pages", &self.granted_pages)
            .finish()
    }
}

impl PoolInUse {
    /// Whether the same call can succeed later: when its users have ended.
    pub fn is_retryable(&self) -> bool {
        true
    }
}

fn check_heads(layout: &KvLayout, wanted: HeadRange) -> Result<(), IssueError> {
    for (layer, planes) in layout.layers.iter().enumerate() {
        let holds = |plane: &crate::kv::Plane| {
            plane.role == PlaneRole::Auxiliary || plane.heads.contains(wanted)
        };
        if wanted.count == 0 || !planes.planes.iter().all(holds) {
            return Err(IssueError::Heads { wanted, layer });
        }
    }
    Ok(())
}
