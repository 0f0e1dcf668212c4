//! The accepting side's windows: keys to what one grant opens, for the lanes of its writer, shut with the grant.
//!
//! A grant that gets windows is accepted when the last of them is bound, and not before. When its arrival ends, for
//! whatever reason, its windows are taken back first, and only then are its pages released and the end reported. A
//! writer that does not answer a revoke has its windows taken back instead of its lanes fenced, where the device
//! promises that nothing lands after that; its other pushes go on. Fencing remains as the last resort.
//!
//! Invariants: each operation has a slot of its lane's send queue, taken before it is posted; a rail's windows are
//! counted when they are planned, so that two grants never want the last one; `outstanding` is the number of
//! operations posted and not completed; nothing here waits.

use std::collections::VecDeque;

use super::{
    Core, Rail,
    session::{Lane, LaneState, Session},
    timers::Timer,
};
use crate::{
    endpoint::{
        ArrivalError, GrantKeys, PeerError, config::Protection, control::ConnId,
        shared::PoolRecord, shared::TailSlot,
    },
    fabric::{Access, FabricError, MrId, RemoteKey, Window, WindowBind},
    kv::{self, cover},
    protocol::Time,
    wire::{
        GoodbyeCode, GrantWindows, LaneWindows, MAX_WINDOWS, Message, Open, Refuse, RefuseCode,
        WindowRange,
    },
};

/// Marks the completions of windows among those of a lane's send queue; the rest is the slot of the grant.
const OPERATION: u64 = 1 << 63;

/// Most windows of one grant, over all lanes: what a message can hold.
const MOST: usize = 1 << 16;

/// In the table of a session's slots of the immediate: its grant has ended, and its writer has not said that it stopped.
pub(super) const SHUT: u32 = u32::MAX;

/// What to do when the windows are as they should be.
enum Then {
    /// All bound: tell the writer.
    Accept,
    /// All gone, because one could not be had.
    FallBack(Box<FabricError>),
    /// All gone: end the arrival so.
    End(Result<(), ArrivalError>),
    /// All gone, while the writer was silent: nothing can land any more.
    Shut,
    /// All bound and told; nothing to do.
    Rest,
}

/// The windows of one arrival.
pub(super) struct Windows {
    ranges: Vec<WindowRange>,
    /// Whether they hold the granted pages only.
    exact: bool,
    want_pool: bool,
    lanes: Vec<OfLane>,
    pub(super) outstanding: u32,
    then: Then,
    /// When the lanes must be fenced, because taking back takes too long.
    fence_at: Time,
}

/// The windows of one lane.
struct OfLane {
    lane: usize,
    rail: usize,
    /// The tail's, then one for each range.
    windows: Vec<Item>,
    /// The next to bind, or to take back.
    next: usize,
    /// Whether it is in the session's line for the lane.
    waits: bool,
}

struct Item {
    mr: MrId,
    address: u64,
    length: u64,
    window: Option<Window>,
}

impl Windows {
    /// Plans what to bind; takes nothing yet. `None` if a rail does not reach a page, or there would be too many.
    fn plan(
        record: &PoolRecord,
        tail: &TailSlot,
        pages: &[u32],
        lanes: &[Lane],
        most: usize,
        want_pool: bool,
    ) -> Option<Self> {
        let (cover, exact) = cover(&record.layout, pages, most);
        let mut rails: Vec<usize> = lanes.iter().map(|lane| lane.rail).collect();
        rails.sort_unstable();
        rails.dedup();
        // No window crosses the end of an extent of any rail.
        let mut ranges = Vec::with_capacity(cover.len());
        for range in cover {
            cut(record, &rails, range, &mut ranges)?;
        }
        if ranges.len() > MAX_WINDOWS || (ranges.len() + 1) * lanes.len() > MOST {
            return None;
        }
        let of_lane = |(index, lane): (usize, &Lane)| {
            let (address, mr, length) = tail.window(lane.rail)?;
            let item = |address, mr, length| Item {
                mr,
                address,
                length,
                window: None,
            };
            let mut windows = Vec::with_capacity(ranges.len() + 1);
            windows.push(item(address, mr, length));
            for range in &ranges {
                let region = record.regions.get(usize::from(range.region))?;
                let (address, mr) = region.rails().get(lane.rail)?.window(range.offset)?;
                windows.push(item(address, mr, range.length));
            }
            Some(OfLane {
                lane: index,
                rail: lane.rail,
                windows,
                next: 0,
                waits: false,
            })
        };
        let lanes = lanes.iter().enumerate().map(of_lane);
        Some(Self {
            lanes: lanes.collect::<Option<_>>()?,
            ranges,
            exact,
            want_pool,
            outstanding: 0,
            then: Then::Accept,
            fence_at: Time(u64::MAX),
        })
    }

