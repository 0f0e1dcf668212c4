//! The built-in models: small, llama-shaped, with weights from a generator, so that a first run needs no download.
//!
//! They answer with printable ASCII without meaning. Weights depend on nothing but the variant.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use super::{
    BuiltIn, ModelConfig, ModelError,
    file::{Kind, Source, Tensor},
    tokenizer::bytes,
};

impl Source for BuiltIn {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let (name, layers, heads, kv_heads, intermediate) = match self {
            Self::Tiny => ("kvpush-tiny", 4, 8, 4, 512),
            Self::TinyThree => ("kvpush-tiny-three", 3, 6, 3, 384),
        };
        let digest = Sha256::digest(format!("{name} 1"));
        Ok(ModelConfig {
            name: name.into(),
            digest: digest.into(),
            vocab: bytes::VOCAB,
            layers,
            heads,
            kv_heads,
            head_dim: 32,
            hidden: heads * 32,
            intermediate,
            rope_theta: 10_000.0,
            norm_epsilon: 1e-5,
            context: 4096,
            eos: vec![bytes::END],
        })
    }

    fn find(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        let config = self.config()?;
        let (hidden, inner) = (config.hidden, config.intermediate);
        let of_layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let (rows, columns) = match of_layer.map_or(name, |(_, rest)| rest) {
            "token_embd.weight" | "output.weight" => (config.vocab, hidden),
            "attn_norm.weight" | "ffn_norm.weight" | "output_norm.weight" => (1, hidden),
            "attn_q.weight" | "attn_output.weight" => (hidden, hidden),
            "attn_k.weight" | "attn_v.weight" => (config.kv_heads * config.head_dim, hidden),
            "ffn_gate.weight" | "ffn_up.weight" => (inner, hidden),
            "ffn_down.weight" => (hidden, inner),
            _ => return Ok(None),
        };
        let seed = Sha256::digest(format!("{} {name}", config.name));
        let mut state = u64::from_le_bytes(std::array::from_fn(|i| seed[i]));
        // Uniform, and so wide that a product keeps the size of what it is applied to.
        let width = 3.5 / (columns as f32).sqrt();
        let mut data = Vec::with_capacity(rows * columns * 4);
        for row in 0..rows {
            for _ in 0..columns {
                let uniform = splitmix(&mut state);
                let value = match name {
                    _ if rows == 1 => 1.0 + 0.2 * uniform,
                    "token_embd.weight" => uniform,
                    // Only what can be shown is likely.
                    "output.weight" if !bytes::is_printable(row as u32) => 0.0,
                    _ => width * uniform,
                };
                data.extend_from_slice(&value.to_le_bytes());
            }
        }
        Tensor::new(name, Kind::F32, (rows, columns), Cow::Owned(data)).map(Some)
    }

    fn has_adjacent_pairs(&self) -> bool {
        false
    }
}

/// A number from -1 to 1 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
fn splitmix(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ z >> 31) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
