//! What is done to logits before one is chosen.

use super::History;
use crate::request::{SamplingParams, TokenId};

/// The row without what no arithmetic can use: not-a-number counts as impossible, infinity as very large.
pub(super) fn finite(row: &[f32]) -> Vec<f32> {
    let clean = |&logit: &f32| match logit {
        logit if logit.is_nan() => f32::NEG_INFINITY,
        logit => logit.min(f32::MAX),
    };
    row.iter().map(clean).collect()
}

/// Makes tokens impossible.
pub(super) fn forbid(logits: &mut [f32], tokens: &[TokenId]) {
    for &token in tokens {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Adds to logits.
pub(super) fn bias(logits: &mut [f32], bias: &[(TokenId, f32)]) {
    for &(token, value) in bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += value;
        }
    }
}

/// Repetition (Keskar et al., CTRL, section 4.1) over prompt and completion; frequency and presence (OpenAI) over the
/// completion.
pub(super) fn penalise(logits: &mut [f32], params: &SamplingParams, history: &History) {
    if params.repetition_penalty != 1.0 {
        let generated = history.generated.keys();
        let prompt = history.prompt.iter();
        for &token in generated.chain(prompt.filter(|token| !history.generated.contains_key(token)))
        {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / params.repetition_penalty
                } else {
                    *logit * params.repetition_penalty
                };
            }
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        for (&token, &count) in &history.generated {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
    }
}
