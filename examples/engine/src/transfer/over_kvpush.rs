//! [`Transfers`] over kvpush: one endpoint, and a pool for each rank of the model.
//!
//! | Thread | Does |
//! |---|---|
//! | the engine's | calls [`Transfers`]; nothing blocks it but [`KvPush::new`], which pins the pools |
//! | `engine-transfers` | looks at transfers that kvpush has woken: opens, hands over what waits, ends; sleeps otherwise |
//!
//! So pages go as soon as a push is open, even while the engine thread computes, and the engine is woken for outcomes
//! only. Both hold the lock for some microseconds; neither waits for a peer while holding it.

use std::{
    collections::HashMap,
    ops::Range,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvpush::{Endpoint, endpoint::EndpointError, memory::Memory};
use parking_lot::Mutex;

use super::{
    Outcome, RequestNumber, Reserve, Ticket, TransferError, Transfers,
    incoming::Incoming,
    links::Links,
    outgoing::Outgoing,
    ready::{Key, Ready},
    ticket::{Identity, TicketFields},
};
use crate::{model::Model, request::BlockId};

/// How long it is tried to tell an issuer that its ticket is refused. Its own deadline does the rest.
const GIVE_BACK_WITHIN: Duration = Duration::from_secs(10);

/// The transfers of one engine.
pub struct KvPush {
    identity: Identity,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    ready: Arc<Ready>,
    state: Mutex<State>,
    notify: Mutex<Option<Notify>>,
}

type Notify = Arc<dyn Fn() + Send + Sync>;

struct State {
    links: Links,
    transfers: HashMap<RequestNumber, Transfer>,
    outcomes: Vec<Outcome>,
}

enum Transfer {
    Incoming(Incoming),
    Outgoing(Outgoing),
}

/// Why an engine's transfers cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The model has no ranks, or they have no layers.
    #[error("the model has no cache: {0}")]
    NoCache(&'static str),
    /// A rank's cache cannot be registered.
    #[error("rank {rank}: {source}")]
    Pool {
        /// The rank.
        rank: usize,
        /// Why.
        source: Box<EndpointError>,
    },
    /// The system gives no thread.
    #[error("thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl KvPush {
    /// Registers the cache of every rank of `model` with `endpoint`. Blocks while the memory is pinned.
    ///
    /// # Errors
    ///
    /// A cache cannot be registered.
    pub fn new(endpoint: Endpoint, model: &dyn Model) -> Result<Self, SetupError> {
        let shards = model.shards();
        let layout = &shards
            .first()
            .ok_or(SetupError::NoCache("no ranks"))?
            .layout;
        let layer = layout.layers.first();
        let plane = layer.and_then(|layer| layer.planes.first());
        let plane = plane.ok_or(SetupError::NoCache("no layers"))?;
        let identity = Identity {
            model: model.config().digest,
            dtype: plane.dtype as u8,
            block_tokens: model.block_tokens() as u32,
            layers: layout.layers.len() as u32,
            kv_heads: model.config().kv_heads as u32,
        };
        let mut pools = Vec::with_capacity(shards.len());
        for (rank, shard) in shards.iter().enumerate() {
            let memory = shard.memory.iter();
            let memory = memory.map(|memory| Arc::clone(memory) as Arc<dyn Memory>);
            let pool = endpoint.register_pool(shard.layout.clone(), memory.collect());
            pools.push(pool.map_err(|source| SetupError::Pool {
                rank,
                source: Box::new(source),
            })?);
        }
        let links = Links::new(endpoint, pools);
        let shared = Arc::new(Shared {
            ready: Arc::clone(&links.ready),
            state: Mutex::new(State {
                links,
                transfers: HashMap::new(),
                outcomes: Vec::new(),
            }),
            notify: Mutex::new(None),
        });
        let looks = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("engine-transfers".to_owned())
            .spawn(move || looks.run())?;
        Ok(Self {
            identity,
            shared,
            thread: Some(thread),
        })
    }

    /// What the other engine must have in common with this one.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Reservations and pushes that have not ended, and tickets that are being given back.
    pub fn live(&self) -> usize {
        let state = self.shared.state.lock();
        state.transfers.len() + state.links.releases()
    }

    /// Layers of a reservation that are here whole, from the first on; nothing if there is no such reservation.
    pub fn arrived_layers(&self, request: RequestNumber) -> Option<u32> {
        match self.shared.state.lock().transfers.get(&request)? {
            Transfer::Incoming(incoming) => Some(incoming.complete_layers()),
            Transfer::Outgoing(_) => None,
        }
    }

    /// Does `work` on the state, then tells the engine of outcomes that it led to.
    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.shared.state.lock();
        let result = work(&mut state);
        let is_over = !state.outcomes.is_empty();
        drop(state);
        if is_over {
            self.shared.notify();
        }
        result
    }
}

