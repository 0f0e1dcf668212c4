//! Which tokens may be chosen, and how likely each is.

use std::cmp::Ordering;

use crate::request::{SamplingParams, TokenId};

type Candidate = (TokenId, f32);

/// Likelier first; of equal ones the lowest token.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn possible(logits: &[f32]) -> impl Iterator<Item = Candidate> {
    (0..)
        .zip(logits.iter().copied())
        .filter(|candidate| candidate.1 > f32::NEG_INFINITY)
}

/// The token with the greatest logit; of equal ones the lowest.
pub(super) fn greatest(logits: &[f32]) -> Option<TokenId> {
    possible(logits).min_by(order).map(|(token, _)| token)
}

/// The `count` greatest, greatest first.
pub(super) fn top(logits: &[f32], count: usize) -> Vec<Candidate> {
    let mut candidates: Vec<_> = possible(logits).collect();
    keep_greatest(&mut candidates, count);
    candidates.sort_unstable_by(order);
    candidates
}

fn keep_greatest(candidates: &mut Vec<Candidate>, count: usize) {
    if (1..candidates.len()).contains(&count) {
        candidates.select_nth_unstable_by(count - 1, order);
    }
    candidates.truncate(count);
}

/// Logarithm of the sum of exponentials.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if greatest == f32::NEG_INFINITY {
        return f64::from(greatest);
    }
    let sum: f64 = logits.iter().map(|&l| weight(l, greatest)).sum();
    f64::from(greatest) + sum.ln()
}

/// In single precision, which is faster; sums are in double precision.
fn weight(logit: f32, greatest: f32) -> f64 {
    f64::from((logit - greatest).exp())
}

/// Tokens that may be chosen.
pub(super) struct Kept {
    /// With weights, which do not sum up to 1.
    pub(super) weights: Vec<(TokenId, f64)>,
    total: f64,
}

impl Kept {
    /// Temperature, min-p, top-k and top-p, in this order. Nothing if no token is possible.
    pub(super) fn new(logits: &[f32], params: &SamplingParams) -> Option<Self> {
        let mut candidates: Vec<_> = possible(logits)
            .map(|(token, logit)| (token, logit / params.temperature))
            .collect();
        let greatest = candidates.iter().map(|c| c.1).reduce(f32::max)?;
        if params.min_p > 0.0 {
            let least = f64::from(params.min_p);
            candidates.retain(|c| weight(c.1, greatest) >= least);
        }
        if params.top_k > 0 {
            keep_greatest(&mut candidates, params.top_k);
        }
        if params.top_p < 1.0 {
            keep_likeliest(&mut candidates, greatest, f64::from(params.top_p));
        }
        // Selecting leaves an order that is nobody's; this one is.
        candidates.sort_unstable_by_key(|candidate| candidate.0);
        let weights: Vec<_> = candidates
            .into_iter()
            .map(|(token, logit)| (token, weight(logit, greatest)))
            .collect();
        let total = weights.iter().map(|(_, weight)| weight).sum();
        Some(Self { weights, total })
    }

    /// The token at `point`, from 0 up to but not including 1, of their cumulated probability.
    pub(super) fn at(&self, point: f64) -> TokenId {
        let mut left = point * self.total;
        let mut last = 0;
        for &(token, weight) in self.weights.iter().filter(|(_, weight)| *weight > 0.0) {
            last = token;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        // Rounding may leave a rest after the last one.
        last
    }
}

/// The fewest of the likeliest candidates that have `share` of the probability together.
fn keep_likeliest(candidates: &mut Vec<Candidate>, greatest: f32, share: f64) {
    let wanted = share
        * candidates
            .iter()
            .map(|c| weight(c.1, greatest))
            .sum::<f64>();
    // Mostly few are needed: so few are sorted, and more only when they are not enough.
    let mut sorted = 0;
    let mut sum = 0.0;
    while sorted < candidates.len() {
        let next = (sorted * 8).max(64).min(candidates.len());
        if next < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(next - sorted - 1, order);
        }
        candidates[sorted..next].sort_unstable_by(order);
        for position in sorted..next {
            sum += weight(candidates[position].1, greatest);
            if sum >= wanted {
                candidates.truncate(position + 1);
                return;
            }
        }
        sorted = next;
    }
}
