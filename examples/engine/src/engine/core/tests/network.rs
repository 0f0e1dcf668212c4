//! Transfers between cores of one test: slow, and hostile where the contract allows it.
//!
//! Granted blocks are filled with garbage, and pages are copied late, from wherever they lie then: who reads a block
//! before its arrival, or gives a block back before its outcome, gets other tokens. Lost blocks are written for ever.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    model::KvShard,
    request::BlockId,
    transfer::{Outcome, RequestNumber, Reserve, Ticket, TransferError, Transfers},
};

/// How a transfer that fails does so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Both sides are sure.
    Fenced,
    /// The decode side is not.
    UnfencedArrival,
    /// The prefill side is not.
    UnfencedPush,
}

struct Grant {
    owner: usize,
    request: RequestNumber,
    blocks: Vec<BlockId>,
    held: usize,
    tokens: usize,
    digest: [u8; 32],
    expires: Instant,
    is_over: bool,
    push: Option<Push>,
}

struct Push {
    side: usize,
    request: RequestNumber,
    copies: Vec<(usize, usize, BlockId)>,
    done: usize,
    tail: Option<Vec<u8>>,
}

/// Everything between the cores.
pub(super) struct Network {
    pub(super) now: Instant,
    shards: Vec<Vec<KvShard>>,
    grants: BTreeMap<u64, Grant>,
    next: u64,
    outcomes: Vec<Vec<Outcome>>,
    /// Blocks that are written for ever.
    lost: Vec<(usize, BlockId)>,
    /// The next call of this name fails.
    pub(super) refuse: Option<&'static str>,
    /// Positions that were handed over, in order.
    pub(super) log: Vec<(usize, Range<usize>)>,
    pub(super) tails: Vec<Vec<u8>>,
    /// Pages copied.
    pub(super) copied: usize,
}

impl Network {
    pub(super) fn new(shards: Vec<Vec<KvShard>>, now: Instant) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            now,
            outcomes: shards.iter().map(|_| Vec::new()).collect(),
            shards,
            grants: BTreeMap::new(),
            next: 1,
            lost: Vec::new(),
            refuse: None,
            log: Vec::new(),
            tails: Vec::new(),
            copied: 0,
        }))
    }

    fn refuses(&mut self, what: &'static str) -> Result<(), TransferError> {
        if self.refuse == Some(what) {
            self.refuse = None;
            return Err(error(what));
        }
        Ok(())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.grants.is_empty() && self.outcomes.iter().all(Vec::is_empty)
    }

    pub(super) fn grants(&self) -> Vec<u64> {
        self.grants.keys().copied().collect()
    }

    /// Copies up to `pages` pages of each push, and ends what is over.
    pub(super) fn tick(&mut self, pages: usize) {
        for name in self.grants() {
            self.carry(name, pages);
            let Some(grant) = self.grants.get(&name) else {
                continue;
            };
            if grant.is_over || grant.expires <= self.now {
                self.fail(name, Failure::Fenced);
            }
        }
        for (side, block) in self.lost.clone() {
            self.scribble(side, block, 0xee);
        }
    }

    fn carry(&mut self, name: u64, pages: usize) {
        let Some(grant) = self.grants.get_mut(&name) else {
            return;
        };
        let (owner, blocks) = (grant.owner, grant.blocks.clone());
        let (held, is_over) = (grant.held, grant.is_over);
        let Some(push) = &mut grant.push else { return };
        if is_over {
            return;
        }
        let end = push.done.saturating_add(pages).min(push.copies.len());
        let (side, copies) = (push.side, push.copies[push.done..end].to_vec());
        push.done = end;
        let is_done = end == push.copies.len();
        let tail = push.tail.clone();
        for (layer, position, from) in copies {
            assert!(position >= held, "position {position} is held");
            self.copy(layer, (side, from), (owner, blocks[position]));
        }
        if let (true, Some(tail)) = (is_done, tail)
            && let Some(grant) = self.grants.remove(&name)
            && let Some(push) = grant.push
        {
            let bytes = push.copies.len() as u64;
            self.tails.push(tail.clone());
            self.outcomes[push.side].push(Outcome::Pushed {
                request: push.request,
                bytes,
            });
            self.outcomes[owner].push(Outcome::Arrived {
                request: grant.request,
                tail,
                bytes,
            });
        }
    }

    pub(super) fn fail(&mut self, name: u64, how: Failure) {
        let Some(grant) = self.grants.remove(&name) else {
            return;
        };
        for &block in &grant.blocks[grant.held..] {
            self.scribble(grant.owner, block, 0x77);
            if how == Failure::UnfencedArrival {
                self.lost.push((grant.owner, block));
            }
        }
        self.outcomes[grant.owner].push(Outcome::NotArrived {
            request: grant.request,
            error: error("lost"),
            is_fenced: how != Failure::UnfencedArrival,
        });
        if let Some(push) = grant.push {
            self.outcomes[push.side].push(Outcome::NotPushed {
                request: push.request,
                error: error("lost"),
                is_fenced: how != Failure::UnfencedPush,
            });
        }
    }

    fn planes(
        shards: &[KvShard],
        layer: usize,
    ) -> Vec<(Arc<kvpush::memory::HostMemory>, u64, u64)> {
        let of = |shard: &KvShard| {
            let planes = shard.layout.layers[layer].planes.clone();
            let memory = Arc::clone(&shard.memory[0]);
            planes
                .into_iter()
                .map(move |p| (Arc::clone(&memory), p.offset, p.page_stride))
                .collect::<Vec<_>>()
        };
        shards.iter().flat_map(of).collect()
    }

    fn copy(&mut self, layer: usize, from: (usize, BlockId), to: (usize, BlockId)) {
        let source = Self::planes(&self.shards[from.0], layer);
        let target = Self::planes(&self.shards[to.0], layer);
        for ((read, at, stride), (write, to_at, _)) in source.iter().zip(&target) {
            let mut page = vec![0; *stride as usize];
            read.read(at + u64::from(from.1) * stride, &mut page)
                .expect("a page");
            write
                .write(to_at + u64::from(to.1) * stride, &page)
                .expect("a page");
        }
        self.copied += 1;
    }

    fn scribble(&self, side: usize, block: BlockId, byte: u8) {
        for layer in 0..self.shards[side][0].layout.layers.len() {
            for (memory, at, stride) in Self::planes(&self.shards[side], layer) {
                let at = at + u64::from(block) * stride;
                memory.fill(at, stride, byte).expect("a page");
            }
        }
    }
}

