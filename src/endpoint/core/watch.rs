//! What a core tells of itself: to the counters, the flight recorder and the log. See [`crate::endpoint::telemetry`].
//!
//! Everything that is told is told here, so that the files which decide have one line for it. Nothing here decides
//! anything, and no more than a batch of requests, a part or a change of state is ever told at once.

use std::{fmt, sync::Arc, time::Duration};

use super::{Core, reader::ArrivalEntry, session::Session};
use crate::{
    endpoint::{
        ArrivalError, PeerError, PushError,
        control::{CloseReason, ConnId},
        telemetry::{
            Event, EventKind, Telemetry,
            meters::{Outcome, PeerMeters, Revoked},
        },
    },
    fabric::{Completion, FabricError, LaneId, Status},
    protocol::Time,
    wire::{GoodbyeCode, GrantId, RefuseCode},
};

/// What is kept of a push or an arrival for telling of it.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Those of its peer, once it has one.
    meters: Option<Arc<PeerMeters>>,
    /// When it was opened.
    opened: Time,
    /// When the grant began to be taken back.
    revoking: Option<Time>,
    /// The peer was fenced because of it.
    forced: bool,
}

/// Events as text, for the log.
struct Tail(Arc<[Event]>);

impl fmt::Display for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, event) in self.0.iter().enumerate() {
            let separator = if index > 0 { "; " } else { "" };
            write!(f, "{separator}{event}")?;
        }
        Ok(())
    }
}

impl Core {
    /// What callers look at.
    pub(crate) fn telemetry(&self) -> Arc<Telemetry> {
        Arc::clone(&self.telemetry)
    }

    fn event_now(&self, kind: EventKind) -> Event {
        Event::new(kind, Duration::from_nanos(self.now.0))
    }

    fn record(&self, kind: EventKind, fill: impl FnOnce(&mut Event)) {
        let mut event = self.event_now(kind);
        fill(&mut event);
        self.telemetry.recorder.record(event);
    }

    /// Numbers of what exists. Told after each step in which something happened.
    pub(super) fn tell_levels(&mut self) {
        let levels = [
            self.sessions.len(),
            self.lanes.len(),
            self.pushes.len(),
            self.arrivals.len(),
            self.accesses.len(),
            self.pools.len(),
            self.exports.len(),
            self.timers.len(),
        ];
        for (index, (level, told)) in levels.into_iter().zip(&mut self.told).enumerate() {
            let level = level as u64;
            if level != *told {
                *told = level;
                self.telemetry.levels[index].store(level, std::sync::atomic::Ordering::Relaxed);
                self.telemetry.endpoint.level(index, level);
            }
        }
    }

    pub(super) fn tell_session(&self, conn: ConnId, kind: EventKind) {
        self.record(kind, |event| event.session = conn.0);
    }

    /// Lanes are connected, and the peer has said who it is.
    pub(super) fn tell_ready(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let meters = self.telemetry.peer(&session.peer_name);
        meters.sessions.add(1);
        session.meters = Some(meters);
        let lanes = session.lanes.len();
        let fabric = session.lanes.first().map(|lane| self.rails[lane.rail].kind);
        tracing::info!(
            peer = session.name(),
            role = ?session.role,
            fabric = fabric.map(tracing::field::display),
            lanes,
            incarnation = session.incarnation.map(tracing::field::display),
            "session ready"
        );
        self.record(EventKind::SessionReady, |event| {
            event.session = conn.0;
            event.value = lanes as u64;
        });
    }

    /// A session ends. Called before anything of it is stopped.
    pub(super) fn tell_session_end(&self, conn: ConnId, session: &Session, error: &PeerError) {
        let by_error = !is_orderly(error);
        if let PeerError::Silent { waited, .. } = error {
            self.record(EventKind::PeerSilent, |event| {
                event.session = conn.0;
                event.value = waited.as_millis() as u64;
            });
        }
        self.record(EventKind::SessionEnded, |event| {
            event.session = conn.0;
            event.code = by_error.into();
        });
        let peer = session.name();
        if !by_error {
            tracing::info!(peer, %error, "session ended");
            return;
        }
        let meters = session.meters.clone();
        meters
            .unwrap_or_else(|| self.telemetry.unreached())
            .sessions_failed
            .add(1);
        let trace = Tail(
            self.telemetry
                .recorder
                .tail(|event| event.session == conn.0),
        );
        tracing::warn!(
            peer,
            %error,
            pushes = session.pushes.len(),
            arrivals = session.slots.iter().flatten().count(),
            %trace,
            "session failed"
        );
    }

    /// A peer did not show that it is there.
    pub(super) fn tell_silent(&self, session: &Session) {
        if let Some(meters) = &session.meters {
            meters.keepalive_timeouts.add(1);
        }
    }

