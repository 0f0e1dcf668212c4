//! What the engine thread does, without the thread: time is an argument, and nothing blocks but the model.
//!
//! A step: outcomes of transfers, deadlines and receivers that were closed, then the schedule, the model, the tokens.
//!
//! Invariants: a block that a peer may write is used by nobody, and a block that a peer may read is not given back,
//! before the transfer's outcome says so. A decode leg computes nothing before all its pages are there. The tokens of a
//! request do not depend on what else is under way, as far as the model's logits do not.

mod admitting;
mod computing;
mod ending;
mod generating;
mod job;
mod scheduling;
#[cfg(test)]
mod tests;
mod travelling;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use self::job::{Job, Phase, Push, Role, Sequence};
use super::{
    Config, Stats,
    blocks::Pool,
    handle::Command,
    hashing::Hashing,
    sampling::{Sampler, fresh_seed},
};
use crate::{
    model::Model,
    request::{Event, Leg, Request, RequestError},
    transfer::{RequestNumber, Ticket, Transfers},
};

/// Receivers that are closed are looked for that often while nothing is computed.
const IDLE_POLL: Duration = Duration::from_millis(20);

/// See the module.
pub(super) struct Core {
    config: Config,
    model: Box<dyn Model>,
    transfers: Option<Box<dyn Transfers>>,
    pool: Pool,
    hashing: Hashing,
    jobs: BTreeMap<RequestNumber, Job>,
    /// Those whose client still waits.
    by_id: HashMap<String, RequestNumber>,
    /// By number, except that nobody goes back behind later ones.
    waiting: VecDeque<RequestNumber>,
    /// By number.
    running: Vec<RequestNumber>,
    next: RequestNumber,
    stats: Stats,
    /// How long the first of the queue waits before it is admitted, on average.
    pace: Duration,
    last_admission: Option<Instant>,
    /// For the handles, since they were last told.
    left_queue: usize,
    ended: Vec<String>,
    farewells: Vec<Farewell>,
}

/// The last event of a request. It is sent when handles know that the request has ended, so that who hears it may use
/// the request's id again.
pub(super) struct Farewell {
    events: mpsc::UnboundedSender<Event>,
    event: Event,
}

impl Farewell {
    pub(super) fn send(self) {
        // Nobody may listen any more.
        let _ = self.events.send(self.event);
    }
}

/// What handles are to know after a step.
pub(super) struct News {
    pub(super) changes: Vec<super::KvChange>,
    pub(super) stats: Stats,
    pub(super) left_queue: usize,
    pub(super) ended: Vec<String>,
    pub(super) farewells: Vec<Farewell>,
    /// Transfers of requests that have ended.
    pub(super) closing: usize,
    pub(super) retry_after: Duration,
}

impl Core {
    pub(super) fn new(
        model: Box<dyn Model>,
        transfers: Option<Box<dyn Transfers>>,
        config: Config,
    ) -> Self {
        let block_tokens = model.block_tokens();
        Self {
            pool: Pool::new(model.blocks(), block_tokens),
            hashing: Hashing::new(model.config().digest, &config.cache_salt, block_tokens),
            config,
            model,
            transfers,
            jobs: BTreeMap::new(),
            by_id: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            next: 1,
            stats: Stats::default(),
            pace: Duration::from_secs(1),
            last_admission: None,
            left_queue: 0,
            ended: Vec::new(),
            farewells: Vec::new(),
        }
    }

