//! From a command to dial to a socket whose handshake has begun, one address after the other.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::super::connection::{Early, Origin};
use super::super::dial::{Dial, DialError, Resolved, errno};
use super::super::{CloseReason, ConnId, ControlEvent};
use super::Reactor;
use crate::wire::Channel;

impl Reactor {
    pub(super) fn connect(&mut self, conn: ConnId, addresses: Vec<String>, timeout: Duration) {
        if self.connections.contains_key(&conn) || self.resolving.contains_key(&conn) {
            // An event would be taken for one of the connection that has the number.
            tracing::error!(?conn, "a control connection was dialed twice");
            return;
        }
        if conn.0 > ConnId::MAX_DIALED || self.shutdown.is_some() {
            let reason = CloseReason::Local;
            return self.sink.emit(ControlEvent::Closed { conn, reason });
        }
        // A timeout beyond the clock's range means none in practice.
        let now = Instant::now();
        let year = Duration::from_secs(365 * 24 * 3600);
        let dial = Dial::new(now + timeout.min(year));
        self.deadlines.push(Reverse((dial.deadline, conn)));
        self.resolving.insert(conn, (dial, Early::default()));
        if let Some(resolved) = self.resolver.resolve(conn, addresses) {
            self.resolved(resolved);
        }
    }

    pub(super) fn resolved(&mut self, resolved: Resolved) {
        let conn = resolved.conn;
        if let Some((mut dial, early)) = self.resolving.remove(&conn) {
            dial.resolved(resolved);
            self.attempt(conn, dial, early);
        }
    }

    /// Dials the next address, or gives up.
    pub(super) fn attempt(&mut self, conn: ConnId, mut dial: Dial, early: Early) {
        let now = Instant::now();
        while let Some(current) = dial.candidates.pop_front() {
            if now >= dial.deadline {
                dial.fail(&current.address, Some(current.peer), DialError::Timeout);
                break;
            }
            let channel = match Channel::initiator(&self.auth) {
                Ok(channel) => channel,
                Err(error) => {
                    let reason = error.into();
                    return self.sink.emit(ControlEvent::Closed { conn, reason });
                }
            };
            match TcpStream::connect(current.peer).and_then(|s| self.register(s, conn)) {
                Ok(socket) => {
                    let (peer, deadline) = (current.peer, dial.attempt_deadline(now));
                    let origin = Origin::Dialed { dial, current };
                    let mut connection =
                        self.connection(conn, socket, peer, origin, channel, deadline);
                    connection.early = early;
                    self.connections.insert(conn, connection);
                    return;
                }
                Err(error) => {
                    let error = DialError::Os(errno(&error));
                    dial.fail(&current.address, Some(current.peer), error);
                }
            }
        }
        self.failed(conn, dial);
    }

    pub(super) fn failed(&mut self, conn: ConnId, dial: Dial) {
        let attempts = dial.failures;
        let reason = CloseReason::Dial { attempts };
        self.sink.emit(ControlEvent::Closed { conn, reason });
    }

    pub(super) fn next_address(&mut self, id: ConnId, error: DialError) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        if let Origin::Dialed { mut dial, current } = connection.origin {
            // The socket closes here, before the number is used for the next one.
            drop(connection.socket);
            dial.fail(&current.address, Some(current.peer), error);
            self.attempt(id, dial, connection.early);
        }
    }
}
