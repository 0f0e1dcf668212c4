//! Loading: a source's tensors, shared out over ranks and packed for the kernels.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{
    KvDtype, LoadOptions, Memory, Model, ModelConfig, ModelError, WeightMode,
    file::Source,
    forward::{
        Llama,
        exchange::Exchange,
        rank::{Layer, Rank},
        team::Team,
    },
    kernels::{
        attention::{Heads, PAGE},
        matrix::{Format, GROUP, Matrix},
        rotary::Rotary,
    },
    kv::{Cache, MAX_HEAD_DIM, Shape},
    simd::{F32x16, Isa},
};

/// Loads `source` as `options` say (all but their source).
pub(super) fn load_from(
    source: &dyn Source,
    options: &LoadOptions,
) -> Result<Box<dyn Model>, ModelError> {
    let mut config = source.config()?;
    check(&config, options)?;
    config.digest = digest(&config, options);
    let isa = Isa::detect();
    let tp = options.tp as usize;
    let heads = kvpush::kv::shard::shard_heads;
    let rotary = {
        let factors = match source.find("rope_freqs.weight")? {
            Some(_) => source.vector("rope_freqs.weight", config.head_dim / 2)?,
            None => Vec::new(),
        };
        let dim = config.head_dim;
        Arc::new(Rotary::new(config.rope_theta, dim, config.context, &factors))
    };
    let exchange = Arc::new(Exchange::new(tp));
    let loader = Loader {
        source,
        config: &config,
        mode: options.weights,
    };
    let (head_shards, embedding) = loader.vocabulary(tp)?;
    let norm = lanes(&source.vector("output_norm.weight", config.hidden)?);
    let mut shape = Shape {
        layers: config.layers,
        heads: heads(config.kv_heads as u32, options.tp, 0)
            .map_err(|error| ModelError::Options(error.to_string()))?,
        head_dim: config.head_dim,
        block_tokens: options.block_tokens,
        blocks: 0,
        dtype: options.kv_dtype,
    };
    shape.blocks = blocks(options.memory, shape.block_bytes() * tp)?;
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut ranks = Vec::new();
    for rank in 0..tp {
        shape.heads = heads(config.kv_heads as u32, options.tp, rank as u32)
            .map_err(|error| ModelError::Options(error.to_string()))?;
        let layers = (0..config.layers)
            .map(|layer| loader.layer(layer, rank, tp))
            .collect::<Result<_, _>>()?;
        let team = Team::new(&format!("kvpush-rank-{rank}"), (threads / tp).max(1));
        ranks.push(Rank {
            rank,
            ranks: tp,
            isa,
            team: team.map_err(ModelError::Thread)?,
            heads: Heads {
                group: config.heads / config.kv_heads,
                kv_heads: config.kv_heads / tp,
                head_dim: config.head_dim,
            },
            hidden: config.hidden,
            epsilon: config.norm_epsilon,
            embedding: Arc::clone(&embedding),
            layers,
            norm: norm.clone(),
            head: Arc::clone(&head_shards[rank]),
            rotary: Arc::clone(&rotary),
            cache: Cache::new(shape, rank)?,
            exchange: Arc::clone(&exchange),
            tickets: 0,
            scratch: Default::default(),
        });
    }
    tracing::info!(
        model = config.name,
        ranks = tp,
        threads,
        blocks = shape.blocks,
        block_bytes = shape.block_bytes(),
        instructions = isa.name(),
        "model loaded"
    );
    let blocks = (shape.blocks, options.block_tokens);
    Ok(Box::new(Llama::new(
        config,
        blocks,
        options.tbo,
        ranks,
        exchange,
    )?))
}

fn check(config: &ModelConfig, options: &LoadOptions) -> Result<(), ModelError> {
    let unsupported = |what: String| Err(ModelError::Unsupported(what));
    let tp = options.tp as usize;
    if tp == 0 || !config.kv_heads.is_multiple_of(tp) {
        return Err(ModelError::Options(format!(
            "{} has {} KV heads, which {tp} ranks cannot share evenly",
            config.name, config.kv_heads
        )));
    }
    if options.block_tokens != PAGE {
        return Err(ModelError::Options(format!(
            "blocks have {PAGE} tokens, not {}",
            options.block_tokens
        )));
    }
    if config.kv_heads == 0 || !config.heads.is_multiple_of(config.kv_heads) {
        return unsupported(format!(
            "{} heads over {} KV heads",
            config.heads, config.kv_heads
        ));
    }
    if config.head_dim == 0 || !config.head_dim.is_multiple_of(32) || config.head_dim > MAX_HEAD_DIM
    {
        return unsupported(format!(
            "heads of {} elements; they must be a multiple of 32, and at most {MAX_HEAD_DIM}",
            config.head_dim
        ));
    }
    if config.hidden == 0 || !config.hidden.is_multiple_of(32) {
        return unsupported(format!(
            "a width of {}, which is no multiple of 32",
            config.hidden
        ));
    }
    if config.intermediate == 0 || !config.intermediate.is_multiple_of(32 * tp) {
        return unsupported(format!(
            "{} feed-forward elements over {tp} ranks, which is no multiple of 32 each",
            config.intermediate
        ));
    }
    if config.layers == 0 || config.vocab == 0 || config.context == 0 {
        return unsupported("a model without layers, vocabulary or context".into());
    }
    Ok(())
}

