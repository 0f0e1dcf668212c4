//! A core that goes away: what may begin, what may go on, and when it is over. See [`crate::endpoint::drain`].

use std::sync::{Arc, atomic::Ordering};

use super::{Core, reader::ArrivalEntry, timers::Timer, writer::PushEntry};
use crate::{
    endpoint::{
        ArrivalError, DrainCount, DrainReport, PeerError, PushError,
        drain::DrainEntry,
        shared::{EndpointShared, PushPhase},
    },
    protocol::Time,
};

/// A drain that is not over.
pub(super) struct Draining {
    endpoint: Arc<EndpointShared>,
    begun: Time,
    until: Time,
    /// The time is over: what ends now is cut.
    cutting: bool,
    report: DrainReport,
}

impl Drop for Draining {
    fn drop(&mut self) {
        // If the core goes before it is over, nobody waits for ever.
        self.endpoint.drain.finish(self.report);
    }
}

impl Core {
    /// Whether nothing new may begin.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    pub(super) fn drain(&mut self, entry: DrainEntry) {
        let timeout = entry.timeout;
        let until = self.now + timeout;
        let Some(endpoint) = entry.take() else { return };
        self.timers.at(Some(until), Timer::Drain);
        if let Some(draining) = &mut self.draining {
            draining.until = draining.until.min(until);
            return;
        }
        tracing::info!(
            ?timeout,
            pushes = self.pushes.len(),
            arrivals = self.arrivals.len(),
            sessions = self.sessions.len(),
            "draining"
        );
        self.tell_drain(timeout);
        self.draining = Some(Draining {
            endpoint,
            begun: self.now,
            until,
            cutting: false,
            report: DrainReport::default(),
        });
        let unopened = self.arrivals.iter();
        let unopened: Vec<u32> = unopened
            .filter(|(_, arrival)| arrival.is_granted())
            .map(|(&slot, _)| slot)
            .collect();
        for slot in unopened {
            self.refuse_arrival(slot);
        }
    }

    /// A grant that nobody can open any more.
    fn refuse_arrival(&mut self, slot: u32) {
        if let Some(draining) = &mut self.draining {
            draining.report.unopened += 1;
        }
        self.fail_arrival(slot, ArrivalError::Peer(PeerError::Draining));
    }

    /// A grant that was issued in the moment the drain began.
    pub(super) fn late_grant(&mut self, entry: ArrivalEntry) {
        let slot = entry.grant.id().slot;
        self.add_grant(entry);
        self.refuse_arrival(slot);
    }

    /// A push that was begun in the moment the drain did.
    pub(super) fn late_push(push: &PushEntry) {
        let refused = PushPhase::Ended(Err(PushError::Peer(PeerError::Draining)));
        push.shared.signal.update(|phase| *phase = refused);
    }

    /// A push has ended.
    pub(super) fn count_push(&mut self, completed: bool) {
        if let Some(draining) = &mut self.draining {
            count(&mut draining.report.pushes, completed, draining.cutting);
        }
    }

    /// An arrival has ended that a writer had opened.
    pub(super) fn count_arrival(&mut self, completed: bool) {
        if let Some(draining) = &mut self.draining {
            count(&mut draining.report.arrivals, completed, draining.cutting);
        }
    }

    pub(super) fn drain_timer(&mut self) {
        let now = self.now;
        if self
            .draining
            .as_ref()
            .is_some_and(|draining| draining.until <= now)
        {
            self.end_drain();
        }
    }

    /// Ends the drain if nothing runs any more. Looked at after each step.
    pub(super) fn settle_drain(&mut self) {
        if self.is_draining()
            && self.pushes.is_empty()
            && self.arrivals.is_empty()
            && self.accesses.is_empty()
        {
            self.end_drain();
        }
    }

    /// Nothing runs any more, or the time is over: shuts down, and says so.
    fn end_drain(&mut self) {
        self.shutdown();
    }

    /// The endpoint is being shut down: what still runs is cut.
    pub(super) fn begin_cut(&mut self) {
        if let Some(draining) = &mut self.draining {
            draining.cutting = true;
            draining.report.accesses_cut = self.accesses.len() as u64;
        }
    }

    /// The endpoint is shut down: so is its drain.
    pub(super) fn close_drain(&mut self) {
        let Some(mut draining) = self.draining.take() else {
            return;
        };
        draining.report.elapsed = self.now - draining.begun;
        let report = draining.report;
        tracing::info!(
            elapsed = ?report.elapsed,
            pushes_completed = report.pushes.completed,
            pushes_cut = report.pushes.cut,
            arrivals_completed = report.arrivals.completed,
            arrivals_cut = report.arrivals.cut,
            unopened = report.unopened,
            "drained"
        );
        // The driver sees it after this step, and ends. Dropping `draining` tells whoever waits.
        draining.endpoint.closed.store(true, Ordering::Release);
    }
}

fn count(of: &mut DrainCount, completed: bool, cutting: bool) {
    *match (completed, cutting) {
        (true, _) => &mut of.completed,
        (false, false) => &mut of.ended,
        (false, true) => &mut of.cut,
    } += 1;
}
