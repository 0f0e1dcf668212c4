//! A model without weights, for tests: its keys and values are a chained hash of the tokens, its logits a hash of every
//! byte of keys and values that attention would read.
//!
//! Invariant: the logits are [`reference()`]'s only if every byte of every block before the token is what it should be: a
//! block that is stale, partial, of another sequence or of another prefix changes them.

use std::{sync::Arc, time::Duration};

use kvpush::{
    kv::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole},
    memory::HostMemory,
};

use crate::{
    model::{Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer, Wanted},
    request::{BlockId, TokenId},
};

/// Bytes of one head of one token: a hash.
const HEAD_BYTES: u64 = 8;

/// Shape of a [`FakeModel`].
#[derive(Clone, Debug)]
pub struct Shape {
    /// Blocks there are.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Layers.
    pub layers: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Ranks: a divisor of `kv_heads`.
    pub tp: usize,
    /// Tokens of the vocabulary. The last one ends a sequence.
    pub vocab: usize,
    /// Tokens of the context.
    pub context: usize,
    /// How long each layer takes at least.
    pub layer_time: Duration,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            blocks: 64,
            block_tokens: 16,
            layers: 2,
            kv_heads: 4,
            tp: 1,
            vocab: 256,
            context: 512,
            layer_time: Duration::ZERO,
        }
    }
}

/// See the module.
pub struct FakeModel {
    shape: Shape,
    config: ModelConfig,
    shards: Vec<KvShard>,
}

impl FakeModel {
    /// A model of this shape.
    ///
    /// # Errors
    ///
    /// The shape has nothing of something, or `tp` does not divide its heads, or there is no memory.
    pub fn new(shape: Shape) -> Result<Self, ModelError> {
        let nothing = [
            shape.blocks as usize,
            shape.block_tokens,
            shape.layers,
            shape.tp,
            shape.vocab,
            shape.context,
        ]
        .contains(&0);
        if nothing || shape.kv_heads < shape.tp || !shape.kv_heads.is_multiple_of(shape.tp) {
            return Err(ModelError::Batch(format!("impossible shape: {shape:?}")));
        }
        let shards = (0..shape.tp)
            .map(|rank| shard(&shape, rank))
            .collect::<Result<_, _>>()?;
        let mut digest = [0; 32];
        for (part, value) in [
            shape.layers as u64,
            shape.kv_heads as u64,
            shape.vocab as u64,
            shape.block_tokens as u64,
        ]
        .into_iter()
        .enumerate()
        {
            digest[part * 8..part * 8 + 8].copy_from_slice(&mix(value, 0xd16e57).to_le_bytes());
        }
        let config = ModelConfig {
            name: "fake".to_owned(),
            digest,
            vocab: shape.vocab,
            layers: shape.layers,
            heads: shape.kv_heads,
            kv_heads: shape.kv_heads,
            head_dim: 2,
            hidden: shape.kv_heads * 2,
            intermediate: shape.kv_heads * 2,
            rope_theta: 10_000.0,
            norm_epsilon: 1e-5,
            context: shape.context,
            eos: vec![eos(shape.vocab)],
        };
        Ok(Self {
            shape,
            config,
            shards,
        })
    }

    /// The hash that stands in every head of every layer at `position`, or something else if they differ.
    fn content(&self, blocks: &[BlockId], position: usize) -> Result<u64, ModelError> {
        let mut first = None;
        let mut whole = 0;
        for layer in 0..self.shape.layers {
            for head in 0..self.shape.kv_heads {
                for plane in 0..2 {
                    let (memory, offset) = self.place(blocks, position, layer, head, plane)?;
                    let mut bytes = [0; HEAD_BYTES as usize];
                    memory.read(offset, &mut bytes).map_err(internal)?;
                    let value = u64::from_le_bytes(bytes) ^ name(layer, head, plane);
                    whole = mix(whole, value ^ *first.get_or_insert(value));
                }
            }
        }
        let unharmed = (0..self.shape.layers * self.shape.kv_heads * 2).fold(0, |h, _| mix(h, 0));
        Ok(first.unwrap_or(0) ^ whole ^ unharmed)
    }

