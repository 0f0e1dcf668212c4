//! Pushes and reservations: what the core asks of [`Transfers`], and what comes of it.
//!
//! Invariant: whatever ends a push or reservation, its blocks come back exactly once, by its outcome; or they are lost
//! if the outcome does not vouch for them.

use std::time::Instant;

use super::{
    Core,
    admitting::time_left,
    job::{Job, Phase, Role},
};
use crate::{
    engine::tail::Tail,
    request::{OnFailure, RequestError},
    transfer::{Outcome, RequestNumber, Ticket, TransferError},
};

/// The prefill side.
impl Core {
    pub(super) fn has_ticket(&mut self, number: RequestNumber) -> bool {
        let job = self.jobs.get_mut(&number);
        job.and_then(Job::push)
            .is_some_and(|push| push.ticket.is_some())
    }

    /// Opens the push that the job has a ticket for. Otherwise the job has failed.
    pub(super) fn open_push(&mut self, number: RequestNumber, now: Instant) -> bool {
        let timeout = self.config.transfer_timeout;
        let (Some(job), Some(transfers)) = (self.jobs.get_mut(&number), &mut self.transfers) else {
            return false;
        };
        let deadline = time_left(job, now).min(timeout);
        let prompt = job.sequences.first().map(|s| &s.tokens[..job.prompt]);
        let digest = self.hashing.prompt(prompt.unwrap_or_default());
        let tokens = job.prompt;
        let Some(ticket) = job.push().and_then(|push| push.ticket.take()) else {
            return false;
        };
        match transfers.open(number, &ticket, tokens, digest, deadline) {
            Ok(held) => {
                self.stats.pushes += 1;
                job.is_travelling = true;
                let blocks = tokens.div_ceil(self.model.block_tokens());
                if let Some(push) = job.push() {
                    push.held = held.min(blocks);
                    push.sent = push.held;
                }
                true
            }
            Err(error) => {
                self.stats.pushes_failed += 1;
                self.fail(number, error.into());
                false
            }
        }
    }

    /// Hands over all layers of the blocks that are whole already: found in the prefix cache, or computed before the
    /// ticket came.
    pub(super) fn catch_up(&mut self, number: RequestNumber) {
        let (block_tokens, layers) = (self.block_tokens(), self.model.config().layers);
        let (Some(job), Some(transfers)) = (self.jobs.get_mut(&number), &mut self.transfers) else {
            return;
        };
        let Some(sequence) = job.sequences.first() else {
            return;
        };
        let Some(positions) = job.unsent(sequence.computed, block_tokens) else {
            return;
        };
        if positions.is_empty() {
            return;
        }
        let blocks = &sequence.blocks[positions.clone()];
        let result =
            (0..layers).try_for_each(|l| transfers.layer(number, l, positions.clone(), blocks));
        if let Some(push) = job.push() {
            push.sent = positions.end;
        }
        if let Err(error) = result {
            self.fail(number, error.into());
        }
    }

    /// Everything has been handed over.
    pub(super) fn finish_push(&mut self, number: RequestNumber) {
        let (Some(job), Some(transfers)) = (self.jobs.get_mut(&number), &mut self.transfers) else {
            return;
        };
        job.phase = Phase::Pushing;
        if let Err(error) = transfers.finish(number, &Self::tail(job)) {
            self.fail(number, error.into());
        }
    }

    /// The ticket for a prefill leg whose blocks are held, or will be.
    pub(super) fn push_held(&mut self, id: &str, ticket: Ticket, now: Instant) {
        let number = self.by_id.get(id).copied();
        let job = number.and_then(|number| self.jobs.get_mut(&number));
        let Some(push) = job.and_then(Job::push) else {
            // It has ended since the handle looked.
            return self.reject(&ticket);
        };
        push.ticket = Some(ticket);
        let Some(number) = number else { return };
        let phase = self.jobs.get(&number).map(|job| job.phase);
        if !matches!(phase, Some(Phase::Running | Phase::Holding)) {
            return;
        }
        if self.open_push(number, now) {
            self.catch_up(number);
            if phase == self.jobs.get(&number).map(|job| job.phase) && phase == Some(Phase::Holding)
            {
                self.finish_push(number);
            }
        }
    }

    /// Nothing will come for this ticket.
    pub(super) fn reject(&mut self, ticket: &Ticket) {
        if let Some(transfers) = &mut self.transfers {
            transfers.reject(ticket);
        }
    }
}

/// Outcomes.
impl Core {
    pub(super) fn poll_transfers(&mut self) {
        let Some(transfers) = &mut self.transfers else {
            return;
        };
        let mut outcomes = Vec::new();
        transfers.poll(&mut outcomes);
        for outcome in outcomes {
            self.ended(outcome);
        }
    }

