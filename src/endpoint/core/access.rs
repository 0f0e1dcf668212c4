//! One-sided access: an engine that pulls, or writes without a grant, names an exported region by its token.
//!
//! Nobody counts here: the caller knows when its own reads and writes are done, and the owner learns nothing. Whoever
//! needs the invariants of grants uses grants.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{Core, pump::Task, reader::region_keys, remote::Target, session::Phase, timers::Timer};
use crate::{
    endpoint::regions::Region,
    endpoint::{
        AccessError, PeerError,
        control::ConnId,
        shared::{AccessShared, ExportHandle},
    },
    fabric::{FabricError, Opcode, RemoteKey, Sge},
    protocol::Time,
    wire::{
        Digest, GoodbyeCode, Message, Nonce, OpenRegion, RefuseCode, RegionAccept, RegionKey,
        RegionRefuse, RegionToken,
    },
};

/// Most bytes of one request: small enough that several lanes and peers take turns.
const MAX_PIECE: u64 = 16 << 20;

/// A region that peers reach by its token.
#[derive(Debug)]
pub(crate) struct ExportRecord {
    pub(crate) id: u32,
    pub(crate) nonce: Nonce,
    pub(crate) region: Region,
}

/// What to do with the peer's region.
#[derive(Clone, Debug)]
pub(crate) enum AccessOp {
    /// Learn its keys.
    Open,
    /// Move bytes between `local` and the region, whose keys an `Open` has learnt.
    Move {
        read: bool,
        local: Arc<ExportHandle>,
        local_offset: u64,
        remote: Arc<RegionKeys>,
        remote_offset: u64,
        length: u64,
    },
}

/// What the owner of a region told of it, which holds for the session that it was told in.
#[derive(Debug)]
pub(crate) struct RegionKeys {
    pub(super) conn: ConnId,
    pub(super) targets: HashMap<u8, Target>,
}

/// One access that has not ended.
pub(crate) struct AccessEntry {
    pub(crate) token: RegionToken,
    pub(crate) op: AccessOp,
    pub(crate) shared: Arc<AccessShared>,
    pub(crate) timeout: Duration,
    pub(super) in_flight: u64,
    pub(super) wholly_posted: bool,
    deadline: Time,
    conn: Option<ConnId>,
}

/// One request of an access.
pub(super) struct Piece {
    pub(super) opcode: Opcode,
    pub(super) local: Sge,
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
}

impl AccessEntry {
    pub(crate) fn new(
        token: RegionToken,
        op: AccessOp,
        shared: Arc<AccessShared>,
        timeout: Duration,
    ) -> Self {
        Self {
            token,
            op,
            shared,
            timeout,
            in_flight: 0,
            wholly_posted: false,
            deadline: Time(0),
            conn: None,
        }
    }

    /// Bytes to move.
    pub(super) fn length(&self) -> u64 {
        match &self.op {
            AccessOp::Open => 0,
            AccessOp::Move { length, .. } => *length,
        }
    }

    /// The request for the bytes from `done`; nothing if those were all, or the peer told no key for its rail.
    pub(super) fn piece(&self, done: u64, rail: usize, remote_rail: u8) -> Option<Piece> {
        let AccessOp::Move {
            read,
            local,
            local_offset,
            remote,
            remote_offset,
            length,
        } = &self.op
        else {
            return None;
        };
        let left = length.checked_sub(done).filter(|&left| left > 0)?;
        // No further than the extents go that either side is registered in.
        let keys = local.record.region.rails().get(rail)?;
        let (address, key, here) = keys.at(local_offset + done)?;
        let target = remote.targets.get(&remote_rail)?;
        let (remote_address, remote_key, there) = target.at(remote_offset + done)?;
        Some(Piece {
            opcode: if *read { Opcode::Read } else { Opcode::Write },
            local: Sge {
                address,
                length: left.min(MAX_PIECE).min(here).min(there) as u32,
                key,
            },
            remote_address,
            remote_key,
        })
    }
}

impl Drop for AccessEntry {
    fn drop(&mut self) {
        // Also reached when the command that carries it is never looked at, because the driver is gone.
        self.shared.signal.update(|state| {
            state.get_or_insert(Err(PeerError::Closed.into()));
        });
    }
}

