//! How a rail gets at a piece of memory. The policy, in one place:
//!
//! | Memory | On a NIC (verbs) | On a software fabric (TCP, shared memory, simulated) |
//! |---|---|---|
//! | host | plain | plain |
//! | of a device, accessible by this process | dmabuf, peer memory, staged | plain, dmabuf, staged |
//! | of a device, not accessible | dmabuf, peer memory, staged | dmabuf, staged |
//!
//! The first path that works is taken, for each rail by itself, and the reason of each refusal is kept. The order can be
//! changed (`Builder::memory_paths`). Memory is exported once for all rails and for all regions of a pool that lie in
//! one allocation, only if a rail can use it, and the descriptor is closed when they have been registered.
//!
//! Runs on the caller's thread, because pinning takes long.

use std::{os::fd::AsFd, sync::Arc};

use parking_lot::Mutex;

use super::{Arena, MemoryPath, PathRefusal, RailKeys, Staged, grid::Grid};
use crate::{
    fabric::{
        Access, Device, DmabufRange, FabricError, FabricErrorKind, FabricKind, FileRange,
        MemoryKeys,
    },
    memory::{DeviceMemory, Dmabuf, Memory, PciAddress, Span},
};

/// What may be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) order: Vec<MemoryPath>,
    pub(crate) relaxed_ordering: bool,
    /// Most bytes of one registration, if the device does not say less.
    pub(crate) max_registration: u64,
}

impl Default for Policy {
    fn default() -> Self {
        use MemoryPath::{Dmabuf, PeerMemory, Plain, Staged};
        Self {
            order: vec![Plain, Dmabuf, PeerMemory, Staged],
            relaxed_ordering: false,
            max_registration: u64::MAX,
        }
    }
}

/// Why a rail cannot reach memory.
#[derive(Debug)]
pub(crate) enum Unreachable {
    /// Host memory, which has one path.
    Plain(FabricError),
    /// Memory of a device: each path has its reason.
    All {
        rail: String,
        refused: Vec<PathRefusal>,
    },
}

/// What was exported: of which device, and its addresses.
type Exported = (Option<PciAddress>, Span);

/// What has been exported so far, for one call that registers. Dropping it closes the descriptors.
#[derive(Default)]
pub(crate) struct Exports<'a> {
    exported: Vec<(Exported, Result<Dmabuf, String>)>,
    /// Where to get the arena, if memory may be staged.
    arena: Option<&'a dyn Fn() -> Result<Arc<Arena>, String>>,
}

impl<'a> Exports<'a> {
    /// For memory that may be staged, through what `arena` gives.
    pub(crate) fn with_arena(arena: &'a dyn Fn() -> Result<Arc<Arena>, String>) -> Self {
        Self {
            exported: Vec::new(),
            arena: Some(arena),
        }
    }
}

impl Exports<'_> {
    /// What it takes to stage memory of `device`.
    fn staged(&self, device: &dyn DeviceMemory) -> Result<Staged, String> {
        let make = self.arena.ok_or("only pools are staged")?;
        let mut copier = device.copier().map_err(|error| error.to_string())?;
        let arena = make()?;
        // SAFETY: the registration holds the arena until it has dropped the copier.
        let pinned = unsafe { copier.pin(arena.memory().address(), arena.memory().length()) };
        if let Err(error) = pinned {
            // Several copiers of one device pin the same arena; whoever comes second may be told so.
            tracing::debug!(%error, "staging memory is not pinned once more");
        }
        let copier = Mutex::new(copier);
        let stuck = Mutex::default();
        Ok(Staged {
            copier,
            stuck,
            arena,
        })
    }

    /// The dmabuf that holds `memory`, and where in it.
    fn of(
        &mut self,
        memory: &dyn Memory,
        device: &dyn DeviceMemory,
    ) -> Result<(&Dmabuf, u64), &str> {
        let own = Span {
            address: memory.address(),
            length: memory.length(),
        };
        // Engines cut many regions out of one allocation, which is exported once, if it says which device it is of.
        let location = device.location();
        let allocation = device.allocation().filter(|_| location.is_some());
        let allocation = allocation.filter(|allocation| allocation.contains(own));
        let whole = allocation.unwrap_or(own);
        let key = (location, whole);
        let at = match self.exported.iter().position(|(held, _)| *held == key) {
            Some(at) => at,
            None => {
                let exported = match allocation {
                    Some(_) => device.export_allocation(),
                    None => device.export(),
                };
                self.exported
                    .push((key, exported.map_err(|error| error.to_string())));
                self.exported.len() - 1
            }
        };
        match &self.exported[at].1 {
            Ok(dmabuf) => Ok((dmabuf, dmabuf.offset + (own.address - whole.address))),
            Err(reason) => Err(reason),
        }
    }
}

