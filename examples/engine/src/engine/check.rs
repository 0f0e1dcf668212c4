//! Which requests are taken at all.

use super::handle::Facts;
use crate::request::{Leg, Request, RequestError, SamplingParams};

impl Facts {
    /// Refuses what can never be served; `lost` blocks are gone.
    pub(super) fn check(&self, request: &Request, lost: usize) -> Result<(), RequestError> {
        let params = &request.sampling;
        let prompt = request.prompt.len();
        if prompt == 0 {
            return invalid("the prompt has no tokens", "prompt");
        }
        let unknown = request.prompt.iter().find(|&&t| !self.is_token(t));
        if let Some(token) = unknown {
            return invalid(&format!("there is no token {token}"), "prompt");
        }
        if !matches!(request.leg, Leg::Both) && !self.has_transfers {
            return invalid("this engine has no peers", "leg");
        }
        if matches!(request.leg, Leg::Decode { prefill_tp: 0, .. }) {
            return invalid("the prefill engine has no ranks", "prefill_tp");
        }
        self.check_sampling(params)?;
        if prompt + params.max_tokens > self.model.context {
            return Err(RequestError::ContextLength {
                context: self.model.context,
                prompt,
                max_tokens: params.max_tokens,
            });
        }
        let needed = self.most_blocks(request);
        let there = self.blocks.saturating_sub(lost);
        if needed > there {
            let message = format!(
                "the request may need {needed} blocks of the KV cache, which has {there} of {} tokens each",
                self.block_tokens
            );
            return invalid(&message, "max_tokens");
        }
        Ok(())
    }

    fn check_sampling(&self, params: &SamplingParams) -> Result<(), RequestError> {
        let config = &self.config;
        let is_positive = |value: f32| value.is_finite() && value >= 0.0;
        let checks = [
            (params.max_tokens > 0, "max_tokens", "must be at least 1"),
            (
                params.min_tokens <= params.max_tokens,
                "min_tokens",
                "must not be more than max_tokens",
            ),
            (
                is_positive(params.temperature),
                "temperature",
                "must be a number from 0 on",
            ),
            (
                params.top_p > 0.0 && params.top_p <= 1.0,
                "top_p",
                "must be above 0 and at most 1",
            ),
            (
                (0.0..=1.0).contains(&params.min_p),
                "min_p",
                "must be from 0 to 1",
            ),
            (
                params.presence_penalty.is_finite(),
                "presence_penalty",
                "must be a number",
            ),
            (
                params.frequency_penalty.is_finite(),
                "frequency_penalty",
                "must be a number",
            ),
            (
                is_positive(params.repetition_penalty) && params.repetition_penalty > 0.0,
                "repetition_penalty",
                "must be a number above 0",
            ),
            (
                (1..=config.max_completions).contains(&params.n),
                "n",
                "must be at least 1, and within this server's limit",
            ),
            (
                params.logprobs.is_none_or(|n| n <= config.max_logprobs),
                "logprobs",
                "is beyond this server's limit",
            ),
            (
                params
                    .prompt_logprobs
                    .is_none_or(|n| n <= config.max_logprobs),
                "prompt_logprobs",
                "is beyond this server's limit",
            ),
            (
                params.stop_token_ids.iter().all(|&t| self.is_token(t)),
                "stop_token_ids",
                "names a token that is not there",
            ),
            (
                params
                    .logit_bias
                    .iter()
                    .all(|&(token, bias)| self.is_token(token) && bias.is_finite()),
                "logit_bias",
                "names a token that is not there, or has no number",
            ),
        ];
        match checks.into_iter().find(|(is_good, ..)| !is_good) {
            Some((_, param, what)) => invalid(&format!("{param} {what}"), param),
            None => Ok(()),
        }
    }

    /// Blocks that the request may have at once. The last token's keys and values are never needed.
    fn most_blocks(&self, request: &Request) -> usize {
        let prompt = request.prompt.len();
        match request.leg {
            Leg::Prefill { .. } | Leg::PrefillHeld => prompt.div_ceil(self.block_tokens),
            Leg::Both | Leg::Decode { .. } => {
                let params = &request.sampling;
                let shared = prompt / self.block_tokens;
                let each = (prompt + params.max_tokens - 1).div_ceil(self.block_tokens) - shared;
                shared + params.n * each
            }
        }
    }

    fn is_token(&self, token: u32) -> bool {
        (token as usize) < self.model.vocab
    }
}

fn invalid(message: &str, param: &'static str) -> Result<(), RequestError> {
    Err(RequestError::Invalid {
        message: message.to_owned(),
        param: Some(param),
    })
}