    /// Does what a handle asks for.
    pub(super) fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Submit(request) => self.submit(*request, now),
            Command::PushHeld { id, ticket } => self.push_held(&id, Ticket(ticket), now),
            Command::Reject { ticket } => self.reject(&Ticket(ticket)),
            Command::Abort { id } => {
                if let Some(&number) = self.by_id.get(&id) {
                    self.fail(number, RequestError::Aborted);
                }
            }
            Command::Finish { id, index } => {
                if let Some(&number) = self.by_id.get(&id) {
                    self.stop_completion(number, index);
                }
            }
            Command::ClearPrefixCache => self.pool.clear(),
        }
    }

    fn submit(&mut self, request: Request, now: Instant) {
        let number = self.next;
        self.next += 1;
        self.stats.requests += 1;
        let push = |ticket, is_held| {
            Role::Prefill(Push {
                ticket,
                is_held,
                held: 0,
                sent: 0,
                firsts: Vec::new(),
            })
        };
        let role = match request.leg {
            Leg::Both => Role::Both,
            Leg::Prefill { ticket } => push(Some(Ticket(ticket)), false),
            Leg::PrefillHeld => push(None, true),
            Leg::Decode {
                prefill_tp,
                on_failure,
            } => Role::Decode {
                prefill_tp,
                on_failure,
            },
        };
        let wants_prompt =
            request.sampling.prompt_logprobs.is_some() && !matches!(role, Role::Decode { .. });
        let eos = &self.model.config().eos;
        let job = Job {
            number,
            id: request.id.clone(),
            came: now,
            deadline: request.deadline,
            events: request.events,
            sampler: Sampler::new(request.sampling.clone(), eos, fresh_seed()),
            params: request.sampling,
            role,
            phase: Phase::Waiting,
            prompt: request.prompt.len(),
            root: self.hashing.root(request.cache_salt.as_deref()),
            sequences: vec![Sequence::new(request.prompt)],
            granted: Vec::new(),
            is_travelling: false,
            usage: crate::request::Usage::default(),
            was_admitted: false,
            is_counted: false,
            prompt_logprobs: wants_prompt.then(Vec::new),
        };
        tracing::debug!(id = job.id, number, prompt = job.prompt, "request");
        self.by_id.insert(request.id, number);
        self.jobs.insert(number, job);
        self.waiting.push_back(number);
    }

    /// One step. Says whether there may be more to do at once.
    pub(super) fn step(&mut self, now: Instant) -> bool {
        self.poll_transfers();
        self.expire(now);
        let before = (self.waiting.len(), self.jobs.len(), self.stats.preemptions);
        let rows = self.schedule(now);
        if rows.is_empty() {
            return before != (self.waiting.len(), self.jobs.len(), self.stats.preemptions);
        }
        self.compute(&rows);
        self.stats.steps += 1;
        true
    }

    /// When to look again if nothing happens before.
    pub(super) fn next_wake(&self, now: Instant) -> Option<Instant> {
        let deadlines = self.jobs.values().filter(|job| job.phase != Phase::Closing);
        let next = deadlines.map(|job| job.deadline).min()?;
        Some(next.min(now + IDLE_POLL))
    }

    /// Ends everything.
    pub(super) fn shut_down(&mut self) {
        for number in self.jobs.keys().copied().collect::<Vec<_>>() {
            self.fail(number, RequestError::Draining);
        }
    }

    /// Ends everything for its clients only: the rest can no longer be relied on.
    pub(super) fn abandon(&mut self) -> Vec<Farewell> {
        let jobs = self.jobs.values();
        let left = jobs
            .filter(|job| job.phase != Phase::Closing)
            .map(|job| Farewell {
                events: job.events.clone(),
                event: Event::Failed(RequestError::Internal("the engine has failed".to_owned())),
            });
        std::mem::take(&mut self.farewells)
            .into_iter()
            .chain(left)
            .collect()
    }

    /// Whether nothing is under way, not even a transfer of a request that has ended.
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// What has changed since the last call.
    pub(super) fn news(&mut self) -> News {
        let closing = self
            .jobs
            .values()
            .filter(|job| job.phase == Phase::Closing)
            .count();
        let width = |number| self.jobs.get(number).map_or(0, Job::width);
        let stats = Stats {
            running: self.running.iter().map(width).sum(),
            waiting: self.waiting.len(),
            parked: self.jobs.len() - self.waiting.len() - self.running.len(),
            blocks: self.pool.counts(),
            blocks_evicted: self.pool.evicted(),
            ..self.stats
        };
        News {
            changes: self.pool.take_changes(),
            stats,
            left_queue: std::mem::take(&mut self.left_queue),
            ended: std::mem::take(&mut self.ended),
            farewells: std::mem::take(&mut self.farewells),
            closing,
            retry_after: self
                .pace
                .clamp(Duration::from_millis(100), Duration::from_secs(60)),
        }
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    /// Back into the steps, at its place.
    fn run(&mut self, number: RequestNumber) {
        let place = self.running.partition_point(|&other| other < number);
        self.running.insert(place, number);
        if let Some(job) = self.jobs.get_mut(&number) {
            job.phase = Phase::Running;
        }
    }

    /// Back into the queue, at its place.
    fn queue(&mut self, number: RequestNumber) {
        let place = self.waiting.partition_point(|&other| other < number);
        self.waiting.insert(place, number);
        if let Some(job) = self.jobs.get_mut(&number) {
            job.phase = Phase::Waiting;
        }
    }
}
