//! The dialling side: it opens grants and writes.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{
    Core,
    pump::{Current, Owner, Task},
    remote::{LaneTargets, RemotePool, Target, prepare},
    session::{Lane, LaneState, Phase, Session},
    timers::Timer,
    watch::Watch,
};
use crate::{
    endpoint::{
        PeerError, PushError, PushReport,
        control::ConnId,
        prepared::PageList,
        shared::{PoolHandle, PushPhase, PushShared, TailSlot},
    },
    fabric::{FabricError, FabricKind, LaneId, LocalKey, RemoteKey},
    kv::Planner,
    protocol::{Blocks, PushAction, PushEnd, PushMachine, Time},
    wire::{
        Accept, Cancel, Credits, GoodbyeCode, Grant, Imm, Message, Open, Refuse, Revoke,
        RevokeReason,
    },
};

/// One push.
pub(crate) struct PushEntry {
    pub(crate) id: u64,
    pub(crate) grant: Grant,
    pub(crate) source: Arc<PoolHandle>,
    pub(crate) shared: Arc<PushShared>,
    pub(crate) tail_slot: TailSlot,
    pub(super) machine: PushMachine<PushError>,
    pub(super) planner: Option<Arc<Planner>>,
    pub(super) requests: u64,
    pub(super) bytes: u64,
    pub(super) remote: Option<Arc<RemotePool>>,
    /// Whether its source pages go through bounce buffers.
    pub(super) is_staged: bool,
    /// The pages to write to, if the reader has given others than the grant's.
    pub(super) landing: Option<Arc<[u32]>>,
    pub(super) conn: Option<ConnId>,
    pub(super) slot: u16,
    pub(super) blocks: Option<Blocks>,
    /// Pages not handed over yet, of each part.
    pub(super) remaining: Vec<u32>,
    /// The lane of each part, once it has one.
    pub(super) lane_of: Vec<Option<u16>>,
    pub(super) tail_targets: HashMap<u8, Target>,
    /// If the reader has given windows, they are all there is; by our rail and lane.
    pub(super) windows: Option<HashMap<(usize, LaneId), LaneTargets>>,
    tail_bytes: u32,
    opened: Time,
    pub(super) watch: Watch,
}

impl PushEntry {
    pub(crate) fn new(
        id: u64,
        grant: Grant,
        source: Arc<PoolHandle>,
        shared: Arc<PushShared>,
        tail_slot: TailSlot,
    ) -> Self {
        Self {
            id,
            grant,
            source,
            shared,
            tail_slot,
            machine: PushMachine::new(Time(u64::MAX), Duration::ZERO),
            planner: None,
            requests: 0,
            bytes: 0,
            remote: None,
            is_staged: false,
            landing: None,
            conn: None,
            slot: 0,
            blocks: None,
            remaining: Vec::new(),
            lane_of: Vec::new(),
            tail_targets: HashMap::new(),
            windows: None,
            tail_bytes: 0,
            opened: Time(0),
            watch: Watch::default(),
        }
    }

    /// The peer's regions through `lane`.
    pub(super) fn targets(&self, lane: &Lane) -> Option<&Arc<[Target]>> {
        match &self.windows {
            Some(windows) => Some(&windows.get(&(lane.rail, lane.id))?.regions),
            None => self.remote.as_ref()?.targets.get(&lane.remote_rail),
        }
    }

    /// How far both ends of a lane are from the memory there, together; nothing if a pool does not use one of them.
    pub(super) fn distance(&self, lane: &Lane) -> Option<u16> {
        if let Some(windows) = &self.windows
            && !windows.contains_key(&(lane.rail, lane.id))
        {
            return None;
        }
        self.rail_distance(lane.rail, lane.remote_rail)
    }

