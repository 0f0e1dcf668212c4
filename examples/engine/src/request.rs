//! What is asked of an engine, and what comes back. Plain data: every layer may use it.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// A block of the KV cache: the tokens of one page, of all layers and ranks. It is the page number of every rank's
/// kvpush pool.
pub type BlockId = u32;

/// One request.
#[derive(Debug)]
pub struct Request {
    /// Unique among those under way; in logs, metrics and the name of grants.
    pub id: String,
    /// The prompt, at least one token.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen, and when to stop.
    pub sampling: SamplingParams,
    /// When it is given up.
    pub deadline: Instant,
    /// Which part of the work is done here.
    pub leg: Leg,
    /// W3C `traceparent`, passed on to the other leg.
    pub traceparent: Option<String>,
    /// Prefix-cache blocks are shared only among requests with the same salt.
    pub cache_salt: Option<String>,
    /// Where events go. A closed receiver aborts the request within one step.
    pub events: mpsc::UnboundedSender<Event>,
}

/// Which part of a request an engine does.
#[derive(Clone, Debug, Default)]
pub enum Leg {
    /// All of it.
    #[default]
    Both,
    /// Prefill, push the pages to where the ticket says, choose the first token and send it with them.
    Prefill {
        /// What the decode engine has issued, as bytes.
        ticket: Vec<u8>,
    },
    /// Prefill for a decode engine that asks for the pages only later (`kv_transfer_params` relay): the blocks are held
    /// until the request's deadline, or until a ticket comes for this request's id. [`Event::Finished`] says that the
    /// prompt is computed and held, [`Event::Done`] that it has been pushed. In between the receiver may be dropped.
    PrefillHeld,
    /// Reserve blocks, answer with [`Event::Reserved`], decode once they have arrived.
    Decode {
        /// Tensor parallel ranks of the prefill engine: each of them gets grants of its own.
        prefill_tp: u32,
        /// What to do when the pages do not arrive.
        on_failure: OnFailure,
    },
}

/// Which part of the work an engine takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Whole requests, and either leg if it has peers.
    #[default]
    Both,
    /// Prefill legs.
    Prefill,
    /// Decode legs.
    Decode,
}

impl Role {
    /// Whether it takes requests of this kind.
    pub fn takes(self, leg: &Leg) -> bool {
        match (self, leg) {
            (Self::Both, _) => true,
            (Self::Prefill, Leg::Prefill { .. } | Leg::PrefillHeld) => true,
            (Self::Decode, Leg::Decode { .. }) => true,
            (Self::Prefill | Self::Decode, _) => false,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "both" => Ok(Self::Both),
            "prefill" => Ok(Self::Prefill),
            "decode" => Ok(Self::Decode),
            _ => Err(format!("{text:?} is no role: both, prefill, decode")),
        }
    }
}

/// What a decode engine does when pages do not arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// End the request with the reason.
    #[default]
    Fail,
    /// Compute the prompt here. Counted in metrics.
    Recompute,
}

/// How tokens are chosen, and when to stop. The fields are OpenAI's and vLLM's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Do not stop before that many.
    pub min_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Subtracted from what has been generated, once.
    pub presence_penalty: f32,
    /// Subtracted from what has been generated, for each time.
    pub frequency_penalty: f32,
    /// Divides what has been seen; 1 is none.
    pub repetition_penalty: f32,
    /// Makes the choice reproducible.
    pub seed: Option<u64>,
    /// Independent completions of the prompt.
    pub n: usize,
    /// Alternatives to report for each token; `None` reports no log probabilities.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Strings that end the text (looked for in the text by the server, which then aborts).
    pub stop: Vec<String>,
    /// Tokens that end it.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: None,
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logit_bias: Vec::new(),
        }
    }
}

/// What an engine tells about a request, in order. [`Event::Done`] or [`Event::Failed`] is the last.
#[derive(Clone, Debug)]
pub enum Event {
    /// Decode leg: blocks are reserved; who has these bytes may push to them.
    Reserved {
        /// Encoded [`crate::transfer::Ticket`].
        ticket: Vec<u8>,
    },
    /// Log probabilities of the prompt's tokens from the second on, before the first [`Event::Token`], if asked for. A
    /// decode leg does not send it: the prefill leg does.
    PromptLogprobs(Vec<Token>),
    /// A token has been chosen. Tokens that end a completion are sent too.
    Token(Token),
    /// One of the `n` completions has ended.
    Finished {
        /// Which.
        index: usize,
        /// Why.
        reason: FinishReason,
    },
    /// All of it has ended.
    Done(Usage),
    /// It has ended otherwise.
    Failed(RequestError),
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Of which completion.
    pub index: usize,
    /// The token.
    pub id: TokenId,
    /// Its log probability, if asked for.
    pub logprob: Option<f32>,
    /// The most likely alternatives, likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a completion has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, or a stop token or string.
    Stop,
    /// `max_tokens` or the model's context.
    Length,
    /// The prefill leg is done: the other leg goes on.
    Handed,
}

/// What was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, over all completions.
    pub completion_tokens: usize,
    /// Tokens of the prompt whose keys and values came from another engine.
    pub pushed_tokens: usize,
    /// Tokens of the prompt computed here although they should have come from another engine.
    pub recomputed_tokens: usize,
}

/// Why a request has failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The request cannot be served as it is.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
        /// The parameter.
        param: Option<&'static str>,
    },
    /// Prompt and completion do not fit into the model's context.
    #[error(
        "this model's context is {context} tokens; the prompt has {prompt}, and {max_tokens} are to be generated"
    )]
    ContextLength {
        /// Tokens of the context.
        context: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Asked for.
        max_tokens: usize,
    },
    /// No room in the queue, or for blocks.
    #[error("the engine is busy: {what}; try again in {retry_after:?}")]
    Busy {
        /// What has run out.
        what: &'static str,
        /// A guess.
        retry_after: Duration,
    },
    /// The engine is going away.
    #[error("the engine is draining")]
    Draining,
    /// Its time is up.
    #[error("deadline exceeded after {after:?}, while {phase}")]
    Deadline {
        /// Since it came.
        after: Duration,
        /// What it was doing.
        phase: &'static str,
    },
    /// The other leg's pages did not come, or could not be sent.
    #[error("KV transfer: {message}")]
    Transfer {
        /// Why, with peer and reason.
        message: String,
        /// Whether the same may work later.
        is_retryable: bool,
    },
    /// The client has gone.
    #[error("aborted")]
    Aborted,
    /// A fault of the engine.
    #[error("internal error: {0}")]
    Internal(String),
}

impl RequestError {
    /// Whether the same request may succeed later or elsewhere.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Invalid { .. }
            | Self::ContextLength { .. }
            | Self::Aborted
            | Self::Internal(_) => false,
            Self::Busy { .. } | Self::Draining => true,
            Self::Deadline { .. } => false,
            Self::Transfer { is_retryable, .. } => *is_retryable,
        }
    }
}
