//! The dialling side of a lane that fails.
//!
//! `Up` → (failure here, or `LaneLost`) → `Fencing` → (`LaneFenced`) → `Down` → (backoff) → `Renewing` → (`LaneRenewed`)
//! → `Up`.
//!
//! The end here is destroyed first. From then on the device reads nothing for it, so its requests are retired, but what
//! they were part of stays queued (`PushMachine::queue`) and at the head of the lane until the reader has answered.

use std::collections::HashSet;

use super::super::{
    Core,
    dial::slower,
    pump::Owner,
    session::{LaneState, Role},
};
use crate::{
    endpoint::{PeerError, control::ConnId},
    protocol::{Progress, SendCredits},
    wire::{
        GoodbyeCode, LaneDown, LaneFenced, LaneLost, LaneRefused, LaneRenew, LaneRenewed, Message,
    },
};

impl Core {
    /// Ends this side's end of a lane, keeps what may have to be sent again, and asks the reader.
    pub(super) fn writer_lost(&mut self, conn: ConnId, index: usize, error: PeerError) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get(index) else {
            return;
        };
        if !matches!(lane.state, LaneState::Up | LaneState::Renewing { .. }) {
            return;
        }
        tracing::info!(peer = session.name(), lane = index, epoch = lane.epoch, %error, "lane failed");
        let (rail, id, reserved) = (lane.rail, lane.id, lane.reserved);
        self.tell_lane_down(conn, index);
        if let Err(source) = self.destroy_lane(rail, id, reserved) {
            // A device may still read for it, so whatever used it is in doubt. The lane is still live, and ending the
            // session finds that out again.
            let peer = self.peer_name(conn);
            let error = PeerError::Fabric {
                peer,
                source: source.into(),
            };
            let goodbye = (GoodbyeCode::Error, "a lane could not be fenced");
            self.end_session(conn, error, Some(goodbye));
            return;
        }
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let lane = &mut session.lanes[index];
        let posted = lane.ledger.next_sequence();
        let kept: Vec<_> = lane.replay.take(posted).collect();
        let mut asked = Vec::new();
        let mut again = Vec::new();
        for (task, progress) in kept {
            // What is not wanted any more is not sent again, and nobody asks for it.
            match task.owner() {
                Owner::Push(id) | Owner::Staged { push: id, .. } => {
                    let push = self.pushes.get_mut(&id);
                    let Some(push) = push.filter(|push| push.machine.may_post()) else {
                        lane.load -= task.bytes();
                        continue;
                    };
                    if progress != Progress::Open {
                        push.machine.queue();
                    }
                }
                Owner::Access(id) => {
                    let Some(access) = self.accesses.get_mut(&id) else {
                        lane.load -= task.bytes();
                        continue;
                    };
                    access.wholly_posted = false;
                }
            }
            asked.extend(task.immediate().filter(|_| progress == Progress::Posted));
            again.push(task);
        }
        for task in again.into_iter().rev() {
            lane.queue.push_front(task);
        }
        lane.current = None;
        let mut abandoned = Vec::new();
        lane.ledger.abandon(|batch| abandoned.push(batch));
        let down = LaneDown {
            lane: index as u16,
            epoch: lane.epoch,
            unacknowledged: asked.clone(),
        };
        lane.state = LaneState::Fencing {
            since: self.now,
            asked,
        };
        let renew_at = lane.backoff.failed(self.now);
        tracing::debug!(lane = index, %renew_at, asked = down.unacknowledged.len(), "lane down");
        session.last_failure = Some(error);
        // Before anything is said that follows from what is retired below.
        self.send(conn, &Message::LaneDown(down));
        for batch in abandoned {
            self.retire(batch);
        }
        self.note_down(conn);
    }

    /// Notices that no lane works any more, and ends the session if none can again.
    pub(super) fn note_down(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let up = session
            .lanes
            .iter()
            .any(|lane| matches!(lane.state, LaneState::Up));
        if !up {
            session.down_since.get_or_insert(self.now);
            let hope = |lane: &super::super::session::Lane| self.rails[lane.rail].is_usable();
            if !session.lanes.iter().any(hope)
                && let Some(error) = session.last_failure.clone()
            {
                let detail = error.to_string();
                self.end_session(conn, error, Some((GoodbyeCode::Error, &detail)));
                return;
            }
        }
        self.watch_recovery(conn);
    }

    /// The reader's end of a lane has failed.
    pub(in crate::endpoint::core) fn lane_lost(&mut self, conn: ConnId, lost: LaneLost) {
        let Some(session) = self.sessions.get(&conn) else {
            return;
        };
        let index = usize::from(lost.lane);
        let lane = session.lanes.get(index);
        match lane
            .filter(|lane| lane.epoch == lost.epoch)
            .map(|l| &l.state)
        {
            Some(LaneState::Up) => {
                let error = PeerError::LaneLost {
                    peer: session.name(),
                    lane: lost.lane,
                    detail: lost.detail,
                };
                self.lane_failed(conn, index, error);
            }
            // Sent before the reader heard that the lane is gone here.
            Some(LaneState::Fencing { .. }) => {}
            _ => self.violation(conn, "the loss of a lane that there is not"),
        }
    }

    /// The reader's end is gone, and what it had counted is known: the rest is sent again.
    pub(in crate::endpoint::core) fn lane_fenced(&mut self, conn: ConnId, fenced: LaneFenced) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let index = usize::from(fenced.lane);
        let lane = session.lanes.get_mut(index);
        let Some(lane) = lane.filter(|lane| lane.epoch == fenced.epoch) else {
            self.violation(conn, "a fence of no lane");
            return;
        };
        let asked = match &mut lane.state {
            LaneState::Fencing { asked, .. } if asked.len() == fenced.counted.len() => {
                std::mem::take(asked)
            }
            _ => {
                self.violation(conn, "a fence that was not asked for, or of other parts");
                return;
            }
        };
        let unacknowledged = asked.len();
        let counted: HashSet<_> = asked
            .into_iter()
            .zip(fenced.counted)
            .filter_map(|(part, counted)| counted.then_some(part))
            .collect();
        let replayed = unacknowledged.saturating_sub(counted.len());
        let mut arrived = Vec::new();
        let load = &mut lane.load;
        lane.queue.retain(|task| {
            let needed = task.part().is_none_or(|part| !counted.contains(&part));
            if !needed {
                *load -= task.bytes();
                arrived.push((task.owner(), task.bytes()));
            }
            needed
        });
        // When the attempt was due depends on the failure, which is past; what is left of the wait counts from now.
        let renew_at = lane.backoff.due(self.now);
        lane.state = LaneState::Down {
            renew_at: Some(renew_at),
        };
        for (owner, bytes) in arrived {
            let Owner::Push(id) = owner else { continue };
            let Some(push) = self.pushes.get_mut(&id) else {
                continue;
            };
            push.bytes += bytes;
            let action = push.machine.not_needed();
            self.push_action(id, action);
        }
        self.tell_replayed(conn, index, replayed);
        self.move_tasks(conn, index);
        if renew_at <= self.now {
            self.renew(conn, index);
        }
        self.watch_recovery(conn);
    }

    /// Offers the reader a new end for a lane that is down, if its rail can be used.
    pub(super) fn renew(&mut self, conn: ConnId, index: usize) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let Some(lane) = session.lanes.get_mut(index) else {
            return;
        };
        let LaneState::Down { renew_at } = &mut lane.state else {
            return;
        };
        let rail = &self.rails[lane.rail];
        if !rail.is_usable() || rail.down_since.is_some() {
            // Its port says when.
            *renew_at = None;
            return;
        }
        let (rail, home) = (lane.rail, lane.home);
        let made = self.create_lane(Role::Dialler, rail, home);
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let lane = &mut session.lanes[index];
        lane.backoff.attempt(self.now);
        let (new, address) = match (made, lane.epoch.checked_add(1)) {
            (Ok(made), Some(epoch)) => {
                lane.epoch = epoch;
                made
            }
            (made, _) => {
                if let Err(error) = made {
                    tracing::warn!(%error, lane = index, "a lane cannot be made again yet");
                }
                lane.state = LaneState::Down {
                    renew_at: Some(lane.backoff.failed(self.now)),
                };
                return;
            }
        };
        self.lanes.insert((rail, new.id), (conn, index));
        lane.replace(new);
        lane.state = LaneState::Renewing { since: self.now };
        let renew = LaneRenew {
            lane: index as u16,
            epoch: lane.epoch,
            rail: rail as u8,
            remote_rail: home,
            address,
        };
        self.renewals += 1;
        self.send(conn, &Message::LaneRenew(renew));
    }

    /// The reader has connected its new end.
    pub(in crate::endpoint::core) fn lane_renewed(&mut self, conn: ConnId, renewed: LaneRenewed) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let index = usize::from(renewed.lane);
        let peer = session.name();
        let host = session.peer.map(|peer| peer.ip());
        let lane = session.lanes.get_mut(index);
        let lane = match lane.filter(|lane| lane.epoch == renewed.epoch) {
            Some(lane) if matches!(lane.state, LaneState::Renewing { .. }) => lane,
            // It has failed here in the meantime; the reader will be told, or has been.
            Some(lane) if matches!(lane.state, LaneState::Fencing { .. }) => return,
            _ => {
                self.violation(conn, "a lane renewed that was not offered");
                return;
            }
        };
        lane.remote_rail = renewed.rail;
        lane.peer_receives = renewed.receives;
        lane.send = SendCredits::new(lane.config.send_depth, renewed.receives);
        let (rail, id) = (lane.rail, lane.id);
        let local = self.rails[rail].device.info().bits_per_second;
        lane.speed = slower(local, renewed.speed_bits);
        let Some(host) = host else { return };
        // Work that waits here may be of a pool that the reader's rail does not reach.
        let stranded = lane.queue.iter().any(|task| match task.owner() {
            Owner::Push(id) | Owner::Staged { push: id, .. } => {
                let push = self.pushes.get(&id);
                push.is_some_and(|push| push.rail_distance(rail, renewed.rail).is_none())
            }
            Owner::Access(_) => false,
        });
        if stranded {
            let error = PeerError::LaneLost {
                peer,
                lane: renewed.lane,
                detail: "it was made again on a rail that does not reach the pool".to_owned(),
            };
            self.lane_failed(conn, index, error);
            return;
        }
        let context = &mut self.rails[rail].context;
        if let Err(source) = context.connect_lane(id, &renewed.address, host, true) {
            let error = PeerError::Fabric {
                peer,
                source: source.into(),
            };
            self.lane_failed(conn, index, error);
            return;
        }
        tracing::info!(peer, lane = index, epoch = renewed.epoch, "lane renewed");
        lane.backoff.up(self.now);
        lane.state = LaneState::Up;
        session.down_since = None;
        self.tell_renewed(conn, index);
        self.move_all(conn);
        self.pump(conn, index);
    }

    /// The reader cannot make its end now.
    pub(in crate::endpoint::core) fn lane_refused(&mut self, conn: ConnId, refused: LaneRefused) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        let index = usize::from(refused.lane);
        let peer = session.name();
        let lane = session.lanes.get_mut(index);
        let lane = match lane.filter(|lane| lane.epoch == refused.epoch) {
            Some(lane) if matches!(lane.state, LaneState::Renewing { .. }) => lane,
            Some(lane) if matches!(lane.state, LaneState::Fencing { .. }) => return,
            _ => {
                self.violation(conn, "a refusal of a lane that was not offered");
                return;
            }
        };
        tracing::debug!(peer, lane = index, code = %refused.code, detail = refused.detail, "lane refused");
        let (rail, id, reserved) = (lane.rail, lane.id, lane.reserved);
        lane.state = LaneState::Down {
            renew_at: Some(lane.backoff.failed(self.now)),
        };
        // Nothing has gone through it; an error has been logged and the rail set aside.
        let _ = self.destroy_lane(rail, id, reserved);
        self.note_down(conn);
    }

    pub(super) fn peer_name(&self, conn: ConnId) -> String {
        let session = self.sessions.get(&conn);
        session.map(|session| session.name()).unwrap_or_default()
    }
}
