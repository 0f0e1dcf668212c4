//! What an operator sees: plain numbers.

/// An engine at the end of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences being computed.
    pub running: usize,
    /// Requests in the queue, and those that were preempted.
    pub waiting: usize,
    /// Requests that compute nothing now: decode legs whose pages are on their way, prefill legs that hold or push
    /// theirs, and ended requests whose transfer has not ended yet.
    pub parked: usize,
    /// Blocks of the KV cache.
    pub blocks: BlockStats,
    /// Steps that computed something.
    pub steps: u64,
    /// Requests taken.
    pub requests: u64,
    /// Requests refused when they were submitted.
    pub refused: u64,
    /// Requests that ended with [`crate::request::Event::Done`].
    pub succeeded: u64,
    /// Requests that ended with [`crate::request::Event::Failed`], without the aborted.
    pub failed: u64,
    /// Requests that were aborted, or whose receiver was closed.
    pub aborted: u64,
    /// Tokens of prompts of requests that were admitted.
    pub prompt_tokens: u64,
    /// Of these, found in the prefix cache.
    pub cached_tokens: u64,
    /// Of these, whose keys and values came from another engine.
    pub pushed_tokens: u64,
    /// Of these, computed here although they should have come from another engine.
    pub recomputed_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens computed again after a preemption.
    pub preempted_tokens: u64,
    /// Requests whose blocks were taken back because others needed them.
    pub preemptions: u64,
    /// Blocks copied because several sequences had the same and one was about to write.
    pub blocks_copied: u64,
    /// Cached blocks evicted.
    pub blocks_evicted: u64,
    /// Pushes opened.
    pub pushes: u64,
    /// Pushes that did not end well.
    pub pushes_failed: u64,
    /// Bytes of pushes that ended well.
    pub bytes_pushed: u64,
    /// Reservations made.
    pub reservations: u64,
    /// Reservations whose pages did not arrive.
    pub reservations_failed: u64,
    /// Bytes that arrived.
    pub bytes_arrived: u64,
}

/// Blocks by what they are. Each is one of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// All.
    pub total: usize,
    /// With nothing in them.
    pub free: usize,
    /// With a prefix that nobody uses now. Evicted when blocks are needed.
    pub cached: usize,
    /// In use.
    pub used: usize,
    /// Being written by another engine.
    pub granted: usize,
    /// Perhaps still written by another engine: not used again before the process ends.
    pub lost: usize,
}

impl BlockStats {
    /// Those that can be taken now.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}
