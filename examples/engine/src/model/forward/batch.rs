//! A batch as the ranks see it: checked, flat, in one or two micro-batches.

use std::{ops::Range, sync::atomic::AtomicUsize};

use crate::{
    model::{Chunk, ModelConfig, ModelError, Wanted, kernels::attention::Sequence},
    request::{BlockId, TokenId},
};

/// Where a token's keys and values go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) position: usize,
    pub(crate) block: BlockId,
    pub(crate) slot: usize,
}

/// Chunks that are computed together.
#[derive(Debug, Default)]
pub(crate) struct Micro {
    pub(crate) chunks: Range<usize>,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) places: Vec<Place>,
    pub(crate) sequences: Vec<Sequence>,
    /// Rows for which logits are wanted.
    pub(crate) wanted: Vec<usize>,
    /// How often a rank has written the keys and values of a layer.
    pub(crate) written: AtomicUsize,
}

/// One call of `forward`.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) micros: Vec<Micro>,
}

impl Step {
    /// `tbo`: in two micro-batches, of about as many tokens, if there are two chunks.
    pub(crate) fn new(
        batch: &[Chunk<'_>],
        config: &ModelConfig,
        (blocks, block_tokens): (u32, usize),
        tbo: bool,
    ) -> Result<Self, ModelError> {
        if batch.is_empty() {
            return Err(ModelError::Batch("no chunks".into()));
        }
        for (index, chunk) in batch.iter().enumerate() {
            check(chunk, config, blocks, block_tokens)
                .map_err(|what| ModelError::Batch(format!("chunk {index}: {what}")))?;
        }
        let total: usize = batch.iter().map(|chunk| chunk.tokens.len()).sum();
        let mut first = 0;
        let mut split = 0;
        while tbo && batch.len() > 1 && split < batch.len() - 1 && 2 * first < total {
            first += batch[split].tokens.len();
            split += 1;
        }
        let ranges = [0..split, split..batch.len()];
        let micros = ranges
            .into_iter()
            .filter(|range| !range.is_empty())
            .map(|range| Micro::new(batch, range, block_tokens))
            .collect();
        Ok(Self { micros })
    }
}

impl Micro {
    fn new(batch: &[Chunk<'_>], chunks: Range<usize>, block_tokens: usize) -> Self {
        let mut micro = Self {
            chunks: chunks.clone(),
            ..Self::default()
        };
        for chunk in &batch[chunks] {
            let first = micro.tokens.len();
            for (i, token) in chunk.tokens.iter().enumerate() {
                let position = chunk.start + i;
                micro.tokens.push(*token);
                micro.places.push(Place {
                    position,
                    block: chunk.blocks[position / block_tokens],
                    slot: position % block_tokens,
                });
            }
            let rows = first..micro.tokens.len();
            match chunk.logits {
                Wanted::None => {}
                Wanted::Last => micro.wanted.push(rows.end - 1),
                Wanted::All => micro.wanted.extend(rows.clone()),
            }
            micro.sequences.push(Sequence {
                rows,
                start: chunk.start,
                blocks: chunk.blocks.to_vec(),
            });
        }
        micro
    }
}

fn check(
    chunk: &Chunk<'_>,
    config: &ModelConfig,
    blocks: u32,
    block_tokens: usize,
) -> Result<(), String> {
    if chunk.tokens.is_empty() {
        return Err("no tokens".into());
    }
    let end = chunk.start.saturating_add(chunk.tokens.len());
    if end > config.context {
        return Err(format!(
            "position {} is beyond the context of {}",
            end - 1,
            config.context
        ));
    }
    if chunk.blocks.len() < end.div_ceil(block_tokens) {
        return Err(format!(
            "{} blocks do not hold {end} tokens",
            chunk.blocks.len()
        ));
    }
    if let Some(block) = chunk.blocks.iter().find(|block| **block >= blocks) {
        return Err(format!("block {block} of {blocks}"));
    }
    let is_foreign = |token: &&TokenId| **token as usize >= config.vocab;
    if let Some(token) = chunk.tokens.iter().find(is_foreign) {
        return Err(format!(
            "token {token} of a vocabulary of {}",
            config.vocab
        ));
    }
    Ok(())
}
