//! Rails that come and go.
//!
//! A port that goes down gets no new work at once. What is on its way is left to the device's own retries for a while,
//! because most links come back; then its lanes are ended, and what they carried goes over other rails. A port that comes
//! back has its lanes made again.

use std::time::Duration;

use super::super::{
    Core,
    session::{LaneState, Role},
    timers::Timer,
};
use crate::{
    endpoint::{PeerError, control::ConnId},
    fabric::{FabricError, FabricErrorKind, RailEvent},
};

/// How long lanes of a port that is down are left alone.
const GRACE: Duration = Duration::from_millis(300);
/// How long a port must be up before lanes that had to leave it come back.
const SETTLED: Duration = Duration::from_secs(1);

impl Core {
    /// A rail has reported something of itself.
    pub(in crate::endpoint::core) fn rail_event(&mut self, rail: usize, event: RailEvent) {
        let device = self.rails[rail].device.info().name.clone();
        tracing::info!(device, ?event, "rail");
        match event {
            RailEvent::PortDown => {
                if self.rails[rail].down_since.is_none() {
                    self.rails[rail].down_since = Some(self.now);
                    let at = self.now + GRACE;
                    self.timers.at(Some(at), Timer::Rail(rail));
                    self.each_session_of(rail, |core, conn| core.move_all(conn));
                }
            }
            RailEvent::PortActive => {
                if self.rails[rail].down_since.take().is_some() {
                    self.rails[rail].up_since = self.now;
                    let at = self.now + SETTLED;
                    self.timers.at(Some(at), Timer::Rail(rail));
                    self.each_session_of(rail, |core, conn| core.port_returned(conn, rail));
                }
            }
            RailEvent::AddressChanged => {
                let error = self.rail_error(rail, "the port's address has changed");
                self.fail_lanes(rail, &error, |_| true);
            }
            RailEvent::LaneFailed(id) => {
                if let Some(&(conn, index)) = self.lanes.get(&(rail, id)) {
                    let error = self.rail_error(rail, "the device reports that a lane has failed");
                    let error = self.fabric_error(conn, &error);
                    self.lane_failed(conn, index, error);
                }
            }
        }
    }

    /// A rail cannot be polled any more.
    pub(in crate::endpoint::core) fn rail_failed(&mut self, rail: usize, error: &FabricError) {
        // It would say so again and again.
        self.rails[rail].dead = true;
        self.tell_rail_failed(rail);
        tracing::error!(%error, "rail failed");
        self.fail_lanes(rail, error, |_| true);
        self.each_session_of(rail, |core, conn| match core.sessions.get(&conn) {
            Some(session) if session.role == Role::Dialler => core.note_down(conn),
            _ => core.end_without_rails(conn),
        });
    }

    /// Time has passed since the port of `rail` changed.
    pub(in crate::endpoint::core) fn rail_timer(&mut self, rail: usize) {
        match self.rails[rail].down_since {
            Some(since) if since + GRACE <= self.now => {
                let error = self.rail_error(rail, "the port is down");
                self.fail_lanes(rail, &error, |_| true);
            }
            None if self.rails[rail].up_since + SETTLED <= self.now && !self.rails[rail].dead => {
                self.come_home(rail);
            }
            _ => {}
        }
    }

    /// Lanes that belong to `rail` and had to be made on another are to be made again here.
    fn come_home(&mut self, rail: usize) {
        for conn in self.sorted_sessions() {
            let Some(session) = self.sessions.get(&conn) else {
                continue;
            };
            let away: Vec<usize> = session
                .lanes
                .iter()
                .enumerate()
                .filter(|(_, lane)| {
                    let home = usize::from(lane.home) == rail && lane.rail != rail;
                    home && session.role == Role::Acceptor && matches!(lane.state, LaneState::Up)
                })
                .map(|(index, _)| index)
                .collect();
            for index in away {
                let error = self.rail_error(rail, "its own rail works again");
                let error = self.fabric_error(conn, &error);
                self.lane_failed(conn, index, error);
            }
        }
    }

    fn port_returned(&mut self, conn: ConnId, rail: usize) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let mut working = Vec::new();
        for (index, lane) in session.lanes.iter_mut().enumerate() {
            if lane.rail != rail {
                continue;
            }
            match &mut lane.state {
                LaneState::Down { renew_at } if session.role == Role::Dialler => {
                    let soon = lane.backoff.hurry(self.now);
                    *renew_at = Some(renew_at.map_or(soon, |at| at.min(soon)));
                }
                LaneState::Up => working.push(index),
                _ => {}
            }
        }
        for index in working {
            self.pump(conn, index);
        }
        if self.is_dialled(conn) {
            self.move_all(conn);
            self.recovery_timer(conn);
        }
    }

    fn is_dialled(&self, conn: ConnId) -> bool {
        let session = self.sessions.get(&conn);
        session.is_some_and(|session| session.role == Role::Dialler)
    }

    /// Fails the lanes on `rail` of which `which` says so.
    fn fail_lanes(&mut self, rail: usize, error: &FabricError, which: impl Fn(&LaneState) -> bool) {
        for conn in self.sorted_sessions() {
            let lanes = self.sessions.get(&conn).map_or(0, |s| s.lanes.len());
            for index in 0..lanes {
                let session = self.sessions.get(&conn);
                let lane = session.and_then(|session| session.lanes.get(index));
                if lane
                    .is_some_and(|lane| lane.rail == rail && lane.is_live() && which(&lane.state))
                {
                    let error = self.fabric_error(conn, error);
                    self.lane_failed(conn, index, error);
                }
            }
        }
    }

    fn each_session_of(&mut self, rail: usize, mut act: impl FnMut(&mut Self, ConnId)) {
        for conn in self.sorted_sessions() {
            let session = self.sessions.get(&conn);
            if session.is_some_and(|s| s.lanes.iter().any(|lane| lane.rail == rail)) {
                act(self, conn);
            }
        }
    }

    /// In an order that depends on nothing but the past.
    fn sorted_sessions(&self) -> Vec<ConnId> {
        let mut conns: Vec<ConnId> = self.sessions.keys().copied().collect();
        conns.sort_unstable();
        conns
    }

    fn fabric_error(&self, conn: ConnId, error: &FabricError) -> PeerError {
        PeerError::Fabric {
            peer: self.peer_name(conn),
            source: Box::new(error.clone()),
        }
    }

    fn rail_error(&self, rail: usize, what: &str) -> FabricError {
        let info = self.rails[rail].device.info();
        FabricError {
            device: info.name.clone(),
            port: info.port,
            operation: "carry lanes",
            kind: FabricErrorKind::Unavailable(what.to_owned()),
            hint: None,
        }
    }
}
