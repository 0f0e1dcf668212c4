//! What a peer can make this side hold, and who is let in. All limits of one session and one peer that are not a
//! message's own are here; `docs/protocol.md` lists them with those of the other layers.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Core,
    remote::RemotePool,
    session::{Phase, Role},
};
use crate::{
    endpoint::PeerError,
    protocol::Time,
    wire::{GoodbyeCode, Hello, Incarnation, PoolId, RejectCode},
};

/// Sessions that one incarnation may have with this side: one, and those that overlap while it finds that out.
pub(super) const MAX_SESSIONS_OF_PEER: usize = 4;

/// Pools of one peer that a session remembers. Each may take some megabytes; what is forgotten is asked for again.
pub(super) const MAX_REMOTE_POOLS: usize = 64;

/// What a session knows of its peer's pools: those used last.
#[derive(Default)]
pub(super) struct RemotePools {
    pools: BTreeMap<PoolId, (Arc<RemotePool>, Time)>,
    latest: Time,
}

impl RemotePools {
    /// What is known of `pool`, which is used now.
    pub(super) fn known(&mut self, pool: PoolId, now: Time) -> Option<Arc<RemotePool>> {
        self.latest = now;
        let (known, used) = self.pools.get_mut(&pool)?;
        *used = now;
        Some(Arc::clone(known))
    }

    /// Remembers `pool`, and forgets the one that has not been used for longest if there are too many.
    pub(super) fn remember(&mut self, pool: PoolId, remote: Arc<RemotePool>) {
        if self.pools.len() >= MAX_REMOTE_POOLS && !self.pools.contains_key(&pool) {
            let oldest = self.pools.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(&oldest, _)| oldest) {
                self.pools.remove(&oldest);
            }
        }
        self.pools.insert(pool, (remote, self.latest));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.pools.len()
    }
}

impl Core {
    /// Whether a peer that offers lanes may have a session.
    pub(super) fn may_join(&self, hello: &Hello) -> Result<(), (RejectCode, String)> {
        let busy = |detail: &str| Err((RejectCode::Busy, detail.to_owned()));
        if self.is_draining() {
            return busy("the endpoint is going away");
        }
        let (mut all, mut of_peer) = (0, 0);
        for session in self.sessions.values() {
            if session.role == Role::Acceptor && session.phase == Phase::Ready {
                all += 1;
                of_peer += usize::from(session.incarnation == Some(hello.incarnation));
            }
        }
        if of_peer >= MAX_SESSIONS_OF_PEER {
            return busy("this peer has too many sessions");
        }
        if all >= self.config.max_peers {
            return busy("the endpoint has as many sessions as it takes");
        }
        Ok(())
    }

    /// Ends the sessions with `peer`.
    pub(super) fn disconnect(&mut self, peer: Incarnation) {
        let sessions = self.sessions.iter();
        let conns: Vec<_> = sessions
            .filter(|(_, session)| {
                session.incarnation == Some(peer)
                    || session.incarnation.is_none() && session.expected == Some(peer)
            })
            .map(|(&conn, session)| (conn, session.name()))
            .collect();
        for (conn, peer) in conns {
            self.end_session(
                conn,
                PeerError::Disconnected { peer },
                Some((GoodbyeCode::Shutdown, "disconnected")),
            );
        }
    }
}