fn error(what: &str) -> TransferError {
    TransferError {
        message: what.to_owned(),
        is_retryable: true,
    }
}

/// One core's end.
pub(super) struct End {
    pub(super) network: Arc<Mutex<Network>>,
    pub(super) side: usize,
}

impl Transfers for End {
    fn reserve(&mut self, what: &Reserve<'_>) -> Result<Ticket, TransferError> {
        let mut network = self.network.lock();
        network.refuses("reserve")?;
        assert!(what.held < what.blocks.len(), "nothing is granted");
        let name = network.next;
        network.next += 1;
        for &block in &what.blocks[what.held..] {
            network.scribble(self.side, block, 0xaa);
        }
        let grant = Grant {
            owner: self.side,
            request: what.request,
            blocks: what.blocks.to_vec(),
            held: what.held,
            tokens: what.tokens,
            digest: what.digest,
            expires: network.now + what.deadline,
            is_over: false,
            push: None,
        };
        network.grants.insert(name, grant);
        Ok(Ticket(name.to_le_bytes().to_vec()))
    }

    fn open(
        &mut self,
        request: RequestNumber,
        ticket: &Ticket,
        tokens: usize,
        digest: [u8; 32],
        _deadline: Duration,
    ) -> Result<usize, TransferError> {
        let mut network = self.network.lock();
        let result = network.open(self.side, request, ticket, tokens, digest);
        if result.is_err() {
            network.reject(ticket);
        }
        result
    }
    fn layer(
        &mut self,
        request: RequestNumber,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError> {
        let mut network = self.network.lock();
        network.refuses("layer")?;
        assert_eq!(positions.len(), blocks.len());
        network.log.push((layer, positions.clone()));
        if let Some(push) = network.push(self.side, request) {
            for (position, &block) in positions.zip(blocks) {
                push.copies.push((layer, position, block));
            }
        }
        Ok(())
    }

    fn finish(&mut self, request: RequestNumber, tail: &[u8]) -> Result<(), TransferError> {
        let mut network = self.network.lock();
        network.refuses("finish")?;
        let layers = network.shards[self.side][0].layout.layers.len();
        let Some(grant) = network.of_push(self.side, request) else {
            return Ok(());
        };
        let (held, count) = (grant.held, grant.blocks.len());
        if let Some(push) = &mut grant.push {
            for layer in 0..layers {
                let of = push.copies.iter().filter(|copy| copy.0 == layer);
                let positions: Vec<_> = of.map(|copy| copy.1).collect();
                let expected: Vec<_> = (held..count).collect();
                assert_eq!(positions, expected, "layer {layer}: each once and in order");
            }
            push.tail = Some(tail.to_vec());
        }
        Ok(())
    }

    fn reject(&mut self, ticket: &Ticket) {
        self.network.lock().reject(ticket);
    }

    fn cancel(&mut self, request: RequestNumber) {
        let mut network = self.network.lock();
        let side = self.side;
        for grant in network.grants.values_mut() {
            let is_push = |push: &Push| push.side == side && push.request == request;
            if grant.owner == side && grant.request == request
                || grant.push.as_ref().is_some_and(is_push)
            {
                grant.is_over = true;
            }
        }
    }

    fn poll(&mut self, out: &mut Vec<Outcome>) {
        out.append(&mut self.network.lock().outcomes[self.side]);
    }

    fn on_ready(&mut self, _waker: Box<dyn Fn() + Send + Sync>) {}
}

impl Network {
    fn open(
        &mut self,
        side: usize,
        request: RequestNumber,
        ticket: &Ticket,
        tokens: usize,
        digest: [u8; 32],
    ) -> Result<usize, TransferError> {
        self.refuses("open")?;
        let grant = name(ticket).and_then(|name| self.grants.get_mut(&name));
        let grant = grant.ok_or_else(|| error("no such grant"))?;
        if grant.is_over || grant.push.is_some() {
            return Err(error("used"));
        }
        if grant.tokens != tokens || grant.digest != digest {
            return Err(error("another prompt"));
        }
        grant.push = Some(Push {
            side,
            request,
            copies: Vec::new(),
            done: 0,
            tail: None,
        });
        Ok(grant.held)
    }

    fn reject(&mut self, ticket: &Ticket) {
        if let Some(grant) = name(ticket).and_then(|name| self.grants.get_mut(&name))
            && grant.push.is_none()
        {
            grant.is_over = true;
        }
    }

    fn of_push(&mut self, side: usize, request: RequestNumber) -> Option<&mut Grant> {
        self.grants.values_mut().find(|grant| {
            let push = grant.push.as_ref();
            push.is_some_and(|push| push.side == side && push.request == request)
        })
    }

    fn push(&mut self, side: usize, request: RequestNumber) -> Option<&mut Push> {
        self.of_push(side, request)?.push.as_mut()
    }
}

fn name(ticket: &Ticket) -> Option<u64> {
    Some(u64::from_le_bytes(ticket.0.as_slice().try_into().ok()?))
}
