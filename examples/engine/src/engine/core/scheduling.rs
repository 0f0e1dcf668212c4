//! What is computed in a step: first one token for each sequence that generates, then parts of prompts in the order
//! in which they came, then those who wait; all within a budget of tokens.
//!
//! When blocks run out, the request that came last gives up its blocks and waits again: so the one that came first
//! always gets on, and two never take blocks from each other in turn.

use std::time::Instant;

use super::{
    Core,
    admitting::Admission,
    job::{Job, Phase, Role},
};
use crate::{
    engine::copying::copy_block, model::ModelError, request::RequestError, transfer::RequestNumber,
};

/// Values of logits in one step at most, for requests that want those of their prompt.
const MOST_LOGITS: usize = 1 << 24;

/// Part of a sequence.
pub(super) struct Row {
    pub(super) number: RequestNumber,
    pub(super) sequence: usize,
    /// From the first without keys and values on.
    pub(super) tokens: usize,
}

struct Batch {
    rows: Vec<Row>,
    budget: usize,
}

enum Room {
    Enough,
    NoBlock,
    Failed(ModelError),
}

impl Core {
    pub(super) fn schedule(&mut self, now: Instant) -> Vec<Row> {
        let preemptions = self.stats.preemptions;
        let mut batch = Batch {
            rows: Vec::new(),
            budget: self.config.max_batch_tokens.max(1),
        };
        for is_chunk in [false, true] {
            for number in self.running.clone() {
                self.add(number, is_chunk, &mut batch);
            }
        }
        while self.stats.preemptions == preemptions
            && let Some(&number) = self.waiting.front()
            && (batch.budget > 0 || self.computes_nothing(number))
        {
            match self.admit(number, now) {
                Admission::Running => {
                    self.add(number, true, &mut batch);
                    self.add(number, false, &mut batch);
                }
                Admission::Elsewhere => {}
                Admission::NoRoom => break,
            }
        }
        batch.rows
    }

    fn computes_nothing(&self, number: RequestNumber) -> bool {
        let job = self.jobs.get(&number);
        job.is_some_and(|job| matches!(job.role, Role::Decode { .. }) && !job.was_admitted)
    }

    /// Adds what the job's sequences can do: more than one token if `is_chunk`, else one.
    fn add(&mut self, number: RequestNumber, is_chunk: bool, batch: &mut Batch) {
        for sequence in 0.. {
            let Some(job) = self.jobs.get(&number) else {
                return;
            };
            let Some(it) = job.sequences.get(sequence) else {
                return;
            };
            if job.phase != Phase::Running {
                return;
            }
            if it.is_finished || !self.follow(number, sequence) {
                continue;
            }
            let Some(job) = self.jobs.get(&number) else {
                return;
            };
            let it = &job.sequences[sequence];
            if (it.remaining() > 1) != is_chunk {
                continue;
            }
            let most = self.most_tokens(job).min(batch.budget);
            let tokens = it.remaining().min(most);
            if tokens == 0 {
                return;
            }
            if self.make_room(number, sequence, tokens, batch) {
                batch.budget -= tokens;
                batch.rows.push(Row {
                    number,
                    sequence,
                    tokens,
                });
            }
        }
    }

    /// After a preemption one sequence computes the prompt again, and the others wait until they can share its full
    /// blocks: so a request never needs more blocks than it was admitted for. Says whether the sequence may go on.
    fn follow(&mut self, number: RequestNumber, sequence: usize) -> bool {
        let block_tokens = self.block_tokens();
        let Some(job) = self.jobs.get_mut(&number) else {
            return false;
        };
        let leader = job.leader();
        let shared = job.prompt / block_tokens;
        if sequence == leader || !job.sequences[sequence].blocks.is_empty() {
            return true;
        }
        if job.sequences[leader].computed < shared * block_tokens {
            return false;
        }
        let blocks = job.sequences[leader].blocks[..shared].to_vec();
        blocks.iter().for_each(|&block| self.pool.share(block));
        let it = &mut job.sequences[sequence];
        it.blocks = blocks;
        it.computed = shared * block_tokens;
        it.published = shared;
        true
    }

    fn most_tokens(&self, job: &Job) -> usize {
        let most = self.config.max_chunk_tokens.max(1);
        match job.prompt_logprobs {
            Some(_) => most.min((MOST_LOGITS / self.model.config().vocab).max(1)),
            None => most,
        }
    }

    /// Blocks for the sequence's next tokens, taken from others if need be. If not, it is not running any more.
    fn make_room(
        &mut self,
        number: RequestNumber,
        sequence: usize,
        tokens: usize,
        batch: &mut Batch,
    ) -> bool {
        loop {
            match self.extend(number, sequence, tokens) {
                Room::Enough => return true,
                Room::Failed(error) => {
                    batch.drop_rows(number);
                    self.fail(number, RequestError::Internal(error.to_string()));
                    return false;
                }
                Room::NoBlock => {
                    let is_preemptible =
                        |n: &&RequestNumber| self.jobs.get(n).is_some_and(Job::is_preemptible);
                    let Some(&last) = self.running.iter().rev().find(is_preemptible) else {
                        return false;
                    };
                    batch.drop_rows(last);
                    self.preempt(last);
                    if last == number {
                        return false;
                    }
                }
            }
        }
    }

    fn extend(&mut self, number: RequestNumber, sequence: usize, tokens: usize) -> Room {
        let block_tokens = self.block_tokens();
        let job = self.jobs.get_mut(&number);
        let Some(it) = job.and_then(|job| job.sequences.get_mut(sequence)) else {
            return Room::NoBlock;
        };
        // Copy on write: others see the block as it was.
        if let Some(block) = it.blocks.get_mut(it.computed / block_tokens)
            && self.pool.is_shared(*block)
        {
            let Some(own) = self.pool.allocate() else {
                return Room::NoBlock;
            };
            if let Err(error) = copy_block(self.model.shards(), *block, own) {
                self.pool.release(own);
                return Room::Failed(error);
            }
            self.pool.release(std::mem::replace(block, own));
            self.stats.blocks_copied += 1;
        }
        while it.blocks.len() * block_tokens < it.computed + tokens {
            let Some(block) = self.pool.allocate() else {
                return Room::NoBlock;
            };
            it.blocks.push(block);
        }
        Room::Enough
    }

    /// Takes a job's blocks; it computes again what it has, unless it is found in the prefix cache.
    fn preempt(&mut self, number: RequestNumber) {
        self.running.retain(|&other| other != number);
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        tracing::debug!(id = job.id, "preempted");
        for sequence in job.sequences.iter_mut().filter(|s| !s.is_finished) {
            sequence.had = sequence.had.max(sequence.computed);
            self.pool.release_all(sequence.blocks.drain(..));
            sequence.computed = 0;
            sequence.published = 0;
        }
        self.stats.preemptions += 1;
        self.queue(number);
    }
}

impl Batch {
    fn drop_rows(&mut self, number: RequestNumber) {
        self.rows.retain(|row| {
            let stays = row.number != number;
            self.budget += if stays { 0 } else { row.tokens };
            stays
        });
    }
}