impl Drop for KvPush {
    fn drop(&mut self) {
        self.shared.ready.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the transfers' thread panicked");
        }
        // What has not ended is cancelled and revoked by being dropped.
        self.shared.state.lock().transfers.clear();
    }
}

impl Shared {
    fn run(&self) {
        let mut keys = Vec::new();
        while self.ready.wait(&mut keys) {
            let mut state = self.state.lock();
            for key in keys.drain(..) {
                match key {
                    Key::Release(_) => state.links.drive_release(key),
                    Key::Transfer(request) => state.drive(request),
                }
            }
            let is_over = !state.outcomes.is_empty();
            drop(state);
            if is_over {
                self.notify();
            }
        }
    }

    /// Without the lock of the state: the engine may do what it likes.
    fn notify(&self) {
        let notify = self.notify.lock().clone();
        if let Some(notify) = notify {
            notify();
        }
    }
}

impl State {
    /// Goes on with a transfer, and takes it out if it is over.
    fn drive(&mut self, request: RequestNumber) {
        let outcome = match self.transfers.get_mut(&request) {
            Some(Transfer::Incoming(incoming)) => {
                incoming.drive();
                incoming.outcome()
            }
            Some(Transfer::Outgoing(outgoing)) => {
                outgoing.drive(&mut self.links);
                outgoing.outcome()
            }
            // A mark that was set when it had ended already.
            None => None,
        };
        if let Some(outcome) = outcome {
            self.transfers.remove(&request);
            self.outcomes.push(outcome);
        }
    }

    fn is_new(&self, request: RequestNumber) -> Result<(), TransferError> {
        match self.transfers.contains_key(&request) || self.has_outcome(request) {
            false => Ok(()),
            true => Err(unknown(request, "has a transfer already")),
        }
    }

    fn has_outcome(&self, request: RequestNumber) -> bool {
        self.outcomes.iter().any(|outcome| match outcome {
            Outcome::Arrived { request: other, .. }
            | Outcome::NotArrived { request: other, .. }
            | Outcome::Pushed { request: other, .. }
            | Outcome::NotPushed { request: other, .. } => *other == request,
        })
    }

    /// Does `work` on a push. One that has ended and whose outcome the engine has not seen yet takes everything.
    fn outgoing(
        &mut self,
        request: RequestNumber,
        work: impl FnOnce(&mut Outgoing) -> Result<(), TransferError>,
    ) -> Result<(), TransferError> {
        if let Some(Transfer::Outgoing(outgoing)) = self.transfers.get_mut(&request) {
            work(outgoing)?;
            self.drive(request);
            return Ok(());
        }
        match self.has_outcome(request) {
            true => Ok(()),
            false => Err(unknown(request, "has no push")),
        }
    }

