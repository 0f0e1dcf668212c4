//! What an operator can see of an endpoint: counters, a plain snapshot of them, and a flight recorder.
//!
//! Three ways to look, one source. The driver counts into `meters`: each count is an atomic of ours, for
//! [`Endpoint::stats`](super::Endpoint::stats), and a handle of the `metrics` facade, which does nothing unless the
//! program has installed a recorder. Handles are made once for each peer, so counting is an addition for each batch of
//! requests and never an allocation. `recorder` remembers the last changes of state; the part that concerns a failed
//! push or arrival travels with it.
//!
//! Names, types and labels of all metrics are in `docs/metrics.md`. No label and no event ever holds a secret: no nonce,
//! no key, no request name, no page content.
//!
//! The driver writes; any thread reads. Nobody waits for anybody longer than it takes to copy the ring.

pub(crate) mod meters;
mod recorder;
mod stats;

#[cfg(feature = "prometheus")]
pub mod prometheus;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicU64},
};

use parking_lot::Mutex;

use super::StagingStats;

use self::meters::{EndpointMeters, PeerMeters};
pub(crate) use self::recorder::Recorder;
pub use self::{
    recorder::{Event, EventKind, FlightRecord},
    stats::{Levels, Outcomes, PeerStats, RailStats, Stats},
};

/// Peers whose sessions have never become ready share this label.
const UNREACHED: &str = "unreached";
/// Peers beyond the limit share this one.
const OTHERS: &str = "others";
/// Peers without a name, this one.
const UNNAMED: &str = "unnamed";

/// What the driver writes and callers read.
#[derive(Debug)]
pub(crate) struct Telemetry {
    /// Rails of the endpoint, as labels.
    rails: Vec<String>,
    /// Most peers with a label of their own.
    limit: usize,
    peers: Mutex<BTreeMap<String, Arc<PeerMeters>>>,
    unreached: Arc<PeerMeters>,
    pub(crate) endpoint: EndpointMeters,
    pub(crate) recorder: Recorder,
    pub(crate) levels: [AtomicU64; Levels::COUNT],
}

impl Telemetry {
    /// For an endpoint with these rails, of whose peers at most `limit` are told apart.
    pub(crate) fn new(rails: Vec<String>, limit: usize) -> Self {
        Self {
            unreached: Arc::new(PeerMeters::new(UNREACHED, &rails)),
            rails,
            limit,
            peers: Mutex::default(),
            endpoint: EndpointMeters::new(),
            recorder: Recorder::new(),
            levels: Default::default(),
        }
    }

    /// The meters of the peer that calls itself `name`.
    pub(crate) fn peer(&self, name: &str) -> Arc<PeerMeters> {
        let mut peers = self.peers.lock();
        let name = if name.is_empty() { UNNAMED } else { name };
        let name = match peers.contains_key(name) || peers.len() < self.limit {
            true => name,
            false => OTHERS,
        };
        if let Some(peer) = peers.get(name) {
            return Arc::clone(peer);
        }
        let peer = Arc::new(PeerMeters::new(name, &self.rails));
        peers.insert(name.to_owned(), Arc::clone(&peer));
        peer
    }

    /// The meters of what never reached its peer.
    pub(crate) fn unreached(&self) -> Arc<PeerMeters> {
        Arc::clone(&self.unreached)
    }

    /// Everything, now.
    pub(crate) fn stats(&self) -> Stats {
        let peers = self.peers.lock();
        let peers = peers.values().chain([&self.unreached]);
        Stats {
            levels: Levels::load(&self.levels),
            refused: self.endpoint.refused.total(),
            unfenced: self.endpoint.unfenced.total(),
            staging: StagingStats::default(),
            peers: peers.map(|peer| peer.stats(&self.rails)).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
