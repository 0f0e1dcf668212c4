//! Changes of the prefix cache as server-sent events, with replay: what a gateway needs to know which blocks are here.
//!
//! `GET /kv_events?from=N`: every event from sequence number N on (1 is the first), and then those to come. Without
//! `from`, those to come. `Last-Event-ID` is understood. Where events are missing, and for `from=0`, an event `reset`
//! says to start again from an empty set; what is in the cache now follows, as if it had just been stored.

use std::{collections::VecDeque, convert::Infallible, sync::Arc};

use axum::{
    extract::{Query, State},
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::{App, error::ApiError};
use crate::engine::{KvChange, KvEvent};

/// One thing to tell a listener.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// Start again from an empty set. After what is in the cache comes the event with this number.
    Reset(u64),
    /// The next event.
    Event(KvEvent),
}

/// Events without gaps, or with a reset where there is one.
pub struct Feed {
    app: Arc<App>,
    live: broadcast::Receiver<KvEvent>,
    ready: VecDeque<Told>,
    /// The number of the next event; `None`: any.
    next: Option<u64>,
}

impl Feed {
    /// From this sequence number on.
    pub fn new(app: &Arc<App>, from: Option<u64>) -> Self {
        // First, so that none is missed in between.
        let live = app.handle.subscribe_kv_events();
        let mut feed = Self {
            app: Arc::clone(app),
            live,
            ready: VecDeque::new(),
            next: from,
        };
        match from {
            None => {}
            Some(0) => feed.reset(),
            Some(from) => feed.replay(from),
        }
        feed
    }

    /// What is there now, from an empty set on.
    fn reset(&mut self) {
        let snapshot = self.app.handle.kv_snapshot();
        let block_size = self.app.handle.block_tokens();
        let sequence = snapshot.sequence;
        self.next = Some(sequence + 1);
        self.ready.push_back(Told::Reset(sequence + 1));
        let stored = snapshot.blocks.into_iter().map(|block| KvChange::Stored {
            hashes: vec![block.hash],
            parent: block.parent,
            tokens: block.tokens,
            block_size,
        });
        let events = stored.map(|change| KvEvent { sequence, change });
        self.ready.extend(events.map(Told::Event));
    }

    fn replay(&mut self, from: u64) {
        let replay = self.app.handle.replay_kv_events(from);
        if !replay.is_complete {
            return self.reset();
        }
        if let Some(last) = replay.events.last() {
            self.next = Some(last.sequence + 1);
        }
        self.ready
            .extend(replay.events.into_iter().map(Told::Event));
    }

    /// The next thing; `None` when the engine has gone.
    pub async fn next(&mut self) -> Option<Told> {
        loop {
            if let Some(told) = self.ready.pop_front() {
                return Some(told);
            }
            match self.live.recv().await {
                Ok(event) => match self.next {
                    // Told already, by a replay.
                    Some(next) if event.sequence < next => {}
                    Some(next) if event.sequence > next => self.replay(next),
                    _ => {
                        self.next = Some(event.sequence + 1);
                        return Some(Told::Event(event));
                    }
                },
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    if let Some(next) = self.next {
                        self.replay(next);
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// An event's data.
pub fn event_json(event: &KvEvent) -> Value {
    let hex = |hashes: &[crate::engine::BlockHash]| -> Vec<String> {
        hashes.iter().map(ToString::to_string).collect()
    };
    match &event.change {
        KvChange::Stored {
            hashes,
            parent,
            tokens,
            block_size,
        } => json!({
            "sequence": event.sequence,
            "type": "stored",
            "hashes": hex(hashes),
            "parent": parent.as_ref().map(ToString::to_string),
            "tokens": tokens,
            "block_size": block_size,
        }),
        KvChange::Removed { hashes } => json!({
            "sequence": event.sequence,
            "type": "removed",
            "hashes": hex(hashes),
        }),
        KvChange::Cleared => json!({"sequence": event.sequence, "type": "cleared"}),
    }
}

/// The query.
#[derive(Deserialize)]
pub struct From {
    from: Option<u64>,
}

/// `GET /kv_events`.
///
/// # Errors
///
/// 400: `from` is no number.
pub async fn kv_events(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    query: Result<Query<From>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid("from", error.body_text()))?;
    let last_seen = headers
        .get("last-event-id")
        .and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let from = query.from.or(last_seen.and_then(|id| id.checked_add(1)));
    let feed = Feed::new(&app, from);
    let events = stream::unfold((feed, Arc::clone(&app)), |(mut feed, app)| async move {
        let told = tokio::select! {
            told = feed.next() => told?,
            // A listener must not hold up the end.
            () = app.ended() => return None,
        };
        let event = match told {
            Told::Reset(next) => Event::default()
                .event("reset")
                .data(json!({"type": "reset", "next": next}).to_string()),
            Told::Event(event) => Event::default()
                .event("kv")
                .id(event.sequence.to_string())
                .data(event_json(&event).to_string()),
        };
        Some((Ok::<_, Infallible>(event), (feed, app)))
    });
    Ok(Sse::new(events)
        .keep_alive(KeepAlive::default())
        .into_response())
}
