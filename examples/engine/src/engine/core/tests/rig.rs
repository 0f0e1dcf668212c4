//! One or two cores, their network, and clients that note what they hear.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::network::{End, Network};
use crate::{
    engine::{
        BlockHash, Config, KvChange, Stats,
        core::{Core, Farewell},
        fake::{self, FakeModel, Shape},
        handle::Command,
        sampling::{History, Sampler},
    },
    model::Model,
    request::{
        Event, FinishReason, Leg, OnFailure, Request, RequestError, SamplingParams, Token, TokenId,
        Usage,
    },
};

pub(super) const BLOCK: usize = 4;
pub(super) const VOCAB: usize = 64;

/// What a client has heard.
#[derive(Default, Debug)]
pub(super) struct Heard {
    pub(super) ticket: Option<Vec<u8>>,
    pub(super) tokens: BTreeMap<usize, Vec<Token>>,
    pub(super) finished: BTreeMap<usize, FinishReason>,
    pub(super) prompt_logprobs: Option<Vec<Token>>,
    pub(super) end: Option<Result<Usage, RequestError>>,
}

pub(super) struct Client {
    pub(super) id: String,
    pub(super) side: usize,
    pub(super) prompt: Vec<TokenId>,
    pub(super) params: SamplingParams,
    pub(super) is_prefill: bool,
    pub(super) is_decode: bool,
    pub(super) heard: Heard,
    events: Option<mpsc::UnboundedReceiver<Event>>,
}

pub(super) struct Rig {
    pub(super) cores: Vec<Core>,
    pub(super) network: Arc<Mutex<Network>>,
    pub(super) now: Instant,
    pub(super) clients: Vec<Client>,
    /// What each core's events say that can be found.
    pub(super) mirrors: Vec<BTreeSet<BlockHash>>,
    pub(super) stats: Vec<Stats>,
}

pub(super) fn config() -> Config {
    Config {
        max_batch_tokens: 16,
        max_chunk_tokens: 16,
        max_running: 8,
        transfer_timeout: Duration::from_secs(10),
        ..Config::default()
    }
}

pub(super) fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        max_tokens,
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

pub(super) fn prompt(seed: u32, tokens: usize) -> Vec<TokenId> {
    (0..tokens as u32)
        .map(|n| (seed * 31 + n * n * 7 + n) % 63)
        .collect()
}

pub(super) fn decode(on_failure: OnFailure) -> Leg {
    Leg::Decode {
        prefill_tp: 1,
        on_failure,
    }
}

impl Rig {
    /// One core for each number of blocks.
    pub(super) fn new(blocks: &[u32], config: &Config) -> Self {
        let now = Instant::now();
        let model = |&blocks: &u32| {
            let shape = Shape {
                blocks,
                block_tokens: BLOCK,
                kv_heads: 2,
                vocab: VOCAB,
                context: 64,
                ..Shape::default()
            };
            FakeModel::new(shape).expect("a model")
        };
        let models: Vec<_> = blocks.iter().map(model).collect();
        let shards = models.iter().map(|model| model.shards().to_vec()).collect();
        let network = Network::new(shards, now);
        let cores = models
            .into_iter()
            .enumerate()
            .map(|(side, model)| {
                let network = Arc::clone(&network);
                let end = Box::new(End { network, side });
                Core::new(Box::new(model), Some(end), config.clone())
            })
            .collect();
        Self {
            cores,
            network,
            now,
            clients: Vec::new(),
            mirrors: blocks.iter().map(|_| BTreeSet::new()).collect(),
            stats: blocks.iter().map(|_| Stats::default()).collect(),
        }
    }

    /// A request with a minute of time. Its client's number.
    pub(super) fn submit(
        &mut self,
        side: usize,
        leg: Leg,
        prompt: &[TokenId],
        params: SamplingParams,
    ) -> usize {
        self.submit_for(side, leg, prompt, params, Duration::from_secs(60))
    }

    pub(super) fn submit_for(
        &mut self,
        side: usize,
        leg: Leg,
        prompt: &[TokenId],
        params: SamplingParams,
        time: Duration,
    ) -> usize {
        let (events, receiver) = mpsc::unbounded_channel();
        let number = self.clients.len();
        let id = format!("request-{number}");
        self.clients.push(Client {
            id: id.clone(),
            side,
            prompt: prompt.to_vec(),
            params: params.clone(),
            is_decode: matches!(leg, Leg::Decode { .. }),
            is_prefill: matches!(leg, Leg::Prefill { .. } | Leg::PrefillHeld),
            heard: Heard::default(),
            events: Some(receiver),
        });
        let request = Request {
            id,
            prompt: prompt.to_vec(),
            sampling: params,
            deadline: self.now + time,
            leg,
            traceparent: None,
            cache_salt: None,
            events,
        };
        self.command(side, Command::Submit(Box::new(request)));
        number
    }

    pub(super) fn command(&mut self, side: usize, command: Command) {
        self.cores[side].command(command, self.now);
        self.look(side);
    }

    pub(super) fn abort(&mut self, client: usize) {
        let id = self.clients[client].id.clone();
        self.command(self.clients[client].side, Command::Abort { id });
    }

    /// The client goes away.
    pub(super) fn hang_up(&mut self, client: usize) {
        self.clients[client].events = None;
    }

    pub(super) fn is_listening(&self, client: usize) -> bool {
        self.clients[client].events.is_some()
    }

