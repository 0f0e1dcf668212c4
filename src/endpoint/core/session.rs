//! Sessions: one control connection and the lanes that belong to it.
//!
//! Roles are fixed: who dials writes. The dialler offers lanes of its best fabric; an acceptor that lacks that fabric
//! says what it has, and the dialler offers again over the same connection.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    Core, Rail,
    limits::RemotePools,
    liveness::Liveness,
    pump::{Current, Owner, Task},
};
use crate::{
    endpoint::{PeerError, control::ConnId, telemetry::meters::PeerMeters},
    fabric::{FabricError, FabricErrorKind, FabricKind, LaneAddress, LaneConfig, LaneId},
    kv::{Plan, plan::Translation},
    protocol::{Backoff, LaneLedger, ReceiveCredits, ReplayLedger, SendCredits, Time},
    wire::Incarnation,
};

/// Operations on windows that one lane of the accepting side may have on its send queue.
const WINDOW_DEPTH: u32 = 64;

/// Who dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Dialler,
    Acceptor,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The control connection is being made (dialler), or nothing has been said (acceptor).
    Connecting,
    /// The dialler has offered lanes.
    Offered,
    /// Lanes are connected.
    Ready,
}

/// One control connection and its lanes.
pub(super) struct Session {
    pub(super) role: Role,
    pub(super) phase: Phase,
    pub(super) peer: Option<SocketAddr>,
    pub(super) peer_name: String,
    /// Who it is, once it has said so.
    pub(super) incarnation: Option<Incarnation>,
    pub(super) liveness: Liveness,
    /// Where it is counted, once the peer has said who it is.
    pub(super) meters: Option<Arc<PeerMeters>>,
    pub(super) lanes: Vec<Lane>,
    /// Dialler: who is expected to answer.
    pub(super) expected: Option<Incarnation>,
    /// Dialler: fabrics not tried yet, best last.
    pub(super) untried: Vec<FabricKind>,
    /// Dialler: pushes of this session.
    pub(super) pushes: BTreeSet<u64>,
    /// Dialler: what the peer has told of its pools.
    pub(super) remote_pools: RemotePools,
    /// Dialler: where the next block goes if all lanes are equally busy.
    pub(super) next_lane: usize,
    /// Dialler: since when no lane works.
    pub(super) down_since: Option<Time>,
    /// Dialler: when its recovery is looked at next.
    pub(super) recovery_at: Option<Time>,
    /// How the last lane failed that did.
    pub(super) last_failure: Option<PeerError>,
    /// Acceptor: the fabric of its lanes.
    pub(super) kind: Option<FabricKind>,
    /// Acceptor: the grant slot behind each slot of an immediate.
    pub(super) slots: Vec<Option<u32>>,
    /// Acceptor: pushes whose windows were taken back while their writer was silent, and their slots of the immediate,
    /// which stay taken until the writer says that it has stopped: immediates of it may still be on their way.
    pub(super) shut: BTreeMap<u64, u16>,
    /// Acceptor: for each lane, the grant slots that wait for slots of its send queue, for their windows.
    pub(super) waiting: Vec<VecDeque<u32>>,
    /// Acceptor: where the search for a free slot begins, so that slots are reused as late as possible.
    pub(super) next_slot: usize,
}

impl Session {
    fn new(role: Role, peer_name: String) -> Self {
        Self {
            role,
            phase: Phase::Connecting,
            peer: None,
            peer_name,
            incarnation: None,
            liveness: Liveness::default(),
            meters: None,
            lanes: Vec::new(),
            expected: None,
            untried: Vec::new(),
            pushes: BTreeSet::new(),
            remote_pools: RemotePools::default(),
            next_lane: 0,
            down_since: None,
            recovery_at: None,
            last_failure: None,
            kind: None,
            slots: Vec::new(),
            shut: BTreeMap::new(),
            waiting: Vec::new(),
            next_slot: 0,
        }
    }

    /// A session that this side opens, expecting `expected` to answer.
    pub(super) fn dialled(
        expected: Option<Incarnation>,
        peer_name: String,
        untried: Vec<FabricKind>,
    ) -> Self {
        Self {
            expected,
            untried,
            ..Self::new(Role::Dialler, peer_name)
        }
    }

    /// A session that a peer opens.
    pub(super) fn accepted(peer: SocketAddr) -> Self {
        Self {
            peer: Some(peer),
            ..Self::new(Role::Acceptor, String::new())
        }
    }

    /// The peer for people: its own name, and its address.
    pub(super) fn name(&self) -> String {
        match self.peer {
            Some(peer) if self.peer_name.is_empty() => peer.to_string(),
            Some(peer) => format!("{} ({peer})", self.peer_name),
            None => self.peer_name.clone(),
        }
    }
}

