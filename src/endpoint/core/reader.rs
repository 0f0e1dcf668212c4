//! The accepting side: it issues grants, counts what arrives, and takes grants back.

use std::{sync::Arc, time::Duration};

use super::{
    Core,
    session::{LaneState, Phase, Session},
    staging::Landed,
    timers::Timer,
    watch::Watch,
    windows::{Opening, SHUT, Windows},
};
use crate::{
    endpoint::regions::Region,
    endpoint::{
        ArrivalError, GrantKeys, PeerError,
        control::ConnId,
        shared::{ArrivalShared, PoolHandle, TailSlot},
    },
    fabric::FabricError,
    protocol::{ArrivalAction, ArrivalEnd, ArrivalMachine, Blocks, PartMap, PartOutcome, Time},
    wire::{
        Accept, Cancel, Credits, GoodbyeCode, Grant, GrantId, GrantWindows, Imm, Incarnation,
        Message, Open, PoolDescriptor, Refuse, RefuseCode, RegionDescriptor, RegionKey, Revoke,
        RevokeReason, TailTarget,
    },
};

/// One grant that has not ended.
pub(crate) struct ArrivalEntry {
    pub(crate) grant: Grant,
    pub(crate) pool: Arc<PoolHandle>,
    pub(crate) shared: Arc<ArrivalShared>,
    pub(crate) tail_slot: TailSlot,
    pub(super) parts: PartMap,
    /// Where its bytes land first, if the pool has to be staged and the grant is open.
    pub(super) landed: Option<Landed>,
    blocks: Blocks,
    valid_for: Duration,
    /// Whether devices are told of what has arrived before the caller is.
    flush: bool,
    pub(super) machine: ArrivalMachine<ArrivalError>,
    /// The session that opened it, its name there, and its slot in immediates.
    pub(super) opened: Option<(ConnId, u64, u16)>,
    /// The keys that its writer has instead of those of regions, or will have.
    pub(super) windows: Option<Windows>,
    pub(super) watch: Watch,
}

impl ArrivalEntry {
    pub(crate) fn new(
        grant: Grant,
        pool: Arc<PoolHandle>,
        shared: Arc<ArrivalShared>,
        tail_slot: TailSlot,
        blocks: Blocks,
        valid_for: Duration,
        flush: bool,
    ) -> Self {
        Self {
            grant,
            pool,
            shared,
            tail_slot,
            parts: PartMap::new(blocks),
            landed: None,
            blocks,
            valid_for,
            flush,
            machine: ArrivalMachine::new(Time(u64::MAX), Duration::ZERO),
            opened: None,
            windows: None,
            watch: Watch::default(),
        }
    }
}

impl ArrivalEntry {
    /// Whether no writer has opened it.
    pub(super) fn is_granted(&self) -> bool {
        self.machine.is_granted()
    }

    /// The parts that have been placed, be it in the pool or in a landing.
    pub(super) fn arrived(&self) -> &PartMap {
        self.landed.as_ref().map_or(&self.parts, Landed::arrived)
    }

    pub(super) fn blocks(&self) -> Blocks {
        self.blocks
    }

    /// Whether `open` asks for this grant, and may.
    pub(super) fn is_meant(&self, open: &Open, issuer: Incarnation) -> bool {
        open.incarnation == issuer
            && self.grant.id() == open.grant
            && self.grant.pool() == open.pool
            && self.grant.digest().matches(&open.digest)
            && self.machine.is_granted()
    }

    /// The writer's number for the push that opened it.
    pub(super) fn push(&self) -> u64 {
        self.opened.map_or(0, |(_, push, _)| push)
    }

    /// The session that opened it.
    pub(super) fn session(&self) -> u64 {
        self.opened.map_or(0, |(conn, ..)| conn.0)
    }

    /// Parts that have not arrived.
    pub(super) fn missing(&self) -> u32 {
        self.parts.missing()
    }

    fn expired(&self) -> ArrivalError {
        ArrivalError::Expired {
            missing: self.parts.missing(),
            parts: self.blocks.parts(),
        }
    }
}

