//! Whether the peer of a session is still there, asked when nothing has come from it for a while.
//!
//! Any message is a sign of life; traffic on lanes is not, because a device goes on when its process has stopped. A
//! `Ping` is sent only after an interval without a message, and the accepting side waits a little longer, so on an idle
//! session one side asks and the other answers. A session has one timer, armed again only when it has fired: an idle
//! one costs one look in each interval, a busy one no more.
//!
//! A peer is never given up because *this* side did not look: if the timer fires late by more than an interval, the
//! process or machine was stopped, and the peer gets a new chance.

use std::time::Duration;

use super::{
    Core,
    session::{Phase, Role},
    timers::Timer,
};
use crate::{
    endpoint::{PeerError, control::ConnId},
    protocol::Time,
    wire::{GoodbyeCode, Message},
};

/// A peer that wants to hear from us more often than that is asked less often than it wants.
const SHORTEST: Duration = Duration::from_millis(100);

/// What is known of a peer's life.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Liveness {
    /// When its last message came.
    heard: Time,
    /// The silence after which it is asked; none if nobody wants to know.
    interval: Option<Duration>,
    /// When the timer is to fire.
    due: Time,
}

impl Core {
    /// What this side tells its peers: the silence after which it gives them up, in milliseconds; 0 for never.
    pub(super) fn keepalive_ms(&self) -> u32 {
        self.config.keepalive.map_or(0, |keepalive| {
            u32::try_from(keepalive.timeout.as_millis()).unwrap_or(u32::MAX)
        })
    }

    /// A message of the peer has come.
    pub(super) fn heard(&mut self, conn: ConnId, bytes: usize) {
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.liveness.heard = self.now;
            if let Some(meters) = &session.meters {
                meters.control_received.add(bytes as u64);
            }
        }
    }

    /// A peer has authenticated itself and is to offer lanes now.
    pub(super) fn await_hello(&mut self, conn: ConnId) {
        let until = self.now + self.config.open_timeout;
        self.timers.at(Some(until), Timer::Hello(conn));
    }

    pub(super) fn hello_timer(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        if session.phase == Phase::Ready {
            return;
        }
        let error = PeerError::Silent {
            peer: session.name(),
            waited: self.config.open_timeout,
        };
        self.end_session(
            conn,
            error,
            Some((GoodbyeCode::Timeout, "no session in time")),
        );
    }

    /// The session is ready: begins to watch its peer, which gives this side up after `needs_ms` (0: never).
    pub(super) fn watch(&mut self, conn: ConnId, needs_ms: u32) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let own = self.config.keepalive.map(|keepalive| keepalive.interval);
        // Three chances before the peer's patience ends.
        let theirs =
            (needs_ms > 0).then(|| (Duration::from_millis(needs_ms.into()) / 3).max(SHORTEST));
        let interval = own.into_iter().chain(theirs).min();
        // The dialler asks first, and its question is a sign of life for the acceptor.
        let interval = interval.map(|interval| match session.role {
            Role::Dialler => interval,
            Role::Acceptor => interval + interval / 4,
        });
        session.liveness = Liveness {
            heard: self.now,
            interval,
            due: self.now + interval.unwrap_or_default(),
        };
        if interval.is_some() {
            let due = session.liveness.due;
            self.timers.at(Some(due), Timer::Alive(conn));
        }
    }

    pub(super) fn alive_timer(&mut self, conn: ConnId) {
        let now = self.now;
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let liveness = &mut session.liveness;
        let Some(interval) = liveness.interval else {
            return;
        };
        if now - liveness.due > interval {
            // What the peer has sent meanwhile may still lie in a socket.
            liveness.heard = Time(liveness.heard.0.max(now.0 - interval.as_nanos() as u64));
        }
        let heard = liveness.heard;
        let given_up = self
            .config
            .keepalive
            .map(|keepalive| (heard + keepalive.timeout, keepalive.timeout));
        if let Some((_, waited)) = given_up.filter(|(at, _)| *at <= now) {
            let error = PeerError::Silent {
                peer: session.name(),
                waited,
            };
            if let Some(session) = self.sessions.get(&conn) {
                self.tell_silent(session);
            }
            self.end_session(conn, error, Some((GoodbyeCode::Timeout, "no sign of life")));
            return;
        }
        let ask = now - heard >= interval;
        let next = if ask { now } else { heard } + interval;
        liveness.due = given_up.map_or(next, |(at, _)| next.min(at));
        let due = liveness.due;
        self.timers.at(Some(due), Timer::Alive(conn));
        if ask {
            self.pings += 1;
            let nonce = self.pings;
            self.send(conn, &Message::Ping { nonce });
        }
    }
}