/// How a lane is. See `docs/protocol.md` for the messages that lead from one state to the next.
#[derive(Debug)]
pub(super) enum LaneState {
    /// It works, as far as is known; before the session is ready, it has been offered.
    Up,
    /// Reader: it has failed and is ended here as soon as all completions have been looked at.
    Failing,
    /// Reader: its end here is gone, and the writer has been told.
    Lost,
    /// Writer: its end here is gone, and the reader has been asked whether the parts of `asked` were counted.
    Fencing { since: Time, asked: Vec<(u64, u32)> },
    /// Both ends are gone. The writer offers it again at `renew_at`, or when its rail can be used again.
    Down { renew_at: Option<Time> },
    /// Writer: a new end has been offered.
    Renewing { since: Time },
    /// Reader: the last offer was refused.
    Refused,
}

/// One lane of a session: a slot that keeps its place, its rails and its queue while queue pairs come and go.
pub(super) struct Lane {
    pub(super) state: LaneState,
    /// How often it has been offered since the session was made.
    pub(super) epoch: u32,
    pub(super) rail: usize,
    pub(super) remote_rail: u8,
    /// The rail here (reader) or there (writer) that it belongs to, though it may be on another while that fails.
    pub(super) home: u8,
    /// The slower of both rails, in bits per second; 0 if unknown.
    pub(super) speed: u64,
    pub(super) id: LaneId,
    pub(super) config: LaneConfig,
    /// Completion-queue entries reserved.
    pub(super) reserved: u32,
    pub(super) send: SendCredits,
    pub(super) receive: ReceiveCredits,
    /// Receives the peer posts on its end.
    pub(super) peer_receives: u32,
    pub(super) ledger: LaneLedger<Owner>,
    /// Reader: receives posted and not completed.
    pub(super) receives: u32,
    /// Writer: the tasks behind the requests in flight.
    pub(super) replay: ReplayLedger<Task>,
    pub(super) backoff: Backoff,
    /// Bytes of `queue` and `replay`.
    pub(super) load: u64,
    pub(super) queue: VecDeque<Task>,
    pub(super) current: Option<Current>,
    pub(super) plan: Plan,
    /// The plan of the task being posted, if it is not `plan` but one of another layer that has been kept, and where its
    /// places are in this layer.
    pub(super) kept: Option<Arc<Plan>>,
    pub(super) translation: Translation,
    /// Requests posted since the last signalled one.
    pub(super) unsignalled: u32,
}

impl Lane {
    /// Whether there is a queue pair.
    pub(super) fn is_live(&self) -> bool {
        matches!(
            self.state,
            LaneState::Up | LaneState::Failing | LaneState::Renewing { .. }
        )
    }

    /// Whether work can be posted.
    pub(super) fn works(&self, rails: &[Rail]) -> bool {
        let rail = rails.get(self.rail);
        matches!(self.state, LaneState::Up)
            && rail.is_some_and(|rail| !rail.dead && rail.down_since.is_none())
    }

    /// Adds work.
    pub(super) fn enqueue(&mut self, task: Task) {
        self.load += task.bytes();
        self.queue.push_back(task);
    }

    /// Puts a new queue pair into this slot. What is queued stays.
    pub(super) fn replace(&mut self, new: Self) {
        let Self {
            rail,
            remote_rail,
            id,
            config,
            reserved,
            send,
            receive,
            receives,
            ..
        } = new;
        self.rail = rail;
        self.remote_rail = remote_rail;
        self.id = id;
        self.config = config;
        self.reserved = reserved;
        self.send = send;
        self.receive = receive;
        self.receives = receives;
        self.peer_receives = 0;
        self.ledger = LaneLedger::new();
        self.current = None;
        self.kept = None;
        self.unsignalled = 0;
    }

    /// The plan of the task being posted.
    pub(super) fn plan(&self) -> &Plan {
        self.kept.as_deref().unwrap_or(&self.plan)
    }
}

impl Core {
    /// A new connection of our own.
    pub(super) fn allocate_conn(&mut self) -> ConnId {
        self.next_conn += 1;
        ConnId(self.next_conn)
    }

    /// The rails of `kind` that can be used.
    pub(super) fn rails_of(&self, kind: FabricKind) -> Vec<usize> {
        let usable: Vec<usize> = self
            .all_rails_of(kind)
            .into_iter()
            .filter(|&rail| self.rails[rail].is_usable())
            .collect();
        // Those whose port is down only if there is nothing else.
        let up: Vec<usize> = usable
            .iter()
            .copied()
            .filter(|&rail| self.rails[rail].down_since.is_none())
            .collect();
        if up.is_empty() { usable } else { up }
    }

    /// The rails of `kind`, whatever their state. A lane may move between them, so peers are told the keys of all.
    pub(super) fn all_rails_of(&self, kind: FabricKind) -> Vec<usize> {
        (0..self.rails.len())
            .filter(|&rail| self.rails[rail].kind == kind)
            .collect()
    }

