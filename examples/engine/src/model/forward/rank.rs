//! One tensor parallel rank: its share of each layer, over its own keys and values.
//!
//! A rank has some heads and some of the feed-forward elements; what it adds to the residual stream is a part, and the
//! [`Exchange`] makes the sum. The residual stream is the same on all ranks. A rank is driven by one thread, and has a
//! team for its products.
//!
//! With two micro-batches every exchange of one has the other's computation between its post and its taking.

use std::{
    mem,
    ops::Range,
    sync::{Arc, atomic::Ordering::SeqCst},
};

use super::{
    batch::{Micro, Step},
    exchange::Exchange,
    team::Team,
};
use crate::model::{
    ModelError, Part,
    kernels::{
        attention::{Heads, attention},
        matrix::Matrix,
        product::{Panels, product},
        rotary::Rotary,
        rows::{From, Need, Rows},
    },
    kv::Cache,
    simd::{F32x16, Isa},
};

/// A layer's weights, one rank's share.
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<F32x16>,
    /// Queries, keys, values.
    pub(crate) qkv: Vec<Matrix>,
    pub(crate) output: Vec<Matrix>,
    pub(crate) feed_forward_norm: Vec<F32x16>,
    /// Gate, up.
    pub(crate) gate_up: Vec<Matrix>,
    pub(crate) down: Vec<Matrix>,
}

/// What happens in a step.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Written(usize),
    Computed(usize),
    ExchangeStarted(usize, Part),
    ExchangeEnded(usize, Part),
}

/// A rank.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    pub(crate) isa: Isa,
    pub(crate) team: Team,
    pub(crate) heads: Heads,
    pub(crate) hidden: usize,
    pub(crate) epsilon: f32,
    pub(crate) embedding: Arc<Vec<Arc<Matrix>>>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<F32x16>,
    /// The rank's part of the vocabulary.
    pub(crate) head: Arc<Matrix>,
    pub(crate) rotary: Arc<Rotary>,
    pub(crate) cache: Cache,
    pub(crate) exchange: Arc<Exchange>,
    pub(crate) tickets: u64,
    pub(crate) scratch: Scratch,
}

/// Buffers that steps use again.
#[derive(Default)]
pub(crate) struct Scratch {
    rows: Rows,
    wide: Panels,
    attended: Vec<F32x16>,
}

/// A micro-batch under way.
struct State<'a> {
    micro: &'a Micro,
    residual: Panels,
    part: Panels,
    /// The exchange that has been posted and not taken.
    pending: Option<(u64, usize, Part)>,
    /// The layer that this rank has written and others perhaps not.
    unreported: Option<usize>,
}

impl Rank {
    /// Returns the rank's part of the logits of each micro-batch.
    pub(crate) fn run(
        &mut self,
        step: &Step,
        hear: &mut dyn FnMut(Happening, Range<usize>),
    ) -> Result<Vec<Panels>, ModelError> {
        let mut states: Vec<State<'_>> = step.micros.iter().map(|m| self.embed(m)).collect();
        for layer in 0..self.layers.len() {
            for part in [Part::Attention, Part::FeedForward] {
                for state in &mut states {
                    self.take(state, hear)?;
                    match part {
                        Part::Attention => self.attend(layer, state, hear)?,
                        Part::FeedForward => self.feed_forward(layer, state),
                    }
                    self.post(layer, part, state, hear);
                }
            }
        }
        let mut logits = Vec::with_capacity(states.len());
        for mut state in states {
            self.take(&mut state, hear)?;
            logits.push(self.logits(&state));
        }
        Ok(logits)
    }