    pub(super) fn tell_lane_failed(&self, conn: ConnId, index: usize, completion: &Completion) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get(index) else {
            return;
        };
        let status = status_name(completion.status);
        let info = self.rails[lane.rail].device.info();
        if let Some(meters) = &session.meters {
            // By status, and rare: the handle is made when it is needed.
            metrics::counter!("kvpush_lane_failures_total",
                "peer" => meters.name().to_owned(), "rail" => rail_name(info), "status" => status)
            .increment(1);
        }
        tracing::warn!(
            peer = session.name(),
            rail = rail_name(info),
            lane = %lane.id,
            status,
            vendor_error = completion.vendor_error,
            in_flight = lane.ledger.in_flight(),
            "lane failed"
        );
        self.record(EventKind::LaneFailed, |event| {
            event.session = conn.0;
            event.rail = lane.rail as u16;
            event.lane = index as u16;
            event.code = match completion.status {
                Status::Other(code) => code,
                status => status_code(status),
            };
        });
    }

    /// A lane has failed, whatever showed it. The session looks after it.
    pub(super) fn tell_lane_down(&self, conn: ConnId, index: usize) {
        if let Some((rail, meters)) = self.lane_meters(conn, index) {
            if let Some(rail) = meters.rail(rail) {
                rail.failures.add(1);
            }
            self.record(EventKind::LaneDown, |event| {
                event.session = conn.0;
                (event.rail, event.lane) = (rail as u16, index as u16);
            });
        }
    }

    /// What a failed lane had carried without an acknowledgement is sent again, as far as it had not arrived.
    pub(super) fn tell_replayed(&self, conn: ConnId, index: usize, parts: usize) {
        if let Some((rail, meters)) = self.lane_meters(conn, index).filter(|_| parts > 0) {
            if let Some(rail) = meters.rail(rail) {
                rail.replayed.add(parts as u64);
            }
            self.record(EventKind::PartsReplayed, |event| {
                event.session = conn.0;
                (event.rail, event.lane) = (rail as u16, index as u16);
                event.value = parts as u64;
            });
        }
    }

    /// A failed lane works again.
    pub(super) fn tell_renewed(&self, conn: ConnId, index: usize) {
        if let Some((rail, meters)) = self.lane_meters(conn, index) {
            if let Some(rail) = meters.rail(rail) {
                rail.renewals.add(1);
            }
            self.record(EventKind::LaneRenewed, |event| {
                event.session = conn.0;
                (event.rail, event.lane) = (rail as u16, index as u16);
            });
        }
    }

    fn lane_meters(&self, conn: ConnId, index: usize) -> Option<(usize, Arc<PeerMeters>)> {
        let session = self.sessions.get(&conn)?;
        Some((session.lanes.get(index)?.rail, session.meters.clone()?))
    }

    pub(super) fn tell_rail_failed(&self, rail: usize) {
        self.record(EventKind::RailFailed, |event| event.rail = rail as u16);
    }

    /// A device refused to end a lane.
    pub(super) fn tell_fence_failed(&self, rail: usize, lane: LaneId, error: &FabricError) {
        self.telemetry.endpoint.unfenced.add(1);
        tracing::error!(%error, %lane, rail, "a lane could not be fenced");
        self.record(EventKind::FenceFailed, |event| event.rail = rail as u16);
    }

    pub(super) fn tell_push_opening(&self, id: u64) {
        let Some(push) = self.pushes.get(&id) else {
            return;
        };
        let conn = push.conn.map_or(0, |conn| conn.0);
        let grant = push.grant.id();
        tracing::debug!(
            push = id,
            slot = grant.slot,
            generation = grant.generation,
            pages = push.grant.pages().len(),
            "push opening"
        );
        self.record(EventKind::PushOpening, |event| {
            (event.session, event.push) = (conn, id);
            (event.slot, event.generation) = (grant.slot, grant.generation);
        });
    }

    /// The reader has agreed, `after` this long.
    pub(super) fn tell_push_open(&mut self, conn: ConnId, id: u64, after: Duration) {
        let meters = self.sessions.get(&conn).and_then(|s| s.meters.clone());
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        if let Some(meters) = &meters {
            meters.push_opened(after);
        }
        push.watch.meters = meters;
        tracing::debug!(push = id, round_trip = ?after, "push open");
        self.record(EventKind::PushOpen, |event| {
            (event.session, event.push) = (conn.0, id);
        });
    }

    pub(super) fn tell_push_stopping(&self, conn: Option<ConnId>, id: u64) {
        self.record(EventKind::PushStopping, |event| {
            (event.session, event.push) = (conn.map_or(0, |conn| conn.0), id);
        });
    }

    /// Lanes are about to be fenced because the peer does not answer: to a revocation (`slot`), or in its
    /// acknowledgements (`push`).
    pub(super) fn tell_forced(&mut self, conn: ConnId, push: u64, slot: Option<u32>) {
        let peer = self.sessions.get(&conn).map(Session::name);
        let arrival = slot.and_then(|slot| self.arrivals.get_mut(&slot));
        let grant = arrival.map(|arrival| {
            arrival.watch.forced = true;
            arrival.grant.id()
        });
        self.record(EventKind::FenceForced, |event| {
            (event.session, event.push) = (conn.0, push);
            (event.slot, event.generation) = grant.map_or((0, 0), |id| (id.slot, id.generation));
        });
        let trace = Tail(
            self.telemetry
                .recorder
                .tail(|event| event.session == conn.0),
        );
        tracing::warn!(
            peer,
            push,
            slot = grant.map(|id| id.slot),
            generation = grant.map(|id| id.generation),
            %trace,
            "fence forced: the peer does not answer"
        );
    }

    /// A push has ended. Returns what led to it, if it did not end well.
    pub(super) fn tell_push_end(
        &self,
        push: &super::PushEntry,
        after: Duration,
        result: Result<(), &PushError>,
    ) -> Option<Arc<[Event]>> {
        let id = push.id;
        let outcome = push_outcome(result);
        let meters = push.watch.meters.clone();
        let meters = meters.unwrap_or_else(|| self.telemetry.unreached());
        meters.push_ended(outcome, after);
        let session = push.conn.map_or(0, |conn| conn.0);
        self.record(EventKind::PushEnded, |event| {
            (event.session, event.push) = (session, id);
            event.code = outcome as u32;
            event.value = push.bytes;
        });
        let error = result.err();
        let (bytes, writes) = (push.bytes, push.requests);
        let peer = meters.name();
        match error {
            None => tracing::debug!(push = id, peer, bytes, writes, elapsed = ?after, "push ended"),
            Some(error) => {
                tracing::info!(push = id, peer, bytes, writes, elapsed = ?after, %error, "push failed");
            }
        }
        error.map(|_| {
            self.telemetry
                .recorder
                .tail(|event| event.session == session || event.push == id)
        })
    }

    pub(super) fn tell_grant(&self, arrival: &ArrivalEntry) {
        let (id, pages) = (arrival.grant.id(), arrival.grant.pages().len());
        tracing::debug!(
            slot = id.slot,
            generation = id.generation,
            pages,
            "grant issued"
        );
        self.record(EventKind::GrantIssued, |event| {
            (event.slot, event.generation) = (id.slot, id.generation);
            event.value = pages as u64;
        });
    }

    pub(super) fn tell_refused(
        &self,
        conn: ConnId,
        grant: Option<GrantId>,
        code: RefuseCode,
        detail: &str,
    ) {
        self.telemetry.endpoint.refuse(code);
        let peer = self.sessions.get(&conn).map(Session::name);
        let (slot, generation) = grant.map_or((0, 0), |id| (id.slot, id.generation));
        tracing::info!(peer, slot, generation, %code, detail, "grant refused");
        self.record(EventKind::GrantRefused, |event| {
            event.session = conn.0;
            (event.slot, event.generation) = (slot, generation);
            event.code = (code as u16).into();
        });
    }

    /// A writer has opened the grant in `slot`.
    pub(super) fn tell_arrival_open(&mut self, conn: ConnId, slot: u32) {
        let meters = self.sessions.get(&conn).and_then(|s| s.meters.clone());
        let now = self.now;
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        arrival.watch.meters = meters;
        arrival.watch.opened = now;
        let (id, push) = (arrival.grant.id(), arrival.push());
        tracing::debug!(
            push,
            slot = id.slot,
            generation = id.generation,
            "grant opened"
        );
        self.record(EventKind::ArrivalOpen, |event| {
            (event.session, event.push) = (conn.0, push);
            (event.slot, event.generation) = (id.slot, id.generation);
        });
    }

    /// The grant in `slot` is being taken back.
    pub(super) fn tell_revoking(&mut self, slot: u32, expired: bool) {
        let now = self.now;
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        arrival.watch.revoking = Some(now);
        let (id, push, session) = (arrival.grant.id(), arrival.push(), arrival.session());
        tracing::debug!(
            push,
            slot = id.slot,
            generation = id.generation,
            expired,
            "grant is taken back"
        );
        self.record(EventKind::ArrivalRevoking, |event| {
            (event.session, event.push) = (session, push);
            (event.slot, event.generation) = (id.slot, id.generation);
            event.code = expired.into();
        });
    }

    /// An arrival has ended. Returns what led to it, if it did not end well.
    pub(super) fn tell_arrival_end(
        &self,
        arrival: &ArrivalEntry,
        result: Result<(), &ArrivalError>,
    ) -> Option<Arc<[Event]>> {
        let outcome = arrival_outcome(result);
        let watch = &arrival.watch;
        let meters = watch.meters.clone();
        let meters = meters.unwrap_or_else(|| self.telemetry.unreached());
        meters.arrival_ended(outcome, self.now - watch.opened);
        if let Some(since) = watch.revoking {
            let how = match watch.forced {
                true => Revoked::Forced,
                false => Revoked::Cooperative,
            };
            meters.revoked(how, self.now - since);
        }
        let (id, push, session) = (arrival.grant.id(), arrival.push(), arrival.session());
        let missing = arrival.missing();
        self.record(EventKind::ArrivalEnded, |event| {
            (event.session, event.push) = (session, push);
            (event.slot, event.generation) = (id.slot, id.generation);
            event.code = outcome as u32;
            event.value = missing.into();
        });
        let (slot, generation) = (id.slot, id.generation);
        let trace = result.err().map(|_| {
            self.telemetry.recorder.tail(|event| {
                (event.slot, event.generation) == (slot, generation)
                    || session != 0 && event.session == session
            })
        });
        let peer = meters.name();
        match (result, &trace) {
            (Err(error @ (ArrivalError::Unfenced(_) | ArrivalError::Stuck(_))), Some(trace)) => {
                let trace = Tail(Arc::clone(trace));
                tracing::error!(peer, push, slot, generation, %error, %trace, "arrival unfenced");
            }
            (Err(error), _) => {
                tracing::info!(peer, push, slot, generation, missing, %error, "arrival failed");
            }
            (Ok(()), _) => tracing::debug!(peer, push, slot, generation, "arrival complete"),
        }
        trace
    }

    pub(super) fn tell_drain(&self, timeout: Duration) {
        self.telemetry.endpoint.drains.add(1);
        self.record(EventKind::Draining, |event| {
            event.value = timeout.as_millis() as u64;
        });
    }
}