    /// The same for a lane between two rails.
    pub(super) fn rail_distance(&self, rail: usize, theirs: u8) -> Option<u16> {
        let ours = *self.source.record.rails.get(rail)?;
        let remote = self.remote.as_ref()?;
        let reached = self.windows.is_some()
            || (remote.targets.contains_key(&theirs) && self.tail_targets.contains_key(&theirs));
        reached.then_some(u16::from(ours?) + u16::from(remote.distance(theirs)))
    }

    /// Whether its writes may have to be cut, because a region of either side is registered in several extents.
    pub(super) fn is_cut(&self) -> bool {
        self.windows.is_some()
            || self.source.record.is_cut
            || self.remote.as_ref().is_some_and(|remote| remote.is_cut)
    }

    /// The pages to write to, in the grant's order.
    pub(super) fn destination(&self) -> &[u32] {
        self.landing.as_deref().unwrap_or(self.grant.pages())
    }

    /// The immediate of `part`.
    pub(super) fn imm(&self, part: u32) -> u32 {
        // Both were checked against the immediate's bits when the push was accepted.
        Imm::new(self.slot, part).map_or(0, Imm::to_wire)
    }

    /// The part of the tail.
    pub(super) fn blocks_tail(&self) -> u32 {
        self.blocks.map_or(0, |blocks| blocks.tail())
    }

    /// The tail's gather element and target.
    pub(super) fn tail(&self, lane: &Lane) -> Option<(u64, LocalKey, u32, (u64, RemoteKey))> {
        let target = match &self.windows {
            Some(windows) => &windows.get(&(lane.rail, lane.id))?.tail,
            None => self.tail_targets.get(&lane.remote_rail)?,
        };
        let target = target.first();
        let (address, key) = self.tail_slot.local(lane.rail)?;
        Some((address, key, self.tail_bytes, target))
    }
}

impl Drop for PushEntry {
    fn drop(&mut self) {
        // Also reached when the command that carries it is never looked at, because the driver is gone.
        let closed = PushPhase::Ended(Err(PushError::Peer(PeerError::Closed)));
        self.shared.signal.update(|phase| {
            if !matches!(phase, PushPhase::Ended(_)) {
                *phase = closed;
            }
        });
    }
}

impl Core {
    /// A push begins: over the session there is, or a new one.
    pub(super) fn open_push(&mut self, mut push: PushEntry) {
        let id = push.id;
        let timeout = push.shared.open_timeout.unwrap_or(self.config.open_timeout);
        push.machine = PushMachine::new(self.now + timeout, self.config.drain_timeout);
        push.opened = self.now;
        let issuer = push.grant.issuer();
        let conn = self.session_to(issuer, push.grant.addresses(), timeout);
        push.conn = Some(conn);
        self.timers
            .at(push.machine.next_deadline(), Timer::Push(id));
        self.pushes.insert(id, push);
        self.tell_push_opening(id);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        session.pushes.insert(id);
        // While lanes are offered, the opening goes right behind the offer: one round trip for both.
        if session.phase != Phase::Connecting {
            self.send_open(conn, id);
        }
    }

