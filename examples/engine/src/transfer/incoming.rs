//! A reservation: one kvpush arrival for each pair of ranks.
//!
//! Invariants: it has arrived when every pair's arrival is complete, and never before; it is over when every arrival has
//! ended, and so nothing writes the blocks any more (or an end says that something still may); the first failure takes
//! the other grants back.

use std::{sync::Arc, task::Context};

use bytes::Bytes;
use kvpush::{
    Arrival,
    endpoint::{ArrivalError, GrantOptions},
    kv::shard::{self, Pair},
};

use super::{
    Outcome, RequestNumber, Reserve, TransferError,
    links::{Links, Wait, cancelled, look, page_bytes},
    ready::Mark,
    ticket::{Identity, MAX_TP, PairGrant, TicketError, TicketFields, cut},
};

/// See the module's documentation.
pub(super) struct Incoming {
    request: RequestNumber,
    mark: Arc<Mark>,
    pairs: Vec<PairArrival>,
    /// Bytes of all grants.
    bytes: u64,
    /// Why it is being taken back.
    stop: Option<TransferError>,
    /// Whether kvpush has been told so.
    is_stopping: bool,
}

struct PairArrival {
    pair: Pair,
    arrival: Arc<Arrival>,
    wait: Wait<Result<Bytes, ArrivalError>>,
    end: Option<Result<Bytes, ArrivalError>>,
}

impl Incoming {
    /// Grants what is not held to each rank that has heads of it.
    ///
    /// # Errors
    ///
    /// It makes no sense, or a grant cannot be issued. None is then: those issued before it are taken back, which ends
    /// soon, as nobody knows of them.
    pub(super) fn reserve(
        links: &Links,
        identity: &Identity,
        what: &Reserve<'_>,
        mark: Arc<Mark>,
    ) -> Result<(Self, TicketFields), TransferError> {
        let decode_tp = links.pools.len() as u32;
        if !(1..=MAX_TP).contains(&what.prefill_tp) {
            return Err(TransferError {
                message: format!("{} prefill ranks; {MAX_TP} is the most", what.prefill_tp),
                is_retryable: false,
            });
        }
        let pairs = shard::pairing(identity.kv_heads, what.prefill_tp, decode_tp)
            .map_err(TicketError::from)?;
        let pages = what.blocks.get(what.held..).unwrap_or_default();
        let mut fields = TicketFields {
            identity: *identity,
            prefill_tp: what.prefill_tp,
            decode_tp,
            tokens: u32::try_from(what.tokens).unwrap_or(u32::MAX),
            prompt: what.digest,
            blocks: u32::try_from(what.blocks.len()).unwrap_or(u32::MAX),
            held: u32::try_from(what.held).unwrap_or(u32::MAX),
            valid_for: what.deadline,
            id: what.id.to_owned(),
            grants: Vec::with_capacity(pairs.len()),
        };
        let mut incoming = Self {
            request: what.request,
            mark,
            pairs: Vec::with_capacity(pairs.len()),
            bytes: 0,
            stop: None,
            is_stopping: false,
        };
        for pair in pairs {
            let pool = &links.pools[pair.destination_rank as usize];
            let name = Bytes::copy_from_slice(cut(what.id).as_bytes());
            let options = GrantOptions::new(name, what.deadline).heads(pair.heads);
            // Those before are taken back by being dropped.
            let arrival = pool
                .grant_with(pages, options)
                .map_err(|error| TransferError {
                    message: format!(
                        "grant of {} at rank {}: {error}",
                        pair.heads, pair.destination_rank
                    ),
                    is_retryable: error.is_retryable(),
                })?;
            incoming.bytes += page_bytes(pool.layout(), pair.heads) * pages.len() as u64;
            fields.grants.push(PairGrant {
                pair,
                grant: arrival.grant().clone(),
            });
            incoming.pairs.push(PairArrival::new(pair, arrival));
        }
        incoming.mark.set();
        Ok((incoming, fields))
    }

    /// Takes it back.
    pub(super) fn cancel(&mut self) {
        self.stop.get_or_insert_with(cancelled);
    }

    /// Goes on as far as it can without waiting.
    pub(super) fn drive(&mut self) {
        let mark = Arc::clone(&self.mark);
        let waker = mark.waker();
        let mut context = Context::from_waker(&waker);
        for PairArrival {
            pair, wait, end, ..
        } in &mut self.pairs
        {
            if end.is_some() {
                continue;
            }
            *end = look(wait, &mut context);
            if let Some(Err(error)) = end {
                self.stop.get_or_insert_with(|| failed(pair, error));
            }
        }
        if self.stop.is_some() && !std::mem::replace(&mut self.is_stopping, true) {
            for pair in self.pairs.iter().filter(|pair| pair.end.is_none()) {
                pair.arrival.start_revoke();
            }
        }
    }

    /// How it ended, if it has.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        let mut tail = None;
        let mut is_whole = true;
        let mut is_fenced = true;
        for pair in &self.pairs {
            match pair.end.as_ref()? {
                Ok(bytes) => {
                    tail.get_or_insert(bytes);
                }
                Err(error) => {
                    is_whole = false;
                    is_fenced &= leaves_pages_free(error);
                }
            }
        }
        let request = self.request;
        // Everything was there before it was given up: then it counts.
        Some(if is_whole {
            Outcome::Arrived {
                request,
                tail: tail.map(|tail| tail.to_vec()).unwrap_or_default(),
                bytes: self.bytes,
            }
        } else {
            Outcome::NotArrived {
                request,
                error: self.stop.clone().unwrap_or_else(cancelled),
                is_fenced,
            }
        })
    }

    /// Layers of which everything is there, from the first on.
    pub(super) fn complete_layers(&self) -> u32 {
        let each = self.pairs.iter().map(|pair| pair.arrival.complete_layers());
        each.min().unwrap_or(0)
    }
}

impl PairArrival {
    fn new(pair: Pair, arrival: Arrival) -> Self {
        let arrival = Arc::new(arrival);
        let waited = Arc::clone(&arrival);
        Self {
            pair,
            arrival,
            wait: Box::pin(async move { waited.complete().await }),
            end: None,
        }
    }
}

/// Whether nothing writes the pages any more, as kvpush promises for all ends but these.
fn leaves_pages_free(error: &ArrivalError) -> bool {
    !matches!(error, ArrivalError::Unfenced(_) | ArrivalError::Stuck(_))
}

fn failed(pair: &Pair, error: &ArrivalError) -> TransferError {
    TransferError {
        message: format!(
            "{} from rank {} for rank {}: {error}",
            pair.heads, pair.source_rank, pair.destination_rank
        ),
        is_retryable: error.is_retryable(),
    }
}
