//! Counters of one peer, of each rail to it, and of the endpoint.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::stats::{Levels, Outcomes, PeerStats, RailStats};
use crate::wire::RefuseCode;

/// A counter of ours and, if there is a recorder, the program's.
#[derive(Debug)]
pub(crate) struct Tally {
    total: AtomicU64,
    exported: Counter,
}

impl Tally {
    pub(crate) fn new(exported: Counter) -> Self {
        Self {
            total: AtomicU64::new(0),
            exported,
        }
    }

    /// Only the driver adds, but any thread may look.
    pub(crate) fn add(&self, count: u64) {
        self.total.fetch_add(count, Ordering::Relaxed);
        self.exported.increment(count);
    }

    pub(crate) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// How a push or an arrival ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Completed,
    Cancelled,
    Revoked,
    Expired,
    Refused,
    Failed,
    Unfenced,
}

impl Outcome {
    pub(super) const ALL: [(Self, &str); 7] = [
        (Self::Completed, "completed"),
        (Self::Cancelled, "cancelled"),
        (Self::Revoked, "revoked"),
        (Self::Expired, "expired"),
        (Self::Refused, "refused"),
        (Self::Failed, "failed"),
        (Self::Unfenced, "unfenced"),
    ];
}

/// How a grant was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Revoked {
    /// The writer agreed.
    Cooperative,
    /// Its lanes were fenced.
    Forced,
}

/// Counters of one rail to one peer.
#[derive(Debug)]
pub(crate) struct RailMeters {
    pub(crate) bytes: Tally,
    pub(crate) writes: Tally,
    pub(crate) stalls: Tally,
    pub(crate) parts: Tally,
    pub(crate) failures: Tally,
    pub(crate) renewals: Tally,
    pub(crate) replayed: Tally,
}

impl RailMeters {
    fn new(peer: &str, rail: &str) -> Self {
        let new = |name: &'static str| {
            Tally::new(counter!(name, "peer" => peer.to_owned(), "rail" => rail.to_owned()))
        };
        Self {
            bytes: new("kvpush_written_bytes_total"),
            writes: new("kvpush_writes_total"),
            stalls: new("kvpush_stalls_total"),
            parts: new("kvpush_parts_arrived_total"),
            failures: new("kvpush_lanes_failed_total"),
            renewals: new("kvpush_lanes_renewed_total"),
            replayed: new("kvpush_parts_replayed_total"),
        }
    }
}

/// Counters of one peer.
#[derive(Debug)]
pub(crate) struct PeerMeters {
    name: String,
    pub(crate) sessions: Tally,
    pub(crate) sessions_failed: Tally,
    pub(crate) keepalive_timeouts: Tally,
    pub(crate) control_sent: Tally,
    pub(crate) control_received: Tally,
    pushes: [Tally; Outcome::ALL.len()],
    arrivals: [Tally; Outcome::ALL.len()],
    revokes: [Tally; 2],
    open_time: Histogram,
    push_time: Histogram,
    arrival_time: Histogram,
    revoke_time: [Histogram; 2],
    rails: Box<[RailMeters]>,
}

