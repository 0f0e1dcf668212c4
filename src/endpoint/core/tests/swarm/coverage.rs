//! What a run of schedules has tried and seen. A run that never reached something it should have is worth less than it
//! seems, so it fails.

use std::collections::BTreeMap;

use super::menu::{Fault, named};
use crate::{
    endpoint::{ArrivalError, PeerError, PushError, PushReport},
    wire::RefuseCode,
};

named! {
    /// How a push or an arrival ended, and what happened on the way.
    Seen {
        ArrivalCompleted = "arrival: completed",
        ArrivalRevoked = "arrival: revoked",
        ArrivalExpired = "arrival: expired",
        ArrivalAbandoned = "arrival: abandoned",
        ArrivalControl = "arrival: control connection lost",
        ArrivalGoodbye = "arrival: goodbye",
        ArrivalLane = "arrival: lane failed",
        ArrivalFabric = "arrival: fabric failed",
        ArrivalSilent = "arrival: silent peer",
        ArrivalClosed = "arrival: its process is gone",
        ArrivalUnfenced = "arrival: unfenced",
        ArrivalOther = "arrival: another end",
        PushCompleted = "push: completed",
        PushCancelled = "push: cancelled",
        PushExpired = "push: expired",
        PushRevoked = "push: revoked",
        PushRefusedStale = "push: refused, stale generation",
        PushRefusedIncarnation = "push: refused, wrong incarnation",
        PushRefusedOpened = "push: refused, already opened",
        PushRefusedExpired = "push: refused, expired",
        PushRefusedOther = "push: refused otherwise",
        PushRestarted = "push: peer restarted",
        PushControl = "push: control connection lost",
        PushGoodbye = "push: goodbye",
        PushLane = "push: lane failed",
        PushFabric = "push: fabric failed",
        PushSilent = "push: silent peer",
        PushClosed = "push: its process is gone",
        PushUnfenced = "push: unfenced",
        PushOther = "push: another end",
        FanIn = "several writers to the same pages",
        LayerFirst = "a layer was ready before the rest",
        Reused = "pages granted again",
        Retransmitted = "packets sent again",
        SeveralRails = "several rails",
    }
}

impl Seen {
    /// Those without which a long run fails. The others depend on what the driver makes of a fault.
    fn must_occur(self) -> bool {
        !matches!(
            self,
            Self::ArrivalOther
                | Self::PushOther
                | Self::PushRefusedOther
                | Self::PushRefusedExpired
                | Self::PushRefusedIncarnation
                | Self::PushLane
                | Self::ArrivalLane
                | Self::PushFabric
                | Self::ArrivalFabric
        )
    }

    /// The name of an arrival's end.
    pub(super) fn of_arrival(end: &Result<bytes::Bytes, ArrivalError>) -> Self {
        match end {
            Ok(_) => Self::ArrivalCompleted,
            Err(ArrivalError::Revoked) => Self::ArrivalRevoked,
            Err(ArrivalError::Expired { .. }) => Self::ArrivalExpired,
            Err(ArrivalError::Abandoned { .. }) => Self::ArrivalAbandoned,
            Err(ArrivalError::Unfenced(_)) => Self::ArrivalUnfenced,
            Err(ArrivalError::Peer(error)) => match error {
                PeerError::Control { .. } => Self::ArrivalControl,
                PeerError::Goodbye { .. } => Self::ArrivalGoodbye,
                PeerError::Lane { .. } => Self::ArrivalLane,
                PeerError::Fabric { .. } => Self::ArrivalFabric,
                PeerError::Silent { .. } => Self::ArrivalSilent,
                PeerError::Closed => Self::ArrivalClosed,
                _ => Self::ArrivalOther,
            },
            Err(_) => Self::ArrivalOther,
        }
    }

    /// The name of a push's end.
    pub(super) fn of_push(end: &Result<PushReport, PushError>) -> Self {
        match end {
            Ok(_) => Self::PushCompleted,
            Err(PushError::Cancelled) => Self::PushCancelled,
            Err(PushError::Expired) => Self::PushExpired,
            Err(PushError::Revoked(_)) => Self::PushRevoked,
            Err(PushError::Unfenced(_)) => Self::PushUnfenced,
            Err(PushError::Refused { code, .. }) => match code {
                RefuseCode::StaleGeneration | RefuseCode::UnknownGrant => Self::PushRefusedStale,
                RefuseCode::WrongIncarnation => Self::PushRefusedIncarnation,
                RefuseCode::AlreadyOpened => Self::PushRefusedOpened,
                RefuseCode::Expired => Self::PushRefusedExpired,
                _ => Self::PushRefusedOther,
            },
            Err(PushError::Peer(error)) => match error {
                PeerError::Restarted { .. } => Self::PushRestarted,
                PeerError::Control { .. } => Self::PushControl,
                PeerError::Goodbye { .. } => Self::PushGoodbye,
                PeerError::Lane { .. } => Self::PushLane,
                PeerError::Fabric { .. } => Self::PushFabric,
                PeerError::Silent { .. } => Self::PushSilent,
                PeerError::Closed => Self::PushClosed,
                _ => Self::PushOther,
            },
            Err(_) => Self::PushOther,
        }
    }
}

/// How often what occurred.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    faults: BTreeMap<Fault, u64>,
    seen: BTreeMap<Seen, u64>,
}

impl Coverage {
    pub(super) fn fault(&mut self, fault: Fault) {
        *self.faults.entry(fault).or_default() += 1;
    }

    pub(super) fn saw(&mut self, seen: Seen) {
        *self.seen.entry(seen).or_default() += 1;
    }

    pub(super) fn count(&self, seen: Seen) -> u64 {
        self.seen.get(&seen).copied().unwrap_or_default()
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (&fault, count) in &other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        for (&seen, count) in &other.seen {
            *self.seen.entry(seen).or_default() += count;
        }
    }

    /// One line for each: its name, how often, and whether a long run must have it.
    pub(super) fn lines(&self) -> impl Iterator<Item = (String, u64, bool)> + '_ {
        let faults = Fault::ALL.iter().map(|fault| {
            let count = self.faults.get(fault).copied().unwrap_or_default();
            (format!("fault: {}", fault.name()), count, true)
        });
        let seen = Seen::ALL
            .iter()
            .map(|seen| (seen.name().to_owned(), self.count(*seen), seen.must_occur()));
        faults.chain(seen)
    }

    /// What a long run lacks.
    pub(super) fn missing(&self) -> Vec<String> {
        self.lines()
            .filter(|&(_, count, must)| must && count == 0)
            .map(|(name, ..)| name)
            .collect()
    }
}