impl Core {
    pub(super) fn start_access(&mut self, mut access: AccessEntry) {
        self.next_request += 1;
        let id = self.next_request;
        access.deadline = self.now + access.timeout;
        self.timers.at(Some(access.deadline), Timer::Access(id));
        let conn = match &access.op {
            AccessOp::Open => self.session_to(
                access.token.issuer(),
                access.token.addresses(),
                access.timeout,
            ),
            AccessOp::Move { remote, .. } if self.sessions.contains_key(&remote.conn) => {
                remote.conn
            }
            AccessOp::Move { .. } => {
                let peer = access.token.addresses().join(", ");
                access
                    .shared
                    .finish(Err(PeerError::NoSession { peer }.into()));
                return;
            }
        };
        access.conn = Some(conn);
        let (moving, bytes) = match &access.op {
            AccessOp::Open => (false, 0),
            AccessOp::Move { length, .. } => (true, *length),
        };
        self.accesses.insert(id, access);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if moving {
            let lane = usize::from(session.choose(&self.rails, self.now, bytes, |_| Some(0)));
            session.lanes[lane].enqueue(Task::Access { access: id, bytes });
            self.pump(conn, lane);
        } else if session.phase != Phase::Connecting {
            self.send_region_open(conn, id);
        }
    }

    /// A new offer has been made: what asked for keys behind the last one asks again.
    pub(super) fn resend_region_opens(&mut self, conn: ConnId) {
        for id in self.accesses_of(conn) {
            self.send_region_open(conn, id);
        }
    }

    fn send_region_open(&mut self, conn: ConnId, id: u64) {
        let Some(access) = self.accesses.get(&id) else {
            return;
        };
        let open = OpenRegion {
            request: id,
            region: access.token.region(),
            nonce: *access.token.nonce(),
            incarnation: access.token.issuer(),
        };
        self.send(conn, &Message::OpenRegion(open));
    }

