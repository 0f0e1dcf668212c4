//! Two engines' transfers in one process, over caches that are filled by a formula.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvpush::{
    Auth, Endpoint,
    fabric::FabricKind,
    kv::{
        Dtype,
        presets::{Arrangement, HeadOrder, KvShape, Stacking},
        region_lengths,
        shard::shard_heads,
    },
    memory::HostMemory,
};
use kvpush_engine::{
    model::{Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer},
    request::BlockId,
    transfer::{KvPush, Outcome, RequestNumber, Reserve, Ticket, TransferError, Transfers},
};
use parking_lot::{Condvar, Mutex};

/// Longer than anything takes, unless it never ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const LAYERS: usize = 5;
pub(crate) const KV_HEADS: usize = 12;
pub(crate) const BLOCK_TOKENS: usize = 4;
pub(crate) const BLOCKS: u32 = 40;
const HEAD_DIM: u32 = 6;

/// How a cache lies in memory: the two sides need not agree.
#[derive(Clone, Copy)]
pub(crate) enum Lay {
    Flash,
    PageMajor,
}

/// A model that has a cache and computes nothing.
pub(crate) struct Cache {
    config: ModelConfig,
    shards: Vec<KvShard>,
}

impl Cache {
    pub(crate) fn new(tp: u32, lay: Lay) -> Self {
        let shards = (0..tp).map(|rank| {
            let shape = KvShape {
                layers: LAYERS as u32,
                tokens_per_page: BLOCK_TOKENS as u32,
                heads: shard_heads(KV_HEADS as u32, tp, rank).unwrap(),
                head_dim: HEAD_DIM,
                dtype: Dtype::F32,
            };
            let layout = match lay {
                Lay::Flash => shape.vllm_flash(BLOCKS).unwrap(),
                Lay::PageMajor => shape
                    .layout(
                        BLOCKS,
                        Arrangement::Interleaved,
                        HeadOrder::HeadMajor,
                        Stacking::PageMajor,
                    )
                    .unwrap(),
            };
            let memory = region_lengths(&layout).unwrap().into_iter();
            let memory = memory.map(|length| Arc::new(HostMemory::memfd("cache", length).unwrap()));
            KvShard {
                memory: memory.collect(),
                layout,
            }
        });
        Self {
            shards: shards.collect(),
            config: ModelConfig {
                name: "none".to_owned(),
                digest: [7; 32],
                vocab: 1,
                layers: LAYERS,
                heads: KV_HEADS,
                kv_heads: KV_HEADS,
                head_dim: HEAD_DIM as usize,
                hidden: 1,
                intermediate: 1,
                rope_theta: 1.0,
                norm_epsilon: 1.0,
                context: 1 << 20,
                eos: Vec::new(),
            },
        }
    }

    pub(crate) fn with_digest(mut self, digest: [u8; 32]) -> Self {
        self.config.digest = digest;
        self
    }

    /// Calls `visit` with the place of each head of each token of `block` in `layer`: memory, offset, and what names it
    /// in every sharding.
    fn each(
        &self,
        layer: usize,
        block: BlockId,
        mut visit: impl FnMut(&HostMemory, u64, [u64; 4]),
    ) {
        for shard in &self.shards {
            for plane in &shard.layout.layers[layer].planes {
                for token in 0..BLOCK_TOKENS as u64 {
                    for head in 0..plane.heads.count {
                        let offset = plane.offset
                            + u64::from(block) * plane.page_stride
                            + token * plane.token_stride
                            + u64::from(head) * plane.head_stride;
                        let memory = &shard.memory[usize::from(plane.region)];
                        let name = [
                            layer as u64,
                            plane.role as u64,
                            token,
                            u64::from(plane.heads.first + head),
                        ];
                        visit(memory, offset, name);
                    }
                }
            }
        }
    }

    /// Fills `layer` of `block` with the content of position `position` of a prompt named `seed`.
    pub(crate) fn fill(&self, layer: usize, block: BlockId, seed: u64, position: usize) {
        self.each(layer, block, |memory, offset, name| {
            memory
                .write(offset, &content(seed, position, name))
                .unwrap();
        });
    }

    /// Fails unless all layers of `block` hold that.
    pub(crate) fn check(&self, block: BlockId, seed: u64, position: usize) {
        for layer in 0..LAYERS {
            self.each(layer, block, |memory, offset, name| {
                let mut found = [0; HEAD_DIM as usize * 4];
                memory.read(offset, &mut found).unwrap();
                assert_eq!(
                    found,
                    content(seed, position, name),
                    "block {block}, position {position}, [layer, role, token, head] {name:?}"
                );
            });
        }
    }
}