    /// A step of one core; the invariants hold after it.
    pub(super) fn step(&mut self, side: usize) -> bool {
        let has_more = self.cores[side].step(self.now);
        self.look(side);
        has_more
    }

    /// Notes what has come, and checks the core.
    fn look(&mut self, side: usize) {
        let news = self.cores[side].news();
        news.farewells.into_iter().for_each(Farewell::send);
        for client in &mut self.clients {
            client.listen();
        }
        let mirror = &mut self.mirrors[side];
        for change in news.changes {
            match change {
                KvChange::Stored { hashes, .. } => {
                    hashes
                        .iter()
                        .for_each(|h| assert!(mirror.insert(*h), "stored twice"));
                }
                KvChange::Removed { hashes } => {
                    hashes
                        .iter()
                        .for_each(|h| assert!(mirror.remove(h), "not stored"));
                }
                KvChange::Cleared => mirror.clear(),
            }
        }
        self.stats[side] = news.stats;
        self.cores[side].check_invariants(mirror);
    }

    /// Steps of all cores, and of the network, until nothing happens.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            self.network.lock().tick(usize::MAX);
            let mut has_more = false;
            for side in 0..self.cores.len() {
                has_more |= self.step(side);
            }
            let is_over = self.network.lock().outcomes_are_taken();
            if !has_more && is_over {
                return;
            }
        }
        panic!("it does not settle");
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.network.lock().now = self.now;
    }

    /// Everything is back.
    pub(super) fn assert_returned(&self, side: usize, lost: usize) {
        let blocks = self.stats[side].blocks;
        assert!(self.cores[side].is_idle(), "requests are left");
        assert_eq!((blocks.used, blocks.granted), (0, 0), "{blocks:?}");
        assert_eq!(blocks.lost, lost);
        assert_eq!(blocks.free + blocks.cached + lost, blocks.total);
    }

    pub(super) fn heard(&self, client: usize) -> &Heard {
        &self.clients[client].heard
    }

    /// Ids of completion `index`.
    pub(super) fn ids(&self, client: usize, index: usize) -> Vec<TokenId> {
        self.clients[client].ids(index)
    }
}

impl Network {
    fn outcomes_are_taken(&self) -> bool {
        self.is_idle() || !self.grants().is_empty()
    }
}

impl Client {
    fn listen(&mut self) {
        let heard = &mut self.heard;
        while let Some(Ok(event)) = self.events.as_mut().map(mpsc::UnboundedReceiver::try_recv) {
            assert!(
                heard.end.is_none(),
                "{event:?} after the end of {}",
                self.id
            );
            match event {
                Event::Reserved { ticket } => {
                    assert!(heard.ticket.replace(ticket).is_none());
                }
                Event::PromptLogprobs(found) => {
                    assert!(heard.tokens.is_empty());
                    assert!(heard.prompt_logprobs.replace(found).is_none());
                }
                Event::Token(token) => {
                    assert!(!heard.finished.contains_key(&token.index));
                    heard.tokens.entry(token.index).or_default().push(token);
                }
                Event::Finished { index, reason } => {
                    assert!(heard.finished.insert(index, reason).is_none());
                }
                Event::Done(usage) => heard.end = Some(Ok(usage)),
                Event::Failed(error) => heard.end = Some(Err(error)),
            }
        }
    }

    pub(super) fn ids(&self, index: usize) -> Vec<TokenId> {
        let tokens = self.heard.tokens.get(&index);
        tokens.map_or_else(Vec::new, |tokens| tokens.iter().map(|t| t.id).collect())
    }

    /// What it has heard is what it would have heard alone: as far as it goes, and to the end if it was told so.
    pub(super) fn assert_right(&self) {
        for index in 0..self.params.n {
            let (expected, reason) = alone(&self.prompt, &self.params, index);
            let ids = self.ids(index);
            let most = if self.is_prefill { 1 } else { expected.len() };
            assert!(
                expected[..most].starts_with(&ids),
                "{} index {index}: {ids:?}, alone {expected:?}",
                self.id
            );
            if let (Some(Ok(usage)), true) = (&self.heard.end, self.events.is_some()) {
                assert_eq!(usage.prompt_tokens, self.prompt.len());
                let finished = self.heard.finished.get(&index);
                if self.is_prefill {
                    assert_eq!(finished, Some(&FinishReason::Handed));
                    assert_eq!(ids.len(), 1);
                } else if ids.len() < expected.len() {
                    // Stopped by the client.
                    assert_eq!(finished, Some(&FinishReason::Stop));
                } else {
                    assert_eq!(finished, Some(&reason));
                }
            }
        }
    }
}

/// A request by itself, without blocks or batches.
pub(super) fn alone(
    prompt: &[TokenId],
    params: &SamplingParams,
    index: usize,
) -> (Vec<TokenId>, FinishReason) {
    let sampler = Sampler::new(params.clone(), &[fake::eos(VOCAB)], 0);
    let mut history = History::new(prompt);
    let mut tokens = prompt.to_vec();
    loop {
        let row = fake::reference(&tokens, VOCAB);
        let choice = sampler.choose(&row, index, &history).expect("a token");
        tokens.push(choice.id);
        history.push(choice.id);
        let reason = if sampler.is_stop(choice.id, &history) {
            FinishReason::Stop
        } else if history.count() >= params.max_tokens {
            FinishReason::Length
        } else {
            continue;
        };
        return (tokens.split_off(prompt.len()), reason);
    }
}
