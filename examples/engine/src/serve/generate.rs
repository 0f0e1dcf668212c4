//! From prompts to text: submits to the engine, puts its events together, drives the dialects.
//!
//! Invariants: a generation that is dropped aborts what is under way; it ends by its deadline, even if the engine says
//! nothing; a room is ended exactly when its prefill has.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::future::poll_fn;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Sleep, sleep_until},
};

use super::{
    App,
    dialect::{Part, Peer},
    error::ApiError,
    measure::Timer,
    stop::StopScanner,
    text::{Assembler, Chunk, TokenLogprob},
    tickets::Waiting,
};
use crate::request::{
    Event, FinishReason, Leg, OnFailure, Request, RequestError, SamplingParams, TokenId, Usage,
};

/// The engine is given this long to report a deadline itself.
const GRACE: Duration = Duration::from_secs(2);

/// What to generate.
pub struct Submission {
    /// Name of the whole request.
    pub id: String,
    /// The prompts, and what of each is done here.
    pub prompts: Vec<(Vec<TokenId>, Part)>,
    /// For all of them.
    pub sampling: SamplingParams,
    /// Leave the stop string in the text.
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special: bool,
    /// When it is given up.
    pub deadline: Instant,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The prefix cache is shared only among requests with the same salt.
    pub cache_salt: Option<String>,
}

/// What comes of it, in order. After an error nothing follows.
#[derive(Debug)]
pub enum Output {
    /// Native decode leg: the ticket.
    Reserved(Vec<u8>),
    /// New text.
    Chunk(Chunk),
}

/// A submission under way.
pub struct Generation {
    app: Arc<App>,
    legs: Vec<LegState>,
    /// Completions of each prompt.
    n: usize,
    /// Where to look first, so that all get their turn.
    next: usize,
    guard: Pin<Box<Sleep>>,
    deadline: Instant,
    started: Instant,
    is_over: bool,
}

struct LegState {
    id: String,
    prompt: Vec<TokenId>,
    /// `None` once nothing more is expected.
    events: Option<mpsc::UnboundedReceiver<Event>>,
    prompt_logprobs: Vec<TokenLogprob>,
    completions: Vec<Assembler>,
    usage: Option<Usage>,
    timer: Timer,
    kind: Kind,
}

enum Kind {
    /// Nothing special.
    Direct,
    /// Prefill for a room: goes on after the answer.
    Held { room: String },
    /// The ticket goes to the prefill engine.
    Fetch { peer: Peer, room: String },
    /// It is on its way.
    Fetching(HandOver),
}

/// A ticket on its way; given up when dropped.
struct HandOver(JoinHandle<Result<(), RequestError>>);

impl Drop for HandOver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Generation {
    /// Submits. All prompts are taken, or none.
    ///
    /// # Errors
    ///
    /// The engine refuses one, or a peer does not answer.
    pub async fn start(app: &Arc<App>, submission: Submission) -> Result<Self, ApiError> {
        let mut generation = Self {
            app: Arc::clone(app),
            legs: Vec::with_capacity(submission.prompts.len()),
            n: submission.sampling.n,
            next: 0,
            guard: Box::pin(sleep_until((submission.deadline + GRACE).into())),
            deadline: submission.deadline,
            started: Instant::now(),
            is_over: false,
        };
        for (index, (prompt, part)) in submission.prompts.iter().enumerate() {
            // If this fails, dropping the generation aborts the legs before.
            generation.add(index, prompt, part, &submission).await?;
        }
        Ok(generation)
    }

