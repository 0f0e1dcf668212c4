//! A push to a decode engine: one kvpush push for each pair of ranks.
//!
//! What is handed over before a pair is open waits as two numbers for each layer: the positions handed over and those
//! pushed. Pushes that cannot be opened for a passing reason are begun again until the deadline.
//!
//! Invariants: it is over when every pair's push has ended, and so nothing reads the source blocks any more (or an end
//! says that a device still may); the first failure stops the others; the tail goes with the first pair, once.

use std::{
    ops::Range,
    sync::Arc,
    task::Context,
    time::{Duration, Instant},
};

use kvpush::{
    Push,
    endpoint::{PeerError, PushError, PushReport},
    kv::shard::Pair,
};

use super::{
    Outcome, RequestNumber, TransferError,
    links::{Links, Wait, cancelled, look},
    ready::Mark,
    ticket::{PairGrant, TicketFields},
};
use crate::request::BlockId;

/// Before a push is begun again the first time; doubled each time, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(super) struct Outgoing {
    request: RequestNumber,
    mark: Arc<Mark>,
    deadline: Instant,
    /// Blocks of the prompt that the other side has.
    held: usize,
    /// Blocks that go there.
    granted: usize,
    /// Source blocks known so far; the first is position `held`.
    blocks: Vec<BlockId>,
    /// Positions handed over of each layer, counted from `held`.
    handed: Vec<usize>,
    tail: Option<Vec<u8>>,
    pairs: Vec<PairPush>,
    /// Why it is being stopped.
    stop: Option<TransferError>,
    /// Whether kvpush has been told so.
    is_stopping: bool,
}

struct PairPush {
    grant: PairGrant,
    state: State,
    /// Positions given to kvpush, of each layer.
    pushed: Vec<usize>,
    is_finished: bool,
    pause: Duration,
}

enum State {
    /// The reader has not agreed yet.
    Opening(Arc<Push>, Wait<Result<(), PushError>>),
    /// Begun again then.
    Paused(Instant),
    /// Pages can go.
    Open(Arc<Push>, Wait<Result<PushReport, PushError>>),
    /// It is over.
    Ended(Result<u64, PushError>),
}

impl Outgoing {
    /// Begins the pushes of all pairs.
    ///
    /// # Errors
    ///
    /// One cannot be begun. None is then.
    pub(super) fn open(
        links: &mut Links,
        request: RequestNumber,
        mark: Arc<Mark>,
        ticket: TicketFields,
        layers: usize,
        deadline: Instant,
    ) -> Result<Self, TransferError> {
        let mut pairs: Vec<PairPush> = Vec::with_capacity(ticket.grants.len());
        for grant in ticket.grants {
            match links.start_push(grant.pair.source_rank, &grant.grant, deadline) {
                Ok(push) => pairs.push(PairPush {
                    grant,
                    state: opening(push),
                    pushed: vec![0; layers],
                    is_finished: false,
                    pause: FIRST_PAUSE,
                }),
                Err(error) => {
                    let begun = pairs.into_iter().filter_map(PairPush::into_opening);
                    begun.for_each(|push| links.release(push));
                    return Err(failed(&grant.pair, &error));
                }
            }
        }
        links.ready.alarm(deadline, &mark);
        // The first look is what waits for the opening.
        mark.set();
        let granted = ticket.blocks - ticket.held;
        Ok(Self {
            request,
            mark,
            deadline,
            held: ticket.held as usize,
            granted: granted as usize,
            blocks: Vec::with_capacity(granted as usize),
            handed: vec![0; layers],
            tail: None,
            pairs,
            stop: None,
            is_stopping: false,
        })
    }

