//! Inputs of matrix products: rows, as floats or quantised to 8 bits, made from what a layer computed before.
//!
//! Invariant: a row depends on nothing but its own source.

use parking_lot::Mutex;

use super::product::Panels;
use crate::model::{
    forward::team::Team,
    simd::{self, F32x16, Isa, Kernel, Lanes},
};

/// 32 elements of a row as 8-bit integers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct QuantisedBlock {
    /// Four elements each.
    pub(crate) values: [i32; 8],
    /// What the integers are multiplied with.
    pub(crate) scale: f32,
    /// Of the integers.
    pub(crate) sum: i32,
}

/// Which forms a product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) floats: bool,
    pub(crate) blocks: bool,
}

impl Need {
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            floats: self.floats || other.floats,
            blocks: self.blocks || other.blocks,
        }
    }
}

/// The rows.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    inner: usize,
    floats: Vec<f32>,
    blocks: Vec<QuantisedBlock>,
}

/// What rows are made from.
#[derive(Clone, Copy)]
pub(crate) enum From<'a> {
    /// The RMS norm of each row, times weights.
    Norm {
        values: &'a Panels,
        weight: &'a [F32x16],
        epsilon: f32,
    },
    /// Attention's output, `[kv head][row][lanes]`.
    Heads {
        values: &'a [F32x16],
        /// Groups of lanes that a row has of each head.
        width: usize,
    },
    /// silu(gate) * up, where `values` has all gates, then all ups.
    Gated(&'a Panels),
}

impl Rows {
    pub(crate) fn floats(&self, row: usize) -> &[f32] {
        &self.floats[row * self.inner..][..self.inner]
    }

    pub(crate) fn blocks(&self, row: usize) -> &[QuantisedBlock] {
        let blocks = self.inner / 32;
        &self.blocks[row * blocks..][..blocks]
    }

    /// Makes `rows` rows of `inner` elements; `index` maps to the rows of the source.
    pub(crate) fn fill(
        &mut self,
        (isa, team): (Isa, &mut Team),
        (rows, inner): (usize, usize),
        need: Need,
        source: From<'_>,
        index: &(dyn Fn(usize) -> usize + Sync),
    ) {
        self.rows = rows;
        self.inner = inner;
        self.floats.resize(rows * inner, 0.0);
        let blocks = if need.blocks { inner / 32 } else { 0 };
        self.blocks.resize(rows * blocks, QuantisedBlock::default());
        let piece = rows.div_ceil(team.threads() * 2).max(1);
        // Without blocks there is nothing to hand out beside the floats.
        let (mut some, mut none);
        let blocks_of: &mut (dyn Iterator<Item = &mut [QuantisedBlock]> + Send) = if blocks > 0 {
            some = self.blocks.chunks_mut(piece * blocks);
            &mut some
        } else {
            none = std::iter::repeat_with(|| &mut [][..]);
            &mut none
        };
        let work = Mutex::new(
            self.floats
                .chunks_mut(piece * inner)
                .zip(blocks_of)
                .enumerate(),
        );
        let section = || {
            loop {
                let next = work.lock().next();
                let Some((chunk, (floats, quantised))) = next else {
                    break;
                };
                let mut quantised = quantised.chunks_mut(blocks.max(1));
                for (row, floats) in floats.chunks_mut(inner).enumerate() {
                    isa.run(Row {
                        source,
                        row: index(chunk * piece + row),
                        floats,
                        blocks: quantised.next().unwrap_or_default(),
                    });
                }
            }
        };
        if rows == 1 {
            section();
        } else {
            team.run(&section);
        }
    }
}

struct Row<'a> {
    source: From<'a>,
    row: usize,
    floats: &'a mut [f32],
    blocks: &'a mut [QuantisedBlock],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Self {
            source,
            row,
            floats,
            blocks,
        } = self;
        let mut lanes = F32x16::default();
        match source {
            From::Norm {
                values,
                weight,
                epsilon,
            } => {
                let mut squares = s.splat(0.0);
                for group in values.data.chunks_exact(values.rows) {
                    let x = s.load(&group[row]);
                    squares = s.fma(x, x, squares);
                }
                s.store(squares, &mut lanes);
                let mean = simd::sum(&lanes.0) / floats.len() as f32;
                let scale = s.splat(1.0 / (mean + epsilon).sqrt());
                let groups = values.data.chunks_exact(values.rows).zip(weight);
                for ((group, weight), to) in groups.zip(floats.chunks_mut(16)) {
                    let x = s.mul(s.mul(s.load(&group[row]), scale), s.load(weight));
                    s.store(x, &mut lanes);
                    to.copy_from_slice(&lanes.0);
                }
            }
            From::Heads { values, width } => {
                let rows = values.len() * 16 / floats.len();
                for (head, to) in floats.chunks_mut(width * 16).enumerate() {
                    let from = &values[(head * rows + row) * width..][..width];
                    for (from, to) in from.iter().zip(to.chunks_mut(16)) {
                        to.copy_from_slice(&from.0);
                    }
                }
            }
            From::Gated(values) => {
                let groups = floats.len() / 16;
                for (g, to) in floats.chunks_mut(16).enumerate() {
                    let gate = s.load(&values.group(g)[row]);
                    let up = s.load(&values.group(groups + g)[row]);
                    let e = simd::exp(s, s.sub(s.splat(0.0), gate));
                    let silu = s.div(gate, s.add(s.splat(1.0), e));
                    s.store(s.mul(silu, up), &mut lanes);
                    to.copy_from_slice(&lanes.0);
                }
            }
        }
        for (block, values) in blocks.iter_mut().zip(floats.chunks_exact(32)) {
            quantise(values, block);
        }
    }
}

/// The largest magnitude becomes 127; ties round to even.
#[inline(always)]
fn quantise(values: &[f32], block: &mut QuantisedBlock) {
    let mut maxima = [0.0f32; 16];
    for half in values.chunks_exact(16) {
        for (max, value) in maxima.iter_mut().zip(half) {
            let value = value.abs();
            *max = if value > *max { value } else { *max };
        }
    }
    let mut largest = 0.0f32;
    for max in maxima {
        largest = if max > largest { max } else { largest };
    }
    block.scale = largest / 127.0;
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    // Beyond 2^23 floats have no fraction, so the low bits of the sum are the rounded integer.
    const MAGIC: f32 = 12_582_912.0;
    let mut integers = [0i32; 32];
    for (to, value) in integers.iter_mut().zip(values) {
        let bits = (value * inverse + MAGIC).to_bits();
        *to = bits.wrapping_sub(MAGIC.to_bits()) as i32;
    }
    block.sum = integers.iter().fold(0, |sum, value| sum.wrapping_add(*value));
    for (to, four) in block.values.iter_mut().zip(integers.chunks_exact(4)) {
        *to = four[0] & 255 | (four[1] & 255) << 8 | (four[2] & 255) << 16 | four[3] << 24;
    }
}
