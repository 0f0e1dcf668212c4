//! A model that notes, at the end of each layer, how much had been pushed by then. Runs on the engine thread.

use std::{ops::Range, sync::Arc};

use kvpush::Endpoint;
use parking_lot::Mutex;

use super::protocol::LayerEnd;
use crate::model::{Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer, Wanted};

/// The notes. Cleared by who reads them.
pub(super) type Notes = Arc<Mutex<Vec<LayerEnd>>>;

/// See the module's documentation.
pub(super) struct Watched {
    model: Box<dyn Model>,
    endpoint: Endpoint,
    notes: Notes,
    /// Bytes of one block of one layer, over all ranks.
    block_bytes: u64,
    computed: u64,
}

impl Watched {
    pub(super) fn new(model: Box<dyn Model>, endpoint: Endpoint, notes: Notes) -> Self {
        let layers = model
            .shards()
            .iter()
            .filter_map(|shard| shard.layout.layers.first());
        let planes = layers.flat_map(|layer| {
            let tokens = u64::from(layer.tokens_per_page);
            let bytes = move |plane: &kvpush::kv::Plane| {
                tokens * u64::from(plane.head_bytes) * u64::from(plane.heads.count)
            };
            layer.planes.iter().map(bytes)
        });
        Self {
            block_bytes: planes.sum(),
            model,
            endpoint,
            notes,
            computed: 0,
        }
    }
}

/// Bytes that an endpoint has posted so far.
pub(super) fn posted(endpoint: &Endpoint) -> u64 {
    let peers = endpoint.stats().peers;
    let rails = peers.iter().flat_map(|peer| &peer.rails);
    rails.map(|rail| rail.bytes).sum()
}

struct Watch<'a> {
    inner: &'a mut dyn Observer,
    endpoint: &'a Endpoint,
    notes: &'a Notes,
    computed: &'a mut u64,
    layer_bytes: u64,
}

impl Observer for Watch<'_> {
    fn layer_written(&mut self, layer: usize, chunks: Range<usize>) {
        self.inner.layer_written(layer, chunks);
    }

    fn layer_computed(&mut self, layer: usize, chunks: Range<usize>) {
        self.inner.layer_computed(layer, chunks);
        *self.computed += self.layer_bytes;
        self.notes.lock().push(LayerEnd {
            layer,
            posted: posted(self.endpoint),
            computed: *self.computed,
            bytes: self.layer_bytes,
        });
    }
}

impl Model for Watched {
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
        let tokens = self.model.block_tokens();
        let blocks = batch.iter().map(|chunk| {
            let end = chunk.start + chunk.tokens.len();
            // A block that the next chunk goes on with is pushed with that.
            let last = match chunk.logits {
                Wanted::None => end / tokens,
                Wanted::Last | Wanted::All => end.div_ceil(tokens),
            };
            (last - chunk.start / tokens) as u64
        });
        let mut watch = Watch {
            layer_bytes: blocks.sum::<u64>() * self.block_bytes,
            inner: observer,
            endpoint: &self.endpoint,
            notes: &self.notes,
            computed: &mut self.computed,
        };
        self.model.forward(batch, &mut watch)
    }
}
