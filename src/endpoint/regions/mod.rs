//! Regions: memory registered with the rails of an endpoint.
//!
//! A region owns its memory, so the memory outlives every registration of it. Registration runs on the caller's
//! thread, because pinning gigabytes takes long; deregistration runs on the thread that owns the contexts.
//!
//! | File | What |
//! |---|---|
//! | `policy` | by which path a rail gets at memory |
//! | `arena` | pinned host memory for what a rail cannot reach |
//! | `grid` | how a region is cut where a device registers less at once |
//! | `registry` | what is registered: shared registrations, lookup by address |
//! | `index` | which region holds an address |
//! | `report` | the public words for all that |

mod arena;
mod grid;
mod index;
mod policy;
mod registry;
mod report;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use parking_lot::Mutex;

pub use self::arena::StagingStats;
pub use self::report::{Located, MemoryPath, PathRefusal, RailPath, RegionId, RegionPaths};
pub(crate) use self::{
    arena::{Arena, Buffer, LandingRange},
    grid::Grid,
    index::{AddressIndex, Entry},
    policy::{Exports, Policy, Unreachable},
    registry::Registry,
};
use crate::{
    fabric::{Access, Device, LocalKey, MemoryKeys, MrId, RemoteKey},
    memory::{Copier, Memory, Ticket},
};

/// How one rail reaches a region.
#[derive(Debug)]
pub(crate) struct RailKeys {
    path: MemoryPath,
    grid: Grid,
    /// One for each extent; none if the rail does not reach the region.
    keys: Vec<MemoryKeys>,
    refused: Vec<PathRefusal>,
    /// Registrations of paths that failed half-way, to be ended with the rest.
    abandoned: Vec<MemoryKeys>,
}

impl RailKeys {
    fn unreachable(refused: Vec<PathRefusal>, abandoned: Vec<MemoryKeys>) -> Self {
        Self {
            path: MemoryPath::Staged,
            grid: Grid::NOWHERE,
            keys: Vec::new(),
            refused,
            abandoned,
        }
    }

    /// How it is cut, and where its first byte is in the rail's address space.
    pub(crate) fn grid(&self) -> Grid {
        self.grid
    }

    /// Every registration, for ending them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &MemoryKeys> {
        self.keys.iter().chain(&self.abandoned)
    }

    /// The keys for peers, one for each extent.
    pub(crate) fn remote(&self) -> Vec<RemoteKey> {
        self.keys.iter().map(|keys| keys.remote).collect()
    }

    /// What a window that begins at `offset` is bound into: the address there, and the registration. `None` if the rail
    /// does not reach the region.
    pub(crate) fn window(&self, offset: u64) -> Option<(u64, MrId)> {
        let keys = self.keys.get(self.grid.index(offset))?;
        Some((self.grid.address + offset, keys.mr))
    }

    /// The gather element's address and key for the byte at `offset`, and how many bytes on they are good for (never
    /// beyond the extent; the end of the region is not looked at). `None` if the rail does not reach the region.
    #[inline]
    pub(crate) fn at(&self, offset: u64) -> Option<(u64, LocalKey, u64)> {
        let keys = self.keys.get(self.grid.index(offset))?;
        Some((
            self.grid.address + offset,
            keys.local,
            self.grid.rest(offset),
        ))
    }
}

/// What it takes to stage a region.
#[derive(Debug)]
pub(crate) struct Staged {
    /// Only the driver uses it; dropping it waits for what it has started.
    pub(crate) copier: Mutex<Box<dyn Copier>>,
    /// A batch that was not waited for any more.
    pub(crate) stuck: Mutex<Option<Ticket>>,
    /// Pinned for the copier, so it stays until the copier has gone.
    pub(crate) arena: Arc<Arena>,
}

/// One piece of memory and its keys on each rail, whoever shares them.
#[derive(Debug)]
pub(crate) struct Registration {
    id: RegionId,
    // Before the memory that it copies.
    staged: Option<Staged>,
    memory: Arc<dyn Memory>,
    access: Access,
    rails: Vec<RailKeys>,
}

