//! The endpoint: what serving engines hold, and the threads that drive the protocol over the fabrics.
//!
//! | Thread | Owns | Sleeps in |
//! |---|---|---|
//! | `kvpush-driver` | the `core`, and with it all contexts, lanes, grants and pushes | `poll(2)` on the contexts and its wake-up |
//! | `kvpush-control` | the control connections | `epoll(7)` |
//!
//! Every method may be called from any thread, and none but those that say so blocks. Every wait exists as a future
//! (of any runtime, or none), as a blocking call with a timeout, and as a poll.

mod arrival;
mod builder;
mod choice;
mod config;
pub(crate) mod control;
mod core;
mod drain;
mod driver;
mod error;
mod export;
mod pool;
mod prepared;
mod push;
mod rails;
mod regions;
mod shared;
mod signal;
mod sleep;
pub mod telemetry;
mod wake;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
};

use parking_lot::Mutex;

pub use self::{
    arrival::{Arrival, Revocation},
    builder::Builder,
    choice::RailChoice,
    config::{GrantKeys, Polling, Protection},
    control::{CloseReason, DialError, DialFailure},
    drain::{DrainCount, DrainReport},
    error::{
        AccessError, ArrivalError, EndpointError, FlushError, IssueError, PeerError, PushError,
        PushInputError, StagingError, StuckCopy,
    },
    export::{LocalRegion, RemoteRegion},
    pool::{GrantOptions, Pool, PoolInUse, PoolOptions},
    prepared::Prepared,
    push::{Push, PushReport},
    regions::{Located, MemoryPath, PathRefusal, RailPath, RegionId, RegionPaths, StagingStats},
    telemetry::{Event, EventKind, FlightRecord, Levels, Outcomes, PeerStats, RailStats, Stats},
};
use self::{
    core::{Command, ConnectEntry},
    shared::{ConnectShared, EndpointShared},
};
use crate::{fabric::DeviceInfo, wire::Incarnation};

/// One process's end of all transfers: its rails, its registered memory, its peers.
///
/// Cloning is cheap and gives another handle to the same endpoint. When the last handle is dropped the endpoint shuts
/// down: peers are told, lanes fenced, and whoever still waits gets [`PeerError::Closed`].
#[derive(Clone, Debug)]
pub struct Endpoint {
    owner: Arc<Owner>,
}

#[derive(Debug)]
struct Owner {
    shared: Arc<EndpointShared>,
    local: SocketAddr,
    driver: Mutex<Option<JoinHandle<()>>>,
}

impl Endpoint {
    /// Begins to configure an endpoint.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The address that the control channel listens on.
    pub fn local_address(&self) -> SocketAddr {
        self.owner.local
    }

    /// The addresses that grants name.
    pub fn addresses(&self) -> &[String] {
        &self.owner.shared.addresses
    }

    /// The random name of this start of the endpoint.
    pub fn incarnation(&self) -> Incarnation {
        self.owner.shared.incarnation
    }

    /// The rails in use, best fabric first.
    pub fn rails(&self) -> impl Iterator<Item = &DeviceInfo> {
        self.owner.shared.devices.iter().map(|device| device.info())
    }

    /// The registration of this endpoint that holds `address`, in O(log n): of several the shortest, and of equally short
    /// ones the latest. For engines that know a pointer and ask whose it is.
    pub fn locate(&self, address: u64) -> Option<Located> {
        self.shared().registry.locate(address)
    }

    /// Whether `region` is still registered. False for a name that has outlived its registration, whatever has been
    /// registered since.
    pub fn is_registered(&self, region: RegionId) -> bool {
        self.shared().registry.is_live(region)
    }

    /// What has gone through staging memory so far; all zero if no pool needs it.
    pub fn staging(&self) -> StagingStats {
        let staging = self.shared().staging.lock();
        let arena = staging.as_ref();
        arena.map_or_else(StagingStats::default, |arena| arena.counters.stats())
    }

    /// Registrations that there are, each counted once however many pools share it.
    pub fn registrations(&self) -> usize {
        self.shared().registry.len()
    }

    /// Makes the session to the endpoint that listens on `address` (`host:port`) now, so that the first push to it does
    /// not have to. Returns that endpoint's incarnation.
    ///
    /// # Errors
    ///
    /// The endpoint cannot be reached, or no lanes can be made, within
    /// [`Builder::open_timeout`].
    pub async fn connect(&self, address: &str) -> Result<Incarnation, PeerError> {
        let shared = self.start_connect(address)?;
        std::future::poll_fn(|context| shared.poll(context, Clone::clone)).await
    }

    /// Like [`Endpoint::connect`], blocking.
    pub fn connect_blocking(&self, address: &str) -> Result<Incarnation, PeerError> {
        self.start_connect(address)?
            .wait(None, Clone::clone)
            .unwrap_or(Err(PeerError::Closed))
    }

    fn start_connect(&self, address: &str) -> Result<Arc<ConnectShared>, PeerError> {
        if self.shared().drain.has_begun() {
            return Err(PeerError::Draining);
        }
        let shared = Arc::new(ConnectShared::new(None));
        let entry = ConnectEntry::new(address.to_owned(), Arc::clone(&shared));
        if self.shared().command(Command::Connect(entry)) {
            Ok(shared)
        } else {
            Err(PeerError::Closed)
        }
    }

    /// What exists and what has happened so far, without a metrics recorder. Waits for nobody; the last word after the
    /// endpoint has been shut down, too.
    pub fn stats(&self) -> Stats {
        Stats {
            staging: self.staging(),
            ..self.shared().telemetry.stats()
        }
    }

    /// The last changes of state of sessions, pushes and arrivals, at most 1024.
    pub fn flight_record(&self) -> FlightRecord {
        self.shared().telemetry.recorder.snapshot()
    }

    /// Ends all sessions with `peer`, dialled and accepted: its lanes are fenced, and what ran over them ends with
    /// [`PeerError::Disconnected`]. A later push or connection makes a new session. Does not wait.
    pub fn disconnect(&self, peer: Incarnation) {
        // Without a driver there are no sessions.
        self.shared().command(Command::Disconnect(peer));
    }

    /// Shuts down now, without waiting for other handles to be dropped. Blocks until the threads have ended.
    ///
    /// On return no peer can reach registered memory any more, and every arrival and push has ended.
    pub fn shutdown(&self) {
        self.owner.shutdown();
    }

    pub(crate) fn shared(&self) -> &Arc<EndpointShared> {
        &self.owner.shared
    }
}

impl Owner {
    fn shutdown(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.wake.wake();
        if let Some(driver) = self.driver.lock().take() {
            // The last handle may be dropped by a waker, which the driver itself calls. It ends on its own then.
            if driver.thread().id() == std::thread::current().id() {
                return;
            }
            // The driver catches nothing, so that a bug is seen; its panic has been printed by its own thread.
            if driver.join().is_err() {
                tracing::error!("the driver thread panicked");
            }
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shutdown();
    }
}
