//! A layer's pages are at the other side before the next layer has ended, not after the prompt.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kvpush::{Endpoint, fabric::FabricKind};
use kvpush_engine::model::{Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer};

use super::fixture::{Ask, Node, PATIENCE, Pair, config, endpoint, fake_model};

/// A model that does not go on with a layer before everything of the layers before it has arrived at the other side. If
/// pages went only after the forward pass, it would wait for ever.
struct Patient {
    model: Box<dyn Model>,
    reader: Endpoint,
    /// Parts of one layer of a grant.
    parts: u64,
}

struct Patience<'a> {
    inner: &'a mut dyn Observer,
    reader: &'a Endpoint,
    parts: u64,
    before: u64,
}

/// Parts that have arrived at an endpoint.
fn arrived(endpoint: &Endpoint) -> u64 {
    let peers = endpoint.stats().peers;
    let rails = peers.iter().flat_map(|peer| &peer.rails);
    rails.map(|rail| rail.parts).sum()
}

impl Observer for Patience<'_> {
    fn layer_written(&mut self, layer: usize, chunks: Range<usize>) {
        let until = Instant::now() + PATIENCE;
        let wanted = self.before + self.parts * layer as u64;
        while arrived(self.reader) < wanted {
            assert!(
                Instant::now() < until,
                "layer {layer} is computed, and those before it have not arrived"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        // Nothing of this layer has been handed over yet, so nothing of it can have been counted.
        assert_eq!(arrived(self.reader), wanted, "before layer {layer}");
        self.inner.layer_written(layer, chunks);
    }

    fn layer_computed(&mut self, layer: usize, chunks: Range<usize>) {
        self.inner.layer_computed(layer, chunks);
    }
}

impl Model for Patient {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    fn blocks(&self) -> u32 {
        self.model.blocks()
    }

    fn shards(&self) -> &[KvShard] {
        self.model.shards()
    }

    fn forward(
        &mut self,
        batch: &[Chunk<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError> {
        let mut patience = Patience {
            inner: observer,
            reader: &self.reader,
            parts: self.parts,
            before: arrived(&self.reader),
        };
        self.model.forward(batch, &mut patience)
    }
}

fn overlapped(fabric: FabricKind) {
    let reader = endpoint("decode", fabric);
    // Three ranks to three, eight blocks in the four parts that kvpush counts a layer of a grant in.
    let patient = Patient {
        model: Box::new(fake_model(3, Duration::ZERO)),
        reader: reader.clone(),
        parts: 3 * 4,
    };
    let prefill = Node::start(
        Box::new(patient),
        Some(endpoint("prefill", fabric)),
        config(512),
    );
    let decode = Node::start(
        Box::new(fake_model(3, Duration::ZERO)),
        Some(reader),
        config(512),
    );
    let pair = Pair {
        prefill,
        decode,
        prefill_tp: 3,
    };
    let ask = Ask::new(1, 8 * 16 - 3, 6);
    let (answer, _) = pair.ask("request", &ask);
    let both = Node::alone(Box::new(fake_model(3, Duration::ZERO)), 512);
    assert!(answer == both.ask("request", &ask).0);
    pair.prefill.is_idle();
    pair.decode.is_idle();
}

#[test]
fn over_tcp() {
    overlapped(FabricKind::Tcp);
}

#[test]
fn over_shared_memory() {
    overlapped(FabricKind::Shm);
}

/// In a guest: `cargo xtask rxe`.
mod verbs {
    use super::*;

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask rxe"]
    fn over_rxe() {
        overlapped(FabricKind::Verbs);
    }
}