/// One user's hold on a registration.
#[derive(Debug)]
pub(crate) struct Region {
    registration: Arc<Registration>,
    /// What this user registered: the registration may hold another value for the same bytes.
    memory: Arc<dyn Memory>,
    registry: Option<Arc<Registry>>,
}

impl Region {
    /// Registers `memory` with every device of `rails`, in their order, for one user.
    ///
    /// # Errors
    ///
    /// The error of the first rail that cannot reach it. Registrations made before stay until the caller hands the
    /// returned region to the driver, so it is returned with the error.
    pub(crate) fn register(
        memory: Arc<dyn Memory>,
        access: Access,
        rails: &[Arc<dyn Device>],
        policy: &Policy,
    ) -> Result<Self, Box<(Unreachable, Self)>> {
        Self::make(
            RegionId(0),
            memory,
            access,
            rails,
            policy,
            &mut Exports::default(),
        )
    }

    fn make(
        id: RegionId,
        memory: Arc<dyn Memory>,
        access: Access,
        rails: &[Arc<dyn Device>],
        policy: &Policy,
        exports: &mut Exports<'_>,
    ) -> Result<Self, Box<(Unreachable, Self)>> {
        let mut staged = None;
        let mut registered = Vec::with_capacity(rails.len());
        let mut failure = None;
        for device in rails {
            match policy::register(&memory, access, device, policy, exports, &mut staged) {
                Ok(keys) => registered.push(keys),
                Err(failed) => {
                    let (error, keys) = *failed;
                    registered.push(keys);
                    failure = Some(error);
                    break;
                }
            }
        }
        let region = Self {
            registration: Arc::new(Registration {
                id,
                staged: staged.and_then(Result::ok),
                memory: Arc::clone(&memory),
                access,
                rails: registered,
            }),
            memory,
            registry: None,
        };
        match failure {
            None => Ok(region),
            Some(error) => Err(Box::new((error, region))),
        }
    }

    /// Its name.
    pub(crate) fn id(&self) -> RegionId {
        self.registration.id
    }

    /// The memory that this user registered.
    pub(crate) fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// Address of the first byte, as the owner of the memory knows it.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Bytes.
    pub(crate) fn length(&self) -> u64 {
        self.memory.length()
    }

    /// What peers may do.
    pub(crate) fn access(&self) -> Access {
        self.registration.access
    }

    /// How each rail reaches it, in the endpoint's order.
    pub(crate) fn rails(&self) -> &[RailKeys] {
        &self.registration.rails
    }

    /// What it takes to stage it, if some rail does not reach it.
    pub(crate) fn staged(&self) -> Option<&Staged> {
        self.registration.staged.as_ref()
    }

    /// Whether rail number `rail` reaches it.
    pub(crate) fn is_reached(&self, rail: usize) -> bool {
        self.rails()
            .get(rail)
            .is_some_and(|keys| !keys.keys.is_empty())
    }

    /// Whether some rail has it in several extents.
    pub(crate) fn is_cut(&self) -> bool {
        self.rails().iter().any(|rail| !rail.grid.is_whole())
    }

    /// Gives this user's hold up. Returns whether it was the last one, and the registrations must be ended now. To be
    /// called once, by the driver.
    pub(crate) fn release(&self) -> bool {
        self.registry
            .as_ref()
            .is_none_or(|registry| registry.release(&self.registration))
    }

    /// How the rails reach it.
    pub(crate) fn paths(&self, devices: &[Arc<dyn Device>]) -> RegionPaths {
        let rails = self.rails().iter().zip(devices).map(|(keys, device)| {
            let info = device.info();
            RailPath {
                device: info.name.clone(),
                port: info.port,
                fabric: info.kind,
                path: keys.path,
                extents: keys.keys.len(),
                refused: keys.refused.clone(),
            }
        });
        RegionPaths {
            id: self.id(),
            address: self.address(),
            length: self.length(),
            kind: self.memory.kind(),
            rails: rails.collect(),
        }
    }
}
