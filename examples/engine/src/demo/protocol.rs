//! Lines of JSON between the demo and its two engines, over their standard input and output.
//!
//! Not an interface: both ends are this program. Tests use it to have engines that can be killed.

use serde::{Deserialize, Serialize};

use crate::request::{FinishReason, RequestError, TokenId, Usage};

/// To an engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Begin a request.
    Submit(Submit),
    /// End one.
    Abort(String),
    /// Say how it is: [`Reply::State`].
    State,
}

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submit {
    /// Its id.
    pub id: String,
    /// Its prompt.
    pub prompt: Vec<TokenId>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Alternatives to report.
    pub logprobs: Option<usize>,
    /// Whether to go on after an end of sequence.
    pub ignore_eos: bool,
    /// It may take so long.
    pub deadline_ms: u64,
    /// Which part of it.
    pub leg: Leg,
}

/// As [`crate::request::Leg`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Leg {
    /// All.
    Both,
    /// Prefill for this ticket.
    Prefill(Vec<u8>),
    /// Decode what these ranks prefill, and compute it here if they do not.
    Decode {
        /// Ranks of the prefill engine.
        prefill_tp: u32,
        /// Whether to compute it here if it does not come.
        recompute: bool,
    },
}

/// From an engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// It takes commands.
    Ready(Ready),
    /// Something happened with a request.
    Event {
        /// Which.
        id: String,
        /// Microseconds since the epoch.
        at: u64,
        /// What.
        what: What,
    },
    /// An answer to [`Command::State`].
    State(State),
}

/// What an engine is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ready {
    /// Its model.
    pub model: String,
    /// Its ranks.
    pub tp: usize,
    /// Its layers.
    pub layers: usize,
    /// Its rails.
    pub rails: Vec<String>,
}

/// What happens with a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum What {
    /// Blocks are reserved.
    Reserved(Vec<u8>),
    /// A token.
    Token {
        /// Which.
        id: TokenId,
        /// The likeliest, and their log probabilities' bits.
        top: Vec<(TokenId, u32)>,
    },
    /// It has come to an end by itself.
    Finished {
        /// Whether the other leg goes on.
        is_handed: bool,
    },
    /// It is done.
    Done {
        /// Tokens of the prompt that were found here.
        cached: usize,
        /// Those that came from another engine.
        pushed: usize,
        /// Those that should have.
        recomputed: usize,
    },
    /// It has failed.
    Failed {
        /// Why.
        message: String,
        /// Whether it may work later.
        is_retryable: bool,
    },
}

impl What {
    /// As said by an engine.
    pub fn finished(reason: FinishReason) -> Self {
        Self::Finished {
            is_handed: reason == FinishReason::Handed,
        }
    }

    /// As said by an engine.
    pub fn done(usage: Usage) -> Self {
        Self::Done {
            cached: usage.cached_tokens,
            pushed: usage.pushed_tokens,
            recomputed: usage.recomputed_tokens,
        }
    }

    /// As said by an engine.
    pub fn failed(error: &RequestError) -> Self {
        Self::Failed {
            message: error.to_string(),
            is_retryable: error.is_retryable(),
        }
    }
}

/// How an engine is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Blocks by what they are.
    pub blocks: Blocks,
    /// Requests that have not ended, those whose transfer has not included.
    pub live: usize,
    /// Tokens of prompts computed here although they should have come.
    pub recomputed_tokens: u64,
    /// Bytes that were pushed.
    pub bytes_pushed: u64,
    /// Bytes that arrived.
    pub bytes_arrived: u64,
    /// When each layer of the last prefill ended, and the bytes posted by then.
    pub layers: Vec<LayerEnd>,
    /// Rails that have carried bytes away.
    pub used: Vec<String>,
    /// Grants and pushes of the endpoint that have not ended.
    pub transfers: u64,
}

/// As [`crate::engine::BlockStats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// All.
    pub total: usize,
    /// Free, or with a prefix that nobody uses.
    pub available: usize,
    /// In use.
    pub used: usize,
    /// Being written by another engine.
    pub granted: usize,
    /// Perhaps still written: set aside.
    pub lost: usize,
}

/// The end of a layer's computation, in a prefill engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerEnd {
    /// Which.
    pub layer: usize,
    /// Bytes that the endpoint had posted by then, since it was started.
    pub posted: u64,
    /// Bytes of this layer, those of the layers before it, and of the passes before, without what the other side held.
    pub computed: u64,
    /// Bytes of this layer.
    pub bytes: u64,
}

impl LayerEnd {
    /// Whether all bytes of the layers before this one had been posted.
    pub fn is_overlapped(&self) -> bool {
        self.posted + self.bytes >= self.computed
    }
}
