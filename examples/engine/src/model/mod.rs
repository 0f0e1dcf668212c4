//! The model: weights, tokenizer, and a forward pass over paged keys and values.
//!
//! Invariant: what is computed for a token depends on nothing but the tokens before it, the batch's shape and the
//! number of ranks. The engine thread owns the model; its ranks' threads belong to it.

use std::sync::Arc;

use crate::request::{BlockId, TokenId};

/// What the model is.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// As `/v1/models` shows it.
    pub name: String,
    /// Digest of the weights and of everything that shapes keys and values: two engines whose digests differ do not
    /// exchange pages.
    pub digest: [u8; 32],
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub intermediate: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Of the RMS norms.
    pub norm_epsilon: f32,
    /// Tokens of the context.
    pub context: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<TokenId>,
}

/// Element type of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// 32-bit floats.
    #[default]
    F32,
    /// 8-bit floats (e4m3) with a scale for each token and head.
    Fp8E4m3,
}

/// One rank's keys and values.
#[derive(Clone)]
pub struct KvShard {
    /// Where everything lies. Page numbers are [`BlockId`]s.
    pub layout: kvpush::kv::KvLayout,
    /// One memory for each region of the layout.
    pub memory: Vec<Arc<kvpush::memory::HostMemory>>,
}

/// Part of one sequence, computed in one step.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The tokens, at least one.
    pub tokens: &'a [TokenId],
    /// The position of the first.
    pub start: usize,
    /// The sequence's blocks from position 0 on; they cover the chunk's last token.
    pub blocks: &'a [BlockId],
    /// For which tokens logits are wanted.
    pub logits: Wanted,
}

/// For which tokens of a chunk logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// For none: more of the prompt follows.
    None,
    /// For the last.
    Last,
    /// For all.
    All,
}

/// Rows of logits, in the order of chunks and tokens.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// `rows * vocab` values.
    pub values: Vec<f32>,
    /// Values of a row.
    pub vocab: usize,
}

impl Logits {
    /// One row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..(index + 1) * self.vocab]
    }
}

/// Hears of the forward pass, on the thread that called it.
pub trait Observer {
    /// All ranks have written the keys and values of `layer` for the chunks `chunks` (a range of the batch: all of it,
    /// or one micro-batch of two-batch overlap). Returns at once.
    fn layer_written(&mut self, layer: usize, chunks: std::ops::Range<usize>);
    /// The feed-forward part of `layer` has ended for these chunks.
    fn layer_computed(&mut self, _layer: usize, _chunks: std::ops::Range<usize>) {}
}

/// A model that is loaded.
pub trait Model: Send {
    /// What it is.
    fn config(&self) -> &ModelConfig;
    /// Tokens of a block.
    fn block_tokens(&self) -> usize;
    /// Blocks there are.
    fn blocks(&self) -> u32;
    /// Each rank's cache.
    fn shards(&self) -> &[KvShard];
    /// Computes `batch`: writes keys and values of its tokens, returns the logits wanted.
    ///
    /// # Errors
    ///
    /// The batch is impossible (no tokens, blocks missing or out of range, positions beyond the context, a token
    /// beyond the vocabulary), or a rank has failed.
    fn forward(
        &mut self,
        batch: &[Chunk<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError>;
}

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A batch that makes no sense.
    #[error("impossible batch: {0}")]
    Batch(String),
}
