//! Causal attention over pages.
//!
//! Invariant: for one row and head, the keys are taken page by page from position 0 on, by the same operations in the
//! same order, whichever rows are computed together, and whichever blocks the pages are. Positions after the row's own
//! are never read as numbers.

use std::ops::Range;

use parking_lot::Mutex;

use super::product::Panels;
use crate::{
    model::{
        ModelError,
        forward::team::Team,
        kv::{Cache, Role},
        simd::{self, F32x16, Isa, Kernel, Lanes},
    },
    request::BlockId,
};

/// Rows of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Position of the first.
    pub(crate) start: usize,
    /// Its blocks, from position 0 on.
    pub(crate) blocks: Vec<BlockId>,
}

/// Tokens of a page that the kernels take at once.
pub(crate) const PAGE: usize = 16;
/// Rows that share the loading of a page.
const TILE: usize = 16;

/// Sizes that all rows share.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads of each key head.
    pub(crate) group: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Writes `[kv head][row][query head of it][element]` to `out`.
pub(crate) fn attention(
    (isa, team): (Isa, &mut Team),
    heads: Heads,
    queries: &Panels,
    sequences: &[Sequence],
    (cache, layer): (&Cache, usize),
    out: &mut Vec<F32x16>,
) -> Result<(), ModelError> {
    let per_row = heads.group * heads.head_dim / 16;
    out.resize(queries.rows * heads.kv_heads * per_row, F32x16::default());
    // The tiles in the order of `out`, so that each gets its part.
    let mut rest = &mut out[..];
    let mut tiles = Vec::with_capacity(heads.kv_heads * sequences.len());
    for kv_head in 0..heads.kv_heads {
        for sequence in sequences {
            let mut first = sequence.rows.start;
            while first < sequence.rows.end {
                let count = TILE.min(sequence.rows.end - first);
                let (mine, others) = rest.split_at_mut(count * per_row);
                rest = others;
                tiles.push(Tile {
                    heads,
                    queries,
                    cache,
                    layer,
                    kv_head,
                    first,
                    position: sequence.start + first - sequence.rows.start,
                    count,
                    blocks: &sequence.blocks,
                    out: mine,
                });
                first += count;
            }
        }
    }
    let failure = Mutex::new(None);
    let work = Mutex::new(tiles.into_iter());
    team.run(&|| {
        loop {
            let next = work.lock().next();
            let Some(tile) = next else { break };
            if let Err(error) = isa.run(tile) {
                *failure.lock() = Some(error);
            }
        }
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// Some rows of one sequence, and one key head.
struct Tile<'a> {
    heads: Heads,
    queries: &'a Panels,
    cache: &'a Cache,
    layer: usize,
    kv_head: usize,
    first: usize,
    /// Of the first row.
    position: usize,
    count: usize,
    blocks: &'a [BlockId],
    out: &'a mut [F32x16],
}

impl Kernel for Tile<'_> {
    type Output = Result<(), ModelError>;

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) -> Self::Output {
        let Heads {
            group, head_dim, ..
        } = self.heads;
        let width = head_dim / 16;
        let lines = self.count * group;
        // A line is one row and one query head. `queries` is `[line][element]`.
        let mut queries = vec![0.0; lines * head_dim];
        for (line, query) in queries.chunks_mut(head_dim).enumerate() {
            let row = self.first + line / group;
            let head = self.kv_head * group + line % group;
            for (i, to) in query.chunks_mut(16).enumerate() {
                to.copy_from_slice(&self.queries.group(head * width + i)[row].0);
            }
        }
        let end = self.position + self.count;
        let pages = end.div_ceil(PAGE);
        let pages_of = |line: usize| (self.position + line / group) / PAGE + 1;
        // Scores, then weights: `[line][page]`, zeros beyond a line's position.
        let mut scores = vec![F32x16::default(); lines * pages];
        let mut page = vec![0.0; PAGE * head_dim];
        let mut turned = vec![F32x16::default(); head_dim];
        let per_block = self.cache.block_tokens() / PAGE;
        debug_assert_eq!(per_block, 1, "a block is a page");
        for (p, block) in self.blocks.iter().enumerate().take(pages) {
            let tokens = PAGE.min(end - p * PAGE);
            let at = (self.layer, Role::Key, self.kv_head);
            self.cache.load(at, *block, tokens, &mut page)?;
            for (token, vector) in page.chunks(head_dim).enumerate() {
                for (to, value) in turned.iter_mut().zip(vector) {
                    to.0[token] = *value;
                }
            }
            // Lines from the first whose position reaches this page.
            let mut line = (p * PAGE).saturating_sub(self.position) * group;
            while line < lines {
                line += if lines - line >= 4 && S::TILE >= 4 {
                    score::<S, 4>(s, &queries, &turned, line, &mut scores, pages, p)
                } else {
                    score::<S, 1>(s, &queries, &turned, line, &mut scores, pages, p)
                };
            }
        }
        let mut scales = vec![0.0; lines];
        for (line, scores) in scores.chunks_mut(pages).enumerate() {
            let valid = self.position + line / group + 1;
            scales[line] = weigh(s, &mut scores[..pages_of(line)], valid);
        }
        self.out.fill(F32x16::default());
        for (p, block) in self.blocks.iter().enumerate().take(pages) {
            let tokens = PAGE.min(end - p * PAGE);
            let at = (self.layer, Role::Value, self.kv_head);
            self.cache.load(at, *block, tokens, &mut page)?;
            for (to, values) in turned.iter_mut().zip(page.chunks_exact(16)) {
                to.0.copy_from_slice(values);
            }
            for line in (p * PAGE).saturating_sub(self.position) * group..lines {
                let valid = PAGE.min(self.position + line / group + 1 - p * PAGE);
                let weights = &scores[line * pages + p].0[..valid];
                let out = &mut self.out[line * width..][..width];
                if width.is_multiple_of(4) {
                    mix::<S, 4>(s, weights, &turned, out);
                } else {
                    mix::<S, 2>(s, weights, &turned, out);
                }
            }
        }
        for (out, scale) in self.out.chunks_mut(width).zip(&scales) {
            for out in out {
                let value = s.mul(s.load(out), s.splat(*scale));
                s.store(value, out);
            }
        }
        Ok(())
    }
}

