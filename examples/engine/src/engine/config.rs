//! What an operator chooses.

use std::time::Duration;

/// Limits and switches of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Tokens computed in one step at most, over all requests.
    pub max_batch_tokens: usize,
    /// Tokens of one prompt computed in one step at most, so that a long prompt does not fill steps alone.
    pub max_chunk_tokens: usize,
    /// Sequences in a step at most. A request with `n` completions counts `n` times.
    pub max_running: usize,
    /// Requests that wait at most. More are refused with [`crate::request::RequestError::Busy`].
    pub max_waiting: usize,
    /// Completions of one request at most.
    pub max_completions: usize,
    /// Alternatives reported for a token at most.
    pub max_logprobs: usize,
    /// Whether blocks of earlier prompts are found again.
    pub prefix_cache: bool,
    /// Goes into every block's hash: engines with different salts do not recognise each other's blocks.
    pub cache_salt: String,
    /// Changes of the prefix cache kept for those who missed them.
    pub kv_event_history: usize,
    /// How long the pages of one request may travel at most; never beyond the request's deadline.
    pub transfer_timeout: Duration,
    /// How long [`super::Handle::shutdown`] waits for transfers to end.
    pub shutdown_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_chunk_tokens: 512,
            max_running: 64,
            max_waiting: 256,
            max_completions: 16,
            max_logprobs: 20,
            prefix_cache: true,
            cache_salt: String::new(),
            kv_event_history: 4096,
            transfer_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(5),
        }
    }
}
