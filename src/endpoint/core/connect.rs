//! Sessions made ahead of the first push: the address is known, who answers there is not.

use std::sync::Arc;

use super::{Core, timers::Timer};
use crate::{
    endpoint::{PeerError, control::ConnId, shared::ConnectShared},
    wire::{GoodbyeCode, Incarnation},
};

/// A session that a caller waits for.
pub(crate) struct ConnectEntry {
    address: String,
    shared: Arc<ConnectShared>,
}

impl ConnectEntry {
    pub(crate) fn new(address: String, shared: Arc<ConnectShared>) -> Self {
        Self { address, shared }
    }
}

impl Drop for ConnectEntry {
    fn drop(&mut self) {
        // Also reached when the command that carries it is never looked at, because the driver is gone.
        self.shared.update(|state| {
            state.get_or_insert(Err(PeerError::Closed));
        });
    }
}

impl Core {
    /// Dials for `entry`.
    pub(super) fn connect(&mut self, entry: ConnectEntry) {
        let timeout = self.config.open_timeout;
        let conn = self.dial(None, std::slice::from_ref(&entry.address), timeout);
        self.timers
            .at(Some(self.now + timeout), Timer::Connect(conn));
        self.connects.insert(conn, entry);
    }

    /// The lanes of `conn` are connected: pushes to `incarnation` use it from now on, unless they have a session.
    pub(super) fn connect_ready(&mut self, conn: ConnId, incarnation: Incarnation) {
        let Some(entry) = self.connects.remove(&conn) else {
            return;
        };
        let known = *self.dialled.entry(incarnation).or_insert(conn);
        if known != conn {
            self.end_session(
                conn,
                PeerError::Closed,
                Some((GoodbyeCode::Shutdown, "one session is enough")),
            );
        }
        entry.shared.update(|state| *state = Some(Ok(incarnation)));
    }

    /// The session has ended before it was ready.
    pub(super) fn stop_connect(&mut self, conn: ConnId, error: &PeerError) {
        if let Some(entry) = self.connects.remove(&conn) {
            entry
                .shared
                .update(|state| *state = Some(Err(error.clone())));
        }
    }

    pub(super) fn connect_timer(&mut self, conn: ConnId) {
        let Some(entry) = self.connects.get(&conn) else {
            return;
        };
        let peer = entry.address.clone();
        let error = PeerError::Silent {
            peer,
            waited: self.config.open_timeout,
        };
        self.end_session(
            conn,
            error,
            Some((GoodbyeCode::Timeout, "no session in time")),
        );
    }
}
