//! What the fabrics let travel: which kind of fabric, how to reach a lane, under which key memory is written. Here
//! because messages carry it; the fabrics give it its meaning.

use std::fmt;

/// The kinds of fabric, in order of preference: the greatest kind that both peers have is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum FabricKind {
    /// Deterministic simulation inside one process; only for tests.
    Sim = 1,
    /// Embedded fabric over TCP sockets.
    Tcp = 2,
    /// RDMA verbs: RoCE v2 or InfiniBand.
    Verbs = 4,
    /// Embedded fabric through shared memory, between processes of one host.
    Shm = 8,
}

impl FabricKind {
    /// The kind encoded as `value` on the wire.
    pub fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Sim),
            2 => Some(Self::Tcp),
            4 => Some(Self::Verbs),
            8 => Some(Self::Shm),
            _ => None,
        }
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sim => "sim",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Shm => "shm",
        })
    }
}

/// Names a registration in requests of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RemoteKey(pub u32);

/// How a peer reaches a lane: bytes that only the same kind of fabric understands. At most
/// [`LaneAddress::MAX`] bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneAddress(Vec<u8>);

impl LaneAddress {
    /// The longest address any fabric uses.
    pub const MAX: usize = 96;

    /// Wraps `bytes`, or nothing if they are more than [`LaneAddress::MAX`].
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() <= Self::MAX).then_some(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}