    fn ended(&mut self, outcome: Outcome) {
        let (Outcome::Arrived { request, .. }
        | Outcome::NotArrived { request, .. }
        | Outcome::Pushed { request, .. }
        | Outcome::NotPushed { request, .. }) = outcome;
        let Some(job) = self.jobs.get_mut(&request) else {
            tracing::error!(request, "a transfer has ended that nobody knows");
            return;
        };
        if !std::mem::replace(&mut job.is_travelling, false) {
            tracing::error!(job.id, "a transfer has ended that was not under way");
            return;
        }
        match outcome {
            Outcome::Arrived {
                request,
                tail,
                bytes,
            } => {
                self.stats.bytes_arrived += bytes;
                self.arrived(request, &tail);
            }
            Outcome::NotArrived {
                request,
                error,
                is_fenced,
            } => {
                self.stats.reservations_failed += 1;
                for block in job.granted.drain(..) {
                    if is_fenced {
                        self.pool.fenced(block);
                    } else {
                        self.pool.lose_granted(block);
                    }
                }
                if job.phase == Phase::Closing {
                    self.remove(request);
                } else {
                    self.not_arrived(request, error);
                }
            }
            Outcome::Pushed { request, bytes } => {
                self.stats.bytes_pushed += bytes;
                match job.phase {
                    Phase::Closing => self.remove(request),
                    Phase::Pushing => {
                        if job.push().is_some_and(|push| !push.is_held) {
                            job.tell_handed();
                        }
                        self.succeed(request);
                    }
                    phase => {
                        let what = format!("a push has ended while {}", phase.doing());
                        self.fail(request, RequestError::Internal(what));
                    }
                }
            }
            Outcome::NotPushed {
                request,
                error,
                is_fenced,
            } => {
                self.stats.pushes_failed += 1;
                if !is_fenced {
                    self.lose_source(request);
                }
                let job = self.jobs.get(&request);
                if job.is_some_and(|job| job.phase == Phase::Closing) {
                    self.remove(request);
                } else {
                    self.fail(request, error.into());
                }
            }
        }
    }

    /// Blocks that were handed over may still be read.
    fn lose_source(&mut self, number: RequestNumber) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let sent = job.push().map_or(0..0, |push| push.held..push.sent);
        if let Some(sequence) = job.sequences.first_mut() {
            let sent = sent.start.min(sequence.blocks.len())..sent.end.min(sequence.blocks.len());
            for block in sequence.blocks.drain(sent) {
                self.pool.lose_used(block);
            }
        }
    }

    fn arrived(&mut self, number: RequestNumber, tail: &[u8]) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        if job.phase != Phase::Arriving {
            job.granted.drain(..).for_each(|b| self.pool.fenced(b));
            return self.remove(number);
        }
        let tail = match Tail::decode(tail) {
            Ok(tail) if tail.is_for(job, self.model.config().vocab) => tail,
            other => {
                let what = other.err().map_or_else(
                    || "the tail is of another request".to_owned(),
                    |error| error.to_string(),
                );
                job.granted.drain(..).for_each(|b| self.pool.fenced(b));
                self.stats.reservations_failed += 1;
                let error = TransferError {
                    message: what,
                    is_retryable: false,
                };
                return self.not_arrived(number, error);
            }
        };
        let Some(sequence) = job.sequences.first_mut() else {
            return;
        };
        let pushed = job.prompt - sequence.computed;
        for block in job.granted.drain(..) {
            self.pool.arrived(block);
            sequence.blocks.push(block);
        }
        sequence.computed = job.prompt;
        job.usage.pushed_tokens = pushed;
        job.sampler.seed = tail.seed;
        self.stats.pushed_tokens += pushed as u64;
        self.publish(number, 0);
        self.run(number);
        self.begin(number, tail.firsts);
    }

    /// The pages do not come, and nothing is granted any more.
    pub(super) fn not_arrived(&mut self, number: RequestNumber, error: TransferError) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let policy = match job.role {
            Role::Decode { on_failure, .. } => on_failure,
            _ => OnFailure::Fail,
        };
        match policy {
            OnFailure::Fail => self.fail(number, error.into()),
            OnFailure::Recompute => {
                tracing::warn!(job.id, %error, "pages have not arrived; computing the prompt here");
                job.role = Role::Recompute;
                job.is_counted = false;
                for sequence in &mut job.sequences {
                    self.pool.release_all(sequence.blocks.drain(..));
                    sequence.computed = 0;
                    sequence.published = 0;
                }
                self.queue(number);
            }
        }
    }
}

impl Tail {
    /// Whether it has what this request needs. It comes from a peer.
    fn is_for(&self, job: &Job, vocab: usize) -> bool {
        self.firsts.len() == job.params.n
            && self.firsts.iter().all(|first| {
                let alternatives = first.top.iter().map(|(token, _)| *token);
                std::iter::once(first.id)
                    .chain(alternatives)
                    .all(|token| (token as usize) < vocab)
            })
    }
}
