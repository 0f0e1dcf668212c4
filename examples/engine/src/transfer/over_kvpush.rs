//! [`Transfers`] over kvpush: one endpoint, and a pool for each rank of the model.
//!
//! The engine thread calls; nothing blocks it but [`KvPush::new`], which pins the pools. Futures of kvpush are polled
//! when their wakers say so, and at no other time.

use std::{
    collections::HashMap,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use kvpush::{Endpoint, endpoint::EndpointError, memory::Memory};

use super::{
    Outcome, RequestNumber, Reserve, Ticket, TransferError, Transfers,
    incoming::Incoming,
    links::Links,
    outgoing::Outgoing,
    ready::{Alarm, Key},
    ticket::{Identity, TicketFields},
};
use crate::{model::Model, request::BlockId};

/// The transfers of one engine.
pub struct KvPush {
    identity: Identity,
    links: Links,
    transfers: HashMap<RequestNumber, Transfer>,
    /// Kept for its memory.
    keys: Vec<Key>,
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
        Ok(Self {
            identity,
            links: Links::new(endpoint, pools, Alarm::start()?),
            transfers: HashMap::new(),
            keys: Vec::new(),
        })
    }

    /// What the other engine must have in common with this one.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Reservations and pushes that have not ended, and tickets that are being given back.
    pub fn live(&self) -> usize {
        self.transfers.len() + self.links.releases()
    }

    /// Layers of a reservation that are here whole, from the first on; nothing if there is no such reservation.
    pub fn arrived_layers(&self, request: RequestNumber) -> Option<u32> {
        match self.transfers.get(&request)? {
            Transfer::Incoming(incoming) => Some(incoming.complete_layers()),
            Transfer::Outgoing(_) => None,
        }
    }

    fn is_new(&self, request: RequestNumber) -> Result<(), TransferError> {
        match self.transfers.contains_key(&request) {
            false => Ok(()),
            true => Err(unknown(request, "has a transfer already")),
        }
    }

    fn outgoing(
        &mut self,
        request: RequestNumber,
    ) -> Result<(&mut Outgoing, &mut Links), TransferError> {
        match self.transfers.get_mut(&request) {
            Some(Transfer::Outgoing(outgoing)) => Ok((outgoing, &mut self.links)),
            _ => Err(unknown(request, "has no push")),
        }
    }

    fn try_open(
        &mut self,
        request: RequestNumber,
        ticket: TicketFields,
        tokens: usize,
        digest: &[u8; 32],
        deadline: Duration,
    ) -> Result<usize, TransferError> {
        self.is_new(request)?;
        let tp = self.links.pools.len() as u32;
        ticket.check_for(&self.identity, tp, tokens, digest)?;
        let held = ticket.held as usize;
        let mark = self.links.ready.mark(Key::Transfer(request));
        let layers = self.identity.layers as usize;
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
        match self
            .links
            .start_push(first.pair.source_rank, &first.grant, until)
        {
            Ok(push) => self.links.release(push),
            Err(error) => {
                tracing::warn!(id = ticket.id, %error, "the issuer of a ticket is not told that it is refused");
            }
        }
    }
}

/// How long it is tried to tell an issuer that its ticket is refused. Its own deadline does the rest.
const GIVE_BACK_WITHIN: Duration = Duration::from_secs(10);

impl Transfers for KvPush {
    fn reserve(&mut self, what: &Reserve<'_>) -> Result<Ticket, TransferError> {
        self.is_new(what.request)?;
        let mark = self.links.ready.mark(Key::Transfer(what.request));
        let (incoming, fields) = Incoming::reserve(&self.links, &self.identity, what, mark)?;
        let ticket = fields.encode()?;
        self.transfers
            .insert(what.request, Transfer::Incoming(incoming));
        Ok(ticket)
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
        let result = self.try_open(request, fields.clone(), tokens, &digest, deadline);
        if result.is_err() {
            self.give_back(&fields);
        }
        result
    }

    fn layer(
        &mut self,
        request: RequestNumber,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError> {
        let (outgoing, links) = self.outgoing(request)?;
        outgoing.layer(layer, positions, blocks)?;
        outgoing.drive(links);
        outgoing.ask_for_poll();
        Ok(())
    }

    fn finish(&mut self, request: RequestNumber, tail: &[u8]) -> Result<(), TransferError> {
        let (outgoing, links) = self.outgoing(request)?;
        outgoing.finish(tail)?;
        outgoing.drive(links);
        outgoing.ask_for_poll();
        Ok(())
    }

    fn reject(&mut self, ticket: &Ticket) {
        match TicketFields::decode(&ticket.0) {
            Ok(fields) => self.give_back(&fields),
            Err(error) => tracing::debug!(%error, "a ticket to be refused makes no sense"),
        }
    }

    fn cancel(&mut self, request: RequestNumber) {
        match self.transfers.get_mut(&request) {
            Some(Transfer::Incoming(incoming)) => {
                incoming.cancel();
                incoming.drive();
                incoming.ask_for_poll();
            }
            Some(Transfer::Outgoing(outgoing)) => {
                outgoing.cancel();
                outgoing.drive(&mut self.links);
                outgoing.ask_for_poll();
            }
            None => {}
        }
    }

    fn poll(&mut self, out: &mut Vec<Outcome>) {
        let mut keys = std::mem::take(&mut self.keys);
        self.links.ready.take(&mut keys);
        for key in keys.drain(..) {
            let request = match key {
                Key::Release(_) => {
                    self.links.drive_release(key);
                    continue;
                }
                Key::Transfer(request) => request,
            };
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
                out.push(outcome);
            }
        }
        self.keys = keys;
    }

    fn on_ready(&mut self, waker: Box<dyn Fn() + Send + Sync>) {
        self.links.ready.on_ready(Arc::from(waker));
    }
}

fn unknown(request: RequestNumber, what: &str) -> TransferError {
    TransferError {
        message: format!("request {request} {what}"),
        is_retryable: false,
    }
}