    pub(super) fn send_open(&mut self, conn: ConnId, id: u64) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let known = session.remote_pools.known(push.grant.pool(), self.now);
        push.remote = known.clone();
        let open = Open {
            push: id,
            grant: push.grant.id(),
            pool: push.grant.pool(),
            incarnation: push.grant.issuer(),
            digest: push.grant.digest(),
            want_pool: known.is_none(),
        };
        self.send(conn, &Message::Open(open));
    }

    /// The reader says where to write.
    pub(super) fn accepted(&mut self, conn: ConnId, mut accept: Accept) {
        let id = accept.push;
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if session.phase != Phase::Ready {
            self.violation(conn, "a grant is accepted before there are lanes");
            return;
        }
        let descriptor = accept.pool.take();
        let Some(push) = self
            .pushes
            .get_mut(&id)
            .filter(|push| push.conn == Some(conn))
        else {
            // It has ended here before the peer could answer; the peer holds it open and must be told.
            self.tell_ended(conn, id, &PushEnd::Cancelled);
            return;
        };
        if !push
            .machine
            .accepted(self.now, Duration::from_nanos(accept.remaining_ns))
        {
            self.violation(conn, "a push is accepted twice");
            return;
        }
        let result = prepare(
            session,
            push,
            &accept,
            descriptor,
            &self.config,
            &self.rails,
        );
        match result {
            Ok(()) => {
                let round_trip = self.now - push.opened;
                push.shared
                    .signal
                    .update(|phase| *phase = PushPhase::Active);
                self.timers
                    .at(push.machine.next_deadline(), Timer::Push(id));
                self.tell_push_open(conn, id, round_trip);
            }
            Err(error) => self.stop_push(id, PushEnd::Failed(error)),
        }
    }

    /// The reader does not take this grant.
    pub(super) fn refused(&mut self, conn: ConnId, refuse: Refuse) {
        // The number is the peer's word: it may name a push to somebody else.
        let push = self.pushes.get(&refuse.push);
        if push.is_none_or(|push| push.conn != Some(conn)) {
            return;
        }
        let error = PushError::Refused {
            code: refuse.code,
            detail: refuse.detail,
        };
        self.stop_push(refuse.push, PushEnd::Failed(error));
    }

    /// More receives at the peer.
    pub(super) fn credits(&mut self, conn: ConnId, credits: Credits) {
        let index = usize::from(credits.lane);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let known = session
            .lanes
            .get_mut(index)
            .filter(|lane| lane.epoch == credits.epoch)
            .is_some_and(|lane| match lane.state {
                LaneState::Up => lane.send.announce(credits.total, lane.peer_receives),
                // Sent before the reader heard that the lane is gone here.
                LaneState::Fencing { .. } => true,
                _ => false,
            });
        if known {
            self.pump(conn, index);
        } else {
            self.violation(
                conn,
                "credits for no lane, or more than the lane has receives",
            );
        }
    }

    /// The reader wants the pages back.
    pub(super) fn revoked(&mut self, conn: ConnId, revoke: Revoke) {
        let reason = revoke.reason as u16;
        if self
            .pushes
            .get(&revoke.push)
            .is_some_and(|push| push.conn == Some(conn))
        {
            self.stop_push(revoke.push, PushEnd::Revoked(reason));
        } else {
            // It has ended here: nothing is in flight.
            self.send(conn, &Message::Drained { push: revoke.push });
        }
    }

    /// Source pages of `layer`: cut into blocks, each block to its lane.
    pub(super) fn queue_pages(&mut self, id: u64, layer: u32, list: &Arc<PageList>) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let (Some(blocks), Some(conn)) = (push.blocks, push.conn) else {
            return;
        };
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if !push.machine.may_post() {
            return;
        }
        let first = list.first;
        let end = first + list.pages.len() as u32;
        let mut touched = 0u64;
        let mut position = first;
        while position < end {
            let block = blocks.block_of(position);
            let until = blocks.positions(block).1.min(end);
            let count = until - position;
            let part = blocks.part(layer, block);
            let remaining = &mut push.remaining[part as usize];
            *remaining -= count.min(*remaining);
            let completes = *remaining == 0;
            let bytes = push.planner.as_ref().map_or(0, |planner| {
                let page = planner.bytes_per_page(layer).unwrap_or(0);
                page.saturating_mul(count.into())
            });
            // A part keeps to its lane, except when that is gone and its work has been moved.
            let lane = push.lane_of[part as usize].filter(|&lane| session.keeps(&self.rails, lane));
            let lane = lane.unwrap_or_else(|| {
                let distance = |lane: &Lane| push.distance(lane);
                session.choose(&self.rails, self.now, bytes, distance)
            });
            push.lane_of[part as usize] = Some(lane);
            push.machine.queue();
            session.lanes[usize::from(lane)].enqueue(Task::Pages {
                push: id,
                layer,
                part,
                first: position,
                source: Arc::clone(list),
                from: position - first,
                count,
                completes,
                bytes,
            });
            touched |= 1 << (lane % 64);
            position = until;
        }
        for lane in 0..session.lanes.len() {
            if touched & (1 << (lane % 64)) != 0 {
                self.pump(conn, lane);
            }
        }
    }

    /// Everything has been handed over; the tail goes last.
    pub(super) fn finish_push(&mut self, id: u64, tail: &[u8]) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let Some(conn) = push.conn else { return };
        if !push.machine.may_post() {
            return;
        }
        push.tail_bytes = push.tail_slot.store(push.grant.id().generation, tail);
        push.machine.queue();
        let action = push.machine.finish();
        debug_assert_eq!(action, PushAction::None);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let (part, bytes) = (push.blocks_tail(), u64::from(push.tail_bytes));
        let distance = |lane: &Lane| push.distance(lane);
        let lane = usize::from(session.choose(&self.rails, self.now, bytes, distance));
        let tail = Task::Tail {
            push: id,
            part,
            bytes,
        };
        session.lanes[lane].enqueue(tail);
        self.pump(conn, lane);
    }

    /// This side does not want to go on.
    pub(super) fn cancel_push(&mut self, id: u64) {
        self.stop_push(id, PushEnd::Cancelled);
    }

    pub(super) fn stop_push(&mut self, id: u64, end: PushEnd<PushError>) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let action = push.machine.stop(self.now, end);
        self.push_action(id, action);
    }

    pub(super) fn push_timer(&mut self, id: u64) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let action = push.machine.tick(self.now);
        self.push_action(id, action);
    }

    /// Does what a push's machine asks for.
    pub(super) fn push_action(&mut self, id: u64, action: PushAction<PushError>) {
        let Some(push) = self.pushes.get_mut(&id) else {
            return;
        };
        let conn = push.conn;
        match action {
            PushAction::None => {}
            PushAction::StopPosting => {
                self.timers
                    .at(push.machine.next_deadline(), Timer::Push(id));
                self.tell_push_stopping(conn, id);
                self.drop_tasks(conn, id);
            }
            PushAction::Fence => {
                let Some(conn) = conn else { return };
                let Some(session) = self.sessions.get(&conn) else {
                    return;
                };
                let error = PeerError::Silent {
                    peer: session.name(),
                    waited: self.config.drain_timeout,
                };
                self.tell_forced(conn, id, None);
                self.end_session(
                    conn,
                    error,
                    Some((GoodbyeCode::Timeout, "writes not acknowledged")),
                );
            }
            PushAction::End { end, tell_peer } => {
                self.drop_tasks(conn, id);
                // The peer need not wait for our devices.
                if let (Some(conn), true) = (conn, tell_peer) {
                    self.tell_ended(conn, id, &end);
                }
                if let Some(end) = self.park_push(id, end) {
                    self.end_push(id, end);
                }
            }
        }
    }

    /// A push is over, and nothing touches its source pages any more.
    pub(super) fn end_push(&mut self, id: u64, end: PushEnd<PushError>) {
        let Some(push) = self.pushes.remove(&id) else {
            return;
        };
        let conn = push.conn;
        let result = match &end {
            PushEnd::Completed => Ok(PushReport {
                bytes: push.bytes - u64::from(push.tail_bytes),
                fabric: conn
                    .and_then(|conn| self.sessions.get(&conn)?.lanes.first())
                    .map_or(FabricKind::Tcp, |lane| self.rails[lane.rail].kind),
                writes: push.requests,
                elapsed: self.now - push.opened,
            }),
            PushEnd::Cancelled => Err(PushError::Cancelled),
            PushEnd::Expired => Err(PushError::Expired),
            PushEnd::Revoked(reason) => Err(PushError::Revoked(
                RevokeReason::from_wire(*reason).unwrap_or(RevokeReason::Requested),
            )),
            PushEnd::Failed(error) => Err(error.clone()),
        };
        self.count_push(result.is_ok());
        if let Some(conn) = conn {
            self.leave_session(conn, id);
        }
        let after = self.now - push.opened;
        let trace = self.tell_push_end(&push, after, result.as_ref().map(|_| ()));
        push.shared.end(result, trace);
    }

    fn tell_ended(&mut self, conn: ConnId, push: u64, end: &PushEnd<PushError>) {
        let cancel = |code, detail: String| Message::Cancel(Cancel { push, code, detail });
        let message = match end {
            PushEnd::Revoked(_) => Message::Drained { push },
            PushEnd::Failed(error) => cancel(0, error.to_string()),
            PushEnd::Expired => cancel(Cancel::EXPIRED, "the deadline has passed".to_owned()),
            PushEnd::Cancelled | PushEnd::Completed => {
                cancel(0, "cancelled by the writer".to_owned())
            }
        };
        if self.sessions.contains_key(&conn) {
            self.send(conn, &message);
        }
    }

    /// A session that has never become ready is of no use without pushes.
    fn leave_session(&mut self, conn: ConnId, push: u64) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        session.pushes.remove(&push);
        if session.phase != Phase::Ready
            && session.pushes.is_empty()
            && !self.has_accesses(conn)
            && !self.connects.contains_key(&conn)
        {
            self.end_session(conn, PeerError::Closed, None);
        }
    }

    fn drop_tasks(&mut self, conn: Option<ConnId>, id: u64) {
        let Some(session) = conn.and_then(|conn| self.sessions.get_mut(&conn)) else {
            return;
        };
        for lane in &mut session.lanes {
            let load = &mut lane.load;
            lane.queue.retain(|task| {
                let other = task.owner() != Owner::Push(id);
                *load -= if other { 0 } else { task.bytes() };
                other
            });
            let is_of = match &lane.current {
                Some(Current::Pages { push, .. } | Current::Tail { push }) => *push == id,
                Some(Current::Staged(task)) => task.push == id,
                _ => false,
            };
            if is_of {
                lane.current = None;
                if let Some(task) = lane.replay.close(lane.ledger.next_sequence()) {
                    lane.load -= task.bytes();
                }
            }
        }
    }

    /// The lanes of `session` are gone: its pushes fail. Those of lanes that could not be fenced keep their memory for
    /// good, because a device may still read it.
    pub(super) fn stop_pushes(
        &mut self,
        session: &mut Session,
        error: &PeerError,
        unfenced: Option<&FabricError>,
    ) {
        for lane in &mut session.lanes {
            // Copies that are under way are known to `park_push` from here on.
            if matches!(lane.current, Some(Current::Staged(_))) {
                lane.current = None;
            }
        }
        for id in std::mem::take(&mut session.pushes) {
            let posted = self.pushes.get(&id).is_some_and(|push| push.requests > 0);
            match unfenced {
                Some(source) if posted => {
                    let Some(push) = self.pushes.remove(&id) else {
                        continue;
                    };
                    self.count_push(false);
                    let failure = PushError::Unfenced(Box::new(source.clone()));
                    let after = self.now - push.opened;
                    let trace = self.tell_push_end(&push, after, Err(&failure));
                    push.shared.end(Err(failure), trace);
                    std::mem::forget(push);
                }
                _ => self.stop_push(id, PushEnd::Failed(PushError::Peer(error.clone()))),
            }
        }
        // What was in flight is so no more. Pushes that were draining end here with their own reason.
        let mut abandoned = Vec::new();
        for lane in &mut session.lanes {
            lane.ledger.abandon(|batch| abandoned.push(batch));
        }
        for batch in abandoned {
            if let (Owner::Staged { buffer, .. }, Some(_)) = (batch.owner, unfenced) {
                self.staging.leak(buffer);
            }
            self.retire(batch);
        }
    }

    /// The endpoint is shutting down.
    pub(super) fn close_pushes(&mut self) {
        let ids: Vec<u64> = self.pushes.keys().copied().collect();
        for id in ids {
            self.stop_push(id, PushEnd::Failed(PushError::Peer(PeerError::Closed)));
        }
    }
}
