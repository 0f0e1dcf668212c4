//! A prefill engine, a decode engine, and one that does both, in this process.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use kvpush::{Endpoint, fabric::FabricKind};
use kvpush_engine::{
    engine::{Config, Engine, Handle, Stats, fake},
    model::{BuiltIn, KvShard, LoadOptions, Memory, Model, Source, WeightMode, load},
    request::{
        BlockId, Event, FinishReason, Leg, OnFailure, Request, RequestError, SamplingParams,
        TokenId, Usage,
    },
    runtime::Link,
    transfer::{KvPush, Outcome, RequestNumber, Reserve, Ticket, TransferError, Transfers},
};
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Alternatives asked for with each token: almost all of the vocabulary of 256, and what fits into a tail.
const ALTERNATIVES: usize = 250;

/// Longer than anything takes, unless it never ends.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A model to test with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Weights {
    /// No arithmetic: logits are a hash of every byte of keys and values.
    Fake,
    /// The built-in model.
    Tiny(WeightMode),
    /// The built-in model for one and three ranks.
    TinyThree(WeightMode),
}

impl Weights {
    pub(crate) fn load(self, tp: u32) -> Box<dyn Model> {
        match self {
            Self::Fake => Box::new(fake_model(tp, Duration::ZERO)),
            Self::Tiny(weights) => tiny(BuiltIn::Tiny, weights, tp),
            Self::TinyThree(weights) => tiny(BuiltIn::TinyThree, weights, tp),
        }
    }
}

fn tiny(which: BuiltIn, weights: WeightMode, tp: u32) -> Box<dyn Model> {
    let options = LoadOptions {
        source: Source::BuiltIn(which),
        tp,
        memory: Memory::Blocks(64),
        weights,
        threads: 1,
        ..LoadOptions::default()
    };
    load(&options).unwrap()
}

pub(crate) fn fake_model(tp: u32, layer_time: Duration) -> fake::FakeModel {
    let shape = fake::Shape {
        tp: tp as usize,
        kv_heads: 12,
        layers: 4,
        layer_time,
        ..fake::Shape::default()
    };
    fake::FakeModel::new(shape).unwrap()
}

/// A token, and the log probabilities of the others as bits.
pub(crate) type Chosen = (TokenId, Vec<(TokenId, u32)>);

/// What a request brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    /// Each completion's tokens. Log probabilities of all tokens, exactly, are as good as logits.
    pub(crate) tokens: Vec<Vec<Chosen>>,
    pub(crate) reasons: Vec<Option<FinishReason>>,
}

/// A request to be asked.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) sampling: SamplingParams,
}

impl Ask {
    /// A prompt of `length` tokens that begins as all of the same `seed` do.
    pub(crate) fn new(seed: u32, length: usize, tokens: usize) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 255
        };
        Self {
            prompt: (0..length).map(|_| next()).collect(),
            sampling: SamplingParams {
                max_tokens: tokens,
                temperature: 0.0,
                logprobs: Some(ALTERNATIVES),
                ignore_eos: true,
                ..SamplingParams::default()
            },
        }
    }

    pub(crate) fn request(&self, id: &str, leg: Leg) -> (Request, UnboundedReceiver<Event>) {
        let (events, receiver) = unbounded_channel();
        let request = Request {
            id: id.to_owned(),
            prompt: self.prompt.clone(),
            sampling: self.sampling.clone(),
            deadline: Instant::now() + PATIENCE,
            leg,
            traceparent: None,
            cache_salt: None,
            events,
        };
        (request, receiver)
    }
}

/// An engine, what it is made of, and what its transfers were asked for.
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) shards: Vec<KvShard>,
    pub(crate) seen: Arc<Mutex<Seen>>,
}

/// What went through an engine's transfers.
#[derive(Default)]
pub(crate) struct Seen {
    /// Blocks of the last reservation, and how many of them were held.
    pub(crate) reserved: (Vec<BlockId>, usize),
    /// Source blocks of the last push, by position.
    pub(crate) pushed: Vec<(usize, BlockId)>,
    /// What the blocks of the reservation held when they had arrived: read before the engine goes on.
    pub(crate) arrived: Option<Vec<u8>>,
}

pub(crate) fn config(chunk: usize) -> Config {
    Config {
        max_chunk_tokens: chunk,
        max_batch_tokens: chunk.max(64),
        max_logprobs: ALTERNATIVES,
        ..Config::default()
    }
}

/// Emulated devices acknowledge late: 1.07 s.
pub(crate) fn ack_timeout(fabric: FabricKind) -> Option<u8> {
    (fabric == FabricKind::Verbs).then_some(18)
}

pub(crate) fn endpoint(name: &str, fabric: FabricKind) -> Endpoint {
    let link = Link::new(name, "127.0.0.1:0", Some("tests".to_owned()));
    let mut link = link.fabrics([fabric]);
    link.ack_timeout = ack_timeout(fabric);
    link.start().unwrap()
}

