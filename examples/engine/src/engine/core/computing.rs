//! The forward pass of a step: chunks for the model, finished layers for the pushes.

use std::ops::Range;

use super::{
    Core,
    job::{Job, Role},
    scheduling::Row,
};
use crate::{
    engine::sampling::with_logprobs,
    model::{Chunk, Logits, Observer, Wanted},
    request::{BlockId, RequestError, Token},
    transfer::{RequestNumber, TransferError, Transfers},
};

/// What of a prompt's blocks is whole after a chunk.
struct Part<'a> {
    number: RequestNumber,
    positions: Range<usize>,
    blocks: &'a [BlockId],
}

/// Tells the transfers which blocks have a layer.
struct Pushing<'a> {
    transfers: Option<&'a mut Box<dyn Transfers>>,
    /// For each chunk of the batch.
    parts: Vec<Option<Part<'a>>>,
    failed: Vec<(RequestNumber, TransferError)>,
}

impl Observer for Pushing<'_> {
    fn layer_written(&mut self, layer: usize, chunks: Range<usize>) {
        let Some(transfers) = &mut self.transfers else {
            return;
        };
        for part in self.parts.get_mut(chunks).into_iter().flatten() {
            let Some(it) = part else { continue };
            let positions = it.positions.clone();
            if let Err(error) = transfers.layer(it.number, layer, positions, it.blocks) {
                self.failed.push((it.number, error));
                *part = None;
            }
        }
    }
}

impl Core {
    pub(super) fn compute(&mut self, rows: &[Row]) {
        let block_tokens = self.model.block_tokens();
        let (mut chunks, mut parts) = (Vec::new(), Vec::new());
        for row in rows {
            let Some((job, chunk)) = chunk(self.jobs.get(&row.number), row) else {
                unreachable!("a row of a request that is not under way");
            };
            let end = chunk.start + chunk.tokens.len();
            let positions = job.unsent(end, block_tokens);
            parts.push(positions.filter(|p| !p.is_empty()).map(|positions| Part {
                number: row.number,
                blocks: &chunk.blocks[positions.clone()],
                positions,
            }));
            chunks.push(chunk);
        }
        let wanted: Vec<_> = chunks.iter().map(|chunk| chunk.logits).collect();
        let mut pushing = Pushing {
            transfers: self.transfers.as_mut(),
            parts,
            failed: Vec::new(),
        };
        let result = self.model.forward(&chunks, &mut pushing);
        let failed = pushing.failed;
        for row in rows {
            self.note_sent(row);
        }
        for (number, error) in failed {
            self.fail(number, error.into());
        }
        match result {
            Ok(logits) => self.computed(rows, &wanted, &logits),
            Err(error) => {
                tracing::error!(%error, "the forward pass has failed");
                for row in rows {
                    self.fail(row.number, RequestError::Internal(error.to_string()));
                }
            }
        }
    }

    /// What was whole after the chunk has been handed over, even if the chunk or the push has failed since.
    fn note_sent(&mut self, row: &Row) {
        let block_tokens = self.block_tokens();
        let Some(job) = self.jobs.get_mut(&row.number) else {
            return;
        };
        let computed = job.sequences.first().map_or(0, |s| s.computed);
        let sent = job.unsent(computed + row.tokens, block_tokens);
        if let (Some(positions), Some(push)) = (sent, job.push()) {
            push.sent = positions.end;
        }
    }

    fn computed(&mut self, rows: &[Row], wanted: &[Wanted], logits: &Logits) {
        let mut next = 0;
        for (row, wanted) in rows.iter().zip(wanted) {
            let count = match wanted {
                Wanted::None => 0,
                Wanted::Last => 1,
                Wanted::All => row.tokens,
            };
            let its_rows = next..next + count;
            next += count;
            self.advance(row);
            if *wanted == Wanted::All {
                self.note_prompt_logprobs(row, its_rows.clone(), logits);
            }
            let is_whole = self
                .jobs
                .get(&row.number)
                .and_then(|job| job.sequences.get(row.sequence))
                .is_some_and(|sequence| sequence.remaining() == 0);
            if is_whole && count > 0 {
                self.generate(row.number, row.sequence, logits.row(its_rows.end - 1));
            }
        }
    }

