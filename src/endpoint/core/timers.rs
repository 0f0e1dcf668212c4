//! What must be looked at when. Timers are never cancelled: one that comes too early finds nothing to do.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::Core;
use crate::{endpoint::control::ConnId, protocol::Time};

/// What to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Push(u64),
    Arrival(u32),
    Access(u64),
    Connect(ConnId),
    /// The lanes of a session.
    Recovery(ConnId),
    /// The port of a rail.
    Rail(usize),
    Hello(ConnId),
    Alive(ConnId),
    Drain,
}

/// The timers of a core.
#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Time, Timer)>>);

impl Timers {
    pub(super) fn at(&mut self, time: Option<Time>, timer: Timer) {
        if let Some(time) = time.filter(|time| time.0 < u64::MAX) {
            self.0.push(Reverse((time, timer)));
        }
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.0.peek().map(|Reverse((time, _))| *time)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn due(&mut self, now: Time) -> Option<Timer> {
        self.next().filter(|&time| time <= now)?;
        self.0.pop().map(|Reverse((_, timer))| timer)
    }
}

impl Core {
    /// Runs what is due. Returns whether anything was.
    pub(super) fn run_timers(&mut self) -> bool {
        let mut active = false;
        while let Some(timer) = self.timers.due(self.now) {
            active = true;
            match timer {
                Timer::Push(id) => self.push_timer(id),
                Timer::Arrival(slot) => self.arrival_timer(slot),
                Timer::Access(id) => self.access_timer(id),
                Timer::Connect(conn) => self.connect_timer(conn),
                Timer::Recovery(conn) => self.recovery_timer(conn),
                Timer::Rail(rail) => self.rail_timer(rail),
                Timer::Hello(conn) => self.hello_timer(conn),
                Timer::Alive(conn) => self.alive_timer(conn),
                Timer::Drain => self.drain_timer(),
            }
            self.end_failing();
        }
        active
    }
}
