//! A plain snapshot of the counters, for programs that look themselves.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::endpoint::StagingStats;

/// Numbers of things that exist now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Levels {
    /// Sessions, those that are being made included.
    pub sessions: u64,
    /// Lanes.
    pub lanes: u64,
    /// Pushes that have not ended.
    pub pushes: u64,
    /// Arrivals that have not ended.
    pub arrivals: u64,
    /// One-sided accesses that have not ended.
    pub accesses: u64,
    /// Pools.
    pub pools: u64,
    /// Exported regions.
    pub exports: u64,
    /// Timers that have not come due.
    pub timers: u64,
}

impl Levels {
    pub(crate) const COUNT: usize = 8;
    pub(crate) const NAMES: [&str; Self::COUNT] = [
        "kvpush_sessions",
        "kvpush_lanes",
        "kvpush_pushes_live",
        "kvpush_arrivals_live",
        "kvpush_accesses_live",
        "kvpush_pools",
        "kvpush_exports",
        "kvpush_timers",
    ];

    pub(super) fn load(levels: &[AtomicU64; Self::COUNT]) -> Self {
        let [
            sessions,
            lanes,
            pushes,
            arrivals,
            accesses,
            pools,
            exports,
            timers,
        ] = std::array::from_fn(|index| levels[index].load(Ordering::Relaxed));
        Self {
            sessions,
            lanes,
            pushes,
            arrivals,
            accesses,
            pools,
            exports,
            timers,
        }
    }
}

/// How pushes or arrivals have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcomes {
    /// Everything has arrived.
    pub completed: u64,
    /// The writer gave up.
    pub cancelled: u64,
    /// The reader took the grant back.
    pub revoked: u64,
    /// The deadline passed.
    pub expired: u64,
    /// The reader refused the grant.
    pub refused: u64,
    /// The peer was lost, or something else went wrong.
    pub failed: u64,
    /// Lanes could not be fenced, or a copy did not end: memory is set aside for good.
    pub unfenced: u64,
}

/// What went over one of our rails to or from one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RailStats {
    /// Our device and its port.
    pub rail: String,
    /// Bytes posted as writes and reads.
    pub bytes: u64,
    /// Requests posted.
    pub writes: u64,
    /// How often a lane had work, and neither a slot of its send queue nor a receive of the peer.
    pub stalls: u64,
    /// Parts of grants that have arrived, repetitions included.
    pub parts: u64,
    /// Lanes that failed.
    pub lane_failures: u64,
    /// Failed lanes of sessions of ours that work again.
    pub lane_renewals: u64,
    /// Parts that a failed lane had carried and that were sent again.
    pub parts_replayed: u64,
}

/// What happened with one peer since this endpoint was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// The peer's own name. `others` are those beyond [`Builder::metric_peers`](crate::endpoint::Builder::metric_peers),
    /// `unreached` those of which no session became ready, and `unnamed` those without a name.
    pub peer: String,
    /// Sessions that became ready.
    pub sessions: u64,
    /// Sessions that ended by an error.
    pub sessions_failed: u64,
    /// Sessions that ended because the peer was silent.
    pub keepalive_timeouts: u64,
    /// Bytes of control messages, to it.
    pub control_bytes_sent: u64,
    /// Bytes of control messages, from it.
    pub control_bytes_received: u64,
    /// Pushes to it.
    pub pushes: Outcomes,
    /// Arrivals from it.
    pub arrivals: Outcomes,
    /// Grants it gave back when it was asked.
    pub revokes_cooperative: u64,
    /// Grants that were taken from it by a fence.
    pub revokes_forced: u64,
    /// Each of our rails.
    pub rails: Vec<RailStats>,
}

/// What an endpoint has and what it has done, at one moment. Totals count from its start and never fall.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// What exists now.
    pub levels: Levels,
    /// Grants and region tokens refused to peers.
    pub refused: u64,
    /// Lanes that could not be fenced.
    pub unfenced: u64,
    /// What has gone through staging memory.
    pub staging: StagingStats,
    /// Each peer.
    pub peers: Vec<PeerStats>,
}

impl fmt::Display for Stats {
    /// For people: one line for the endpoint, one for each peer that did something, one for each rail that was used.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let levels = &self.levels;
        writeln!(
            f,
            "sessions {} lanes {} pushes {} arrivals {} accesses {} pools {} exports {} refused {} unfenced {}",
            levels.sessions,
            levels.lanes,
            levels.pushes,
            levels.arrivals,
            levels.accesses,
            levels.pools,
            levels.exports,
            self.refused,
            self.unfenced,
        )?;
        if self.staging != StagingStats::default() {
            let staging = &self.staging;
            writeln!(
                f,
                "  staging: {} bytes to the host, {} to devices, {} copies, {} failed, {} stuck, {} waits",
                staging.to_host,
                staging.to_device,
                staging.copies,
                staging.failures,
                staging.stuck,
                staging.waits,
            )?;
        }
        for peer in &self.peers {
            let (pushes, arrivals) = (&peer.pushes, &peer.arrivals);
            if *pushes == Outcomes::default()
                && *arrivals == Outcomes::default()
                && peer.sessions == 0
            {
                continue;
            }
            writeln!(
                f,
                "  {}: sessions {} (failed {}, silent {}) pushes {pushes} arrivals {arrivals} revokes {} + {} forced",
                peer.peer,
                peer.sessions,
                peer.sessions_failed,
                peer.keepalive_timeouts,
                peer.revokes_cooperative,
                peer.revokes_forced,
            )?;
            for rail in peer
                .rails
                .iter()
                .filter(|rail| rail.writes + rail.parts + rail.lane_failures > 0)
            {
                writeln!(
                    f,
                    "    {}: {} bytes in {} writes, {} stalls, {} parts arrived, {} lanes failed",
                    rail.rail, rail.bytes, rail.writes, rail.stalls, rail.parts, rail.lane_failures,
                )?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} completed", self.completed)?;
        let others = [
            ("cancelled", self.cancelled),
            ("revoked", self.revoked),
            ("expired", self.expired),
            ("refused", self.refused),
            ("failed", self.failed),
            ("unfenced", self.unfenced),
        ];
        for (name, count) in others.into_iter().filter(|(_, count)| *count > 0) {
            write!(f, ", {count} {name}")?;
        }
        Ok(())
    }
}
