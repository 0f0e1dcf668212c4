//! Sessions: one control connection and the lanes that belong to it.
//!
//! Roles are fixed: who dials writes. The dialler offers lanes of its best fabric; an acceptor that lacks that fabric
//! says what it has, and the dialler offers again over the same connection.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
};

use super::{
    Core,
    limits::RemotePools,
    liveness::Liveness,
    pump::{Current, Owner, Task},
};
use crate::{
    endpoint::control::ConnId,
    fabric::{FabricError, FabricErrorKind, FabricKind, LaneAddress, LaneConfig, LaneId},
    kv::Plan,
    protocol::{LaneLedger, ReceiveCredits, SendCredits},
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
            lanes: Vec::new(),
            expected: None,
            untried: Vec::new(),
            pushes: BTreeSet::new(),
            remote_pools: RemotePools::default(),
            next_lane: 0,
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

    /// The lane with the least to do; in turn, if several have.
    pub(super) fn least_loaded(&mut self) -> u16 {
        let count = self.lanes.len().max(1);
        let start = self.next_lane % count;
        self.next_lane = start + 1;
        (0..self.lanes.len())
            .map(|step| (start + step) % count)
            .min_by_key(|&lane| self.lanes[lane].backlog())
            .unwrap_or(0) as u16
    }

    /// Our rails that its lanes use, each once.
    pub(super) fn rails(&self) -> Vec<usize> {
        let mut rails: Vec<usize> = self.lanes.iter().map(|lane| lane.rail).collect();
        rails.sort_unstable();
        rails.dedup();
        rails
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

/// One lane of a session.
pub(super) struct Lane {
    pub(super) rail: usize,
    pub(super) remote_rail: u8,
    pub(super) id: LaneId,
    pub(super) config: LaneConfig,
    /// Completion-queue entries reserved.
    pub(super) reserved: u32,
    pub(super) send: SendCredits,
    pub(super) receive: ReceiveCredits,
    /// Receives the peer posts on its end.
    pub(super) peer_receives: u32,
    pub(super) ledger: LaneLedger<Owner>,
    pub(super) queue: VecDeque<Task>,
    pub(super) current: Option<Current>,
    pub(super) plan: Plan,
    /// Requests posted since the last signalled one.
    pub(super) unsignalled: u32,
}

impl Lane {
    /// How much is waiting, to find the least loaded lane.
    pub(super) fn backlog(&self) -> u64 {
        self.queue.len() as u64 + u64::from(self.current.is_some()) + self.ledger.in_flight()
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
        (0..self.rails.len())
            .filter(|&rail| self.rails[rail].kind == kind && self.rails[rail].is_usable())
            .collect()
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
        let lane = Lane {
            rail,
            remote_rail,
            id,
            config,
            reserved,
            send: SendCredits::new(config.send_depth, 0),
            receive: ReceiveCredits::new(config.receive_depth),
            peer_receives: 0,
            ledger: LaneLedger::new(),
            queue: VecDeque::new(),
            current: None,
            plan: Plan::default(),
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

    /// Fences and frees `lanes`. On success nothing of the peer can land through them.
    ///
    /// A device that refuses to end a queue pair is not to be trusted: the first such error is returned, its rail is
    /// not used again, and the reservations of the lane are not given back.
    pub(super) fn destroy_lanes(&mut self, lanes: &mut [Lane]) -> Result<(), FabricError> {
        let mut result = Ok(());
        for lane in lanes {
            self.lanes.remove(&(lane.rail, lane.id));
            let rail = &mut self.rails[lane.rail];
            match rail.context.destroy_lane(lane.id) {
                Ok(()) => rail.completions_free += lane.reserved,
                Err(error) => {
                    tracing::error!(%error, "a lane could not be fenced");
                    rail.distrusted = true;
                    result = result.and(Err(error));
                }
            }
        }
        result
    }
}
