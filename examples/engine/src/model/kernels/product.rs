//! Matrix products.
//!
//! Invariant: an output element is computed by the same operations in the same order, whatever else is computed with it:
//! block by block (f32: element by element) of the inner dimension, from the first on, into one accumulator. So a row's
//! result depends neither on the batch's other rows nor on tiles or threads.

use parking_lot::Mutex;

use super::{
    matrix::{Matrix, Weights},
    rows::{QuantisedBlock, Rows},
};
use crate::model::{
    forward::team::Team,
    simd::{Bytes64, F16x16, F32x16, Isa, Kernel, Lanes},
};

/// Values in groups of 16 columns: `[group][row]`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Panels {
    pub(crate) rows: usize,
    pub(crate) data: Vec<F32x16>,
}

impl Panels {
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        Self {
            rows,
            data: vec![F32x16::default(); rows * columns.div_ceil(16)],
        }
    }

    /// The columns `16 * group ..`, of all rows.
    pub(crate) fn group(&self, group: usize) -> &[F32x16] {
        &self.data[group * self.rows..][..self.rows]
    }
}

/// `input` times each of `matrices` transposed, side by side.
pub(crate) fn product(isa: Isa, team: &mut Team, matrices: &[Matrix], input: &Rows, out: &mut Panels) {
    let rows = input.rows;
    let groups: usize = matrices.iter().map(Matrix::groups).sum();
    out.rows = rows;
    out.data.resize(groups * rows, F32x16::default());
    // Enough pieces that threads end together, and no more than needed: taking one costs a lock.
    let piece = (groups / (team.threads() * 4)).clamp(1, 64);
    let work = Mutex::new(out.data.chunks_mut(piece * rows).enumerate());
    team.run(&|| {
        loop {
            let next = work.lock().next();
            let Some((index, out)) = next else { break };
            let mut group = index * piece;
            let mut matrices = matrices.iter();
            let mut matrix = matrices.next();
            for out in out.chunks_mut(rows) {
                while let Some(m) = matrix.filter(|m| group >= m.groups()) {
                    group -= m.groups();
                    matrix = matrices.next();
                }
                let Some(matrix) = matrix else { break };
                isa.run(Group {
                    matrix,
                    group,
                    input,
                    out,
                });
                group += 1;
            }
        }
    });
}

/// One group of a matrix, for all rows.
struct Group<'a> {
    matrix: &'a Matrix,
    group: usize,
    input: &'a Rows,
    out: &'a mut [F32x16],
}

impl Kernel for Group<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let mut first = 0;
        while first < self.out.len() {
            let left = self.out.len() - first;
            let out = &mut self.out[first..];
            first += if S::TILE >= 8 && left >= 8 {
                tile::<S, 8>(s, self.matrix, self.group, self.input, first, out)
            } else if S::TILE >= 4 && left >= 4 {
                tile::<S, 4>(s, self.matrix, self.group, self.input, first, out)
            } else if left >= 2 {
                tile::<S, 2>(s, self.matrix, self.group, self.input, first, out)
            } else {
                tile::<S, 1>(s, self.matrix, self.group, self.input, first, out)
            };
        }
    }
}

/// `M` rows from `first` on; returns `M`.
#[inline(always)]
fn tile<S: Lanes, const M: usize>(
    s: S,
    matrix: &Matrix,
    group: usize,
    input: &Rows,
    first: usize,
    out: &mut [F32x16],
) -> usize {
    let mut sums = [s.splat(0.0); M];
    let inner = matrix.inner;
    let blocks = inner / super::matrix::BLOCK;
    match &matrix.weights {
        Weights::F32(data) => {
            let rows: [&[f32]; M] = std::array::from_fn(|m| &input.floats(first + m)[..inner]);
            floats(s, &data[group * inner..][..inner], rows, &mut sums);
        }
        Weights::Q8 { lines, scales } => {
            let rows: [&[QuantisedBlock]; M] =
                std::array::from_fn(|m| &input.blocks(first + m)[..blocks]);
            let lines = &lines[group * blocks * 8..][..blocks * 8];
            bytes(s, lines, &scales[group * blocks..][..blocks], rows, &mut sums);
        }
        Weights::Q4 {
            lines,
            scales,
            offsets,
        } => {
            let rows: [&[QuantisedBlock]; M] =
                std::array::from_fn(|m| &input.blocks(first + m)[..blocks]);
            let lines = &lines[group * blocks * 4..][..blocks * 4];
            let scales = &scales[group * blocks..][..blocks];
            let offsets = &offsets[group * blocks..][..blocks];
            nibbles(s, lines, scales, offsets, rows, &mut sums);
        }
    }
    for (to, sum) in out.iter_mut().zip(sums) {
        s.store(sum, to);
    }
    M
}

#[inline(always)]
fn floats<S: Lanes, const M: usize>(
    s: S,
    weights: &[F32x16],
    rows: [&[f32]; M],
    sums: &mut [S::F; M],
) {
    let mut acc = *sums;
    for (k, weight) in weights.iter().enumerate() {
        let weight = s.load(weight);
        for m in 0..M {
            acc[m] = s.fma(s.splat(rows[m][k]), weight, acc[m]);
        }
    }
    *sums = acc;
}

#[inline(always)]
fn bytes<S: Lanes, const M: usize>(
    s: S,
    lines: &[Bytes64],
    scales: &[F16x16],
    rows: [&[QuantisedBlock]; M],
    sums: &mut [S::F; M],
) {
    let mut acc = *sums;
    for (b, (lines, scale)) in lines.chunks_exact(8).zip(scales).enumerate() {
        let mut dots = [s.splat_int(0); M];
        for m in 0..M {
            // Takes back the 128 that was added to each weight.
            dots[m] = s.splat_int((-128i32).wrapping_mul(rows[m][b].sum));
        }
        for (j, line) in lines.iter().enumerate() {
            let line = s.bytes(line);
            for m in 0..M {
                dots[m] = s.dot(dots[m], line, rows[m][b].values[j]);
            }
        }
        let scale = s.half(scale);
        for m in 0..M {
            let scale = s.mul(scale, s.splat(rows[m][b].scale));
            acc[m] = s.fma(s.to_float(dots[m]), scale, acc[m]);
        }
    }
    *sums = acc;
}

#[inline(always)]
fn nibbles<S: Lanes, const M: usize>(
    s: S,
    lines: &[Bytes64],
    scales: &[F16x16],
    offsets: &[F16x16],
    rows: [&[QuantisedBlock]; M],
    sums: &mut [S::F; M],
) {
    let mut acc = *sums;
    let both = scales.iter().zip(offsets);
    for (b, (lines, (scale, offset))) in lines.chunks_exact(4).zip(both).enumerate() {
        let mut dots = [s.splat_int(0); M];
        for (j, line) in lines.iter().enumerate() {
            let (low, high) = s.nibbles(s.bytes(line));
            for m in 0..M {
                dots[m] = s.dot(dots[m], low, rows[m][b].values[j]);
                dots[m] = s.dot(dots[m], high, rows[m][b].values[j + 4]);
            }
        }
        let (scale, offset) = (s.half(scale), s.half(offset));
        for m in 0..M {
            let row = &rows[m][b];
            let of_row = s.mul(scale, s.splat(row.scale));
            acc[m] = s.fma(s.to_float(dots[m]), of_row, acc[m]);
            acc[m] = s.fma(offset, s.splat(row.scale * row.sum as f32), acc[m]);
        }
    }
    *sums = acc;
}
