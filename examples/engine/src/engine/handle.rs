//! How everybody but the engine thread talks to the engine. Any thread; nothing here waits for a step.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::broadcast;

use super::{
    Config, KvEvent, Replay, Snapshot, Stats,
    core::{Farewell, News},
    kv_events::KvEvents,
};
use crate::{
    model::{Model, ModelConfig},
    request::{Leg, Request, RequestError},
};

/// Talks to an [`super::Engine`].
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// What the engine thread and the handles share.
pub(super) struct Shared {
    pub(super) facts: Facts,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    stats: Mutex<Stats>,
    events: Mutex<KvEvents>,
}

/// What never changes.
pub(super) struct Facts {
    pub(super) config: Config,
    pub(super) model: ModelConfig,
    pub(super) block_tokens: usize,
    pub(super) blocks: usize,
    tp: usize,
    pub(super) has_transfers: bool,
}

struct Inbox {
    commands: VecDeque<Command>,
    /// Requests that have been submitted and have not ended, and whether they still take a ticket.
    known: HashMap<String, TakesTicket>,
    /// Requests that wait for the first time, here or in the scheduler.
    waiting: usize,
    /// Transfers of requests that have ended.
    closing: usize,
    /// Guess after which one more of them will have begun.
    retry_after: Duration,
    is_draining: bool,
    is_shut_down: bool,
    is_dead: bool,
    is_woken: bool,
}

type TakesTicket = bool;

/// What a handle asks for.
pub(super) enum Command {
    Submit(Box<Request>),
    PushHeld {
        id: String,
        ticket: Vec<u8>,
    },
    /// Of a request that was refused.
    Reject {
        ticket: Vec<u8>,
    },
    Abort {
        id: String,
    },
    Finish {
        id: String,
        index: usize,
    },
    ClearPrefixCache,
}

impl Handle {
    pub(super) fn new(model: &dyn Model, has_transfers: bool, config: Config) -> Self {
        let blocks = model.blocks() as usize;
        let mut stats = Stats::default();
        stats.blocks.total = blocks;
        stats.blocks.free = blocks;
        Self(Arc::new(Shared {
            events: Mutex::new(KvEvents::new(config.kv_event_history)),
            facts: Facts {
                config,
                model: model.config().clone(),
                block_tokens: model.block_tokens(),
                blocks,
                tp: model.shards().len(),
                has_transfers,
            },
            inbox: Mutex::new(Inbox {
                commands: VecDeque::new(),
                known: HashMap::new(),
                waiting: 0,
                closing: 0,
                retry_after: Duration::from_secs(1),
                is_draining: false,
                is_shut_down: false,
                is_dead: false,
                is_woken: false,
            }),
            wake: Condvar::new(),
            stats: Mutex::new(stats),
        }))
    }

    /// Queues a request. Its events tell the rest.
    ///
    /// # Errors
    ///
    /// The request is impossible, its id is under way already, the queue is full, or the engine is going away.
    pub fn submit(&self, request: Request) -> Result<(), RequestError> {
        let ticket = match &request.leg {
            Leg::Prefill { ticket } => Some(ticket.clone()),
            _ => None,
        };
        let result = self.try_submit(request);
        if result.is_err() {
            self.0.stats.lock().refused += 1;
            if let Some(ticket) = ticket {
                self.reject(ticket);
            }
        }
        result
    }

    /// The decode engine that has issued this is told that nothing will come.
    fn reject(&self, ticket: Vec<u8>) {
        let mut inbox = self.0.inbox.lock();
        if inbox.check_alive().is_ok() {
            self.0.send(&mut inbox, Command::Reject { ticket });
        }
    }

    fn try_submit(&self, request: Request) -> Result<(), RequestError> {
        let facts = &self.0.facts;
        let lost = self.0.stats.lock().blocks.lost;
        facts.check(&request, lost)?;
        let mut inbox = self.0.inbox.lock();
        inbox.check_alive()?;
        if inbox.is_draining {
            return Err(RequestError::Draining);
        }
        if inbox.waiting >= facts.config.max_waiting {
            return Err(RequestError::Busy {
                what: "the waiting queue is full",
                retry_after: inbox.retry_after,
            });
        }
        if inbox.known.contains_key(&request.id) {
            return Err(RequestError::Invalid {
                message: format!("a request with the id {:?} is under way", request.id),
                param: Some("request_id"),
            });
        }
        let takes_ticket = matches!(request.leg, Leg::PrefillHeld);
        inbox.known.insert(request.id.clone(), takes_ticket);
        inbox.waiting += 1;
        self.0.send(&mut inbox, Command::Submit(Box::new(request)));
        Ok(())
    }

    /// Gives a [`Leg::PrefillHeld`] request the ticket of its decode engine: once.
    ///
    /// # Errors
    ///
    /// No such request is under way, or it has a ticket.
    pub fn push_held(&self, request_id: &str, ticket: Vec<u8>) -> Result<(), RequestError> {
        let mut inbox = self.0.inbox.lock();
        inbox.check_alive()?;
        match inbox.known.get_mut(request_id) {
            Some(takes_ticket) if *takes_ticket => *takes_ticket = false,
            other => {
                let why = match other {
                    Some(_) => "takes no ticket, or has one",
                    None => "is not under way: unknown, ended, or its time was up",
                };
                self.0.send(&mut inbox, Command::Reject { ticket });
                return Err(RequestError::Invalid {
                    message: format!("the request {request_id:?} {why}"),
                    param: Some("request_id"),
                });
            }
        }
        let id = request_id.to_owned();
        self.0.send(&mut inbox, Command::PushHeld { id, ticket });
        Ok(())
    }