/// Whether a session ended as sessions do.
fn is_orderly(error: &PeerError) -> bool {
    match error {
        PeerError::Closed | PeerError::Disconnected { .. } | PeerError::Draining => true,
        PeerError::Goodbye { code, .. } => *code == GoodbyeCode::Shutdown,
        PeerError::Control { reason, .. } => {
            matches!(reason, CloseReason::PeerClosed | CloseReason::Local)
        }
        _ => false,
    }
}

fn push_outcome(result: Result<(), &PushError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Completed,
        Err(PushError::Cancelled) => Outcome::Cancelled,
        Err(PushError::Revoked(_)) => Outcome::Revoked,
        Err(PushError::Expired) => Outcome::Expired,
        Err(PushError::Refused { .. }) => Outcome::Refused,
        Err(PushError::Unfenced(_) | PushError::Stuck(_)) => Outcome::Unfenced,
        Err(_) => Outcome::Failed,
    }
}

fn arrival_outcome(result: Result<(), &ArrivalError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Completed,
        Err(ArrivalError::Abandoned { .. }) => Outcome::Cancelled,
        Err(ArrivalError::Revoked) => Outcome::Revoked,
        Err(ArrivalError::Expired { .. }) => Outcome::Expired,
        Err(ArrivalError::Unfenced(_) | ArrivalError::Stuck(_)) => Outcome::Unfenced,
        Err(_) => Outcome::Failed,
    }
}

/// A rail as a label.
pub(super) fn rail_name(info: &crate::fabric::DeviceInfo) -> String {
    format!("{}:{}", info.name, info.port)
}

fn status_name(status: Status) -> &'static str {
    match status {
        Status::Success => "success",
        Status::Flushed => "flushed",
        Status::RemoteAccess => "remote_access",
        Status::RemoteInvalidRequest => "remote_invalid_request",
        Status::RetryExceeded => "retry_exceeded",
        Status::RnrRetryExceeded => "rnr_retry_exceeded",
        Status::LocalProtection => "local_protection",
        Status::Other(_) => "other",
    }
}

/// The number that verbs has for it (`enum ibv_wc_status`).
fn status_code(status: Status) -> u32 {
    match status {
        Status::Success => 0,
        Status::LocalProtection => 4,
        Status::Flushed => 5,
        Status::RemoteInvalidRequest => 9,
        Status::RemoteAccess => 10,
        Status::RetryExceeded => 12,
        Status::RnrRetryExceeded => 13,
        Status::Other(code) => code,
    }
}