    fn open(
        &mut self,
        identity: &Identity,
        request: RequestNumber,
        ticket: TicketFields,
        tokens: usize,
        digest: &[u8; 32],
        deadline: Duration,
    ) -> Result<usize, TransferError> {
        self.is_new(request)?;
        let tp = self.links.pools.len() as u32;
        ticket.check_for(identity, tp, tokens, digest)?;
        let held = ticket.held as usize;
        let mark = self.links.ready.mark(Key::Transfer(request));
        let layers = identity.layers as usize;
        let until = Instant::now() + deadline;
        let outgoing = Outgoing::open(&mut self.links, request, mark, ticket, layers, until)?;
        self.transfers.insert(request, Transfer::Outgoing(outgoing));
        Ok(held)
    }

    /// Tells a ticket's issuer that nothing will come. One grant is enough: the issuer takes the others back itself.
    fn give_back(&mut self, ticket: &TicketFields) {
        let Some(first) = ticket.grants.first() else {
            return;
        };
        let until = Instant::now() + ticket.valid_for.min(GIVE_BACK_WITHIN);
        let rank = first.pair.source_rank;
        match self.links.start_push(rank, &first.grant, until) {
            Ok(push) => self.links.release(push),
            Err(error) => {
                let id = &ticket.id;
                tracing::warn!(id, %error, "the issuer of a ticket is not told that it is refused");
            }
        }
    }
}

impl Transfers for KvPush {
    fn reserve(&mut self, what: &Reserve<'_>) -> Result<Ticket, TransferError> {
        let identity = self.identity;
        self.with(|state| {
            state.is_new(what.request)?;
            let mark = state.links.ready.mark(Key::Transfer(what.request));
            let (incoming, fields) = Incoming::reserve(&state.links, &identity, what, mark)?;
            let ticket = fields.encode()?;
            let incoming = Transfer::Incoming(incoming);
            state.transfers.insert(what.request, incoming);
            Ok(ticket)
        })
    }

    fn open(
        &mut self,
        request: RequestNumber,
        ticket: &Ticket,
        tokens: usize,
        digest: [u8; 32],
        deadline: Duration,
    ) -> Result<usize, TransferError> {
        let fields = TicketFields::decode(&ticket.0)?;
        let identity = self.identity;
        self.with(|state| {
            let opened = fields.clone();
            let result = state.open(&identity, request, opened, tokens, &digest, deadline);
            if result.is_err() {
                state.give_back(&fields);
            }
            result
        })
    }

    fn layer(
        &mut self,
        request: RequestNumber,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError> {
        self.with(|state| state.outgoing(request, |push| push.layer(layer, positions, blocks)))
    }

    fn finish(&mut self, request: RequestNumber, tail: &[u8]) -> Result<(), TransferError> {
        self.with(|state| state.outgoing(request, |push| push.finish(tail)))
    }

    fn reject(&mut self, ticket: &Ticket) {
        match TicketFields::decode(&ticket.0) {
            Ok(fields) => self.with(|state| state.give_back(&fields)),
            Err(error) => tracing::debug!(%error, "a ticket to be refused makes no sense"),
        }
    }

    fn cancel(&mut self, request: RequestNumber) {
        self.with(|state| {
            match state.transfers.get_mut(&request) {
                Some(Transfer::Incoming(incoming)) => incoming.cancel(),
                Some(Transfer::Outgoing(outgoing)) => outgoing.cancel(),
                None => return,
            }
            state.drive(request);
        });
    }

    fn poll(&mut self, out: &mut Vec<Outcome>) {
        out.append(&mut self.shared.state.lock().outcomes);
    }

    fn on_ready(&mut self, waker: Box<dyn Fn() + Send + Sync>) {
        *self.shared.notify.lock() = Some(Arc::from(waker));
        if !self.shared.state.lock().outcomes.is_empty() {
            self.shared.notify();
        }
    }
}

fn unknown(request: RequestNumber, what: &str) -> TransferError {
    TransferError {
        message: format!("request {request} {what}"),
        is_retryable: false,
    }
}
