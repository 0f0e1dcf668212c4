//! How an endpoint behaves. Every figure has a default; the builder changes them.

use std::time::Duration;

use super::{RailChoice, regions::Policy};
use crate::{
    fabric::{FabricKind, verbs::VerbsConfig},
    wire::Auth,
};

/// How the driver thread waits for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// Spins for this long after the last event, then sleeps until the next one. Idle costs nothing.
    Adaptive(Duration),
    /// Spins always. Lowest latency, one whole core.
    Busy,
}

/// How an endpoint finds out that a peer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keepalive {
    /// The silence after which a peer is asked whether it is there.
    pub(crate) interval: Duration,
    /// The silence after which it is given up.
    pub(crate) timeout: Duration,
}

/// Which keys a reader gives to the writer of a grant.
///
/// The key of a region opens all of it, to every peer that was told, until the region is no longer registered. Windows
/// open only what was granted, to the lanes of that writer, until the grant ends: see `SECURITY.md` and
/// [`WindowCaps`](crate::fabric::WindowCaps) for what a device makes of that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protection {
    /// Keys of regions. A grant is opened without delay, and takes nothing of the device.
    #[default]
    Region,
    /// Windows where the rails have them and there are enough, otherwise keys of regions.
    Auto,
    /// Windows. A writer is refused where there are none, and told to try again where there are not enough.
    Window,
}

/// What the writer of a grant has been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantKeys {
    /// The keys of regions: it can reach all of the pool.
    Region,
    /// Windows of its own.
    Windows {
        /// How many, over all lanes, those of the tail included.
        count: u32,
        /// Whether they hold the granted pages only; if not, they reach from the first page in a region to the last.
        exact: bool,
    },
}

/// An endpoint's settings.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) name: String,
    pub(crate) auth: Option<Auth>,
    pub(crate) fabrics: Vec<FabricKind>,
    pub(crate) devices: Option<Vec<String>>,
    pub(crate) advertise: Vec<String>,
    pub(crate) lanes_per_rail: u16,
    pub(crate) send_depth: u32,
    pub(crate) receive_depth: u32,
    pub(crate) max_sge: u32,
    pub(crate) max_inline: u32,
    pub(crate) max_write: u32,
    pub(crate) parts_per_layer: u16,
    pub(crate) tail_capacity: u32,
    pub(crate) max_transfers: u32,
    pub(crate) max_peers: u32,
    pub(crate) open_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) revoke_grace: Duration,
    pub(crate) recovery_timeout: Duration,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) rails: RailChoice,
    pub(crate) metric_peers: usize,
    pub(crate) policy: Policy,
    pub(crate) flush: bool,
    pub(crate) protection: Protection,
    pub(crate) max_windows: u32,
    pub(crate) staging_memory: u64,
    pub(crate) polling: Polling,
    pub(crate) verbs: VerbsConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::new(),
            auth: None,
            fabrics: vec![FabricKind::Shm, FabricKind::Verbs, FabricKind::Tcp],
            devices: None,
            advertise: Vec::new(),
            lanes_per_rail: 2,
            send_depth: 256,
            receive_depth: 256,
            max_sge: 16,
            max_inline: 220,
            max_write: 1 << 28,
            parts_per_layer: 4,
            tail_capacity: 1016,
            max_transfers: 2048,
            max_peers: 1024,
            open_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(5),
            revoke_grace: Duration::from_millis(500),
            recovery_timeout: Duration::from_secs(10),
            keepalive: Some(Keepalive {
                interval: Duration::from_secs(5),
                timeout: Duration::from_secs(15),
            }),
            rails: RailChoice::Nearest,
            metric_peers: 256,
            policy: Policy::default(),
            flush: true,
            protection: Protection::Region,
            max_windows: 64,
            staging_memory: 64 << 20,
            polling: Polling::Adaptive(Duration::from_micros(20)),
            verbs: VerbsConfig::default(),
        }
    }
}