    /// The blocks at `positions` have all of `layer`.
    ///
    /// # Errors
    ///
    /// No such layer, or positions that do not follow those before. Nothing is remembered then.
    pub(super) fn layer(
        &mut self,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError> {
        let wrong = |what: &str| TransferError {
            message: format!("layer {layer}, positions {positions:?}: {what}"),
            is_retryable: false,
        };
        if blocks.len() != positions.len() {
            return Err(wrong("there must be one block for each"));
        }
        if positions.end > self.held + self.granted {
            return Err(wrong("the prompt has fewer"));
        }
        let handed = self.handed.get_mut(layer);
        let handed = handed.ok_or_else(|| wrong("the model has fewer layers"))?;
        // What the other side has is skipped.
        let skipped = self.held.saturating_sub(positions.start).min(blocks.len());
        let blocks = &blocks[skipped..];
        if blocks.is_empty() {
            return Ok(());
        }
        let first = positions.start + skipped - self.held;
        if first != *handed {
            return Err(wrong("they do not follow those before"));
        }
        let known = &self.blocks[first.min(self.blocks.len())..];
        let common = known.len().min(blocks.len());
        if known[..common] != blocks[..common] {
            return Err(wrong("their blocks are others than those of another layer"));
        }
        self.blocks.extend_from_slice(&blocks[common..]);
        *handed += blocks.len();
        Ok(())
    }

    /// Everything has been handed over.
    ///
    /// # Errors
    ///
    /// It has not, or the tail is too long.
    pub(super) fn finish(&mut self, tail: &[u8]) -> Result<(), TransferError> {
        let wrong = |message: String| TransferError {
            message,
            is_retryable: false,
        };
        let lacking = |&handed: &usize| handed < self.granted;
        if let Some(layer) = self.handed.iter().position(lacking) {
            let missing = self.granted - self.handed[layer];
            return Err(wrong(format!("layer {layer} lacks {missing} blocks")));
        }
        let capacity = self.pairs[0].grant.grant.tail_capacity() as usize;
        if tail.len() > capacity {
            let length = tail.len();
            return Err(wrong(format!(
                "a tail of {length} bytes, the ticket has room for {capacity}"
            )));
        }
        self.tail = Some(tail.to_vec());
        Ok(())
    }

    /// Gives it up.
    pub(super) fn cancel(&mut self) {
        self.stop.get_or_insert_with(cancelled);
    }

    /// Goes on as far as it can without waiting.
    pub(super) fn drive(&mut self, links: &mut Links) {
        let mark = Arc::clone(&self.mark);
        let waker = mark.waker();
        let mut context = Context::from_waker(&waker);
        if self.stop.is_none() && Instant::now() >= self.deadline {
            self.stop = Some(TransferError {
                message: "the deadline has passed before everything was pushed".to_owned(),
                is_retryable: false,
            });
        }
        for index in 0..self.pairs.len() {
            self.drive_pair(index, links, &mut context);
        }
        if self.stop.is_some() && !std::mem::replace(&mut self.is_stopping, true) {
            self.stop_all(links, &mut context);
        }
    }

    fn drive_pair(&mut self, index: usize, links: &Links, context: &mut Context<'_>) {
        let pair = &mut self.pairs[index];
        loop {
            match &mut pair.state {
                State::Opening(push, wait) => match look(wait, context) {
                    None => return,
                    Some(Ok(())) => {
                        let push = Arc::clone(push);
                        let end = Arc::clone(&push);
                        let wait = Box::pin(async move { end.ended().await });
                        pair.state = State::Open(push, wait);
                    }
                    Some(Err(error)) if self.stop.is_none() && may_open_again(&error) => {
                        let again = Instant::now() + pair.pause;
                        pair.pause = (pair.pause * 2).min(MAX_PAUSE);
                        if again >= self.deadline {
                            pair.state = State::Ended(Err(error));
                            continue;
                        }
                        tracing::debug!(request = self.request, %error, pause = ?pair.pause, "push is begun again");
                        links.ready.alarm(again, &self.mark);
                        pair.state = State::Paused(again);
                    }
                    Some(Err(error)) => pair.state = State::Ended(Err(error)),
                },
                State::Paused(until) => {
                    if self.stop.is_some() || Instant::now() < *until {
                        return;
                    }
                    let PairGrant { pair: ranks, grant } = &pair.grant;
                    let push = links.start_push(ranks.source_rank, grant, self.deadline);
                    pair.state = match push {
                        Ok(push) => opening(push),
                        Err(error) => State::Ended(Err(error)),
                    };
                }
                State::Open(push, wait) => {
                    let push = Arc::clone(push);
                    if let Some(end) = look(wait, context) {
                        pair.state = State::Ended(end.map(|report| report.bytes));
                        continue;
                    }
                    if self.stop.is_none() {
                        let tail = self.tail.as_deref().filter(|_| !pair.is_finished);
                        // The first pair carries it, the others say only that they have ended.
                        let tail = tail.map(|tail| if index == 0 { tail } else { &[] });
                        let done = give(&push, &mut pair.pushed, &self.handed, &self.blocks, tail);
                        match done {
                            Ok(()) => pair.is_finished |= tail.is_some(),
                            Err(PushError::Input(error)) => {
                                self.stop =
                                    Some(failed(&pair.grant.pair, &PushError::Input(error)));
                            }
                            // The push has ended, which its wait will say.
                            Err(_ended) => {}
                        }
                    }
                    return;
                }
                State::Ended(result) => {
                    if let Err(error) = result {
                        let ranks = &pair.grant.pair;
                        self.stop.get_or_insert_with(|| failed(ranks, error));
                    }
                    return;
                }
            }
        }
    }

    /// Stops what has not ended. Those that are not open have nothing to wait for, but their readers are told.
    fn stop_all(&mut self, links: &mut Links, context: &mut Context<'_>) {
        for pair in &mut self.pairs {
            match &mut pair.state {
                State::Opening(push, _) => {
                    links.release(Arc::clone(push));
                    pair.state = State::Ended(Err(PushError::Cancelled));
                }
                State::Paused(_) => pair.state = State::Ended(Err(PushError::Cancelled)),
                State::Open(push, wait) => {
                    push.start_cancel();
                    if let Some(end) = look(wait, context) {
                        pair.state = State::Ended(end.map(|report| report.bytes));
                    }
                }
                State::Ended(_) => {}
            }
        }
    }

    /// How it ended, if it has.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        let mut bytes = 0;
        let mut is_fenced = true;
        for pair in &self.pairs {
            match &pair.state {
                State::Ended(Ok(pushed)) => bytes += pushed,
                State::Ended(Err(error)) => is_fenced &= leaves_source_free(error),
                _ => return None,
            }
        }
        let request = self.request;
        Some(match self.failure() {
            None => Outcome::Pushed { request, bytes },
            Some(error) => Outcome::NotPushed {
                request,
                error,
                is_fenced,
            },
        })
    }

