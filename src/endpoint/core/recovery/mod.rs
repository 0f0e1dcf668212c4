//! Lanes that fail and are made again, and rails that come and go, without an end of the session.
//!
//! | File | What |
//! |---|---|
//! | `writer` | the dialling side: destroys its end, asks what was counted, sends the rest again, offers the lane again |
//! | `reader` | the accepting side: ends its end before it answers, connects it again |
//! | `rails` | ports that go down and up, devices that die |
//! | `balance` | which lane gets which work; work of a lane that is gone moves to the others |
//!
//! What must hold (`docs/protocol.md`, "Lanes that fail"):
//!
//! * nothing is sent again before the reader has said that its end of the lane is gone, and then only what it has not
//!   counted: so no write lands in pages whose arrival has ended, and each part is counted once;
//! * `LaneDown` goes out before anything that is said because requests of the lane are no longer in flight (`Drained`,
//!   `Cancel`), so the reader fences before it hears that;
//! * the tasks of one part stay together and in order, because the last of them carries the immediate that vouches for
//!   all.

mod balance;
mod rails;
mod reader;
mod writer;

use super::{
    Core,
    session::{LaneState, Phase, Role},
    timers::Timer,
};
use crate::{
    endpoint::{PeerError, control::ConnId},
    protocol::Time,
    wire::GoodbyeCode,
};

impl Core {
    /// The end of a lane on this side does not work any more, or must not be used.
    pub(super) fn lane_failed(&mut self, conn: ConnId, index: usize, error: PeerError) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let ready = session.phase == Phase::Ready;
        if !ready || self.relies_on_windows(conn) {
            // There is nothing to recover, and the next attempt begins with a new offer.
            let detail = error.to_string();
            self.end_session(conn, error, Some((GoodbyeCode::Error, &detail)));
            return;
        }
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        match session.role {
            Role::Dialler => self.writer_lost(conn, index, error),
            Role::Acceptor => {
                let Some(lane) = session.lanes.get_mut(index) else {
                    return;
                };
                if matches!(lane.state, LaneState::Up) {
                    tracing::info!(lane = index, %error, "lane failed");
                    lane.state = LaneState::Failing;
                    session.last_failure = Some(error);
                    self.failing.push((conn, index, lane.epoch));
                    self.tell_lane_down(conn, index);
                }
            }
        }
    }

    /// Looks after the lanes of `conn`: those to be offered again, and answers that do not come.
    pub(super) fn recovery_timer(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        session.recovery_at = None;
        let (now, patience) = (self.now, self.config.recovery_timeout);
        let waited = |since: Time| since + patience <= now;
        let peer = session.name();
        if session.down_since.is_some_and(waited) {
            let error = PeerError::NoLane {
                peer,
                waited: patience,
                last: Box::new(session.last_failure.clone().unwrap_or(PeerError::Closed)),
            };
            let detail = error.to_string();
            self.end_session(conn, error, Some((GoodbyeCode::Error, &detail)));
            return;
        }
        let mut due = Vec::new();
        let mut silent = false;
        for (index, lane) in session.lanes.iter().enumerate() {
            match &lane.state {
                LaneState::Down {
                    renew_at: Some(at), ..
                } if *at <= now => due.push(index),
                LaneState::Fencing { since, .. } | LaneState::Renewing { since } => {
                    silent |= waited(*since);
                }
                _ => {}
            }
        }
        if silent {
            let error = PeerError::Silent {
                peer,
                waited: patience,
            };
            let goodbye = (GoodbyeCode::Timeout, "no answer about a lane");
            self.end_session(conn, error, Some(goodbye));
            return;
        }
        for index in due {
            self.renew(conn, index);
        }
        self.watch_recovery(conn);
    }

    /// Sets the timer for what [`Core::recovery_timer`] has to look at next.
    fn watch_recovery(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let patience = self.config.recovery_timeout;
        let lanes = session.lanes.iter().filter_map(|lane| match &lane.state {
            LaneState::Down { renew_at } => *renew_at,
            LaneState::Fencing { since, .. } | LaneState::Renewing { since } => {
                Some(*since + patience)
            }
            _ => None,
        });
        let next = lanes
            .chain(session.down_since.map(|since| since + patience))
            .min();
        // Timers are never taken back, so only an earlier one is worth setting.
        if next.is_some_and(|next| session.recovery_at.is_none_or(|set| next < set)) {
            session.recovery_at = next;
            self.timers.at(next, Timer::Recovery(conn));
        }
    }
}