impl PeerMeters {
    pub(super) fn new(name: &str, rails: &[String]) -> Self {
        let label = || name.to_owned();
        let new = |name: &'static str| Tally::new(counter!(name, "peer" => label()));
        let outcomes = |name: &'static str| {
            Outcome::ALL.map(|(_, outcome)| {
                Tally::new(counter!(name, "peer" => label(), "outcome" => outcome))
            })
        };
        let directed = |direction: &'static str| {
            let name = "kvpush_control_bytes_total";
            Tally::new(counter!(name, "peer" => label(), "direction" => direction))
        };
        let how = ["cooperative", "forced"];
        Self {
            name: label(),
            sessions: new("kvpush_sessions_total"),
            sessions_failed: new("kvpush_sessions_failed_total"),
            keepalive_timeouts: new("kvpush_keepalive_timeouts_total"),
            control_sent: directed("sent"),
            control_received: directed("received"),
            pushes: outcomes("kvpush_pushes_total"),
            arrivals: outcomes("kvpush_arrivals_total"),
            revokes: how.map(|how| {
                Tally::new(counter!("kvpush_revokes_total", "peer" => label(), "how" => how))
            }),
            open_time: histogram!("kvpush_push_open_seconds", "peer" => label()),
            push_time: histogram!("kvpush_push_seconds", "peer" => label()),
            arrival_time: histogram!("kvpush_arrival_seconds", "peer" => label()),
            revoke_time: how
                .map(|how| histogram!("kvpush_revoke_seconds", "peer" => label(), "how" => how)),
            rails: rails
                .iter()
                .map(|rail| RailMeters::new(name, rail))
                .collect(),
        }
    }

    /// The label.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The counters of one of our rails.
    pub(crate) fn rail(&self, rail: usize) -> Option<&RailMeters> {
        self.rails.get(rail)
    }

    pub(crate) fn push_opened(&self, after: Duration) {
        self.open_time.record(after.as_secs_f64());
    }

    pub(crate) fn push_ended(&self, outcome: Outcome, after: Duration) {
        self.pushes[outcome as usize].add(1);
        if outcome == Outcome::Completed {
            self.push_time.record(after.as_secs_f64());
        }
    }

    pub(crate) fn arrival_ended(&self, outcome: Outcome, after: Duration) {
        self.arrivals[outcome as usize].add(1);
        if outcome == Outcome::Completed {
            self.arrival_time.record(after.as_secs_f64());
        }
    }

    pub(crate) fn revoked(&self, how: Revoked, after: Duration) {
        self.revokes[how as usize].add(1);
        self.revoke_time[how as usize].record(after.as_secs_f64());
    }

    pub(super) fn stats(&self, rails: &[String]) -> PeerStats {
        let outcomes = |of: &[Tally; Outcome::ALL.len()]| {
            let [
                completed,
                cancelled,
                revoked,
                expired,
                refused,
                failed,
                unfenced,
            ] = std::array::from_fn(|index| of[index].total());
            Outcomes {
                completed,
                cancelled,
                revoked,
                expired,
                refused,
                failed,
                unfenced,
            }
        };
        PeerStats {
            peer: self.name.clone(),
            sessions: self.sessions.total(),
            sessions_failed: self.sessions_failed.total(),
            keepalive_timeouts: self.keepalive_timeouts.total(),
            control_bytes_sent: self.control_sent.total(),
            control_bytes_received: self.control_received.total(),
            pushes: outcomes(&self.pushes),
            arrivals: outcomes(&self.arrivals),
            revokes_cooperative: self.revokes[0].total(),
            revokes_forced: self.revokes[1].total(),
            rails: rails
                .iter()
                .zip(&self.rails)
                .map(|(rail, meters)| RailStats {
                    rail: rail.clone(),
                    bytes: meters.bytes.total(),
                    writes: meters.writes.total(),
                    stalls: meters.stalls.total(),
                    parts: meters.parts.total(),
                    lane_failures: meters.failures.total(),
                    lane_renewals: meters.renewals.total(),
                    parts_replayed: meters.replayed.total(),
                })
                .collect(),
        }
    }
}

/// Counters of the endpoint as a whole.
#[derive(Debug)]
pub(crate) struct EndpointMeters {
    pub(crate) refused: Tally,
    pub(crate) unfenced: Tally,
    pub(crate) drains: Tally,
    levels: [Gauge; Levels::COUNT],
}

impl EndpointMeters {
    pub(super) fn new() -> Self {
        Self {
            // Exported by code, and rare: see `refuse`.
            refused: Tally::new(Counter::noop()),
            unfenced: Tally::new(counter!("kvpush_fences_failed_total")),
            drains: Tally::new(counter!("kvpush_drains_total")),
            levels: Levels::NAMES.map(|name| gauge!(name)),
        }
    }

    /// A grant or region token was refused to a peer.
    pub(crate) fn refuse(&self, code: RefuseCode) {
        self.refused.add(1);
        counter!("kvpush_refused_total", "code" => (code as u16).to_string()).increment(1);
    }

    /// Something of which there is a number at any time has another one now.
    pub(crate) fn level(&self, index: usize, value: u64) {
        if let Some(gauge) = self.levels.get(index) {
            gauge.set(value as f64);
        }
    }
}