    async fn add(
        &mut self,
        index: usize,
        prompt: &[TokenId],
        part: &Part,
        submission: &Submission,
    ) -> Result<(), ApiError> {
        let app = Arc::clone(&self.app);
        let id = if submission.prompts.len() == 1 {
            submission.id.clone()
        } else {
            format!("{}-{index}", submission.id)
        };
        let mut waiting = None;
        let (leg, kind) = match part.clone() {
            Part::Whole => (Leg::Both, Kind::Direct),
            Part::Prefill { ticket } => (Leg::Prefill { ticket }, Kind::Direct),
            Part::Decode {
                prefill_tp,
                on_failure,
            } => {
                let leg = Leg::Decode {
                    prefill_tp,
                    on_failure,
                };
                (leg, Kind::Direct)
            }
            Part::Hold { room } => {
                let room = room.unwrap_or_else(|| id.clone());
                waiting = app.rooms.take(&room);
                match &waiting {
                    // Nothing to wait for: push while computing.
                    Some(Waiting { ticket, .. }) => (
                        Leg::Prefill {
                            ticket: ticket.clone(),
                        },
                        Kind::Direct,
                    ),
                    None => (Leg::PrefillHeld, Kind::Held { room }),
                }
            }
            Part::Fetch {
                peer,
                room,
                prefill_tp,
            } => {
                let prefill_tp = match prefill_tp {
                    Some(ranks) => ranks,
                    None => app.peers.ranks(&peer, self.time_left()).await?,
                };
                let leg = Leg::Decode {
                    prefill_tp,
                    on_failure: OnFailure::Fail,
                };
                (leg, Kind::Fetch { peer, room })
            }
        };
        let (sender, events) = mpsc::unbounded_channel();
        let mut sampling = submission.sampling.clone();
        // Found in the text, here.
        let stops = std::mem::take(&mut sampling.stop);
        let min_tokens = sampling.min_tokens;
        let submitted = app.handle.submit(Request {
            id: id.clone(),
            prompt: prompt.to_vec(),
            sampling,
            deadline: submission.deadline,
            leg,
            traceparent: submission.traceparent.clone(),
            cache_salt: submission.cache_salt.clone(),
            events: sender,
        });
        let outcome = submitted.map_err(ApiError::from);
        if let Some(Waiting { taken, .. }) = waiting {
            // Its sender may have gone; then the push fails and says so.
            let _ = taken.send(outcome.clone());
        }
        if let Err(error) = outcome {
            if let Kind::Held { room } = kind {
                app.rooms.end(&room, error.clone());
            }
            return Err(error);
        }
        let completions = (0..self.n)
            .map(|completion| {
                Assembler::new(
                    index * self.n + completion,
                    app.text.decoder(submission.skip_special),
                    StopScanner::new(stops.clone(), submission.include_stop),
                    min_tokens,
                )
            })
            .collect();
        // From here on the leg is ended by its drop.
        self.legs.push(LegState {
            id: id.clone(),
            prompt: prompt.to_vec(),
            events: Some(events),
            prompt_logprobs: Vec::new(),
            completions,
            usage: None,
            timer: Timer::new(&app.meters),
            kind,
        });
        if let Some(LegState {
            kind: Kind::Held { room },
            ..
        }) = self.legs.last()
            && let Some(Waiting { ticket, taken }) = app.rooms.hold(room, &id)?
        {
            // It came meanwhile.
            let pushed = app.handle.push_held(&id, ticket).map_err(ApiError::from);
            let _ = taken.send(pushed);
        }
        Ok(())
    }

    /// Time until the deadline.
    pub fn time_left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The next thing that comes of it; `None` at the end.
    ///
    /// # Errors
    ///
    /// It has failed. Nothing follows.
    pub async fn next(&mut self) -> Option<Result<Output, ApiError>> {
        if self.is_over {
            return None;
        }
        let output = poll_fn(|context| self.poll(context)).await;
        if !matches!(output, Some(Ok(_))) {
            self.is_over = true;
        }
        output
    }