    /// The row's tokens have keys and values; full blocks can be found.
    fn advance(&mut self, row: &Row) {
        let Some(job) = self.jobs.get_mut(&row.number) else {
            return;
        };
        if let Some(sequence) = job.sequences.get_mut(row.sequence) {
            let again = sequence.had.min(sequence.computed + row.tokens);
            self.stats.preempted_tokens += again.saturating_sub(sequence.computed) as u64;
            sequence.computed += row.tokens;
        }
        self.publish(row.number, row.sequence);
    }

    /// Full blocks can be found from now on.
    pub(super) fn publish(&mut self, number: RequestNumber, sequence: usize) {
        let block_tokens = self.block_tokens();
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let Some(it) = job.sequences.get_mut(sequence) else {
            return;
        };
        if !self.config.prefix_cache {
            return;
        }
        let full = it.computed / block_tokens;
        let tokens = &it.tokens[..full * block_tokens];
        self.hashing.extend(&job.root, tokens, &mut it.names);
        for place in it.published..full {
            let parent = place.checked_sub(1).map(|before| it.names[before]);
            let tokens = &tokens[place * block_tokens..(place + 1) * block_tokens];
            self.pool
                .publish(it.blocks[place], it.names[place], parent, tokens);
        }
        it.published = full.max(it.published);
    }

    fn note_prompt_logprobs(&mut self, row: &Row, its_rows: Range<usize>, logits: &Logits) {
        let Some(job) = self.jobs.get_mut(&row.number) else {
            return;
        };
        let alternatives = job.params.prompt_logprobs.unwrap_or(0);
        let (Some(found), Some(sequence)) = (&mut job.prompt_logprobs, job.sequences.first())
        else {
            return;
        };
        let first = sequence.computed - row.tokens;
        for (position, index) in (first..).zip(its_rows) {
            // A row tells of the token after it. Some rows come again after a preemption.
            if position + 1 < job.prompt && position == found.len() {
                let id = sequence.tokens[position + 1];
                let choice = with_logprobs(logits.row(index), id, alternatives);
                found.push(Token {
                    index: 0,
                    id,
                    logprob: choice.logprob,
                    top: choice.top,
                });
            }
        }
    }
}

fn chunk<'a>(job: Option<&'a Job>, row: &Row) -> Option<(&'a Job, Chunk<'a>)> {
    let job = job?;
    let sequence = job.sequences.get(row.sequence)?;
    let (start, end) = (sequence.computed, sequence.computed + row.tokens);
    let wants_prompt = job.prompt_logprobs.is_some() && start < job.prompt;
    let logits = if wants_prompt {
        Wanted::All
    } else if end == sequence.tokens.len() {
        Wanted::Last
    } else {
        Wanted::None
    };
    let chunk = Chunk {
        tokens: sequence.tokens.get(start..end)?,
        start,
        blocks: &sequence.blocks,
        logits,
    };
    Some((job, chunk))
}

impl Job {
    /// For an open push: the blocks that are whole once `computed` tokens have keys and values, and have not been
    /// handed over.
    pub(super) fn unsent(&self, computed: usize, block_tokens: usize) -> Option<Range<usize>> {
        let Role::Prefill(push) = &self.role else {
            return None;
        };
        if !self.is_travelling {
            return None;
        }
        // The last block goes when the prompt ends, full or not.
        let whole = if computed >= self.prompt {
            self.prompt.div_ceil(block_tokens)
        } else {
            computed / block_tokens
        };
        Some(push.sent..whole.max(push.sent))
    }
}

impl From<TransferError> for RequestError {
    fn from(error: TransferError) -> Self {
        Self::Transfer {
            message: error.message,
            is_retryable: error.is_retryable,
        }
    }
}
