//! Shapes of known models, from the `config.json` each is published with.

use super::shard::{ShardError, shard_heads};
use super::{Dtype, presets::KvShape};

/// What of a model decides the size of its KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// Name for tables and options.
    pub name: &'static str,
    /// `num_hidden_layers`.
    pub layers: u32,
    /// `num_key_value_heads`; 1 for MLA, whose latent is one head held by every rank.
    pub kv_heads: u32,
    /// Elements of a head: `head_dim`, or `kv_lora_rank + qk_rope_head_dim` for MLA.
    pub head_dim: u32,
    /// Element type of the cache.
    pub dtype: Dtype,
    /// Whether a layer is one latent plane rather than keys and values.
    pub mla: bool,
}

impl Model {
    /// The shape of the shard that `rank` of `tp` holds.
    ///
    /// # Errors
    /// As [`shard_heads`].
    pub fn shard(&self, tokens_per_page: u32, tp: u32, rank: u32) -> Result<KvShape, ShardError> {
        Ok(KvShape {
            layers: self.layers,
            tokens_per_page,
            heads: shard_heads(self.kv_heads, tp, rank)?,
            head_dim: self.head_dim,
            dtype: self.dtype,
        })
    }

    /// The model of that name, in any case.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ALL.iter()
            .find(|model| model.name.eq_ignore_ascii_case(name))
    }
}

const fn gqa(name: &'static str, layers: u32, kv_heads: u32) -> Model {
    Model {
        name,
        layers,
        kv_heads,
        head_dim: 128,
        dtype: Dtype::Bf16,
        mla: false,
    }
}

/// Llama 3.1 8B: 32 layers, 8 KV heads of 128, bf16.
pub const LLAMA_3_1_8B: Model = gqa("llama-3.1-8b", 32, 8);
/// Llama 3.1 70B: 80 layers, 8 KV heads of 128, bf16.
pub const LLAMA_3_1_70B: Model = gqa("llama-3.1-70b", 80, 8);
/// Qwen3 32B: 64 layers, 8 KV heads of 128, bf16.
pub const QWEN3_32B: Model = gqa("qwen3-32b", 64, 8);
/// Qwen3 235B A22B: 94 layers, 4 KV heads of 128, bf16.
pub const QWEN3_235B_A22B: Model = gqa("qwen3-235b-a22b", 94, 4);
/// DeepSeek R1: 61 layers of MLA, latent 512 + rotary 64, bf16.
pub const DEEPSEEK_R1: Model = Model {
    name: "deepseek-r1",
    layers: 61,
    kv_heads: 1,
    head_dim: 512 + 64,
    dtype: Dtype::Bf16,
    mla: true,
};
/// DeepSeek R1 with an FP8 cache.
pub const DEEPSEEK_R1_FP8: Model = Model {
    name: "deepseek-r1-fp8",
    dtype: Dtype::F8E4M3,
    ..DEEPSEEK_R1
};

/// All of them.
pub const ALL: [Model; 6] = [
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    QWEN3_32B,
    QWEN3_235B_A22B,
    DEEPSEEK_R1,
    DEEPSEEK_R1_FP8,
];