    fn place(
        &self,
        blocks: &[BlockId],
        position: usize,
        layer: usize,
        head: usize,
        plane: usize,
    ) -> Result<(&HostMemory, u64), ModelError> {
        let heads = self.shape.kv_heads / self.shape.tp;
        let shard = &self.shards[head / heads];
        let plane = &shard.layout.layers[layer].planes[plane];
        let block = *blocks
            .get(position / self.shape.block_tokens)
            .ok_or_else(|| ModelError::Batch(format!("no block for position {position}")))?;
        let token = (position % self.shape.block_tokens) as u64;
        Ok((
            &shard.memory[0],
            plane.offset
                + u64::from(block) * plane.page_stride
                + token * plane.token_stride
                + (head % heads) as u64 * plane.head_stride,
        ))
    }

    fn check(&self, chunk: &Chunk<'_>) -> Result<(), ModelError> {
        let end = chunk.start + chunk.tokens.len();
        let fault = if chunk.tokens.is_empty() {
            "no tokens"
        } else if end > self.shape.context {
            "beyond the context"
        } else if chunk.blocks.len() < end.div_ceil(self.shape.block_tokens) {
            "too few blocks"
        } else if chunk.blocks.iter().any(|&block| block >= self.shape.blocks) {
            "a block that is not there"
        } else if chunk.tokens.iter().any(|&t| t as usize >= self.shape.vocab) {
            "a token that is not there"
        } else {
            return Ok(());
        };
        Err(ModelError::Batch(fault.to_owned()))
    }
}

