//! The accepting side of a lane that fails.
//!
//! `Up` → (failure here) → `Failing` → `Lost` → (`LaneDown`) → `Down` → (`LaneRenew`) → `Up`, or `Refused` and `Up` later.
//! A `LaneDown` for a lane that works here leads from `Up` to `Down` at once.
//!
//! Before an end is destroyed it is fenced and *emptied*: the completions of what it has placed are counted, because the
//! writer may have seen their acknowledgements and would never send those parts again.

use std::collections::HashMap;

use super::super::{
    Core, MAX_POLLS,
    dial::slower,
    session::{Lane, LaneState, Role},
};
use crate::{
    endpoint::{PeerError, control::ConnId},
    wire::{
        GoodbyeCode, LaneDown, LaneFenced, LaneLost, LaneRefusal, LaneRefused, LaneRenew,
        LaneRenewed, Message,
    },
};

impl Core {
    /// Ends the lanes that have failed since the last time, and tells their writers.
    pub(in crate::endpoint::core) fn end_failing(&mut self) {
        // Emptying one lane may show that others have failed.
        while let Some((conn, index, epoch)) = self.failing.pop() {
            let lane = |core: &Self| {
                let lane = core.sessions.get(&conn)?.lanes.get(index)?;
                let same = lane.epoch == epoch && matches!(lane.state, LaneState::Failing);
                same.then_some((lane.rail, lane.id))
            };
            if lane(self).is_none() || !self.end_here(conn, index) {
                continue;
            }
            let Some(session) = self.sessions.get_mut(&conn) else {
                continue;
            };
            let error = session.last_failure.as_ref();
            let detail = error.map(ToString::to_string).unwrap_or_default();
            session.lanes[index].state = LaneState::Lost;
            let lost = LaneLost {
                lane: index as u16,
                epoch,
                detail,
            };
            self.send(conn, &Message::LaneLost(lost));
            self.end_without_rails(conn);
        }
    }