/// Of the source and of all that shapes keys and values.
fn digest(config: &ModelConfig, options: &LoadOptions) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(config.digest);
    let weights = match options.weights {
        WeightMode::AsIs => 0u8,
        WeightMode::Q8_0 => 1,
        WeightMode::F32 => 2,
    };
    let dtype = match options.kv_dtype {
        KvDtype::F32 => 0u8,
        KvDtype::Fp8E4m3 => 1,
    };
    hasher.update([1, weights, dtype]);
    hasher.update((options.block_tokens as u64).to_le_bytes());
    hasher.finalize().into()
}

fn blocks(memory: Memory, block_bytes: usize) -> Result<u32, ModelError> {
    let blocks = match memory {
        Memory::Blocks(blocks) => u64::from(blocks),
        Memory::Bytes(bytes) => bytes / block_bytes as u64,
    };
    let fits = blocks.checked_mul(block_bytes as u64).is_some();
    match u32::try_from(blocks) {
        Ok(blocks) if blocks > 0 && fits => Ok(blocks),
        _ => Err(ModelError::Options(format!(
            "{memory:?} is {blocks} blocks of {block_bytes} bytes"
        ))),
    }
}

fn lanes(values: &[f32]) -> Vec<F32x16> {
    let lanes = |chunk: &[f32]| F32x16(std::array::from_fn(|i| chunk[i]));
    values.chunks_exact(16).map(lanes).collect()
}

struct Loader<'a> {
    source: &'a dyn Source,
    config: &'a ModelConfig,
    mode: WeightMode,
}

impl Loader<'_> {
    /// Each rank's part of the output matrix, and the embedding: where they are tied, the same parts.
    #[expect(clippy::type_complexity)]
    fn vocabulary(
        &self,
        tp: usize,
    ) -> Result<(Vec<Arc<Matrix>>, Arc<Vec<Arc<Matrix>>>), ModelError> {
        let (vocab, hidden) = (self.config.vocab, self.config.hidden);
        let name = "token_embd.weight";
        let embedding = self.source.matrix(name, vocab, hidden)?;
        let untied = self.source.find("output.weight")?.is_some();
        let output = match untied {
            true => self.source.matrix("output.weight", vocab, hidden)?,
            false => self.source.matrix(name, vocab, hidden)?,
        };
        let format = output.kind().format(self.mode);
        let groups = vocab.div_ceil(GROUP);
        let mut shards = Vec::new();
        for rank in 0..tp {
            let first = (groups * rank / tp * GROUP).min(vocab);
            let end = (groups * (rank + 1) / tp * GROUP).min(vocab);
            let matrix = Matrix::pack(&output, format, end - first, &|r| first + r, 0..hidden)?;
            shards.push(Arc::new(matrix));
        }
        let embedding = match untied {
            true => {
                let format = match embedding.kind().format(self.mode) {
                    Format::Q4 => Format::Q8,
                    format => format,
                };
                vec![Arc::new(Matrix::pack(
                    &embedding,
                    format,
                    vocab,
                    &|r| r,
                    0..hidden,
                )?)]
            }
            false => shards.clone(),
        };
        Ok((shards, Arc::new(embedding)))
    }

    fn layer(&self, layer: usize, rank: usize, tp: usize) -> Result<Layer, ModelError> {
        let c = self.config;
        let name = |what: &str| format!("blk.{layer}.{what}.weight");
        for what in ["attn_q", "attn_k", "attn_v"] {
            let bias = format!("blk.{layer}.{what}.bias");
            if self.source.find(&bias)?.is_some() {
                return Err(ModelError::Unsupported(format!("{bias}: biases")));
            }
        }
        let vector = |what| Ok::<_, ModelError>(lanes(&self.source.vector(&name(what), c.hidden)?));
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let inner = c.intermediate;
        let part = |size: usize| size / tp * rank..size / tp * (rank + 1);
        let rows = |what: &str, size: usize, is_rotary: bool| {
            let tensor = self.source.matrix(&name(what), size, c.hidden)?;
            let mine = part(size);
            let is_rotary = is_rotary && self.source.has_adjacent_pairs();
            let row_at = |row: usize| {
                let row = mine.start + row;
                if !is_rotary {
                    return row;
                }
                // Element i of the first half is at 2 i, of the second at 2 i + 1.
                let (head, element) = (row / c.head_dim, row % c.head_dim);
                let (half, i) = (element / (c.head_dim / 2), element % (c.head_dim / 2));
                head * c.head_dim + 2 * i + half
            };
            let format = tensor.kind().format(self.mode);
            Matrix::pack(&tensor, format, mine.len(), &row_at, 0..c.hidden)
        };
        let columns = |what: &str, size: usize| {
            let tensor = self.source.matrix(&name(what), c.hidden, size)?;
            let format = tensor.kind().format(self.mode);
            Matrix::pack(&tensor, format, c.hidden, &|row| row, part(size))
        };
        Ok(Layer {
            attention_norm: vector("attn_norm")?,
            qkv: vec![
                rows("attn_q", q, true)?,
                rows("attn_k", kv, true)?,
                rows("attn_v", kv, false)?,
            ],
            output: vec![columns("attn_output", q)?],
            feed_forward_norm: vector("ffn_norm")?,
            gate_up: vec![rows("ffn_gate", inner, false)?, rows("ffn_up", inner, false)?],
            down: vec![columns("ffn_down", inner)?],
        })
    }
}
