//! The model: weights, tokenizer, and a forward pass over paged keys and values.
//!
//! Invariant: the bits that are computed for a token depend on nothing but the tokens before it, the weights, the type
//! of the cache and the number of ranks: not on the blocks, the chunks, the rest of the batch, the threads or the
//! machine's instruction set. The engine thread owns the model; its ranks' threads belong to it.
//!
//! | Module | Does |
//! |---|---|
//! | `file`, `builtin` | where tensors come from: GGUF, safetensors, a generator |
//! | `load` | sharing tensors out over ranks, packing them |
//! | `forward` | the layers, ranks, all-reduce, two-batch overlap |
//! | `kernels`, `simd` | what a layer is made of; vectors of the instruction set found at run time |
//! | `kv` | pages, FP8 |
//! | `tokenizer` | tokens, chat templates |
//! | [`fetch`] | the model that the tests and the demo use |

mod builtin;
pub mod fetch;
mod file;
mod forward;
mod kernels;
mod kv;
mod load;
mod simd;
mod tokenizer;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use self::tokenizer::{Detokenizer, Message, Tokenizer};
use self::file::{Source as _, gguf::Gguf, safetensors::Folder};
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
    /// Rank 0 has posted its part of a sum over ranks. With two-batch overlap it computes the other micro-batch before
    /// it takes the sum.
    fn exchange_started(&mut self, _layer: usize, _part: Part, _chunks: std::ops::Range<usize>) {}
    /// Rank 0 has taken the sum.
    fn exchange_ended(&mut self, _layer: usize, _part: Part, _chunks: std::ops::Range<usize>) {}
}

/// The parts of a layer, each with a sum over ranks at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Self-attention.
    Attention,
    /// The feed-forward network.
    FeedForward,
}

/// Hears nothing.
impl Observer for () {
    fn layer_written(&mut self, _layer: usize, _chunks: std::ops::Range<usize>) {}
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

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Made up here.
    BuiltIn(BuiltIn),
    /// A GGUF file.
    Gguf(PathBuf),
    /// A folder with `config.json`, `*.safetensors` and `tokenizer.json`.
    Safetensors(PathBuf),
}

impl Source {
    /// A file is GGUF, a folder is safetensors, `tiny` and `tiny-three` are built in.
    pub fn of(text: &str) -> Self {
        let path = Path::new(text);
        match text {
            "tiny" => Self::BuiltIn(BuiltIn::Tiny),
            "tiny-three" => Self::BuiltIn(BuiltIn::TinyThree),
            _ if path.is_dir() => Self::Safetensors(path.into()),
            _ => Self::Gguf(path.into()),
        }
    }
}

/// Models that need no file. They are deterministic, and make printable text without meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BuiltIn {
    /// 4 layers, 8 heads, 4 KV heads: 1, 2 or 4 ranks.
    #[default]
    Tiny,
    /// 3 layers, 6 heads, 3 KV heads: 1 or 3 ranks.
    TinyThree,
}

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightMode {
    /// As in the file, where there are kernels for it: 4 and 8 bits and f32; 6 bits become 8, other floats f32.
    #[default]
    AsIs,
    /// 32-bit floats.
    F32,
    /// 8 bits, quantised when they are loaded.
    Q8_0,
}

/// Room for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// That many blocks.
    Blocks(u32),
    /// As many blocks as fit into so many bytes, all ranks together.
    Bytes(u64),
}

/// What to load, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The model.
    pub source: Source,
    /// Ranks.
    pub tp: u32,
    /// Room for keys and values.
    pub memory: Memory,
    /// Tokens of a block: 16.
    pub block_tokens: usize,
    /// Element type of keys and values.
    pub kv_dtype: KvDtype,
    /// How weights are kept.
    pub weights: WeightMode,
    /// Threads of all ranks together; 0 is one for each core. Each rank has at least one.
    pub threads: usize,
    /// Two-batch overlap: a batch of several chunks is computed as two whose computation and all-reduces interleave.
    pub tbo: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            source: Source::BuiltIn(BuiltIn::Tiny),
            tp: 1,
            memory: Memory::Blocks(1024),
            block_tokens: 16,
            kv_dtype: KvDtype::F32,
            weights: WeightMode::AsIs,
            threads: 0,
            tbo: false,
        }
    }
}

/// Loads a model.
///
/// # Errors
///
/// Files that cannot be read or make no sense, models or options that are not supported, no memory.
pub fn load(options: &LoadOptions) -> Result<Box<dyn Model>, ModelError> {
    match &options.source {
        Source::BuiltIn(built_in) => load::load_from(built_in, options),
        Source::Gguf(path) => load::load_from(&Gguf::open(path)?, options),
        Source::Safetensors(path) => load::load_from(&Folder::open(path)?, options),
    }
}

/// The tokenizer of a model.
///
/// # Errors
///
/// As [`load`].
pub fn tokenizer_of(source: &Source) -> Result<Tokenizer, ModelError> {
    match source {
        Source::BuiltIn(_) => Tokenizer::bytes(),
        Source::Gguf(path) => tokenizer::from_gguf::tokenizer(Gguf::open(path)?.metadata()),
        Source::Safetensors(path) => Tokenizer::from_folder(path, Folder::open(path)?.config()?.eos),
    }
}

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A batch that makes no sense.
    #[error("impossible batch: {0}")]
    Batch(String),
    /// A file that cannot be read.
    #[error("{}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file whose contents make no sense.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Tensors that are missing, or have other shapes than the configuration says.
    #[error("the weights do not fit: {0}")]
    Shape(String),
    /// A model, or a part of a file, that this engine does not know.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Options that do not go with each other, or with the model.
    #[error("impossible options: {0}")]
    Options(String),
    /// Text that cannot be made tokens, or a tokenizer that cannot be made.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that cannot be used.
    #[error("chat template: {0}")]
    Template(String),
    /// Memory for keys and values.
    #[error("KV cache: {0}")]
    Memory(#[from] kvpush::memory::MemoryError),
    /// A thread cannot be started.
    #[error("a rank's thread: {0}")]
    Thread(std::io::Error),
    /// A rank has failed; the model cannot be used any more.
    #[error("a rank has failed; load the model again")]
    Rank,
}

impl ModelError {
    fn tokenizer(error: impl std::fmt::Display) -> Self {
        Self::Tokenizer(error.to_string())
    }

    fn template(error: impl std::fmt::Display) -> Self {
        Self::Template(error.to_string())
    }
}