    fn poll(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Output, ApiError>>> {
        if self.guard.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(RequestError::Deadline {
                after: self.started.elapsed(),
                phase: "waiting for the engine",
            }
            .into())));
        }
        let legs = self.legs.len();
        for offset in 0..legs {
            let index = (self.next + offset) % legs;
            let leg = &mut self.legs[index];
            match leg.poll(&self.app, self.deadline, context) {
                Poll::Ready(Some(output)) => {
                    self.next = index + 1;
                    return Poll::Ready(Some(output.map_err(ApiError::from)));
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
        if self.legs.iter().all(|leg| leg.events.is_none()) {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    /// What was used, so far.
    pub fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        for leg in &self.legs {
            let usage = leg.usage.unwrap_or_default();
            sum.prompt_tokens += leg.prompt.len();
            sum.cached_tokens += usage.cached_tokens;
            sum.pushed_tokens += usage.pushed_tokens;
            sum.recomputed_tokens += usage.recomputed_tokens;
            sum.completion_tokens += leg.completions.iter().map(Assembler::tokens).sum::<usize>();
        }
        sum
    }

    /// Tokens of the prompt of a completion.
    pub fn prompt_of(&self, completion: usize) -> &[TokenId] {
        let leg = self.legs.get(completion / self.n.max(1));
        leg.map_or(&[], |leg| &leg.prompt)
    }

    /// Log probabilities of the tokens of that prompt, from the second on, if they were asked for.
    pub fn prompt_logprobs_of(&self, completion: usize) -> &[TokenLogprob] {
        let leg = self.legs.get(completion / self.n.max(1));
        leg.map_or(&[], |leg| &leg.prompt_logprobs)
    }

    /// Completions of all prompts.
    pub fn completions(&self) -> usize {
        self.n * self.legs.len()
    }

    /// The room of the first prompt, if it is held.
    pub fn room(&self) -> Option<&str> {
        match &self.legs.first()?.kind {
            Kind::Held { room } => Some(room),
            _ => None,
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for leg in &mut self.legs {
            if leg.events.take().is_some() {
                self.app.handle.abort(&leg.id);
                if let Kind::Held { room } = &leg.kind {
                    self.app.rooms.end(room, RequestError::Aborted.into());
                }
            }
        }
    }
}

impl LegState {
    fn poll(
        &mut self,
        app: &Arc<App>,
        deadline: Instant,
        context: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Output, RequestError>>> {
        if let Kind::Fetching(hand_over) = &mut self.kind
            && let Poll::Ready(result) = Pin::new(&mut hand_over.0).poll(context)
        {
            self.kind = Kind::Direct;
            let result = result.unwrap_or_else(|error| {
                Err(RequestError::Internal(format!("handing over: {error}")))
            });
            if let Err(error) = result {
                return Poll::Ready(Some(Err(error)));
            }
        }
        while let Some(events) = &mut self.events {
            let Poll::Ready(event) = events.poll_recv(context) else {
                return Poll::Pending;
            };
            if let Some(output) = self.take(event, app, deadline, context) {
                return Poll::Ready(Some(output));
            }
        }
        Poll::Ready(None)
    }

    /// One event. `None`: nothing to show.
    fn take(
        &mut self,
        event: Option<Event>,
        app: &Arc<App>,
        deadline: Instant,
        context: &mut std::task::Context<'_>,
    ) -> Option<Result<Output, RequestError>> {
        match event {
            Some(Event::Reserved { ticket }) => match &self.kind {
                Kind::Fetch { peer, room } => {
                    let (peer, room, app) = (peer.clone(), room.clone(), Arc::clone(app));
                    let patience = deadline.saturating_duration_since(Instant::now());
                    self.kind = Kind::Fetching(HandOver(tokio::spawn(async move {
                        let peers = &app.peers;
                        peers.hand_over(&peer, &room, &ticket, patience).await
                    })));
                    // Polled the next time around.
                    context.waker().wake_by_ref();
                    None
                }
                _ => Some(Ok(Output::Reserved(ticket))),
            },
            Some(Event::PromptLogprobs(tokens)) => {
                let text = app.text.as_ref();
                self.prompt_logprobs = tokens
                    .iter()
                    .map(|token| TokenLogprob::of(token, text))
                    .collect();
                None
            }
            Some(Event::Token(token)) => {
                self.timer.token();
                let assembled = self
                    .completions
                    .get_mut(token.index)?
                    .push(&token, app.text.as_ref());
                if assembled.stopped {
                    app.handle.finish(&self.id, token.index);
                }
                assembled.chunk.map(|chunk| Ok(Output::Chunk(chunk)))
            }
            Some(Event::Finished { index, reason }) => {
                let chunk = self.completions.get_mut(index)?.finish(reason);
                let are_handed = self.completions.iter().all(Assembler::is_finished);
                if reason == FinishReason::Handed && are_handed {
                    self.let_go(app);
                }
                chunk.map(|chunk| Ok(Output::Chunk(chunk)))
            }
            Some(Event::Done(usage)) => {
                self.timer.done();
                self.usage = Some(usage);
                self.events = None;
                self.end_room(app, None);
                if matches!(self.kind, Kind::Fetching(_)) {
                    // The pages are here, whatever the answer to the ticket will be.
                    self.kind = Kind::Direct;
                }
                None
            }
            Some(Event::Failed(error)) => {
                self.events = None;
                self.end_room(app, Some(&error));
                Some(Err(error))
            }
            None => {
                let error = RequestError::Internal("the engine has dropped the request".into());
                self.events = None;
                self.end_room(app, Some(&error));
                Some(Err(error))
            }
        }
    }

    /// A held prefill has its first token: the answer can go, the blocks stay until the ticket has come and they have
    /// been pushed, or until the deadline.
    fn let_go(&mut self, app: &Arc<App>) {
        let Kind::Held { room } = &self.kind else {
            return;
        };
        let Some(mut events) = self.events.take() else {
            return;
        };
        let (room, app) = (room.clone(), Arc::clone(app));
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    Event::Done(_) => break,
                    Event::Failed(error) => {
                        tracing::warn!(%error, room, "a held prefill has failed");
                        app.rooms.end(&room, error.into());
                        return;
                    }
                    _ => {}
                }
            }
            app.rooms.end(&room, ended());
        });
    }

    fn end_room(&self, app: &App, error: Option<&RequestError>) {
        if let Kind::Held { room } = &self.kind {
            let error = error.cloned().map_or_else(ended, ApiError::from);
            app.rooms.end(room, error);
        }
    }
}

fn ended() -> ApiError {
    ApiError::new(
        axum::http::StatusCode::NOT_FOUND,
        "room_ended",
        "the prefill of this room has ended",
    )
}