/// Bytes of one head of one token, everywhere different.
fn content(seed: u64, position: usize, name: [u64; 4]) -> [u8; HEAD_DIM as usize * 4] {
    let mut state = name
        .iter()
        .fold(seed ^ 0x9e37_79b9_7f4a_7c15, |state, &part| {
            (state ^ part)
                .wrapping_mul(0x0100_0000_01b3)
                .rotate_left(17)
        })
        ^ position as u64;
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

impl Model for Cache {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn block_tokens(&self) -> usize {
        BLOCK_TOKENS
    }

    fn blocks(&self) -> u32 {
        BLOCKS
    }

    fn shards(&self) -> &[KvShard] {
        &self.shards
    }

    fn forward(
        &mut self,
        _batch: &[Chunk<'_>],
        _observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError> {
        Err(ModelError::Batch("it computes nothing".to_owned()))
    }
}

/// One engine's side.
pub(crate) struct Side {
    pub(crate) endpoint: Endpoint,
    pub(crate) cache: Cache,
    pub(crate) transfers: KvPush,
    woken: Arc<(Mutex<bool>, Condvar)>,
    kept: Vec<Outcome>,
}

pub(crate) fn endpoint(name: &str, fabric: FabricKind) -> Endpoint {
    kvpush::Endpoint::builder()
        .name(name)
        .auth(Auth::psk([3; 32]))
        .fabrics([fabric])
        .bind("127.0.0.1:0")
        .unwrap()
}

impl Side {
    pub(crate) fn new(name: &str, fabric: FabricKind, tp: u32, lay: Lay) -> Self {
        Self::with(endpoint(name, fabric), Cache::new(tp, lay))
    }

    pub(crate) fn with(endpoint: Endpoint, cache: Cache) -> Self {
        let mut transfers = KvPush::new(endpoint.clone(), &cache).unwrap();
        let woken = Arc::new((Mutex::new(false), Condvar::new()));
        let waker = Arc::clone(&woken);
        transfers.on_ready(Box::new(move || {
            *waker.0.lock() = true;
            waker.1.notify_all();
        }));
        Self {
            endpoint,
            cache,
            transfers,
            woken,
            kept: Vec::new(),
        }
    }

    /// The next outcome. Polls only when it is woken, as the engine does.
    pub(crate) fn outcome(&mut self) -> Outcome {
        self.outcome_within(PATIENCE)
            .expect("no outcome, or no wake-up for it")
    }

    /// The next outcome of several that may come together.
    pub(crate) fn any_outcome(&mut self) -> Outcome {
        let until = Instant::now() + PATIENCE;
        while self.kept.is_empty() {
            self.transfers.poll(&mut self.kept);
            if self.kept.is_empty() {
                self.wait(until).expect("no outcome, or no wake-up for it");
            }
        }
        self.kept.remove(0)
    }

    fn outcome_within(&mut self, patience: Duration) -> Option<Outcome> {
        let until = Instant::now() + patience;
        loop {
            let mut out = Vec::new();
            self.transfers.poll(&mut out);
            assert!(out.len() <= 1, "{out:?}");
            if let Some(outcome) = out.pop() {
                return Some(outcome);
            }
            self.wait(until)?;
        }
    }

    /// Until the waker is called.
    fn wait(&self, until: Instant) -> Option<()> {
        let mut woken = self.woken.0.lock();
        while !*woken {
            if self.woken.1.wait_until(&mut woken, until).timed_out() {
                return None;
            }
        }
        *woken = false;
        Some(())
    }

    /// Polls when woken, until `done` says so.
    pub(crate) fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < until, "never: {what}");
            self.go_on();
        }
    }

    /// Polls if woken, or soon.
    pub(crate) fn go_on(&mut self) {
        self.wait(Instant::now() + Duration::from_millis(5));
        let mut out = Vec::new();
        self.transfers.poll(&mut out);
        assert!(out.is_empty(), "{out:?}");
    }

    /// Grants the blocks of a prompt to `prefill_tp` ranks.
    pub(crate) fn reserve(
        &mut self,
        request: RequestNumber,
        prompt: &Prompt,
        prefill_tp: u32,
        deadline: Duration,
    ) -> Result<Ticket, TransferError> {
        self.transfers.reserve(&Reserve {
            request,
            id: "request",
            blocks: &prompt.destination,
            held: prompt.held,
            tokens: prompt.tokens,
            digest: prompt.digest,
            prefill_tp,
            deadline,
        })
    }

    pub(crate) fn open(
        &mut self,
        request: RequestNumber,
        prompt: &Prompt,
        ticket: &Ticket,
    ) -> Result<usize, TransferError> {
        self.transfers
            .open(request, ticket, prompt.tokens, prompt.digest, PATIENCE)
    }

    /// Fills and hands over all of it, chunk by chunk and layer by layer.
    pub(crate) fn hand_over(&mut self, request: RequestNumber, prompt: &Prompt, chunk: usize) {
        for start in (0..prompt.source.len()).step_by(chunk) {
            let positions = start..(start + chunk).min(prompt.source.len());
            for layer in 0..LAYERS {
                let blocks = &prompt.source[positions.clone()];
                for (position, &block) in positions.clone().zip(blocks) {
                    self.cache.fill(layer, block, prompt.seed, position);
                }
                let handed = self
                    .transfers
                    .layer(request, layer, positions.clone(), blocks);
                handed.unwrap();
            }
        }
    }
}

/// A prompt's blocks on both sides.
#[derive(Clone)]
pub(crate) struct Prompt {
    pub(crate) tokens: usize,
    pub(crate) digest: [u8; 32],
    pub(crate) seed: u64,
    pub(crate) source: Vec<BlockId>,
    pub(crate) destination: Vec<BlockId>,
    pub(crate) held: usize,
}

impl Prompt {
    /// Of `blocks` blocks, the last of which is not full, in pages from `first` on, in no simple order.
    pub(crate) fn new(seed: u64, blocks: usize, held: usize) -> Self {
        let scattered = |factor: usize, first: usize| -> Vec<BlockId> {
            (0..blocks)
                .map(|index| ((first + index * factor) % BLOCKS as usize) as BlockId)
                .collect()
        };
        Self {
            tokens: blocks * BLOCK_TOKENS - 1,
            digest: [seed as u8; 32],
            seed,
            source: scattered(3, seed as usize),
            destination: scattered(7, 5 + seed as usize),
            held,
        }
    }
}

/// Bytes of all heads of one block, over all layers.
pub(crate) fn block_bytes() -> u64 {
    (LAYERS * 2 * BLOCK_TOKENS * KV_HEADS) as u64 * u64::from(HEAD_DIM) * 4
}