    /// Our rails that lanes of `conn` may use, each once.
    pub(super) fn rails_of_session(&self, conn: ConnId) -> Vec<usize> {
        let kind = self.sessions.get(&conn).and_then(|session| session.kind);
        kind.map_or_else(Vec::new, |kind| self.all_rails_of(kind))
    }

    /// The kinds of fabric there are, as a mask.
    pub(super) fn supported(&self) -> u8 {
        self.rails
            .iter()
            .filter(|rail| rail.is_usable())
            .fold(0, |mask, rail| mask | rail.kind as u8)
    }

    /// Makes a lane on `rail` and reserves its completions.
    pub(super) fn create_lane(
        &mut self,
        role: Role,
        rail: usize,
        remote_rail: u8,
    ) -> Result<(Lane, LaneAddress), FabricError> {
        let config = self.lane_config(role, rail);
        let rail_ref = &mut self.rails[rail];
        // A failing lane completes everything it holds, signalled or not, so all of it is reserved.
        let reserved = config.send_depth + config.receive_depth;
        if reserved > rail_ref.completions_free {
            let info = rail_ref.device.info();
            return Err(FabricError {
                device: info.name.clone(),
                port: info.port,
                operation: "reserve completions",
                kind: FabricErrorKind::Limit {
                    what: "completion-queue entries",
                    value: reserved.into(),
                    limit: rail_ref.completions_free.into(),
                },
                hint: Some("too many peers for this rail's completion queue"),
            });
        }
        let (id, address) = rail_ref.context.create_lane(&config)?;
        rail_ref.completions_free -= reserved;
        let seed = u64::from_le_bytes(self.incarnation.0[..8].try_into().unwrap_or_default());
        let speed = rail_ref.device.info().bits_per_second;
        let lane = Lane {
            state: LaneState::Up,
            epoch: 0,
            rail,
            remote_rail,
            home: match role {
                Role::Dialler => remote_rail,
                Role::Acceptor => rail as u8,
            },
            speed,
            id,
            config,
            reserved,
            send: SendCredits::new(config.send_depth, 0),
            receive: ReceiveCredits::new(config.receive_depth),
            peer_receives: 0,
            ledger: LaneLedger::new(),
            receives: config.receive_depth,
            replay: ReplayLedger::new(),
            backoff: Backoff::new(seed ^ u64::from(id.0) << 8 ^ rail as u64, self.now),
            load: 0,
            queue: VecDeque::new(),
            current: None,
            plan: Plan::default(),
            kept: None,
            translation: Translation::default(),
            unsignalled: 0,
        };
        Ok((lane, address))
    }

    fn lane_config(&self, role: Role, rail: usize) -> LaneConfig {
        let (config, caps) = (&self.config, &self.rails[rail].device.info().caps);
        let (send_depth, receive_depth) = match role {
            Role::Dialler => (config.send_depth.min(caps.max_send_depth), 0),
            Role::Acceptor if self.has_windows(rail) => (
                WINDOW_DEPTH.min(caps.max_send_depth),
                config.receive_depth.min(caps.max_receive_depth),
            ),
            Role::Acceptor => (1, config.receive_depth.min(caps.max_receive_depth)),
        };
        LaneConfig {
            send_depth,
            receive_depth,
            max_sge: config.max_sge.min(caps.max_sge).max(1),
            max_inline: config.max_inline.min(caps.max_inline),
        }
    }

    /// Makes `lanes` known, so that their completions find `conn`.
    pub(super) fn adopt_lanes(&mut self, conn: ConnId, lanes: Vec<Lane>) {
        for (index, lane) in lanes.iter().enumerate() {
            self.lanes.insert((lane.rail, lane.id), (conn, index));
        }
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.lanes = lanes;
        }
    }

    /// Fences and frees `lanes`, as far as they have queue pairs. On success nothing of the peer can land through them.
    ///
    /// A device that refuses to end a queue pair is not to be trusted: the first such error is returned, its rail is
    /// not used again, and the reservations of the lane are not given back.
    pub(super) fn destroy_lanes(&mut self, lanes: &mut [Lane]) -> Result<(), FabricError> {
        let mut result = Ok(());
        for lane in lanes.iter().filter(|lane| lane.is_live()) {
            let destroyed = self.destroy_lane(lane.rail, lane.id, lane.reserved);
            result = result.and(destroyed);
        }
        result
    }

    /// The same for one lane.
    pub(super) fn destroy_lane(
        &mut self,
        rail: usize,
        id: LaneId,
        reserved: u32,
    ) -> Result<(), FabricError> {
        self.lanes.remove(&(rail, id));
        let on = &mut self.rails[rail];
        match on.context.destroy_lane(id) {
            Ok(()) => {
                on.completions_free += reserved;
                Ok(())
            }
            Err(error) => {
                on.distrusted = true;
                self.tell_fence_failed(rail, id, &error);
                Err(error)
            }
        }
    }
}