    /// Counts the windows of each rail, or nothing if one has not as many.
    fn take(&self, rails: &mut [Rail]) -> bool {
        let enough = rails.iter().enumerate().all(|(rail, state)| {
            let of_rail = self.lanes.iter().filter(|lane| lane.rail == rail);
            let count: usize = of_rail.map(|lane| lane.windows.len()).sum();
            count <= state.windows_free as usize
        });
        if enough {
            for lane in &self.lanes {
                rails[lane.rail].windows_free -= lane.windows.len() as u32;
            }
        }
        enough
    }

    /// They are gone.
    pub(super) fn give_back(&self, rails: &mut [Rail]) {
        for lane in &self.lanes {
            rails[lane.rail].windows_free += lane.windows.len() as u32;
        }
    }

    /// Whether the writer has been told of them.
    pub(super) fn is_told(&self) -> bool {
        matches!(self.then, Then::Rest | Then::Shut)
    }

    /// Whether they are being taken back because the arrival ends.
    pub(super) fn is_ending(&self) -> bool {
        matches!(self.then, Then::End(_))
    }

    /// Whether nothing lands once they have been taken back.
    fn is_final(&self, rails: &[Rail]) -> bool {
        self.lanes.iter().all(|lane| {
            let caps = rails[lane.rail].device.info().caps.windows;
            caps.is_some_and(|caps| caps.final_when_done)
        })
    }

    /// How the arrival was to end when its windows are gone.
    pub(super) fn into_end(self) -> Option<Result<(), ArrivalError>> {
        match self.then {
            Then::End(end) => Some(end),
            _ => None,
        }
    }

    /// Turns to taking back, of what has been bound so far.
    fn shut(&mut self, then: Then, fence_at: Time) {
        if matches!(self.then, Then::Accept | Then::Rest) {
            self.lanes.iter_mut().for_each(|lane| lane.next = 0);
            self.fence_at = fence_at;
        }
        self.then = then;
    }

    /// For the reader's caller.
    pub(super) fn summary(&self) -> GrantKeys {
        let count: usize = self.lanes.iter().map(|lane| lane.windows.len()).sum();
        GrantKeys::Windows {
            count: u32::try_from(count).unwrap_or(u32::MAX),
            exact: self.exact,
        }
    }

    /// What the writer is told. All are bound by then.
    fn on_wire(&self) -> GrantWindows {
        let key = |item: &Item| item.window.map_or(RemoteKey(0), |window| window.remote);
        let lanes = self.lanes.iter().map(|lane| LaneWindows {
            tail: lane.windows.first().map_or(RemoteKey(0), key),
            keys: lane
                .windows
                .iter()
                .skip(1)
                .map(|item| (item.address, key(item)))
                .collect(),
        });
        GrantWindows {
            ranges: self.ranges.clone(),
            lanes: lanes.collect(),
        }
    }
}

/// Splits `range` where some rail's registration of the region ends.
fn cut(
    record: &PoolRecord,
    rails: &[usize],
    range: kv::Range,
    out: &mut Vec<WindowRange>,
) -> Option<()> {
    let region = record.regions.get(usize::from(range.region))?;
    let (mut offset, mut left) = (range.offset, range.length);
    while left > 0 {
        let mut length = left;
        for &rail in rails {
            length = length.min(region.rails().get(rail)?.grid().rest(offset));
        }
        out.push(WindowRange {
            region: range.region,
            offset,
            length,
        });
        offset += length;
        left -= length;
    }
    Some(())
}

