//! A simulated network: deterministic, seeded, in virtual time, and as strict as verbs. For tests only.
//!
//! A [`SimNet`] is one network; [`SimNet::device`] gives rails on it which serve the same [`Device`](super::Device)
//! and [`Context`](super::Context) as real ones. Bytes are moved between the registered memories of one process, one
//! packet of [`Capabilities::mtu`](super::Capabilities) bytes at a time, with everything that a reliable connection
//! does and does not promise:
//!
//! * packets of one lane arrive in order, those of different lanes in any; a message is visible in parts before it
//!   completes; its source is read when a packet leaves (and again when it is resent), unless it is inline;
//! * completions of different work queues come in random order; a send completion follows the acknowledgement;
//! * keys, ranges and rights are checked at both ends; an offence fails both sides of the lane;
//! * queues have exactly their depths. A slot of a work queue is free when its completion has been polled, as in
//!   drivers. A completion too many ends the context: see [`SimStats::cq_overflows`];
//! * on a failed completion the meaningless fields hold garbage.
//!
//! There are two ways to use it. A *stepped* net ([`SimNet::new`]) moves only when the harness says so
//! ([`SimNet::step`], [`SimNet::advance_to`]): with one thread, equal seeds give equal runs ([`SimNet::trace_hash`]).
//! In a *free-running* net ([`SimNet::free_running`]) polling or arming a context that has no completion drives the
//! events, and sleeping contexts are woken, so that threads can use it like real rails. Virtual time then has nothing
//! to do with real time.
//!
//! Any thread may call a net or a device; a context has one owner, as everywhere.

mod completion;
mod config;
mod context;
mod device;
mod event;
mod faults;
mod lane;
mod memory;
mod packet;
mod post;
mod requester;
mod responder;
pub(crate) mod rng;
mod stats;
mod trace;
mod windows;
mod world;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

pub use config::SimConfig;
pub use device::SimDevice;
pub use stats::SimStats;
pub use trace::{Trace, TraceEntry, TraceEvent};

use crate::memory::PciAddress;
use world::World;

/// A simulated network. Clones are handles of the same one.
#[derive(Clone)]
pub struct SimNet {
    world: Arc<Mutex<World>>,
    id: u64,
}

impl SimNet {
    /// A network as `config` says.
    pub fn new(config: SimConfig) -> Self {
        static NETS: AtomicU64 = AtomicU64::new(1);
        Self {
            world: Arc::new(Mutex::new(World::new(config))),
            id: NETS.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The default network with `seed`, driven by its contexts.
    pub fn free_running(seed: u64) -> Self {
        Self::new(SimConfig {
            free_running: true,
            ..SimConfig::seeded(seed)
        })
    }

    /// The device called `name`: a handle of the living one, or a new one.
    pub fn device(&self, name: &str) -> Arc<SimDevice> {
        Arc::new(SimDevice::new(Arc::clone(&self.world), self.id, name, None))
    }

    /// Like [`SimNet::device`], with a place in a host.
    pub fn device_at(&self, name: &str, pci: PciAddress) -> Arc<SimDevice> {
        let world = Arc::clone(&self.world);
        Arc::new(SimDevice::new(world, self.id, name, Some(pci)))
    }

    /// Virtual nanoseconds since the start.
    pub fn now(&self) -> u64 {
        self.world.lock().now
    }

    /// When something happens next, or nothing if the net is at rest.
    pub fn next_event(&self) -> Option<u64> {
        self.world.lock().next_event()
    }

    /// Lets the next event happen. False if the net is at rest.
    pub fn step(&self) -> bool {
        self.world.lock().step()
    }

    /// Lets everything up to `time` happen, and makes it `time`.
    pub fn advance_to(&self, time: u64) {
        let mut world = self.world.lock();
        while world.next_event().is_some_and(|next| next <= time) {
            world.step();
        }
        world.now = world.now.max(time);
    }

    /// Lets at most `limit` events happen. True if the net is at rest then; a requester that waits for a receive
    /// without end never is.
    pub fn run_until_idle(&self, limit: usize) -> bool {
        let mut world = self.world.lock();
        (0..limit).any(|_| !world.step()) || world.next_event().is_none()
    }

    /// The counts so far.
    pub fn stats(&self) -> SimStats {
        self.world.lock().stats
    }

    /// The latest events.
    pub fn trace(&self) -> Trace {
        let world = self.world.lock();
        let devices = world.devices.iter().map(|d| d.name.clone()).collect();
        world.recorder.snapshot(devices)
    }

    /// How many memory windows there are on the device called `name`.
    pub fn windows(&self, name: &str) -> u32 {
        let world = self.world.lock();
        let device = world.find(name).and_then(|index| world.devices.get(index));
        device.map_or(0, |device| device.regions.windows())
    }

    /// A hash of all events so far: equal for equal runs.
    pub fn trace_hash(&self) -> u64 {
        self.world.lock().recorder.hash()
    }
}

impl fmt::Debug for SimNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world.lock();
        f.debug_struct("SimNet")
            .field("now", &world.now)
            .field("config", &world.config)
            .field("stats", &world.stats)
            .finish()
    }
}
