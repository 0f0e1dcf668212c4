//! How the next token is chosen. Pure.
//!
//! Invariants: the choice depends on the row of logits, the parameters, what the completion has so far, its number and
//! the seed, and on nothing else: not on the batch, nor on which engine of a pair chooses. Of equal logits the lowest
//! token wins.
//!
//! The order is vLLM's: log probabilities are of the logits as the model gave them; then forbidden tokens, bias,
//! penalties, temperature, min-p, top-k, top-p.

mod adjust;
mod candidates;
mod random;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

pub(super) use random::fresh_seed;

use crate::request::{SamplingParams, TokenId};

/// Below that, sampling is greedy.
const COLDEST: f32 = 1e-5;

/// What one completion has so far.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    prompt: std::sync::Arc<HashSet<TokenId>>,
    generated: HashMap<TokenId, u32>,
    count: usize,
}

impl History {
    pub(super) fn new(prompt: &[TokenId]) -> Self {
        Self {
            prompt: std::sync::Arc::new(prompt.iter().copied().collect()),
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, token: TokenId) {
        *self.generated.entry(token).or_default() += 1;
        self.count += 1;
    }

    /// Tokens generated.
    pub(super) fn count(&self) -> usize {
        self.count
    }
}

/// Chooses for the completions of one request.
#[derive(Clone, Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    /// Tokens that end a completion.
    stops: Vec<TokenId>,
    /// Sampling state is this, and how many tokens there are.
    pub(super) seed: u64,
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) id: TokenId,
    pub(super) logprob: Option<f32>,
    pub(super) top: Vec<(TokenId, f32)>,
}

/// The model has given nothing to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no token has a finite logit")]
pub(super) struct NoCandidate;

impl Sampler {
    pub(super) fn new(params: SamplingParams, eos: &[TokenId], fresh_seed: u64) -> Self {
        let mut stops = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stops.extend(eos);
        }
        Self {
            seed: params.seed.unwrap_or(fresh_seed),
            stops,
            params,
        }
    }

    /// The next token of completion `index`.
    pub(super) fn choose(
        &self,
        row: &[f32],
        index: usize,
        history: &History,
    ) -> Result<Choice, NoCandidate> {
        let mut logits = adjust::finite(row);
        self.adjust(&mut logits, history);
        let id = if self.params.temperature < COLDEST {
            candidates::greatest(&logits).ok_or(NoCandidate)?
        } else {
            let kept = candidates::Kept::new(&logits, &self.params).ok_or(NoCandidate)?;
            kept.at(random::uniform(self.seed, index, history.count))
        };
        Ok(match self.params.logprobs {
            Some(alternatives) => with_logprobs(row, id, alternatives),
            None => Choice {
                id,
                logprob: None,
                top: Vec::new(),
            },
        })
    }

    fn adjust(&self, logits: &mut [f32], history: &History) {
        if history.count < self.params.min_tokens {
            adjust::forbid(logits, &self.stops);
        }
        adjust::bias(logits, &self.params.logit_bias);
        adjust::penalise(logits, &self.params, history);
    }

    /// Whether `token`, the last of `history`, ends the completion.
    pub(super) fn is_stop(&self, token: TokenId, history: &History) -> bool {
        history.count > self.params.min_tokens.saturating_sub(1) && self.stops.contains(&token)
    }
}

/// `id` with its log probability, and the likeliest alternatives.
pub(super) fn with_logprobs(row: &[f32], id: TokenId, alternatives: usize) -> Choice {
    let logits = adjust::finite(row);
    let normaliser = candidates::log_sum_exp(&logits);
    let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let of = |token: TokenId| logits.get(token as usize).copied();
    Choice {
        id,
        logprob: Some(logprob(of(id).unwrap_or(f32::NEG_INFINITY))),
        top: candidates::top(&logits, alternatives)
            .into_iter()
            .map(|(token, logit)| (token, logprob(logit)))
            .collect(),
    }
}