/// What an `Open` leads to.
pub(super) enum Opening {
    /// Windows are being bound.
    Windows,
    /// Keys of regions; the description of the pool must go along, because one without keys may have been told.
    Region { again: bool },
    /// Neither.
    Refused(RefuseCode, &'static str),
}

/// Whether `id` is that of an operation on a window.
pub(super) fn is_operation(id: u64) -> bool {
    id & OPERATION != 0
}

impl Core {
    /// Whether a lane on `rail` of the accepting side may have windows.
    pub(super) fn has_windows(&self, rail: usize) -> bool {
        self.config.protection != Protection::Region
            && self.rails[rail].device.info().caps.windows.is_some()
    }

    /// Begins to bind the windows of the grant in `slot`, which `conn` wants to open, if it is to have any.
    pub(super) fn begin_windows(&mut self, conn: ConnId, slot: u32, open: &Open) -> Opening {
        const NONE: Opening =
            Opening::Refused(RefuseCode::Other, "no memory windows on every rail");
        const FEW: Opening = Opening::Refused(RefuseCode::Busy, "no memory windows are left");
        if self.config.protection == Protection::Region {
            return Opening::Region { again: false };
        }
        let must = self.config.protection == Protection::Window;
        let Some(session) = self.sessions.get(&conn) else {
            return NONE;
        };
        if !session.lanes.iter().all(|lane| self.has_windows(lane.rail)) {
            return match must {
                true => NONE,
                false => Opening::Region { again: false },
            };
        }
        if !session
            .lanes
            .iter()
            .all(|lane| matches!(lane.state, LaneState::Up))
        {
            // Windows are for lanes that there are; those that are being made again would have none.
            return match must {
                true => FEW,
                false => Opening::Region { again: true },
            };
        }
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return NONE;
        };
        if arrival.landed.is_some() {
            // What goes through memory of this host has keys of its own landing and of no pool.
            return match must {
                true => NONE,
                false => Opening::Region { again: false },
            };
        }
        let most = self.config.max_windows as usize;
        let (record, pages) = (&arrival.pool.record, arrival.grant.pages());
        let windows = Windows::plan(
            record,
            &arrival.tail_slot,
            pages,
            &session.lanes,
            most,
            open.want_pool,
        );
        match windows {
            Some(windows) if windows.take(&mut self.rails) => {
                arrival.windows = Some(windows);
                Opening::Windows
            }
            Some(_) if must => FEW,
            None if must => NONE,
            _ => Opening::Region { again: true },
        }
    }

    /// Whether a session cannot lose a lane, because its pushes reach memory by windows: those of a lane go with it.
    pub(super) fn relies_on_windows(&self, conn: ConnId) -> bool {
        self.sessions.get(&conn).is_some_and(|session| {
            let arrivals = session.slots.iter().flatten();
            let mut arrivals = arrivals.filter_map(|slot| self.arrivals.get(slot));
            let mut pushes = session
                .pushes
                .iter()
                .filter_map(|push| self.pushes.get(push));
            arrivals.any(|arrival| arrival.windows.is_some())
                || pushes.any(|push| push.windows.is_some())
        })
    }

    /// Posts what can be posted for the windows of an arrival, and goes on when they are as they should be.
    pub(super) fn drive_windows(&mut self, slot: u32) {
        let fence_at = self.now + self.config.revoke_grace;
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let (Some(windows), Some((conn, ..))) = (&mut arrival.windows, arrival.opened) else {
            return;
        };
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let failure = match &windows.then {
            Then::Rest => return,
            Then::Accept => match post_bindings(windows, session, &mut self.rails, slot) {
                Ok(()) => None,
                Err(error) => {
                    tracing::info!(%error, "a window could not be bound");
                    windows.shut(Then::FallBack(Box::new(error)), fence_at);
                    self.timers.at(Some(fence_at), Timer::Arrival(slot));
                    post_returns(windows, session, &mut self.rails, slot).err()
                }
            },
            _ => post_returns(windows, session, &mut self.rails, slot).err(),
        };
        if let Some(error) = failure {
            // Nobody knows what the window opens: the lanes must go.
            let error = PeerError::Fabric {
                peer: session.name(),
                source: Box::new(error),
            };
            self.end_session(
                conn,
                error,
                Some((GoodbyeCode::Error, "a window stays open")),
            );
            return;
        }
        let done = windows
            .lanes
            .iter()
            .all(|lane| lane.next == lane.windows.len());
        if done && windows.outstanding == 0 {
            self.windows_ready(slot);
        }
    }