    /// Ends a request with [`RequestError::Aborted`], within one step. Nothing happens if it is not under way.
    pub fn abort(&self, request_id: &str) {
        let id = request_id.to_owned();
        self.command(request_id, Command::Abort { id });
    }

    /// Ends one completion with [`crate::request::FinishReason::Stop`], within one step: its text has a stop string.
    /// Tokens that are already on their way may still come before. Nothing happens if it has ended.
    pub fn finish(&self, request_id: &str, index: usize) {
        let id = request_id.to_owned();
        self.command(request_id, Command::Finish { id, index });
    }

    fn command(&self, request_id: &str, command: Command) {
        let mut inbox = self.0.inbox.lock();
        if inbox.known.contains_key(request_id) {
            self.0.send(&mut inbox, command);
        }
    }

    /// Forgets all prefixes.
    pub fn clear_prefix_cache(&self) {
        let mut inbox = self.0.inbox.lock();
        self.0.send(&mut inbox, Command::ClearPrefixCache);
    }

    /// As of the last step.
    pub fn stats(&self) -> Stats {
        *self.0.stats.lock()
    }

    /// The model.
    pub fn model(&self) -> &ModelConfig {
        &self.0.facts.model
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.0.facts.block_tokens
    }

    /// Tensor parallel ranks.
    pub fn tp(&self) -> usize {
        self.0.facts.tp
    }

    /// What the engine was started with.
    pub fn config(&self) -> &Config {
        &self.0.facts.config
    }

    /// Changes of the prefix cache from now on. Who is slow misses some: see [`Handle::replay_kv_events`].
    pub fn subscribe_kv_events(&self) -> broadcast::Receiver<KvEvent> {
        self.0.events.lock().subscribe()
    }

    /// Changes of the prefix cache from this sequence number on. To miss none, subscribe first.
    pub fn replay_kv_events(&self, from: u64) -> Replay {
        self.0.events.lock().replay(from)
    }

    /// Everything that can be found in the prefix cache, for who has missed events that are not kept any more.
    pub fn kv_snapshot(&self) -> Snapshot {
        self.0.events.lock().snapshot()
    }

    /// Takes no more requests; those under way go on.
    pub fn start_drain(&self) {
        self.0.inbox.lock().is_draining = true;
    }

    /// Whether it takes no more requests.
    pub fn is_draining(&self) -> bool {
        let inbox = self.0.inbox.lock();
        inbox.is_draining || inbox.is_shut_down || inbox.is_dead
    }

    /// Whether it takes no more requests and all have ended, with their transfers.
    pub fn is_drained(&self) -> bool {
        let inbox = self.0.inbox.lock();
        inbox.is_dead || inbox.is_draining && inbox.known.is_empty() && inbox.closing == 0
    }

    /// Whether the engine thread runs.
    pub fn is_alive(&self) -> bool {
        !self.0.inbox.lock().is_dead
    }

    /// Ends the engine thread, and what is under way with [`RequestError::Draining`]. Does not wait for it.
    pub fn shutdown(&self) {
        let mut inbox = self.0.inbox.lock();
        inbox.is_shut_down = true;
        self.0.wake(&mut inbox);
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.0)
    }
}

impl Inbox {
    fn check_alive(&self) -> Result<(), RequestError> {
        if self.is_dead {
            let what = "the engine thread has ended";
            return Err(RequestError::Internal(what.to_owned()));
        }
        if self.is_shut_down {
            return Err(RequestError::Draining);
        }
        Ok(())
    }
}

/// For the engine thread.
impl Shared {
    fn send(&self, inbox: &mut Inbox, command: Command) {
        inbox.commands.push_back(command);
        self.wake(inbox);
    }

    fn wake(&self, inbox: &mut Inbox) {
        inbox.is_woken = true;
        self.wake.notify_one();
    }

    /// Makes [`Shared::sleep`] return. Any thread.
    pub(super) fn rouse(&self) {
        self.wake(&mut self.inbox.lock());
    }

    /// Waits until there is something to do, or `until`.
    pub(super) fn sleep(&self, until: Option<Instant>) {
        let mut inbox = self.inbox.lock();
        while !inbox.is_woken {
            match until {
                None => self.wake.wait(&mut inbox),
                Some(until) => {
                    if self.wake.wait_until(&mut inbox, until).timed_out() {
                        break;
                    }
                }
            }
        }
        inbox.is_woken = false;
    }

    /// Moves commands to `out`. Says whether to go on.
    pub(super) fn receive(&self, out: &mut VecDeque<Command>) -> bool {
        let mut inbox = self.inbox.lock();
        out.append(&mut inbox.commands);
        !inbox.is_shut_down
    }

    /// Shows what came of a step.
    pub(super) fn show(&self, news: News) {
        if !news.changes.is_empty() {
            self.events.lock().publish(news.changes);
        }
        {
            let mut stats = self.stats.lock();
            let refused = stats.refused;
            *stats = Stats {
                refused,
                ..news.stats
            };
        }
        // After the statistics: who sees that it is drained sees those of that.
        let mut inbox = self.inbox.lock();
        for id in &news.ended {
            inbox.known.remove(id);
        }
        inbox.waiting = inbox.waiting.saturating_sub(news.left_queue);
        inbox.closing = news.closing;
        inbox.retry_after = news.retry_after;
        drop(inbox);
        news.farewells.into_iter().for_each(Farewell::send);
    }

    /// The engine thread ends.
    pub(super) fn die(&self) {
        let mut inbox = self.inbox.lock();
        inbox.is_dead = true;
        inbox.known.clear();
        inbox.commands.clear();
    }
}
