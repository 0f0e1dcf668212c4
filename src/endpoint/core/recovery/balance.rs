//! Which lane gets which work.
//!
//! A block goes where it is expected to be done first: behind what waits for the lane's rail, at the speed of the slower
//! end. So rails of different speed get their shares, and one whose lanes are gone gets nothing.
//!
//! Invariant: work that a working lane could do does not wait on one that is down on both sides. What none can do stays
//! where it is, so that the tasks of a part stay in order.

use std::collections::HashSet;

use super::super::{
    Core, Rail,
    pump::Task,
    session::{Lane, LaneState, Session},
};
use crate::{endpoint::control::ConnId, protocol::Time};

/// Rails that a message can name, and some more than an endpoint has.
const RAILS: usize = 32;

impl Session {
    /// The lane for `bytes` more. Those that have a `distance` to the memory come first, then those that work, then
    /// those that do not keep failing, then the nearest.
    pub(in crate::endpoint::core) fn choose(
        &mut self,
        rails: &[Rail],
        now: Time,
        bytes: u64,
        distance: impl Fn(&Lane) -> Option<u16>,
    ) -> u16 {
        let count = self.lanes.len().max(1);
        let start = self.next_lane % count;
        self.next_lane = start + 1;
        let mut waiting = [0u64; RAILS];
        for lane in &self.lanes {
            waiting[lane.rail % RAILS] += lane.load;
        }
        let known = self.lanes.iter().all(|lane| lane.speed > 0);
        let rank = |lane: &Lane| {
            let distance = distance(lane);
            let class = match lane.works(rails) {
                _ if distance.is_none() => 3,
                true => u8::from(lane.backoff.suspect_until() > now),
                false => 2,
            };
            let ahead = u128::from(waiting[lane.rail % RAILS]) + u128::from(bytes);
            let speed = if known { lane.speed } else { 1 };
            // In units small enough to tell single bytes at 2^40 bit/s apart.
            let time = (ahead << 44) / u128::from(speed);
            (class, distance, time, lane.load)
        };
        (0..self.lanes.len())
            .map(|step| (start + step) % count)
            .min_by_key(|&lane| rank(&self.lanes[lane]))
            .unwrap_or(0) as u16
    }

    /// Whether more work of a part whose lane is `index` goes there too.
    pub(in crate::endpoint::core) fn keeps(&self, rails: &[Rail], index: u16) -> bool {
        let lane = self.lanes.get(usize::from(index));
        lane.is_some_and(|lane| match lane.state {
            // Nothing of the part can be on its way, and what waits has been moved.
            LaneState::Down { .. } | LaneState::Renewing { .. } => {
                !lane.queue.is_empty() || !self.has_working_lane(rails)
            }
            _ => true,
        })
    }

    /// Whether any work can be posted.
    pub(in crate::endpoint::core) fn has_working_lane(&self, rails: &[Rail]) -> bool {
        self.lanes.iter().any(|lane| lane.works(rails))
    }
}

impl Core {
    /// Moves what waits on lanes that do not work to those that do.
    pub(super) fn move_all(&mut self, conn: ConnId) {
        let lanes = self.sessions.get(&conn).map_or(0, |s| s.lanes.len());
        for index in 0..lanes {
            self.move_tasks(conn, index);
        }
    }

    /// Moves what waits on lane `from`, if that does not work, to lanes that do. What belongs to parts that are on their
    /// way through it stays.
    pub(super) fn move_tasks(&mut self, conn: ConnId, from: usize) {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return;
        };
        if !session.has_working_lane(&self.rails) {
            return;
        }
        let Some(lane) = session.lanes.get_mut(from) else {
            return;
        };
        let stays = lane.works(&self.rails) || matches!(lane.state, LaneState::Fencing { .. });
        if stays || lane.queue.is_empty() {
            return;
        }
        let key = |task: &Task| (task.owner(), task.part());
        let bound: HashSet<_> = lane.replay.iter().map(key).collect();
        let tasks = std::mem::take(&mut lane.queue);
        let mut touched = 0u64;
        for task in tasks {
            if bound.contains(&key(&task)) {
                session.lanes[from].queue.push_back(task);
                continue;
            }
            session.lanes[from].load -= task.bytes();
            let (now, rails, bytes) = (self.now, &self.rails, task.bytes());
            let lane = match task.part() {
                None => session.choose(rails, now, bytes, |_| Some(0)),
                Some((push, part)) => {
                    let push = self.pushes.get_mut(&push);
                    let Some(push) = push.filter(|push| push.machine.may_post()) else {
                        continue;
                    };
                    let part = part as usize;
                    let moved = push.lane_of.get(part).copied().flatten();
                    // An earlier task of the part may have been moved already.
                    let moved = moved.filter(|&lane| usize::from(lane) != from);
                    let lane = moved.unwrap_or_else(|| {
                        let distance = |lane: &Lane| push.distance(lane);
                        let lane = session.choose(rails, now, bytes, distance);
                        let works = session.lanes[usize::from(lane)].works(rails);
                        // Those that work may all be far from this push's memory.
                        if works { lane } else { from as u16 }
                    });
                    if let Some(place) = push.lane_of.get_mut(part) {
                        *place = Some(lane);
                    }
                    lane
                }
            };
            session.lanes[usize::from(lane)].enqueue(task);
            touched |= 1 << (lane % 64);
        }
        for lane in 0..session.lanes.len() {
            if touched & (1 << (lane % 64)) != 0 {
                self.pump(conn, lane);
            }
        }
    }
}
