//! How each rail reaches a piece of memory, and why not in a better way: for people and for tests.

use std::fmt;

use crate::{fabric::FabricKind, memory::MemoryKind};

/// A way by which a rail reaches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryPath {
    /// Registered as host memory.
    Plain,
    /// Registered by a dmabuf that its device exports.
    Dmabuf,
    /// Registered by its device's own addresses, which a module of the kernel translates (`ibv_peer_mem`,
    /// `nvidia_peermem`).
    PeerMemory,
    /// Not registered: bytes are copied through pinned host memory.
    Staged,
}

impl fmt::Display for MemoryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Dmabuf => "dmabuf",
            Self::PeerMemory => "peer memory",
            Self::Staged => "staged",
        })
    }
}

/// A path that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRefusal {
    /// The path.
    pub path: MemoryPath,
    /// Why not.
    pub reason: String,
}

impl fmt::Display for PathRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

/// How one rail reaches a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RailPath {
    /// The rail's device.
    pub device: String,
    /// Its port.
    pub port: u8,
    /// Its fabric.
    pub fabric: FabricKind,
    /// The path taken.
    pub path: MemoryPath,
    /// Registrations: more than 1 where the region is longer than the device registers at once, 0 if it is staged.
    pub extents: usize,
    /// The better paths, and why they were not taken.
    pub refused: Vec<PathRefusal>,
}

/// How the rails of an endpoint reach a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionPaths {
    /// The registration.
    pub id: RegionId,
    /// Its first byte.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// What the memory is.
    pub kind: MemoryKind,
    /// One for each rail, in the endpoint's order.
    pub rails: Vec<RailPath>,
}

/// Names one registration of an endpoint. No number is ever used again, so a name that has outlived its registration
/// names nothing, even if the same memory, or other memory at the same place, has been registered since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(crate) u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// Where an address was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// The registration that holds it.
    pub id: RegionId,
    /// How far it is from the first byte.
    pub offset: u64,
    /// Bytes from there to the end of the registration, at least 1.
    pub left: u64,
}