    /// Everything asked of the windows of an arrival has been done.
    fn windows_ready(&mut self, slot: u32) {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let (Some(windows), Some((conn, push, _))) = (&mut arrival.windows, arrival.opened) else {
            return;
        };
        if matches!(windows.then, Then::Accept) {
            windows.then = Then::Rest;
            let (told, want_pool) = (windows.on_wire(), windows.want_pool);
            self.accept(slot, want_pool, Some(told));
            return;
        }
        let Some(windows) = arrival.windows.take() else {
            return;
        };
        windows.give_back(&mut self.rails);
        match windows.then {
            Then::Accept | Then::Rest => {}
            Then::FallBack(_) if self.config.protection == Protection::Auto => {
                self.accept(slot, true, None);
            }
            Then::FallBack(error) => {
                self.close_opening(slot);
                let refuse = Refuse {
                    push,
                    code: RefuseCode::Busy,
                    detail: error.to_string(),
                };
                self.send(conn, &Message::Refuse(refuse));
            }
            Then::End(result) => self.finish_arrival(slot, result),
            Then::Shut => self.shut_out(slot),
        }
    }

    /// An operation on a window of `slot` has completed with success.
    pub(super) fn window_done(&mut self, conn: ConnId, lane: usize, id: u64) {
        let slot = (id & !OPERATION) as u32;
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if let Some(lane) = session.lanes.get_mut(lane) {
            lane.send.retire(1);
        }
        if let Some(windows) = self
            .arrivals
            .get_mut(&slot)
            .and_then(|arrival| arrival.windows.as_mut())
        {
            windows.outstanding = windows.outstanding.saturating_sub(1);
        }
        // Those that have waited longest come first.
        while self.has_room(conn, lane) {
            let session = self.sessions.get_mut(&conn);
            let waiting = session.and_then(|session| session.waiting.get_mut(lane));
            let Some(next) = waiting.and_then(VecDeque::pop_front) else {
                break;
            };
            let arrival = self.arrivals.get_mut(&next);
            let windows = arrival.and_then(|arrival| arrival.windows.as_mut());
            let of_lane = windows.and_then(|windows| windows.lanes.get_mut(lane));
            if let Some(of_lane) = of_lane {
                of_lane.waits = false;
                self.drive_windows(next);
            }
        }
        self.drive_windows(slot);
    }

    /// Whether the send queue of a lane has a slot.
    fn has_room(&mut self, conn: ConnId, lane: usize) -> bool {
        let session = self.sessions.get_mut(&conn);
        let lane = session.and_then(|session| session.lanes.get_mut(lane));
        lane.is_some_and(|lane| {
            let room = lane.send.take(1, 0);
            if room {
                lane.send.retire(1);
            }
            room
        })
    }

