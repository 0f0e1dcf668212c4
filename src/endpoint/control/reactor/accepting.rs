//! Strangers: accepted, counted, bounded, and turned away.

use std::cmp::Reverse;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::super::connection::Origin;
use super::super::dial::errno;
use super::super::{CloseReason, ConnId};
use super::{ACCEPT_TIMER, Reactor};
use crate::wire::Channel;

/// How long to leave the listener alone when the system has no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Reactor {
    pub(super) fn accept(&mut self) {
        loop {
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept() {
                Ok((socket, peer)) => {
                    if let Err(reason) = self.accepted(socket, peer) {
                        self.refuse(peer, &reason);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    // No event will tell when the system can accept again.
                    tracing::warn!(%error, "cannot accept a control connection");
                    let at = Instant::now() + ACCEPT_PAUSE;
                    self.accept_at = Some(at);
                    self.deadlines.push(Reverse((at, ACCEPT_TIMER)));
                    return;
                }
            }
        }
    }

    pub(super) fn accepted(
        &mut self,
        socket: TcpStream,
        peer: SocketAddr,
    ) -> Result<(), CloseReason> {
        let total = self.connections.len() + self.resolving.len();
        if total >= self.config.max_connections {
            let (queued, limit) = (total, self.config.max_connections);
            tracing::warn!(%peer, queued, limit, "too many control connections");
            return Err(CloseReason::Local);
        }
        if self.strangers.len() >= self.config.max_unauthenticated {
            // An honest peer is a stranger for a few round trips only, so the oldest is the least likely to be one.
            if let Some(&oldest) = self.strangers.first() {
                self.close(oldest, CloseReason::Local);
                self.forget(oldest);
            }
        }
        let io = |error: io::Error| CloseReason::Io(errno(&error));
        socket.set_nodelay(true).map_err(io)?;
        let channel = Channel::responder(&self.auth)?;
        let id = ConnId(ConnId::ACCEPTED | self.accepted);
        self.accepted += 1;
        let socket = self.register(socket, id).map_err(io)?;
        let deadline = Instant::now() + self.config.handshake_timeout;
        let connection = self.connection(id, socket, peer, Origin::Accepted, channel, deadline);
        self.connections.insert(id, connection);
        self.strangers.insert(id);
        Ok(())
    }

    pub(super) fn refuse(&self, peer: SocketAddr, reason: &CloseReason) {
        self.sink.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(%peer, %reason, "a control connection ended before it was authenticated");
    }
}