impl Drop for ArrivalEntry {
    fn drop(&mut self) {
        // Also reached when the command that carries it is never looked at, because the driver is gone.
        self.shared.signal.update(|state| {
            state
                .end
                .get_or_insert(Err(ArrivalError::Peer(PeerError::Closed)));
        });
    }
}

impl Core {
    pub(super) fn add_grant(&mut self, mut entry: ArrivalEntry) {
        entry.machine = ArrivalMachine::new(self.now + entry.valid_for, self.config.revoke_grace);
        let slot = entry.grant.id().slot;
        self.timers
            .at(entry.machine.next_deadline(), Timer::Arrival(slot));
        self.tell_grant(&entry);
        self.arrivals.insert(slot, entry);
    }

    pub(super) fn revoke(&mut self, id: GrantId) {
        let Some(arrival) = self.arrivals.get_mut(&id.slot) else {
            return;
        };
        if arrival.grant.id() == id {
            let action = arrival.machine.revoke(self.now);
            self.arrival_action(id.slot, action);
        }
    }

    pub(super) fn arrival_timer(&mut self, slot: u32) {
        // A timer of an earlier user of the slot finds the machine of the next one, which knows its own deadline.
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let action = arrival.machine.tick(self.now);
        self.arrival_action(slot, action);
        if self.is_overdue(slot) {
            self.arrival_action(slot, ArrivalAction::Fence);
        }
    }

