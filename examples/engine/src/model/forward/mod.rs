//! The forward pass: a batch goes through all ranks, and the logits come back.
//!
//! The caller's thread is rank 0; each further rank has a thread of its own, named `kvpush-rank-N`, and each rank a
//! [`team`]. After a rank has failed (a panic, or memory that cannot be reached) every later call fails too.

pub(crate) mod batch;
pub(crate) mod exchange;
pub(crate) mod rank;
pub(crate) mod team;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use self::{
    batch::Step,
    exchange::Exchange,
    rank::{Happening, Rank},
};
use super::{
    Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer, kernels::product::Panels,
};

/// A loaded model of the llama family.
pub(crate) struct Llama {
    config: ModelConfig,
    block_tokens: usize,
    blocks: u32,
    tbo: bool,
    shards: Vec<KvShard>,
    exchange: Arc<Exchange>,
    first: Rank,
    others: Vec<Other>,
}

/// A rank on a thread of its own. Dropping the sender ends it.
struct Other {
    steps: Option<mpsc::Sender<Arc<Step>>>,
    results: mpsc::Receiver<Result<Vec<Panels>, ModelError>>,
    thread: Option<JoinHandle<()>>,
}

impl Llama {
    pub(crate) fn new(
        config: ModelConfig,
        (blocks, block_tokens): (u32, usize),
        tbo: bool,
        mut ranks: Vec<Rank>,
        exchange: Arc<Exchange>,
    ) -> Result<Self, ModelError> {
        let shards = ranks.iter().map(|rank| rank.cache.shard()).collect();
        if ranks.is_empty() {
            return Err(ModelError::Options("no ranks".into()));
        }
        let first = ranks.remove(0);
        let mut others = Vec::new();
        for rank in ranks {
            others.push(Other::start(rank, Arc::clone(&exchange))?);
        }
        Ok(Self {
            config,
            block_tokens,
            blocks,
            tbo,
            shards,
            exchange,
            first,
            others,
        })
    }
}

impl Other {
    fn start(mut rank: Rank, exchange: Arc<Exchange>) -> Result<Self, ModelError> {
        let (steps, inbox) = mpsc::channel::<Arc<Step>>();
        let (outbox, results) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("kvpush-rank-{}", rank.rank))
            .spawn(move || {
                for step in inbox {
                    let result = guarded(&mut rank, &step, &exchange, &mut |_, _| ());
                    if outbox.send(result).is_err() {
                        break;
                    }
                }
            })
            .map_err(ModelError::Thread)?;
        Ok(Self {
            steps: Some(steps),
            results,
            thread: Some(thread),
        })
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been told by `forward`.
            let _ = thread.join();
        }
    }
}

/// Runs a step; when it fails, those who wait for this rank fail too.
fn guarded(
    rank: &mut Rank,
    step: &Step,
    exchange: &Exchange,
    hear: &mut dyn FnMut(Happening, Range<usize>),
) -> Result<Vec<Panels>, ModelError> {
    let result = catch_unwind(AssertUnwindSafe(|| rank.run(step, hear)));
    let result = result.unwrap_or(Err(ModelError::Rank));
    if result.is_err() {
        exchange.fail();
    }
    result
}

impl Model for Llama {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    fn blocks(&self) -> u32 {
        self.blocks
    }

    fn shards(&self) -> &[KvShard] {
        &self.shards
    }

    fn forward(
        &mut self,
        batch: &[Chunk<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError> {
        let blocks = (self.blocks, self.block_tokens);
        let step = Arc::new(Step::new(batch, &self.config, blocks, self.tbo)?);
        for other in &self.others {
            let sent = other.steps.as_ref().map(|steps| steps.send(Arc::clone(&step)));
            if !matches!(sent, Some(Ok(()))) {
                self.exchange.fail();
            }
        }
        let mut hear = |what: Happening, chunks: Range<usize>| match what {
            Happening::Written(layer) => observer.layer_written(layer, chunks),
            Happening::Computed(layer) => observer.layer_computed(layer, chunks),
            Happening::ExchangeStarted(layer, part) => {
                observer.exchange_started(layer, part, chunks);
            }
            Happening::ExchangeEnded(layer, part) => observer.exchange_ended(layer, part, chunks),
        };
        // Everyone has to be heard before anything is returned: a rank must not be in two steps.
        let mut parts = vec![guarded(&mut self.first, &step, &self.exchange, &mut hear)];
        for other in &self.others {
            parts.push(other.results.recv().unwrap_or(Err(ModelError::Rank)));
        }
        let parts: Vec<Vec<Panels>> = parts.into_iter().collect::<Result<_, _>>()?;
        Ok(join(&parts, &step, self.config.vocab))
    }
}

/// Puts the ranks' parts of the vocabulary side by side.
fn join(parts: &[Vec<Panels>], step: &Step, vocab: usize) -> Logits {
    let wanted = |index: usize| step.micros[index].wanted.len();
    let rows: usize = (0..step.micros.len()).map(wanted).sum();
    let mut values = Vec::with_capacity(rows * vocab);
    for (index, micro) in step.micros.iter().enumerate() {
        for row in 0..micro.wanted.len() {
            let end = values.len() + vocab;
            for part in parts {
                let panels = &part[index];
                for group in panels.data.chunks(panels.rows.max(1)) {
                    values.extend_from_slice(&group[row].0[..16.min(end - values.len())]);
                }
            }
        }
    }
    Logits { values, vocab }
}