    fn embed<'a>(&self, micro: &'a Micro) -> State<'a> {
        let rows = micro.tokens.len();
        let mut residual = Panels::new(rows, self.hidden);
        let mut vector = vec![0.0; self.hidden];
        for (row, token) in micro.tokens.iter().enumerate() {
            let mut index = *token as usize;
            for shard in self.embedding.iter() {
                if index < shard.rows {
                    shard.row(index, &mut vector);
                    break;
                }
                index -= shard.rows;
            }
            for (group, values) in vector.chunks(16).enumerate() {
                residual.data[group * rows + row].0.copy_from_slice(values);
            }
        }
        State {
            micro,
            residual,
            part: Panels::default(),
            pending: None,
            unreported: None,
        }
    }

    fn attend(
        &mut self,
        layer: usize,
        state: &mut State<'_>,
        hear: &mut dyn FnMut(Happening, Range<usize>),
    ) -> Result<(), ModelError> {
        let Self {
            isa,
            team,
            heads,
            layers,
            scratch,
            ..
        } = self;
        let (isa, heads, weights) = (*isa, *heads, &layers[layer]);
        let micro = state.micro;
        let rows = micro.tokens.len();
        let source = From::Norm {
            values: &state.residual,
            weight: &weights.attention_norm,
            epsilon: self.epsilon,
        };
        let need = need(&weights.qkv);
        scratch
            .rows
            .fill((isa, team), (rows, self.hidden), need, source, &|row| row);
        product(isa, team, &weights.qkv, &scratch.rows, &mut scratch.wide);
        let query_heads = heads.group * heads.kv_heads;
        self.rotary.turn_and_store(
            team,
            &mut scratch.wide,
            (query_heads, heads.kv_heads),
            &micro.places,
            (&self.cache, layer),
        )?;
        micro.written.fetch_add(1, SeqCst);
        state.unreported = Some(layer);
        report(self.ranks, state, hear);
        let cache = (&self.cache, layer);
        let attended = &mut scratch.attended;
        attention((isa, team), heads, &scratch.wide, &micro.sequences, cache, attended)?;
        let source = From::Heads {
            values: &scratch.attended,
            width: heads.group * heads.head_dim / 16,
        };
        let inner = query_heads * heads.head_dim;
        let need = self::need(&weights.output);
        scratch
            .rows
            .fill((isa, team), (rows, inner), need, source, &|row| row);
        product(isa, team, &weights.output, &scratch.rows, &mut state.part);
        Ok(())
    }

    fn feed_forward(&mut self, layer: usize, state: &mut State<'_>) {
        let Self {
            isa,
            team,
            layers,
            scratch,
            ..
        } = self;
        let (isa, weights) = (*isa, &layers[layer]);
        let rows = state.micro.tokens.len();
        let source = From::Norm {
            values: &state.residual,
            weight: &weights.feed_forward_norm,
            epsilon: self.epsilon,
        };
        let need_in = need(&weights.gate_up);
        scratch
            .rows
            .fill((isa, team), (rows, self.hidden), need_in, source, &|row| row);
        product(isa, team, &weights.gate_up, &scratch.rows, &mut scratch.wide);
        let inner = weights.down[0].inner;
        let source = From::Gated(&scratch.wide);
        let need_out = need(&weights.down);
        scratch
            .rows
            .fill((isa, team), (rows, inner), need_out, source, &|row| row);
        product(isa, team, &weights.down, &scratch.rows, &mut state.part);
    }

    fn post(
        &mut self,
        layer: usize,
        part: Part,
        state: &mut State<'_>,
        hear: &mut dyn FnMut(Happening, Range<usize>),
    ) {
        report(self.ranks, state, hear);
        let ticket = self.tickets;
        self.tickets += 1;
        if self.ranks > 1 {
            let data = mem::take(&mut state.part.data);
            self.exchange.post(ticket, self.rank, data);
        }
        state.pending = Some((ticket, layer, part));
        hear(
            Happening::ExchangeStarted(layer, part),
            state.micro.chunks.clone(),
        );
    }

    /// Adds what was posted last to the residual stream.
    fn take(
        &mut self,
        state: &mut State<'_>,
        hear: &mut dyn FnMut(Happening, Range<usize>),
    ) -> Result<(), ModelError> {
        let Some((ticket, layer, part)) = state.pending.take() else {
            return Ok(());
        };
        let residual = &mut state.residual.data;
        if self.ranks > 1 {
            self.exchange.add(ticket, residual)?;
        } else {
            for (to, part) in residual.iter_mut().zip(&state.part.data) {
                to.0.iter_mut().zip(part.0).for_each(|(to, x)| *to += x);
            }
        }
        // All ranks have posted, so all have written.
        report(self.ranks, state, hear);
        let chunks = || state.micro.chunks.clone();
        hear(Happening::ExchangeEnded(layer, part), chunks());
        if part == Part::FeedForward {
            hear(Happening::Computed(layer), chunks());
        }
        Ok(())
    }

    fn logits(&mut self, state: &State<'_>) -> Panels {
        let wanted = &state.micro.wanted;
        let mut logits = Panels::default();
        if wanted.is_empty() {
            return logits;
        }
        let head = std::slice::from_ref(&*self.head);
        let source = From::Norm {
            values: &state.residual,
            weight: &self.norm,
            epsilon: self.epsilon,
        };
        self.scratch.rows.fill(
            (self.isa, &mut self.team),
            (wanted.len(), self.hidden),
            need(head),
            source,
            &|row| wanted[row],
        );
        product(self.isa, &mut self.team, head, &self.scratch.rows, &mut logits);
        logits
    }
}

/// Tells that a layer has been written as soon as all ranks have.
fn report(
    ranks: usize,
    state: &mut State<'_>,
    hear: &mut dyn FnMut(Happening, Range<usize>),
) {
    if let Some(layer) = state.unreported
        && state.micro.written.load(SeqCst) >= ranks * (layer + 1)
    {
        state.unreported = None;
        hear(Happening::Written(layer), state.micro.chunks.clone());
    }
}

fn need(matrices: &[Matrix]) -> Need {
    matrices
        .iter()
        .map(Matrix::need)
        .fold(Need::default(), Need::or)
}
