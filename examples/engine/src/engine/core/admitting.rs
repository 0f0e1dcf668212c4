//! From the queue into the steps, first come first served: the first waits until there are blocks for all it has.

use std::time::Instant;

use super::{
    Core, Duration,
    job::{Job, Phase, Role},
};
use crate::{
    request::{Event, RequestError},
    transfer::{RequestNumber, Reserve},
};

/// What came of it.
#[derive(PartialEq, Eq)]
pub(super) enum Admission {
    /// It computes from now on.
    Running,
    /// It has left the queue for something else: it waits for pages, or has failed.
    Elsewhere,
    /// Not now.
    NoRoom,
}

/// What the prefix cache has for a job, and what it lacks.
#[derive(Default)]
struct Needs {
    /// Blocks found for the first sequence that goes on. Others share its prompt later.
    hits: usize,
    /// Blocks that would be taken out of those available.
    blocks: usize,
}

impl Core {
    pub(super) fn admit(&mut self, number: RequestNumber, now: Instant) -> Admission {
        let needs = self.needs(number);
        let counts = self.pool.counts();
        if needs.blocks > counts.total - counts.lost {
            // It would have fitted when it came.
            let error = RequestError::Busy {
                what: "too many blocks have been lost",
                retry_after: self.config.transfer_timeout,
            };
            self.fail(number, error);
            return Admission::Elsewhere;
        }
        // Each sequence that runs may soon need a block: what is taken now would be taken back then.
        let running: usize = self.running.iter().map(|n| self.width(*n)).sum();
        let width = self.width(number);
        let arriving = self.jobs.values().filter(|j| j.phase == Phase::Arriving);
        let active = running + arriving.map(Job::width).sum::<usize>();
        if needs.blocks + running > counts.available()
            || active > 0 && active + width > self.config.max_running
        {
            return Admission::NoRoom;
        }
        self.waiting.retain(|&other| other != number);
        self.note_admission(number, now);
        let is_decode = self
            .jobs
            .get(&number)
            .is_some_and(|job| matches!(job.role, Role::Decode { .. }) && !job.has_begun());
        if is_decode {
            self.reserve(number, &needs, now);
            return Admission::Elsewhere;
        }
        if self.has_ticket(number) && !self.open_push(number, now) {
            return Admission::Elsewhere;
        }
        self.take_blocks(number, &needs);
        self.run(number);
        self.catch_up(number);
        if self.jobs.get(&number).map(|job| job.phase) == Some(Phase::Running) {
            Admission::Running
        } else {
            Admission::Elsewhere
        }
    }

    pub(super) fn width(&self, number: RequestNumber) -> usize {
        self.jobs.get(&number).map_or(0, Job::width)
    }

    fn needs(&mut self, number: RequestNumber) -> Needs {
        let block_tokens = self.block_tokens();
        let mut needs = Needs::default();
        let Some(job) = self.jobs.get_mut(&number) else {
            return needs;
        };
        let may_hit = self.config.prefix_cache && job.prompt_logprobs.is_none();
        let (leader, shared) = (job.leader(), job.prompt / block_tokens);
        for (index, sequence) in job.sequences.iter_mut().enumerate() {
            let blocks = sequence.tokens.len().div_ceil(block_tokens);
            if sequence.is_finished {
                continue;
            }
            if index != leader {
                needs.blocks += blocks - shared;
                continue;
            }
            let mut cached = 0;
            if may_hit {
                self.hashing
                    .extend(&job.root, &sequence.tokens, &mut sequence.names);
                // The last token is computed in any case: its logits are needed.
                let most = (sequence.tokens.len() - 1) / block_tokens;
                (needs.hits, cached) = self.pool.peek(&sequence.names[..most]);
            }
            needs.blocks += blocks - needs.hits + cached;
        }
        needs
    }

    /// Shares what was found. A prefill leg takes all other blocks too, because it cannot be preempted.
    fn take_blocks(&mut self, number: RequestNumber, needs: &Needs) {
        let block_tokens = self.block_tokens();
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let (is_fixed, leader) = (!job.is_preemptible(), job.leader());
        let Some(sequence) = job.sequences.get_mut(leader) else {
            return;
        };
        let found = sequence.names[..needs.hits].iter();
        sequence.blocks = found.map_while(|name| self.pool.find(name)).collect();
        sequence.published = sequence.blocks.len();
        sequence.computed = sequence.blocks.len() * block_tokens;
        let found = sequence.computed;
        while is_fixed && sequence.blocks.len() * block_tokens < sequence.tokens.len() {
            // There are enough: that was seen before.
            let Some(block) = self.pool.allocate() else {
                break;
            };
            sequence.blocks.push(block);
        }
        let found_of_prompt = found.min(job.prompt);
        if std::mem::replace(&mut job.is_counted, true) {
            // It was preempted.
        } else if matches!(job.role, Role::Recompute) {
            job.usage.cached_tokens = found_of_prompt;
            job.usage.recomputed_tokens = job.prompt - found_of_prompt;
            self.stats.recomputed_tokens += job.usage.recomputed_tokens as u64;
        } else {
            self.stats.prompt_tokens += job.prompt as u64;
            job.usage.prompt_tokens = job.prompt;
            job.usage.cached_tokens = found_of_prompt;
            self.stats.cached_tokens += found_of_prompt as u64;
        }
    }

    /// A decode leg: what was found is locked, the rest is granted.
    fn reserve(&mut self, number: RequestNumber, needs: &Needs, now: Instant) {
        self.take_blocks(number, needs);
        let (block_tokens, timeout) = (self.block_tokens(), self.config.transfer_timeout);
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let Role::Decode { prefill_tp, .. } = job.role else {
            return;
        };
        let (Some(transfers), Some(sequence)) = (&mut self.transfers, job.sequences.first()) else {
            return;
        };
        let held = sequence.blocks.len();
        let count = job.prompt.div_ceil(block_tokens) - held;
        let Some(granted) = self.pool.grant(count) else {
            // There are enough: that was seen before.
            return self.fail(number, RequestError::Internal("no blocks".to_owned()));
        };
        let blocks: Vec<_> = sequence.blocks.iter().chain(&granted).copied().collect();
        let result = transfers.reserve(&Reserve {
            request: number,
            id: &job.id,
            blocks: &blocks,
            held,
            tokens: job.prompt,
            digest: self.hashing.prompt(&sequence.tokens[..job.prompt]),
            prefill_tp,
            deadline: time_left(job, now).min(timeout),
        });
        job.granted = granted;
        match result {
            Ok(ticket) => {
                self.stats.reservations += 1;
                job.is_travelling = true;
                job.phase = Phase::Arriving;
                job.tell(Event::Reserved { ticket: ticket.0 });
            }
            Err(error) => {
                job.granted.drain(..).for_each(|b| self.pool.fenced(b));
                self.not_arrived(number, error);
            }
        }
    }

    fn note_admission(&mut self, number: RequestNumber, now: Instant) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        if std::mem::replace(&mut job.was_admitted, true) {
            return;
        }
        self.left_queue += 1;
        let since = self.last_admission.unwrap_or(job.came).max(job.came);
        let waited = now.saturating_duration_since(since);
        self.pace = (self.pace * 7 + waited) / 8;
        self.last_admission = Some(now);
    }
}

impl Job {
    /// Whether a decode leg's pages have come before: it was preempted since.
    fn has_begun(&self) -> bool {
        self.sequences.iter().any(|s| s.history.count() > 0)
    }
}

pub(super) fn time_left(job: &Job, now: Instant) -> Duration {
    job.deadline.saturating_duration_since(now)
}