    /// Why not everything was pushed. A push that was given up, but had ended well before that was heard, is done.
    fn failure(&self) -> Option<TransferError> {
        let is_whole = self
            .pairs
            .iter()
            .all(|pair| matches!(pair.state, State::Ended(Ok(_))));
        if is_whole {
            return None;
        }
        self.stop.clone()
    }
}

impl PairPush {
    fn into_opening(self) -> Option<Arc<Push>> {
        match self.state {
            State::Opening(push, _) => Some(push),
            _ => None,
        }
    }
}

fn opening(push: Arc<Push>) -> State {
    let opened = Arc::clone(&push);
    State::Opening(push, Box::pin(async move { opened.opened().await }))
}

/// Gives kvpush what has been handed over and not been given yet, and the tail at the end.
fn give(
    push: &Push,
    pushed: &mut [usize],
    handed: &[usize],
    blocks: &[BlockId],
    tail: Option<&[u8]>,
) -> Result<(), PushError> {
    for (layer, (pushed, &handed)) in pushed.iter_mut().zip(handed).enumerate() {
        if *pushed < handed {
            push.layer_from(layer, *pushed, &blocks[*pushed..handed])?;
            *pushed = handed;
        }
    }
    match tail {
        Some(tail) => push.start_finish(tail.to_vec()),
        None => Ok(()),
    }
}

/// Whether the same grant may still be opened: the reader has not had it, or was too busy.
fn may_open_again(error: &PushError) -> bool {
    match error {
        PushError::Refused { code, .. } => code.is_retryable(),
        PushError::Peer(PeerError::Restarted { .. }) => false,
        PushError::Peer(error) => error.is_retryable(),
        _ => false,
    }
}

/// Whether no device reads the source pages any more, as kvpush promises for all ends but these.
fn leaves_source_free(error: &PushError) -> bool {
    !matches!(error, PushError::Unfenced(_) | PushError::Stuck(_))
}

fn failed(pair: &Pair, error: &PushError) -> TransferError {
    TransferError {
        message: format!(
            "push of {} from rank {} to rank {}: {error}",
            pair.heads, pair.source_rank, pair.destination_rank
        ),
        is_retryable: error.is_retryable(),
    }
}