impl Model for FakeModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn block_tokens(&self) -> usize {
        self.shape.block_tokens
    }

    fn blocks(&self) -> u32 {
        self.shape.blocks
    }

    fn shards(&self) -> &[KvShard] {
        &self.shards
    }

    fn forward(
        &mut self,
        batch: &[Chunk<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError> {
        let mut contents = Vec::new();
        for chunk in batch {
            self.check(chunk)?;
            let mut content = match chunk.start {
                0 => 0,
                start => self.content(chunk.blocks, start - 1)?,
            };
            let chained = chunk.tokens.iter().map(|&token| {
                content = chain(content, token);
                content
            });
            contents.push(chained.collect::<Vec<_>>());
        }
        for layer in 0..self.shape.layers {
            if !self.shape.layer_time.is_zero() {
                std::thread::sleep(self.shape.layer_time);
            }
            for (chunk, contents) in batch.iter().zip(&contents) {
                for (position, content) in (chunk.start..).zip(contents) {
                    for head in 0..self.shape.kv_heads {
                        for plane in 0..2 {
                            let (memory, offset) =
                                self.place(chunk.blocks, position, layer, head, plane)?;
                            let value = content ^ name(layer, head, plane);
                            memory
                                .write(offset, &value.to_le_bytes())
                                .map_err(internal)?;
                        }
                    }
                }
            }
            observer.layer_written(layer, 0..batch.len());
            observer.layer_computed(layer, 0..batch.len());
        }
        let mut logits = Logits {
            values: Vec::new(),
            vocab: self.shape.vocab,
        };
        for chunk in batch {
            let end = chunk.start + chunk.tokens.len();
            let wanted = match chunk.logits {
                Wanted::None => end,
                Wanted::Last => end - 1,
                Wanted::All => chunk.start,
            };
            let mut seen = 0;
            for position in 0..end {
                seen = mix(seen, self.content(chunk.blocks, position)?);
                if position >= wanted {
                    logits.values.extend(row(seen, self.shape.vocab));
                }
            }
        }
        Ok(logits)
    }
}

/// The logits after `tokens`, without any block.
pub fn reference(tokens: &[TokenId], vocab: usize) -> Vec<f32> {
    let (mut content, mut seen) = (0, 0);
    for &token in tokens {
        content = chain(content, token);
        seen = mix(seen, content);
    }
    row(seen, vocab).collect()
}

/// The token that ends a sequence.
pub fn eos(vocab: usize) -> TokenId {
    TokenId::try_from(vocab - 1).unwrap_or(TokenId::MAX)
}

fn shard(shape: &Shape, rank: usize) -> Result<KvShard, ModelError> {
    let count = shape.kv_heads / shape.tp;
    let number = |n: usize| u32::try_from(n).map_err(internal);
    let token_stride = count as u64 * HEAD_BYTES;
    let page_stride = shape.block_tokens as u64 * token_stride;
    let plane_bytes = u64::from(shape.blocks) * page_stride;
    let heads = HeadRange::new(number(rank * count)?, number(count)?);
    let layers = (0..shape.layers as u64)
        .map(|layer| {
            let planes = [PlaneRole::Key, PlaneRole::Value].into_iter().zip(0..);
            Ok(LayerLayout {
                tokens_per_page: number(shape.block_tokens)?,
                planes: planes
                    .map(|(role, plane)| Plane {
                        role,
                        dtype: Dtype::F32,
                        region: 0,
                        offset: (layer * 2 + plane) * plane_bytes,
                        page_stride,
                        token_stride,
                        head_stride: HEAD_BYTES,
                        head_bytes: HEAD_BYTES as u32,
                        heads,
                    })
                    .collect(),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    let length = shape.layers as u64 * 2 * plane_bytes;
    Ok(KvShard {
        layout: KvLayout {
            pages: shape.blocks,
            layers,
        },
        memory: vec![Arc::new(HostMemory::new(length).map_err(internal)?)],
    })
}

fn internal(error: impl std::fmt::Display) -> ModelError {
    ModelError::Batch(error.to_string())
}

fn name(layer: usize, head: usize, plane: usize) -> u64 {
    mix(0x6b65_7973, ((layer * 1000 + head) * 2 + plane) as u64 + 1)
}

fn chain(content: u64, token: TokenId) -> u64 {
    mix(content, u64::from(token) + 1)
}

fn row(seen: u64, vocab: usize) -> impl Iterator<Item = f32> {
    // Two decimal places between -8 and 8: ties are common enough to be tested.
    (0..vocab as u64).map(move |token| (mix(seen, token) % 1600) as f32 / 100.0 - 8.0)
}

/// splitmix64 of both.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a.rotate_left(17) ^ b).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Observer for Nobody {
        fn layer_written(&mut self, _: usize, _: std::ops::Range<usize>) {}
    }

    fn chunk<'a>(tokens: &'a [TokenId], start: usize, blocks: &'a [BlockId]) -> Chunk<'a> {
        Chunk {
            tokens,
            start,
            blocks,
            logits: Wanted::Last,
        }
    }

    #[test]
    fn chunks_give_the_same_as_the_reference_and_harm_is_seen() {
        let tokens: Vec<TokenId> = (0..40).map(|n| n * 7 % 250).collect();
        for tp in [1, 2, 4] {
            let shape = Shape {
                tp,
                ..Shape::default()
            };
            let mut model = FakeModel::new(shape).expect("a model");
            let blocks = [9, 3, 60];
            let whole = model.forward(&[chunk(&tokens, 0, &blocks)], &mut Nobody);
            assert_eq!(whole.expect("logits").row(0), reference(&tokens, 256));

            let other = [1, 2, 4];
            for part in [0..5, 5..21, 21..39] {
                let start = part.start;
                let part = [chunk(&tokens[part], start, &other)];
                model.forward(&part, &mut Nobody).expect("logits");
            }
            let last = [chunk(&tokens[39..], 39, &other)];
            let logits = model.forward(&last, &mut Nobody).expect("logits");
            assert_eq!(logits.row(0), reference(&tokens, 256));

            // One byte of one head of one rank.
            let (memory, offset) = model.place(&other, 17, 1, 3, 1).expect("a place");
            memory.fill(offset, 1, 0x55).expect("memory");
            let logits = model.forward(&last, &mut Nobody).expect("logits");
            assert_ne!(logits.row(0), reference(&tokens, 256));
        }
    }

    #[test]
    fn impossible_batches_are_refused() {
        let mut model = FakeModel::new(Shape::default()).expect("a model");
        for bad in [
            chunk(&[], 0, &[0]),
            chunk(&[1], 512, &[0; 33]),
            chunk(&[1; 17], 0, &[0]),
            chunk(&[1], 0, &[64]),
            chunk(&[256], 0, &[0]),
        ] {
            assert!(model.forward(&[bad], &mut Nobody).is_err(), "{bad:?}");
        }
        assert!(
            FakeModel::new(Shape {
                tp: 3,
                ..Shape::default()
            })
            .is_err()
        );
    }
}