/// Products of `M` lines' queries with a page's keys. Four sums for each, joined in a fixed order.
#[inline(always)]
fn score<S: Lanes, const M: usize>(
    s: S,
    queries: &[f32],
    keys: &[F32x16],
    line: usize,
    scores: &mut [F32x16],
    pages: usize,
    page: usize,
) -> usize {
    let dim = keys.len();
    let mut sums = [[s.splat(0.0); 4]; M];
    let lines: [&[f32]; M] = std::array::from_fn(|m| &queries[(line + m) * dim..][..dim]);
    for (k, keys) in keys.chunks_exact(4).enumerate() {
        for (j, key) in keys.iter().enumerate() {
            let key = s.load(key);
            for m in 0..M {
                sums[m][j] = s.fma(s.splat(lines[m][4 * k + j]), key, sums[m][j]);
            }
        }
    }
    for m in 0..M {
        let [a, b, c, d] = sums[m];
        let sum = s.add(s.add(a, b), s.add(c, d));
        s.store(sum, &mut scores[(line + m) * pages + page]);
    }
    M
}

/// Makes weights of the scores of `valid` positions; returns what the weighted sum is to be multiplied with.
#[inline(always)]
fn weigh<S: Lanes>(s: S, scores: &mut [F32x16], valid: usize) -> f32 {
    let Some(last) = scores.last_mut() else {
        return 0.0;
    };
    let used = (valid - 1) % PAGE + 1;
    last.0[used..].fill(f32::MIN);
    let mut largest = s.splat(f32::MIN);
    for score in scores.iter() {
        largest = s.max(s.load(score), largest);
    }
    let mut lanes = F32x16::default();
    s.store(largest, &mut lanes);
    let largest = lanes.0.iter().fold(f32::MIN, |a, b| if *b > a { *b } else { a });
    let largest = s.splat(largest);
    let mut total = s.splat(0.0);
    let pages = scores.len();
    for (page, score) in scores.iter_mut().enumerate() {
        let weight = simd::exp(s, s.sub(s.load(score), largest));
        s.store(weight, score);
        if page + 1 == pages {
            score.0[used..].fill(0.0);
        }
        total = s.add(total, s.load(score));
    }
    s.store(total, &mut lanes);
    1.0 / simd::sum(&lanes.0)
}

/// Adds the weighted values of a page, `W` groups of lanes at a time.
#[inline(always)]
fn mix<S: Lanes, const W: usize>(s: S, weights: &[f32], values: &[F32x16], out: &mut [F32x16]) {
    let width = out.len();
    for (i, out) in out.chunks_exact_mut(W).enumerate() {
        let mut sums = [s.splat(0.0); W];
        for w in 0..W {
            sums[w] = s.load(&out[w]);
        }
        for (values, weight) in values.chunks_exact(width).zip(weights) {
            let weight = s.splat(*weight);
            let values = &values[i * W..][..W];
            for w in 0..W {
                sums[w] = s.fma(weight, s.load(&values[w]), sums[w]);
            }
        }
        for w in 0..W {
            s.store(sums[w], &mut out[w]);
        }
    }
}