    /// A peer wants to use a grant.
    pub(super) fn open(&mut self, conn: ConnId, open: &Open) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        if session.phase != Phase::Ready {
            // It was sent behind an offer that has been refused, and will be sent again behind the next.
            return;
        }
        match self.land_grant(conn, open, false) {
            Ok(true) => self.open_landed(conn, open),
            // It goes on when there is room.
            Ok(false) => {}
            Err((code, detail)) => self.refuse(conn, open, code, detail),
        }
    }

    /// The same, with a landing if it needs one.
    pub(super) fn open_landed(&mut self, conn: ConnId, open: &Open) {
        match self.try_open(conn, open) {
            Ok(()) => {}
            Err((code, detail)) => self.refuse(conn, open, code, detail),
        }
    }

    pub(super) fn refuse(&mut self, conn: ConnId, open: &Open, code: RefuseCode, detail: &str) {
        if !self.sessions.contains_key(&conn) {
            return;
        }
        self.tell_refused(conn, Some(open.grant), code, detail);
        let refuse = Refuse {
            push: open.push,
            code,
            detail: detail.to_owned(),
        };
        self.send(conn, &Message::Refuse(refuse));
    }

    fn try_open(&mut self, conn: ConnId, open: &Open) -> Result<(), (RefuseCode, &'static str)> {
        if open.incarnation != self.incarnation {
            return Err((
                RefuseCode::WrongIncarnation,
                "the endpoint has restarted since",
            ));
        }
        if self.is_draining() {
            return Err((RefuseCode::Draining, "the endpoint is going away"));
        }
        let granted = self.arrivals.get_mut(&open.grant.slot);
        let Some(arrival) = granted.filter(|arrival| arrival.grant.id() == open.grant) else {
            return Err(match self.tails.knows(open.grant) {
                true => (
                    RefuseCode::StaleGeneration,
                    "the grant has completed, expired or been revoked",
                ),
                false => (RefuseCode::UnknownGrant, ""),
            });
        };
        if !arrival.grant.digest().matches(&open.digest) || arrival.grant.pool() != open.pool {
            return Err((
                RefuseCode::DigestMismatch,
                "its content has been changed on the way",
            ));
        }
        if !arrival.machine.is_granted() || arrival.opened.is_some() {
            return Err((RefuseCode::AlreadyOpened, "another push uses it"));
        }
        let Some(session) = self.sessions.get_mut(&conn) else {
            return Err((RefuseCode::Other, "no session"));
        };
        let Some(slot) = session.take_slot(open.grant.slot) else {
            return Err((RefuseCode::Busy, "too many pushes from this peer at once"));
        };
        if arrival.machine.next_deadline() <= Some(self.now) {
            session.slots[usize::from(slot)] = None;
            return Err((RefuseCode::Expired, "its deadline has passed"));
        }
        arrival.opened = Some((conn, open.push, slot));
        match self.begin_windows(conn, open.grant.slot, open) {
            Opening::Windows => self.drive_windows(open.grant.slot),
            Opening::Region { again } => {
                self.accept(open.grant.slot, open.want_pool || again, None)
            }
            Opening::Refused(code, detail) => {
                self.close_opening(open.grant.slot);
                return Err((code, detail));
            }
        }
        Ok(())
    }

    /// The grant in `slot` is not being opened any more, and may be again.
    pub(super) fn close_opening(&mut self, slot: u32) {
        let opened = self
            .arrivals
            .get_mut(&slot)
            .and_then(|arrival| arrival.opened.take());
        if let Some((conn, _, imm_slot)) = opened
            && let Some(session) = self.sessions.get_mut(&conn)
        {
            session.slots[usize::from(imm_slot)] = None;
        }
    }

    /// Tells the writer that has opened the grant in `slot` where to write: through `windows`, or with the keys of
    /// regions.
    pub(super) fn accept(&mut self, slot: u32, tell_pool: bool, windows: Option<GrantWindows>) {
        let opened = self.arrivals.get(&slot).and_then(|arrival| arrival.opened);
        let Some((conn, push, imm_slot)) = opened else {
            return;
        };
        let rails = match windows {
            None => self.rails_of_session(conn),
            Some(_) => Vec::new(),
        };
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let Some(remaining) = arrival.machine.open(self.now) else {
            // Its timer is due and ends it, and its windows.
            let refuse = Refuse {
                push,
                code: RefuseCode::Expired,
                detail: "its deadline has passed".to_owned(),
            };
            if windows.is_none() {
                self.close_opening(slot);
            }
            self.send(conn, &Message::Refuse(refuse));
            return;
        };
        let keys = match (&windows, &arrival.windows) {
            (Some(_), Some(windows)) => windows.summary(),
            _ => GrantKeys::Region,
        };
        arrival
            .shared
            .signal
            .update(|state| state.keys = Some(keys));
        let record = &arrival.pool.record;
        // A writer takes a rail without keys for one that the pool does not use.
        let told: Vec<usize> = rails
            .iter()
            .copied()
            .filter(|&rail| record.uses(rail))
            .collect();
        let landed = arrival.landed.as_ref();
        let landing = landed.map(|landed| landed.descriptor(&arrival.pool, &told));
        let wants_pool = tell_pool && landing.is_none();
        let pool = wants_pool.then(|| PoolDescriptor {
            pool: record.id,
            layout: record.layout.clone(),
            regions: record
                .regions
                .iter()
                .map(|region| RegionDescriptor {
                    length: region.length(),
                    keys: region_keys(region, &told),
                })
                .collect(),
            distances: record.rails.iter().map(|rail| rail.unwrap_or(0)).collect(),
        });
        let accept = Accept {
            push,
            slot: imm_slot,
            remaining_ns: u64::try_from(remaining.as_nanos()).unwrap_or(u64::MAX),
            tail: TailTarget {
                address: arrival.tail_slot.address(),
                keys: rails
                    .iter()
                    .filter_map(|&rail| Some((rail as u8, arrival.tail_slot.remote(rail)?)))
                    .collect(),
                capacity: arrival.grant.tail_capacity(),
            },
            windows,
            pool,
            landing,
        };
        self.tell_arrival_open(conn, slot);
        self.send(conn, &Message::Accept(Box::new(accept)));
    }

    /// A write with immediate has been placed: a part is there.
    pub(super) fn part_arrived(&mut self, conn: ConnId, index: usize, imm: u32) {
        let imm = Imm::from_wire(imm);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get_mut(index) else {
            return;
        };
        if let Some(rail) = session.meters.as_ref().and_then(|m| m.rail(lane.rail)) {
            rail.parts.add(1);
        }
        // A lane that fails gets no more receives, but what it has placed counts.
        let due = match lane.state {
            LaneState::Up => lane.receive.consume(),
            _ => None,
        };
        if let Some(count) = due {
            let id = lane.id;
            match self.rails[lane.rail].context.post_receives(id, count) {
                Ok(()) => {
                    lane.receives += count;
                    let (total, epoch) = (lane.receive.posted(count), lane.epoch);
                    let lane = index as u16;
                    self.send(conn, &Message::Credits(Credits { lane, epoch, total }));
                }
                Err(source) => {
                    let error = PeerError::Fabric {
                        peer: session.name(),
                        source: source.into(),
                    };
                    self.lane_failed(conn, index, error);
                }
            }
        }
        let slot = self.sessions.get(&conn).and_then(|session| {
            session
                .slots
                .get(usize::from(imm.slot()))
                .copied()
                .flatten()
        });
        if slot == Some(SHUT) {
            // Written before its windows were taken back, or empty; nobody waits for it any more.
            return;
        }
        let Some((slot, arrival)) =
            slot.and_then(|slot| Some((slot, self.arrivals.get_mut(&slot)?)))
        else {
            self.violation(conn, "a part of no open grant");
            return;
        };
        if !arrival.machine.is_open() {
            // It is being taken back; what still arrives before the writer has stopped does not count.
            return;
        }
        if arrival.landed.is_none() {
            self.count_part(Some(conn), slot, imm.part());
        } else if !self.part_landed(slot, imm.part()) {
            self.violation(conn, "a part beyond those of the grant");
        }
    }

    /// A part is in the pool's memory. `conn` is whom to blame if there is no such part.
    pub(super) fn count_part(&mut self, conn: Option<ConnId>, slot: u32, part: u32) {
        let arrival = self.arrivals.get_mut(&slot);
        let Some(arrival) = arrival.filter(|arrival| arrival.machine.is_open()) else {
            return;
        };
        match arrival.parts.arrive(part) {
            PartOutcome::Unknown => {
                if let Some(conn) = conn {
                    self.violation(conn, "a part beyond those of the grant");
                }
            }
            PartOutcome::Duplicate | PartOutcome::Counted => {}
            PartOutcome::LayerComplete(layer) => {
                if !self.make_visible(slot) {
                    return;
                }
                let Some(arrival) = self.arrivals.get_mut(&slot) else {
                    return;
                };
                arrival
                    .shared
                    .signal
                    .update(|state| state.layer_complete(layer));
                self.complete_if_whole(slot);
            }
            PartOutcome::Tail => self.complete_if_whole(slot),
        }
    }

    /// Has the devices of the arrival's pool show what has been written, before anyone is told of it. Every part of what
    /// is about to be reported has been placed. Returns `false` if a device refuses: then the arrival fails.
    fn make_visible(&mut self, slot: u32) -> bool {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return false;
        };
        if !arrival.flush {
            return true;
        }
        let Err(error) = arrival.pool.record.flush() else {
            return true;
        };
        tracing::error!(%error, "flush failed");
        let action = arrival.machine.fail(self.now, ArrivalError::Flush(error));
        self.arrival_action(slot, action);
        false
    }

    fn complete_if_whole(&mut self, slot: u32) {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        if !arrival.parts.is_complete() {
            return;
        }
        let action = match arrival.tail_slot.load(arrival.grant.id().generation) {
            Some(tail) => {
                arrival
                    .shared
                    .signal
                    .update(|state| state.tail = Some(tail));
                arrival.machine.completed()
            }
            None => {
                let conn = arrival.opened.map(|(conn, ..)| conn);
                let Some(conn) = conn else { return };
                self.violation(conn, "a tail of another grant, or longer than its room");
                return;
            }
        };
        self.arrival_action(slot, action);
    }

    /// A writer has nothing in flight any more, as it was asked.
    pub(super) fn drained(&mut self, conn: ConnId, push: u64) {
        let Some((slot, arrival)) = self.arrival_of(conn, push) else {
            self.let_in(conn, push);
            return;
        };
        let action = arrival.machine.drained();
        self.arrival_action(slot, action);
    }

    /// A writer gave up by itself.
    pub(super) fn given_up(&mut self, conn: ConnId, cancel: Cancel) {
        let now = self.now;
        let Some((slot, arrival)) = self.arrival_of(conn, cancel.push) else {
            self.let_in(conn, cancel.push);
            return;
        };
        if arrival.windows.as_ref().is_some_and(|w| !w.is_told()) {
            // It was being opened; it ends as if it had been.
            let _ = arrival.machine.open(now);
        }
        let failure = match cancel.code {
            Cancel::EXPIRED => arrival.expired(),
            _ => ArrivalError::Abandoned {
                detail: cancel.detail,
            },
        };
        let action = arrival.machine.given_up(failure);
        self.arrival_action(slot, action);
    }

    fn arrival_of(&mut self, conn: ConnId, push: u64) -> Option<(u32, &mut ArrivalEntry)> {
        let session = self.sessions.get(&conn)?;
        let slot = session.slots.iter().flatten().copied().find(|slot| {
            self.arrivals
                .get(slot)
                .and_then(|arrival| arrival.opened)
                .is_some_and(|(opener, name, _)| opener == conn && name == push)
        })?;
        Some((slot, self.arrivals.get_mut(&slot)?))
    }

    /// Does what an arrival's machine asks for.
    pub(super) fn arrival_action(&mut self, slot: u32, action: ArrivalAction<ArrivalError>) {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        match action {
            ArrivalAction::None => {}
            ArrivalAction::SendRevoke { expired } => {
                self.timers
                    .at(arrival.machine.next_deadline(), Timer::Arrival(slot));
                let opened = arrival.opened;
                self.tell_revoking(slot, expired);
                let Some((conn, push, _)) = opened else {
                    // Its writer has gone after everything had landed: nobody is there to be asked.
                    let arrival = self.arrivals.get_mut(&slot);
                    if let Some(action) = arrival.map(|arrival| arrival.machine.drained()) {
                        self.arrival_action(slot, action);
                    }
                    return;
                };
                let reason = if expired {
                    RevokeReason::Expired
                } else {
                    RevokeReason::Requested
                };
                self.send(conn, &Message::Revoke(Revoke { push, reason }));
            }
            ArrivalAction::Fence => {
                if self.shut_windows(slot) {
                    return;
                }
                let Some(arrival) = self.arrivals.get(&slot) else {
                    return;
                };
                let Some((conn, push, _)) = arrival.opened else {
                    return;
                };
                self.tell_forced(conn, push, Some(slot));
                let Some(session) = self.sessions.get(&conn) else {
                    return;
                };
                let error = PeerError::Silent {
                    peer: session.name(),
                    waited: self.config.revoke_grace,
                };
                // Ends this arrival too, with the reason it was taken back for.
                self.end_session(
                    conn,
                    error,
                    Some((GoodbyeCode::Timeout, "no answer to a revoke")),
                );
            }
            ArrivalAction::End(end) => {
                if let Some(end) = self.park(slot, end) {
                    self.end_arrival(slot, end);
                }
            }
        }
    }

    /// An arrival is over, and nothing touches its pages any more, except as its end says.
    pub(super) fn end_arrival(&mut self, slot: u32, end: ArrivalEnd<ArrivalError>) {
        let Some(arrival) = self.arrivals.get(&slot) else {
            return;
        };
        let result = match end {
            ArrivalEnd::Completed => Ok(()),
            ArrivalEnd::Revoked => Err(ArrivalError::Revoked),
            ArrivalEnd::Expired => Err(arrival.expired()),
            ArrivalEnd::Failed(error) => Err(error),
        };
        if let Some(result) = self.end_with_windows(slot, result) {
            self.finish_arrival(slot, result);
        }
    }

    /// Its windows are gone, too: its pages are released and its end is told.
    pub(super) fn finish_arrival(&mut self, slot: u32, result: Result<(), ArrivalError>) {
        let Some(arrival) = self.arrivals.remove(&slot) else {
            return;
        };
        if arrival.opened.is_some() {
            self.count_arrival(result.is_ok());
        }
        if let Some((conn, push, imm_slot)) = arrival.opened
            && let Some(session) = self.sessions.get_mut(&conn)
        {
            session.slots[usize::from(imm_slot)] = None;
            if result.is_ok() {
                self.send(conn, &Message::Done { push });
            }
        }
        // The pages are free before anyone is told, so that a caller who waits for the end can grant them. Those that a
        // device may still write to are never free again.
        if !matches!(result, Err(ArrivalError::Stuck(_))) {
            arrival
                .pool
                .record
                .release(arrival.grant.pages(), arrival.grant.heads());
        }
        let trace = self.tell_arrival_end(&arrival, result.as_ref().map(|&()| ()));
        arrival.shared.end(result, trace);
    }

    /// The lanes of a session are gone: nothing of its grants can land any more. Unless they could not be fenced: then
    /// its pages are never given back.
    pub(super) fn stop_arrivals(
        &mut self,
        session: &Session,
        error: &PeerError,
        unfenced: Option<&FabricError>,
    ) {
        for slot in session.slots.iter().flatten() {
            let Some(arrival) = self.arrivals.get_mut(slot) else {
                continue;
            };
            let Some(source) = unfenced else {
                // The windows went with the lanes.
                if let Some(windows) = arrival.windows.take() {
                    windows.give_back(&mut self.rails);
                    if !windows.is_told() && !windows.is_ending() {
                        // It was being opened; another writer may.
                        arrival.opened = None;
                        continue;
                    }
                    if let Some(result) = windows.into_end() {
                        self.finish_arrival(*slot, result);
                        continue;
                    }
                }
                if arrival.landed.as_ref().is_some_and(Landed::is_whole) {
                    // All of it is in this host's memory: it is only to be copied, and the writer is not needed.
                    arrival.opened = None;
                    continue;
                }
                let action = arrival
                    .machine
                    .unreachable(ArrivalError::Peer(error.clone()));
                self.arrival_action(*slot, action);
                continue;
            };
            self.bound_landings(Some(*slot));
            let Some(arrival) = self.arrivals.remove(slot) else {
                continue;
            };
            self.count_arrival(false);
            let failure = ArrivalError::Unfenced(Box::new(source.clone()));
            let trace = self.tell_arrival_end(&arrival, Err(&failure));
            arrival.shared.end(Err(failure), trace);
            // Its memory, its reservation and its tail buffer stay as they are for the life of the process.
            std::mem::forget(arrival);
        }
    }

    /// The endpoint is shutting down; all sessions are gone.
    pub(super) fn close_arrivals(&mut self) {
        let slots: Vec<u32> = self.arrivals.keys().copied().collect();
        for slot in slots {
            self.fail_arrival(slot, ArrivalError::Peer(PeerError::Closed));
        }
    }

    /// An arrival that has no session ends with `error`.
    pub(super) fn fail_arrival(&mut self, slot: u32, error: ArrivalError) {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let action = arrival.machine.fail(self.now, error);
        self.arrival_action(slot, action);
    }
}

impl Session {
    /// A free slot of the immediate for the grant in `grant_slot`: the one that has been free longest, roughly.
    fn take_slot(&mut self, grant_slot: u32) -> Option<u16> {
        let count = self.slots.len();
        let slot = (0..count)
            .map(|step| (self.next_slot + step) % count)
            .find(|&s| self.slots[s].is_none())?;
        self.next_slot = slot + 1;
        self.slots[slot] = Some(grant_slot);
        Some(slot as u16)
    }
}

/// The keys of `region` on `rails`.
pub(super) fn region_keys(region: &Region, rails: &[usize]) -> Vec<RegionKey> {
    rails
        .iter()
        .filter_map(|&rail| {
            let keys = region.rails().get(rail)?;
            Some(RegionKey {
                rail: rail as u8,
                address: keys.grid().address,
                extent: keys.grid().size,
                rkeys: keys.remote(),
            })
        })
        .collect()
}
