//! Weight matrices as the kernels read them: 16 output rows side by side, the inner dimension streaming past.
//!
//! Group `g` holds rows `16 g .. 16 g + 16` (zeros beyond the last). For quantised weights a block is 32 elements of the
//! inner dimension, in 8 (8-bit) or 4 (4-bit) lines of 64 bytes: line `j` has, for each of the 16 rows, the four elements
//! `4 j ..`; of 4-bit weights the high halves have those of line `j + 4`.

use half::f16;

use crate::model::{
    file::{Block, Tensor},
    kernels::rows::Need,
    simd::{Bytes64, F16x16, F32x16},
    ModelError,
};

/// Elements of a quantised block.
pub(crate) const BLOCK: usize = 32;
/// Rows of a group.
pub(crate) const GROUP: usize = 16;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Q8,
    Q4,
}

/// The weights of a matrix.
pub(crate) enum Weights {
    /// `[group][inner]`.
    F32(Vec<F32x16>),
    /// Each byte is the weight plus 128: the products want one side unsigned.
    Q8 {
        lines: Vec<Bytes64>,
        scales: Vec<F16x16>,
    },
    /// Weight = scale * bits + offset.
    Q4 {
        lines: Vec<Bytes64>,
        scales: Vec<F16x16>,
        offsets: Vec<F16x16>,
    },
}

/// A matrix.
pub(crate) struct Matrix {
    /// Output elements.
    pub(crate) rows: usize,
    /// Input elements.
    pub(crate) inner: usize,
    pub(crate) weights: Weights,
}

impl Matrix {
    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    pub(crate) fn need(&self) -> Need {
        let is_quantised = !matches!(self.weights, Weights::F32(_));
        Need {
            floats: !is_quantised,
            blocks: is_quantised,
        }
    }

    /// Takes from `tensor` the rows that `row_at` names, of each the columns `columns`.
    pub(crate) fn pack(
        tensor: &Tensor<'_>,
        format: Format,
        rows: usize,
        row_at: &dyn Fn(usize) -> usize,
        columns: std::ops::Range<usize>,
    ) -> Result<Self, ModelError> {
        let inner = columns.len();
        if format != Format::F32 && (inner % BLOCK != 0 || columns.start % BLOCK != 0) {
            return Err(ModelError::Unsupported(format!(
                "{}: columns {columns:?} of a quantised matrix do not begin and end with blocks of {BLOCK}; use f32 \
                 weights or fewer ranks",
                tensor.name
            )));
        }
        let groups = rows.div_ceil(GROUP);
        let weights = match format {
            Format::F32 => {
                let mut data = vec![F32x16::default(); groups * inner];
                let mut row = vec![0.0; tensor.columns()];
                for (r, index) in (0..rows).map(row_at).enumerate() {
                    tensor.row(index, &mut row)?;
                    let to = &mut data[r / GROUP * inner..][..inner];
                    for (to, value) in to.iter_mut().zip(&row[columns.clone()]) {
                        to.0[r % GROUP] = *value;
                    }
                }
                Weights::F32(data)
            }
            Format::Q8 | Format::Q4 => {
                let blocks = inner / BLOCK;
                let is_q4 = format == Format::Q4;
                let per_block = if is_q4 { 4 } else { 8 };
                let empty = if is_q4 { 0 } else { 128 };
                let mut lines = vec![Bytes64([empty; 64]); groups * blocks * per_block];
                let mut scales = vec![F16x16([0; 16]); groups * blocks];
                let mut offsets = vec![F16x16([0; 16]); if is_q4 { groups * blocks } else { 0 }];
                for (r, index) in (0..rows).map(row_at).enumerate() {
                    let (group, lane) = (r / GROUP, r % GROUP);
                    for b in 0..blocks {
                        let block: Block =
                            tensor.block(index, columns.start / BLOCK + b, is_q4)?;
                        let at = group * blocks + b;
                        scales[at].0[lane] = block.scale.to_bits();
                        if is_q4 {
                            offsets[at].0[lane] = block.offset.to_bits();
                        }
                        for (e, value) in block.values.iter().enumerate() {
                            let (line, shift) = match e / 4 {
                                line if is_q4 => (line % 4, line / 4 * 4),
                                line => (line, 0),
                            };
                            let byte = &mut lines[at * per_block + line].0[4 * lane + e % 4];
                            match is_q4 {
                                true => *byte |= (*value as u8) << shift,
                                false => *byte = *value as u8 ^ 128,
                            }
                        }
                    }
                }
                match is_q4 {
                    true => Weights::Q4 {
                        lines,
                        scales,
                        offsets,
                    },
                    false => Weights::Q8 { lines, scales },
                }
            }
        };
        Ok(Self {
            rows,
            inner,
            weights,
        })
    }

    /// One row, as floats.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let (group, lane) = (row / GROUP, row % GROUP);
        let blocks = self.inner / BLOCK;
        let half = |values: &[F16x16], at: usize| f16::from_bits(values[at].0[lane]).to_f32();
        match &self.weights {
            Weights::F32(data) => {
                for (out, value) in out.iter_mut().zip(&data[group * self.inner..]) {
                    *out = value.0[lane];
                }
            }
            Weights::Q8 { lines, scales } => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = group * blocks + k / BLOCK;
                    let byte = lines[at * 8 + k % BLOCK / 4].0[4 * lane + k % 4];
                    *out = half(scales, at) * f32::from((byte ^ 128) as i8);
                }
            }
            Weights::Q4 {
                lines,
                scales,
                offsets,
            } => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = group * blocks + k / BLOCK;
                    let line = k % BLOCK / 4;
                    let byte = lines[at * 4 + line % 4].0[4 * lane + k % 4];
                    let bits = byte >> (line / 4 * 4) & 15;
                    *out = half(scales, at) * f32::from(bits) + half(offsets, at);
                }
            }
        }
    }
}