    /// Takes the windows of an arrival back before it ends with `result`. Gives the result back if there are none.
    pub(super) fn end_with_windows(
        &mut self,
        slot: u32,
        result: Result<(), ArrivalError>,
    ) -> Option<Result<(), ArrivalError>> {
        let fence_at = self.now + self.config.revoke_grace;
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return Some(result);
        };
        let Some(windows) = &mut arrival.windows else {
            return Some(result);
        };
        let told = windows.is_told();
        windows.shut(Then::End(result), fence_at);
        self.timers.at(Some(fence_at), Timer::Arrival(slot));
        if let (false, Some((conn, push, _))) = (told, arrival.opened) {
            let refuse = Refuse {
                push,
                code: RefuseCode::StaleGeneration,
                detail: "the grant ended while it was being opened".to_owned(),
            };
            self.send(conn, &Message::Refuse(refuse));
        }
        self.drive_windows(slot);
        None
    }

    /// Takes the windows of a silent writer back. Returns `false` if that does not do: then its lanes must be fenced.
    pub(super) fn shut_windows(&mut self, slot: u32) -> bool {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return false;
        };
        let Some(windows) = &mut arrival.windows else {
            return false;
        };
        if matches!(windows.then, Then::Rest) && !windows.is_final(&self.rails) {
            return false;
        }
        if windows.fence_at <= self.now {
            return false;
        }
        if !matches!(windows.then, Then::Rest) {
            return true;
        }
        let fence_at = self.now + self.config.revoke_grace;
        windows.shut(Then::Shut, fence_at);
        self.timers.at(Some(fence_at), Timer::Arrival(slot));
        self.drive_windows(slot);
        true
    }

    /// Whether windows should have been taken back by now.
    pub(super) fn is_overdue(&self, slot: u32) -> bool {
        let windows = self.arrivals.get(&slot).and_then(|a| a.windows.as_ref());
        windows.is_some_and(|windows| windows.fence_at <= self.now)
    }

    /// A silent writer cannot write any more: the arrival ends with the reason it was taken back for.
    fn shut_out(&mut self, slot: u32) {
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        if let Some((conn, push, imm_slot)) = arrival.opened.take() {
            self.count_arrival(false);
            if let Some(session) = self.sessions.get_mut(&conn) {
                session.slots[usize::from(imm_slot)] = Some(SHUT);
                session.shut.insert(push, imm_slot);
            }
        }
        let Some(arrival) = self.arrivals.get_mut(&slot) else {
            return;
        };
        let action = arrival.machine.drained();
        self.arrival_action(slot, action);
    }

    /// A writer whose windows were taken back has stopped at last.
    pub(super) fn let_in(&mut self, conn: ConnId, push: u64) {
        if let Some(session) = self.sessions.get_mut(&conn)
            && let Some(imm_slot) = session.shut.remove(&push)
        {
            session.slots[usize::from(imm_slot)] = None;
        }
    }
}

/// Has an arrival wait for slots of the send queue of a lane, once.
fn wait(of_lane: &mut OfLane, waiting: &mut Vec<VecDeque<u32>>, slot: u32) {
    if of_lane.waits {
        return;
    }
    of_lane.waits = true;
    if waiting.len() <= of_lane.lane {
        waiting.resize_with(of_lane.lane + 1, VecDeque::new);
    }
    waiting[of_lane.lane].push_back(slot);
}

fn post_bindings(
    windows: &mut Windows,
    session: &mut Session,
    rails: &mut [Rail],
    slot: u32,
) -> Result<(), FabricError> {
    for of_lane in &mut windows.lanes {
        let Some(lane) = session.lanes.get_mut(of_lane.lane) else {
            continue;
        };
        while let Some(item) = of_lane.windows.get_mut(of_lane.next) {
            if !lane.send.take(1, 0) {
                wait(of_lane, &mut session.waiting, slot);
                break;
            }
            let bind = WindowBind {
                id: OPERATION | u64::from(slot),
                mr: item.mr,
                address: item.address,
                length: item.length,
                access: Access {
                    local_write: false,
                    ..Access::REMOTE_WRITE
                },
            };
            match rails[of_lane.rail].context.bind_window(lane.id, &bind) {
                Ok(window) => item.window = Some(window),
                Err(error) => {
                    lane.send.retire(1);
                    return Err(error);
                }
            }
            windows.outstanding += 1;
            of_lane.next += 1;
        }
    }
    Ok(())
}

fn post_returns(
    windows: &mut Windows,
    session: &mut Session,
    rails: &mut [Rail],
    slot: u32,
) -> Result<(), FabricError> {
    for of_lane in &mut windows.lanes {
        let Some(lane) = session.lanes.get_mut(of_lane.lane) else {
            continue;
        };
        while let Some(item) = of_lane.windows.get_mut(of_lane.next) {
            if let Some(window) = item.window {
                if !lane.send.take(1, 0) {
                    wait(of_lane, &mut session.waiting, slot);
                    break;
                }
                let context = &mut rails[of_lane.rail].context;
                let id = OPERATION | u64::from(slot);
                if let Err(error) = context.invalidate_window(lane.id, id, window.id) {
                    lane.send.retire(1);
                    return Err(error);
                }
                item.window = None;
                windows.outstanding += 1;
            }
            of_lane.next += 1;
        }
    }
    Ok(())
}