    /// Fences a lane, counts what it has placed, and destroys it. Returns whether the session still stands: if the
    /// device does not let go of the lane, it does not.
    fn end_here(&mut self, conn: ConnId, index: usize) -> bool {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return false;
        };
        let lane = &mut session.lanes[index];
        lane.state = LaneState::Failing;
        let (rail, id, reserved) = (lane.rail, lane.id, lane.reserved);
        if !self.rails[rail].dead {
            if let Err(error) = self.rails[rail].context.fence_lane(id) {
                // Destroying it does the same and more.
                tracing::debug!(%error, "fence");
            }
            self.empty(conn, index);
        }
        if !self.sessions.contains_key(&conn) {
            // Something of what it had placed broke the protocol.
            return false;
        }
        let Err(source) = self.destroy_lane(rail, id, reserved) else {
            return true;
        };
        // The writer may still write through it. It is still live, and ending the session finds that out again.
        let error = PeerError::Fabric {
            peer: self.peer_name(conn),
            source: source.into(),
        };
        let goodbye = (GoodbyeCode::Error, "a lane could not be fenced");
        self.end_session(conn, error, Some(goodbye));
        false
    }

    /// Handles completions until all receives of a fenced lane have completed: those that were placed, then the rest as
    /// flushed.
    fn empty(&mut self, conn: ConnId, index: usize) {
        for _ in 0..MAX_POLLS {
            let lane = self.sessions.get(&conn).map(|s| &s.lanes[index]);
            let Some(rail) = lane.filter(|lane| lane.receives > 0).map(|lane| lane.rail) else {
                return;
            };
            if self.rails[rail].dead {
                return;
            }
            self.poll_rail(rail);
        }
        tracing::warn!(lane = index, "a fenced lane does not flush its receives");
    }

    /// A session whose every rail has gone for good is of no use.
    pub(super) fn end_without_rails(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let live = session.lanes.iter().any(Lane::is_live);
        let usable = session.kind.is_some_and(|kind| {
            let rails = self.rails.iter();
            rails
                .filter(|rail| rail.kind == kind)
                .any(|r| r.is_usable())
        });
        if live || usable {
            return;
        }
        if let Some(error) = session.last_failure.clone() {
            let detail = error.to_string();
            self.end_session(conn, error, Some((GoodbyeCode::Error, &detail)));
        }
    }

    /// The writer's end is gone. Ours goes too, and then the writer is told what has been counted.
    pub(in crate::endpoint::core) fn lane_down(&mut self, conn: ConnId, down: LaneDown) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let index = usize::from(down.lane);
        let lane = session.lanes.get(index);
        match lane
            .filter(|lane| lane.epoch == down.epoch)
            .map(|l| &l.state)
        {
            Some(LaneState::Up | LaneState::Failing) => {
                if !self.end_here(conn, index) {
                    return;
                }
            }
            Some(LaneState::Lost | LaneState::Refused) => {}
            _ => {
                self.violation(conn, "the end of a lane that there is not");
                return;
            }
        }
        if self.relies_on_windows(conn) {
            let error = PeerError::Protocol {
                peer: self.peer_name(conn),
                detail: "a lane ended under windows".to_owned(),
            };
            self.end_session(conn, error, Some((GoodbyeCode::Error, "a lane has ended")));
            return;
        }
        let Some(counted) = self.counted(conn, &down.unacknowledged) else {
            self.violation(conn, "a part beyond those of the grant");
            return;
        };
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let peer = session.name();
        tracing::info!(
            peer,
            lane = index,
            epoch = down.epoch,
            "lane ended by the writer"
        );
        session.lanes[index].state = LaneState::Down { renew_at: None };
        let fenced = LaneFenced {
            lane: down.lane,
            epoch: down.epoch,
            counted,
        };
        self.send(conn, &Message::LaneFenced(fenced));
    }

    /// For each part of `asked` whether it must not be sent again: because it was counted, or because its arrival has
    /// ended. The end of an arrival that the writer has not been told of is its completion, for which everything was
    /// counted; and pages of an arrival that has ended are not written for it whatever the reason.
    fn counted(&self, conn: ConnId, asked: &[(u64, u32)]) -> Option<Vec<bool>> {
        let session = self.sessions.get(&conn)?;
        let mut open = HashMap::new();
        if !asked.is_empty() {
            for slot in session.slots.iter().flatten() {
                let arrival = self.arrivals.get(slot);
                if let Some((arrival, (_, push, _))) = arrival.and_then(|a| Some((a, a.opened?))) {
                    open.insert(push, arrival);
                }
            }
        }
        asked
            .iter()
            .map(|&(push, part)| {
                open.get(&push)
                    .map_or(Some(true), |a| a.arrived().has(part))
            })
            .collect()
    }

    /// The writer offers a new end for a lane that is gone on both sides.
    pub(in crate::endpoint::core) fn lane_renew(&mut self, conn: ConnId, renew: LaneRenew) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let index = usize::from(renew.lane);
        let lane = session.lanes.get_mut(index).filter(|lane| {
            let gone = matches!(lane.state, LaneState::Down { .. } | LaneState::Refused);
            gone && lane.epoch.checked_add(1) == Some(renew.epoch)
        });
        let Some(lane) = lane else {
            self.violation(conn, "an offer of a lane that is not gone");
            return;
        };
        lane.epoch = renew.epoch;
        lane.state = LaneState::Refused;
        let made = match self.rail_for(conn, index, renew.remote_rail) {
            Some(rail) => self.connect_again(conn, rail, &renew),
            None => Err((LaneRefusal::NoRail, "its rail is down".to_owned())),
        };
        let message = match made {
            Ok((lane, address)) => {
                self.lanes.insert((lane.rail, lane.id), (conn, index));
                let Some(session) = self.sessions.get_mut(&conn) else {
                    return;
                };
                let slot = &mut session.lanes[index];
                let speed_bits = lane.speed;
                slot.replace(lane);
                slot.state = LaneState::Up;
                slot.home = renew.remote_rail;
                slot.speed = slower(slot.speed, speed_bits);
                tracing::info!(lane = index, epoch = renew.epoch, "lane renewed");
                Message::LaneRenewed(LaneRenewed {
                    lane: renew.lane,
                    epoch: renew.epoch,
                    rail: slot.rail as u8,
                    speed_bits,
                    address,
                    receives: slot.config.receive_depth,
                })
            }
            Err((code, detail)) => Message::LaneRefused(LaneRefused {
                lane: renew.lane,
                epoch: renew.epoch,
                code,
                detail,
            }),
        };
        self.send(conn, &message);
    }

    /// The rail for a lane that belongs to `home`: that one; or, if no lane of the session works, any that can be used,
    /// since a slow way or a long one is better than none.
    fn rail_for(&self, conn: ConnId, index: usize, home: u8) -> Option<usize> {
        let session = self.sessions.get(&conn)?;
        let usable = |rail: &usize| {
            let rail = &self.rails[*rail];
            rail.is_usable() && rail.down_since.is_none()
        };
        let rails = self.all_rails_of(session.kind?);
        let home = rails
            .iter()
            .copied()
            .find(|&rail| rail == usize::from(home))?;
        if usable(&home) {
            return Some(home);
        }
        let rails: Vec<usize> = rails.into_iter().filter(usable).collect();
        if rails.is_empty() || session.has_working_lane(&self.rails) {
            return None;
        }
        rails.get(index % rails.len()).copied()
    }

    fn connect_again(
        &mut self,
        conn: ConnId,
        rail: usize,
        renew: &LaneRenew,
    ) -> Result<(Lane, crate::fabric::LaneAddress), (LaneRefusal, String)> {
        let host = self.sessions.get(&conn).and_then(|session| session.peer);
        let Some(host) = host else {
            return Err((LaneRefusal::Setup, "no address".to_owned()));
        };
        let failed = |error: crate::fabric::FabricError| (LaneRefusal::Setup, error.to_string());
        let made = self.create_lane(Role::Acceptor, rail, renew.rail);
        let (lane, address) = made.map_err(failed)?;
        let context = &mut self.rails[rail].context;
        if let Err(error) = context.connect_lane(lane.id, &renew.address, host.ip(), false) {
            // Nothing has gone through it; an error has been logged and the rail set aside.
            let _ = self.destroy_lane(rail, lane.id, lane.reserved);
            return Err(failed(error));
        }
        Ok((lane, address))
    }
}
