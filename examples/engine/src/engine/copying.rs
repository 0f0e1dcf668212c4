//! Copies a block: for sequences that share a block of which one is about to write.

use crate::{
    model::{KvShard, ModelError},
    request::BlockId,
};

/// Copies keys and values of every layer of every rank.
pub(super) fn copy_block(shards: &[KvShard], from: BlockId, to: BlockId) -> Result<(), ModelError> {
    let bad = |what: String| ModelError::Batch(format!("block {from} cannot be copied: {what}"));
    let mut bytes = Vec::new();
    for shard in shards {
        for layer in &shard.layout.layers {
            for plane in &layer.planes {
                let memory = shard
                    .memory
                    .get(usize::from(plane.region))
                    .ok_or_else(|| bad(format!("there is no region {}", plane.region)))?;
                let token_bytes = u64::from(plane.heads.count) * u64::from(plane.head_bytes);
                let is_dense = plane.head_stride == u64::from(plane.head_bytes)
                    && plane.token_stride == token_bytes;
                // One piece, or one for each head of each token.
                let (tokens, heads, piece) = if is_dense {
                    (1, 1, u64::from(layer.tokens_per_page) * token_bytes)
                } else {
                    let heads = plane.heads.count;
                    (layer.tokens_per_page, heads, plane.head_bytes.into())
                };
                bytes.resize(usize::try_from(piece).unwrap_or(usize::MAX), 0);
                for token in 0..u64::from(tokens) {
                    for head in 0..u64::from(heads) {
                        let at = |block: BlockId| {
                            plane.offset
                                + u64::from(block) * plane.page_stride
                                + token * plane.token_stride
                                + head * plane.head_stride
                        };
                        memory
                            .read(at(from), &mut bytes)
                            .and_then(|()| memory.write(at(to), &bytes))
                            .map_err(|error| bad(error.to_string()))?;
                    }
                }
            }
        }
    }
    Ok(())
}