    /// A peer asks for the keys of an exported region.
    pub(super) fn open_region(&mut self, conn: ConnId, open: &OpenRegion) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        if session.phase != Phase::Ready {
            return;
        }
        let request = open.request;
        let refuse = |code, detail: &str| {
            Message::RegionRefuse(RegionRefuse {
                request,
                code,
                detail: detail.to_owned(),
            })
        };
        let message = match self.exports.get(&open.region) {
            _ if open.incarnation != self.incarnation => refuse(
                RefuseCode::WrongIncarnation,
                "the endpoint has restarted since",
            ),
            _ if self.is_draining() => refuse(RefuseCode::Draining, "the endpoint is going away"),
            Some(export) if Digest(export.nonce).matches(&Digest(open.nonce)) => {
                let rails = self.rails_of_session(conn);
                Message::RegionAccept(RegionAccept {
                    request,
                    length: export.region.length(),
                    read: export.region.access().remote_read,
                    write: export.region.access().remote_write,
                    keys: region_keys(&export.region, &rails),
                })
            }
            _ => refuse(
                RefuseCode::UnknownGrant,
                "no such region, or it has been withdrawn",
            ),
        };
        if let Message::RegionRefuse(refuse) = &message {
            self.tell_refused(conn, None, refuse.code, &refuse.detail);
        }
        self.send(conn, &message);
    }

    pub(super) fn region_accepted(&mut self, conn: ConnId, accept: RegionAccept) {
        let id = accept.request;
        if !self.is_opening(conn, id) {
            return;
        }
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let target = |key: &RegionKey| Some((key.rail, Target::new(key, accept.length)?));
        let targets: Option<HashMap<u8, Target>> = accept.keys.iter().map(target).collect();
        let targets = targets.filter(|targets| {
            let mut lanes = session.lanes.iter();
            lanes.all(|lane| targets.contains_key(&lane.remote_rail))
        });
        let Some(targets) = targets else {
            self.violation(
                conn,
                "a rail without keys, or a region outside of the address space",
            );
            return;
        };
        if let Some(access) = self.accesses.remove(&id) {
            let matches = access.token.length() == accept.length
                && access.token.can_read() == accept.read
                && access.token.can_write() == accept.write;
            if matches {
                access
                    .shared
                    .keys
                    .update(|keys| *keys = Some(Arc::new(RegionKeys { conn, targets })));
                access.shared.finish(Ok(()));
            } else {
                let detail = "the token does not say what the owner exports".to_owned();
                access.shared.finish(Err(AccessError::Refused {
                    code: RefuseCode::Other,
                    detail,
                }));
            }
        }
    }

    pub(super) fn region_refused(&mut self, conn: ConnId, refuse: RegionRefuse) {
        if !self.is_opening(conn, refuse.request) {
            return;
        }
        if let Some(access) = self.accesses.remove(&refuse.request) {
            let error = AccessError::Refused {
                code: refuse.code,
                detail: refuse.detail,
            };
            access.shared.finish(Err(error));
        }
    }

    /// Whether `id` waits for an answer on `conn`. An access that moves bytes does not: its own completions end it,
    /// and nothing that a peer says may end it while a device uses its memory.
    fn is_opening(&self, conn: ConnId, id: u64) -> bool {
        let access = self.accesses.get(&id);
        access
            .is_some_and(|access| access.conn == Some(conn) && matches!(access.op, AccessOp::Open))
    }

    /// Requests of an access have completed.
    pub(super) fn access_retired(&mut self, id: u64, requests: u32) {
        let Some(access) = self.accesses.get_mut(&id) else {
            return;
        };
        access.in_flight = access.in_flight.saturating_sub(requests.into());
        if access.in_flight == 0
            && access.wholly_posted
            && let Some(access) = self.accesses.remove(&id)
        {
            access.shared.finish(Ok(()));
        }
    }

    pub(super) fn access_timer(&mut self, id: u64) {
        let Some(access) = self.accesses.get(&id) else {
            return;
        };
        if access.deadline > self.now {
            return;
        }
        let (conn, in_flight, waited) = (access.conn, access.in_flight, access.timeout);
        if in_flight > 0 {
            // Its memory must not be touched after the error, and only a fence ensures that.
            let Some((conn, session)) = conn.and_then(|c| Some((c, self.sessions.get(&c)?))) else {
                return;
            };
            let error = PeerError::Silent {
                peer: session.name(),
                waited,
            };
            if let Some(access) = self.accesses.get_mut(&id) {
                access.wholly_posted = false;
            }
            self.end_session(
                conn,
                error,
                Some((GoodbyeCode::Timeout, "access not completed")),
            );
        } else if let Some(access) = self.accesses.remove(&id) {
            access.shared.finish(Err(AccessError::Expired));
        }
    }

    /// A session is gone, and with it its lanes: accesses through them fail. Those of lanes that could not be fenced
    /// keep their memory for good, because a device may still use it.
    pub(super) fn stop_accesses(&mut self, error: &PeerError, unfenced: Option<&FabricError>) {
        let gone: Vec<u64> = self
            .accesses
            .iter()
            .filter(|(_, access)| {
                access
                    .conn
                    .is_none_or(|conn| !self.sessions.contains_key(&conn))
            })
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            let Some(access) = self.accesses.remove(&id) else {
                continue;
            };
            match unfenced {
                Some(source) if access.in_flight > 0 => {
                    let failure = AccessError::Unfenced(Box::new(source.clone()));
                    access.shared.finish(Err(failure));
                    std::mem::forget(access);
                }
                _ => access.shared.finish(Err(error.clone().into())),
            }
        }
    }

    pub(super) fn close_accesses(&mut self) {
        for access in std::mem::take(&mut self.accesses).into_values() {
            access.shared.finish(Err(PeerError::Closed.into()));
        }
    }

    pub(super) fn has_accesses(&self, conn: ConnId) -> bool {
        self.accesses
            .values()
            .any(|access| access.conn == Some(conn))
    }

    fn accesses_of(&self, conn: ConnId) -> Vec<u64> {
        self.accesses
            .iter()
            .filter(|(_, access)| access.conn == Some(conn))
            .map(|(&id, _)| id)
            .collect()
    }
}