impl Node {
    pub(crate) fn alone(model: Box<dyn Model>, chunk: usize) -> Self {
        Self::start(model, None, config(chunk))
    }

    pub(crate) fn start(model: Box<dyn Model>, endpoint: Option<Endpoint>, config: Config) -> Self {
        let shards = model.shards().to_vec();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let transfers = endpoint.map(|endpoint| {
            Box::new(Spy {
                inner: KvPush::new(endpoint, model.as_ref()).unwrap(),
                seen: Arc::clone(&seen),
                shards: shards.clone(),
            }) as Box<dyn Transfers>
        });
        Self {
            engine: Engine::start(model, transfers, config).unwrap(),
            shards,
            seen,
        }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.engine.handle()
    }

    /// Its statistics, once `done` says so.
    pub(crate) fn stats(&self, what: &str, done: impl Fn(&Stats) -> bool) -> Stats {
        let until = Instant::now() + PATIENCE;
        loop {
            let stats = self.handle().stats();
            if done(&stats) {
                return stats;
            }
            assert!(Instant::now() < until, "never: {what}: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until no request has blocks, and nothing is lost.
    pub(crate) fn is_idle(&self) -> Stats {
        let stats = self.stats("no request is left", |stats| {
            stats.running + stats.waiting + stats.parked == 0
        });
        let blocks = stats.blocks;
        assert_eq!(blocks.available(), blocks.total, "{blocks:?}");
        stats
    }

    pub(crate) fn ask(&self, id: &str, ask: &Ask) -> (Answer, Usage) {
        let (request, events) = ask.request(id, Leg::Both);
        self.handle().submit(request).unwrap();
        collect(events, ask.sampling.n).unwrap()
    }
}

impl Answer {
    /// Fails at the first difference, in few words.
    pub(crate) fn is(&self, wanted: &Self, what: &str) {
        assert_eq!(self.reasons, wanted.reasons, "{what}");
        for (index, (found, wanted)) in self.tokens.iter().zip(&wanted.tokens).enumerate() {
            let place = found
                .iter()
                .zip(wanted)
                .position(|(found, wanted)| found != wanted);
            assert_eq!(
                place, None,
                "{what}: completion {index} differs first at that token"
            );
            assert_eq!(found.len(), wanted.len(), "{what}: completion {index}");
        }
    }
}

/// Everything until the end.
pub(crate) fn collect(
    mut events: UnboundedReceiver<Event>,
    n: usize,
) -> Result<(Answer, Usage), RequestError> {
    let mut answer = Answer {
        tokens: vec![Vec::new(); n],
        reasons: vec![None; n],
    };
    loop {
        match next(&mut events) {
            Event::Token(token) => {
                let top = token.top.iter().map(|&(id, value)| (id, value.to_bits()));
                answer.tokens[token.index].push((token.id, top.collect()));
            }
            Event::Finished { index, reason } => answer.reasons[index] = Some(reason),
            Event::Done(usage) => return Ok((answer, usage)),
            Event::Failed(error) => return Err(error),
            Event::Reserved { .. } | Event::PromptLogprobs(_) => {}
        }
    }
}

/// The next event.
pub(crate) fn next(events: &mut UnboundedReceiver<Event>) -> Event {
    let until = Instant::now() + PATIENCE;
    loop {
        match events.try_recv() {
            Ok(event) => return event,
            Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => panic!("no end was told"),
            Err(tokio::sync::mpsc::error::TryRecvError::Empty) => {
                assert!(Instant::now() < until, "no event comes");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

/// Two engines that share the work.
pub(crate) struct Pair {
    pub(crate) prefill: Node,
    pub(crate) decode: Node,
    pub(crate) prefill_tp: u32,
}

impl Pair {
    pub(crate) fn new(
        weights: Weights,
        fabric: FabricKind,
        (prefill_tp, decode_tp): (u32, u32),
        chunk: usize,
    ) -> Self {
        let node = |name, tp| {
            let endpoint = Some(endpoint(name, fabric));
            Node::start(weights.load(tp), endpoint, config(chunk))
        };
        Self {
            prefill: node("prefill", prefill_tp),
            decode: node("decode", decode_tp),
            prefill_tp,
        }
    }

    /// Reserves, gives the ticket to prefill.
    pub(crate) fn begin(&self, id: &str, ask: &Ask) -> [UnboundedReceiver<Event>; 2] {
        let leg = Leg::Decode {
            prefill_tp: self.prefill_tp,
            on_failure: OnFailure::Fail,
        };
        let (request, mut decode) = ask.request(id, leg);
        self.decode.handle().submit(request).unwrap();
        let ticket = match next(&mut decode) {
            Event::Reserved { ticket } => ticket,
            other => panic!("{other:?}"),
        };
        let (request, prefill) = ask.request(id, Leg::Prefill { ticket });
        self.prefill.handle().submit(request).unwrap();
        [prefill, decode]
    }

    /// The answer of the decode engine. The first token is the prefill engine's, too.
    pub(crate) fn ask(&self, id: &str, ask: &Ask) -> (Answer, Usage) {
        let [prefill, decode] = self.begin(id, ask);
        self.end(ask, prefill, decode)
    }

    pub(crate) fn end(
        &self,
        ask: &Ask,
        prefill: UnboundedReceiver<Event>,
        decode: UnboundedReceiver<Event>,
    ) -> (Answer, Usage) {
        let (first, _) = collect(prefill, ask.sampling.n).unwrap();
        let (answer, usage) = collect(decode, ask.sampling.n).unwrap();
        for (first, tokens) in first.tokens.iter().zip(&answer.tokens) {
            assert!(
                first[..] == tokens[..1],
                "the first token is not handed over as it is"
            );
        }
        assert!(
            first
                .reasons
                .iter()
                .all(|&reason| reason == Some(FinishReason::Handed))
        );
        assert_eq!(usage.recomputed_tokens, 0);
        (answer, usage)
    }
}

/// Bytes of all heads of one block, over all layers.
pub(crate) fn block_bytes(shards: &[KvShard]) -> u64 {
    shards
        .iter()
        .flat_map(|shard| &shard.layout.layers)
        .flat_map(|layer| {
            let tokens = u64::from(layer.tokens_per_page);
            layer.planes.iter().map(move |plane| {
                tokens * u64::from(plane.head_bytes) * u64::from(plane.heads.count)
            })
        })
        .sum()
}

/// The content of `blocks`, the same for every sharding: by position, layer, plane, token, head.
pub(crate) fn content(shards: &[KvShard], blocks: &[BlockId]) -> Vec<u8> {
    let mut heads: Vec<_> = Vec::new();
    for (rank, shard) in shards.iter().enumerate() {
        for (layer, planes) in shard.layout.layers.iter().enumerate() {
            for plane in &planes.planes {
                for head in 0..plane.heads.count {
                    heads.push((
                        (layer, plane.role, plane.heads.first + head),
                        rank,
                        head,
                        plane,
                    ));
                }
            }
        }
    }
    heads.sort_by_key(|(name, rank, ..)| (*name, *rank));
    heads.dedup_by_key(|(name, ..)| *name);
    let mut out = Vec::new();
    for &block in blocks {
        for ((layer, ..), rank, head, plane) in &heads {
            let shard = &shards[*rank];
            for token in 0..shard.layout.layers[*layer].tokens_per_page {
                let offset = plane.offset
                    + u64::from(block) * plane.page_stride
                    + u64::from(token) * plane.token_stride
                    + u64::from(*head) * plane.head_stride;
                let mut bytes = vec![0; plane.head_bytes as usize];
                shard.memory[usize::from(plane.region)]
                    .read(offset, &mut bytes)
                    .unwrap();
                out.extend(bytes);
            }
        }
    }
    out
}

/// kvpush's transfers, and notes of what they are asked.
struct Spy {
    inner: KvPush,
    seen: Arc<Mutex<Seen>>,
    shards: Vec<KvShard>,
}

impl Transfers for Spy {
    fn reserve(&mut self, what: &Reserve<'_>) -> Result<Ticket, TransferError> {
        self.seen.lock().reserved = (what.blocks.to_vec(), what.held);
        self.inner.reserve(what)
    }

    fn open(
        &mut self,
        request: RequestNumber,
        ticket: &Ticket,
        tokens: usize,
        digest: [u8; 32],
        deadline: Duration,
    ) -> Result<usize, TransferError> {
        self.seen.lock().pushed.clear();
        self.inner.open(request, ticket, tokens, digest, deadline)
    }

    fn layer(
        &mut self,
        request: RequestNumber,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError> {
        if layer == 0 {
            let placed = positions.clone().zip(blocks.iter().copied());
            self.seen.lock().pushed.extend(placed);
        }
        self.inner.layer(request, layer, positions, blocks)
    }

    fn finish(&mut self, request: RequestNumber, tail: &[u8]) -> Result<(), TransferError> {
        self.inner.finish(request, tail)
    }

    fn reject(&mut self, ticket: &Ticket) {
        self.inner.reject(ticket);
    }

    fn cancel(&mut self, request: RequestNumber) {
        self.inner.cancel(request);
    }

    fn poll(&mut self, out: &mut Vec<Outcome>) {
        let before = out.len();
        self.inner.poll(out);
        if out[before..]
            .iter()
            .any(|outcome| matches!(outcome, Outcome::Arrived { .. }))
        {
            let mut seen = self.seen.lock();
            let (blocks, held) = &seen.reserved;
            seen.arrived = Some(content(&self.shards, &blocks[*held..]));
        }
    }

    fn on_ready(&mut self, waker: Box<dyn Fn() + Send + Sync>) {
        self.inner.on_ready(waker);
    }
}
