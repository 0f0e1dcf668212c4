//! How requests end.
//!
//! Invariant: each ends once for its client, with `Done` or `Failed`; its blocks come back then, or with the outcome of
//! its transfer.

use std::time::Instant;

use super::{
    Core, Farewell,
    job::{Job, Phase},
};
use crate::{
    request::{Event, RequestError},
    transfer::RequestNumber,
};

impl Core {
    /// Deadlines, and receivers that were closed.
    pub(super) fn expire(&mut self, now: Instant) {
        let over: Vec<_> = self
            .jobs
            .values()
            .filter(|job| job.phase != Phase::Closing)
            .filter_map(|job| {
                if job.is_deserted() {
                    Some((job.number, RequestError::Aborted))
                } else if job.deadline <= now {
                    let error = RequestError::Deadline {
                        after: now.saturating_duration_since(job.came),
                        phase: job.phase.doing(),
                    };
                    Some((job.number, error))
                } else {
                    None
                }
            })
            .collect();
        for (number, error) in over {
            self.fail(number, error);
        }
    }

    /// Ends a request with `error`, unless it has ended.
    pub(super) fn fail(&mut self, number: RequestNumber, error: RequestError) {
        let Some(job) = self.jobs.get(&number) else {
            return;
        };
        if job.phase == Phase::Closing {
            return;
        }
        tracing::debug!(job.id, %error, doing = job.phase.doing(), "failed");
        match error {
            RequestError::Aborted => self.stats.aborted += 1,
            _ => self.stats.failed += 1,
        }
        let (events, event) = (job.events.clone(), Event::Failed(error));
        self.farewells.push(Farewell { events, event });
        self.close(number);
    }

    /// Ends a request whose completions have all ended.
    pub(super) fn succeed(&mut self, number: RequestNumber) {
        if let Some(job) = self.jobs.get(&number) {
            self.stats.succeeded += 1;
            let (events, event) = (job.events.clone(), Event::Done(job.usage));
            self.farewells.push(Farewell { events, event });
            self.close(number);
        }
    }

    /// Nothing is computed any more; what a transfer does not need comes back.
    fn close(&mut self, number: RequestNumber) {
        self.waiting.retain(|&other| other != number);
        self.running.retain(|&other| other != number);
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        self.by_id.remove(&job.id);
        self.ended.push(job.id.clone());
        if !job.was_admitted {
            self.left_queue += 1;
        }
        let phase = std::mem::replace(&mut job.phase, Phase::Closing);
        let is_travelling = job.is_travelling;
        let unused = job.push().and_then(|push| push.ticket.take());
        if phase == Phase::Arriving {
            // What was found here is not written by the peer.
            self.release(number);
        }
        if let Some(transfers) = &mut self.transfers {
            if let Some(ticket) = unused {
                transfers.reject(&ticket);
            }
            if is_travelling {
                transfers.cancel(number);
            }
        }
        if !is_travelling {
            self.remove(number);
        }
    }

    fn release(&mut self, number: RequestNumber) {
        let job = self.jobs.get_mut(&number);
        for sequence in job.into_iter().flat_map(|job: &mut Job| &mut job.sequences) {
            self.pool.release_all(sequence.blocks.drain(..));
        }
    }

    /// Forgets a request that has ended, and its transfer too.
    pub(super) fn remove(&mut self, number: RequestNumber) {
        self.release(number);
        if let Some(job) = self.jobs.remove(&number) {
            debug_assert!(job.granted.is_empty(), "granted blocks end with an outcome");
        }
    }
}