/// Registers `memory` with `rail` by the first path that works.
pub(super) fn register(
    memory: &Arc<dyn Memory>,
    access: Access,
    rail: &Arc<dyn Device>,
    policy: &Policy,
    exports: &mut Exports<'_>,
    staged: &mut Option<Result<Staged, String>>,
) -> Result<RailKeys, Box<(Unreachable, RailKeys)>> {
    let mut attempt = Attempt {
        memory: &**memory,
        access: Access {
            relaxed_ordering: policy.relaxed_ordering,
            ..access
        },
        rail: &**rail,
        limit: rail.info().caps.max_mr.min(policy.max_registration),
        made: Vec::new(),
    };
    let mut refused = Vec::new();
    let mut abandoned = Vec::new();
    let Some(device) = memory.device() else {
        return match attempt.plain() {
            Ok(grid) => Ok(attempt.done(MemoryPath::Plain, grid, refused, abandoned)),
            Err(error) => {
                abandoned.append(&mut attempt.made);
                let keys = RailKeys::unreachable(refused, abandoned);
                Err(Box::new((Unreachable::Plain(error), keys)))
            }
        };
    };
    for &path in &policy.order {
        let tried = match path {
            MemoryPath::Plain => attempt.plain_of(device),
            MemoryPath::Dmabuf => attempt.dmabuf(device, exports),
            MemoryPath::PeerMemory => attempt.peer_memory(device),
            MemoryPath::Staged => {
                let staged = staged.get_or_insert_with(|| exports.staged(device));
                staged.as_ref().map(|_| Grid::NOWHERE).map_err(Clone::clone)
            }
        };
        match tried {
            Ok(grid) => return Ok(attempt.done(path, grid, refused, abandoned)),
            Err(reason) => {
                abandoned.append(&mut attempt.made);
                refused.push(PathRefusal { path, reason });
            }
        }
    }
    let info = rail.info();
    let error = Unreachable::All {
        rail: format!("{}/{}", info.name, info.port),
        refused: refused.clone(),
    };
    Err(Box::new((error, RailKeys::unreachable(refused, abandoned))))
}

/// One piece of memory and one rail.
struct Attempt<'a> {
    memory: &'a dyn Memory,
    access: Access,
    rail: &'a dyn Device,
    /// Most bytes of one registration.
    limit: u64,
    /// Extents registered by the path under way.
    made: Vec<MemoryKeys>,
}

impl Attempt<'_> {
    fn is_software(&self) -> bool {
        self.rail.info().kind != FabricKind::Verbs
    }

    fn plain_of(&mut self, device: &dyn DeviceMemory) -> Result<Grid, String> {
        if !self.is_software() {
            return Err("a NIC's driver does not take a device's memory for the host's".to_owned());
        }
        if !device.is_host_accessible() {
            return Err("this process cannot access the device's memory".to_owned());
        }
        self.plain().map_err(|error| error.to_string())
    }

    fn peer_memory(&mut self, device: &dyn DeviceMemory) -> Result<Grid, String> {
        if self.is_software() {
            return Err("a software fabric accesses memory with the CPU".to_owned());
        }
        device.peer_memory().map_err(|error| error.to_string())?;
        self.plain().map_err(|error| error.to_string())
    }

    fn dmabuf(
        &mut self,
        device: &dyn DeviceMemory,
        exports: &mut Exports<'_>,
    ) -> Result<Grid, String> {
        if !self.rail.info().caps.dmabuf {
            let what = "the device, its driver or its library registers no dmabufs (`kvpush-bench devices` says more)";
            return Err(what.to_owned());
        }
        let (dmabuf, offset) = exports.of(self.memory, device)?;
        // Offset and I/O virtual address must share their place within a page, and with huge pages of the device more
        // than that is good for the NIC's tables.
        const ALIGN: u64 = 2 << 20;
        let address = self.memory.address();
        let address = address - address % ALIGN + offset % ALIGN;
        let grid = self.grid(address).map_err(|error| error.to_string())?;
        for (at, length) in grid.extents(self.memory.length()) {
            let range = DmabufRange {
                fd: dmabuf.fd.as_fd(),
                offset: offset + at,
                length,
                address: address + at,
            };
            // SAFETY: the exporter lets devices (and, where it can be mapped at all, this process) access the bytes as
            // long as the memory lives, which the region holds until the driver has ended every registration.
            let keys = unsafe { self.rail.register_dmabuf(&range, self.access) };
            self.made.push(keys.map_err(|error| error.to_string())?);
        }
        Ok(grid)
    }

    fn plain(&mut self) -> Result<Grid, FabricError> {
        let grid = self.grid(self.memory.address())?;
        for (at, length) in grid.extents(self.memory.length()) {
            let first = self.memory.address() + at;
            // SAFETY: `Memory` promises the range until the value is dropped; the region holds it, and the driver
            // deregisters every key before it drops the region. It is host memory, or memory that this process can
            // access on a software fabric, or a NIC's driver is asked to translate it. `Memory::file` says which file
            // it maps.
            let keys = unsafe {
                match self.memory.file() {
                    Some((fd, offset)) => {
                        let range = FileRange {
                            fd,
                            offset: offset + at,
                            address: first,
                            length,
                        };
                        self.rail.register_file(&range, self.access)
                    }
                    None => self.rail.register(first, length, self.access),
                }
            };
            self.made.push(keys?);
        }
        Ok(grid)
    }

    fn grid(&self, address: u64) -> Result<Grid, FabricError> {
        const PAGE: u64 = 4096;
        Grid::new(address, self.memory.length(), self.limit, PAGE).ok_or_else(|| {
            let info = self.rail.info();
            FabricError {
                device: info.name.clone(),
                port: info.port,
                operation: "register",
                kind: FabricErrorKind::Limit {
                    what: "region length",
                    value: self.memory.length(),
                    limit: self.limit.saturating_mul(crate::wire::MAX_EXTENTS as u64),
                },
                hint: Some("give the pool several shorter regions"),
            }
        })
    }

    fn done(
        self,
        path: MemoryPath,
        grid: Grid,
        refused: Vec<PathRefusal>,
        abandoned: Vec<MemoryKeys>,
    ) -> RailKeys {
        RailKeys {
            path,
            grid,
            keys: self.made,
            refused,
            abandoned,
        }
    }
}
