//! The fields that chat and plain completions share, and their ranges.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    request::{SamplingParams, TokenId},
    serve::error::ApiError,
};

/// Most independent completions of one prompt.
pub const MAX_N: usize = 128;
/// Most alternatives for each token.
pub const MAX_LOGPROBS: usize = 20;
/// Most stop strings.
const MAX_STOPS: usize = 64;
/// Longest stop string, in bytes: so much text may be held back.
const MAX_STOP_BYTES: usize = 4096;
/// Most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;

/// One string or several.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
    /// vLLM: the usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

/// `response_format`: only text is produced.
#[derive(Clone, Debug, Deserialize)]
pub struct ResponseFormat {
    /// `text`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// The fields that both kinds of completions have.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Common {
    /// The model's name.
    pub model: Option<String>,
    /// Answer by server-sent events.
    pub stream: Option<bool>,
    /// How.
    pub stream_options: Option<StreamOptions>,
    /// Tokens to generate at most.
    pub max_tokens: Option<u32>,
    /// The same; goes before `max_tokens`.
    pub max_completion_tokens: Option<u32>,
    /// vLLM: do not stop before that many.
    pub min_tokens: Option<u32>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// vLLM: -1 and 0 keep all.
    pub top_k: Option<i32>,
    /// vLLM.
    pub min_p: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// vLLM: above 0.
    pub repetition_penalty: Option<f32>,
    /// Same seed, same text.
    pub seed: Option<i64>,
    /// Completions of each prompt.
    pub n: Option<u32>,
    /// Strings that end the text.
    pub stop: Option<OneOrMany>,
    /// vLLM: tokens that end it.
    pub stop_token_ids: Option<Vec<TokenId>>,
    /// vLLM: leave the stop string in the text.
    pub include_stop_str_in_output: Option<bool>,
    /// vLLM: go on after the end-of-sequence token.
    pub ignore_eos: Option<bool>,
    /// vLLM: leave special tokens out of the text.
    pub skip_special_tokens: Option<bool>,
    /// Added to the logits; keys are token ids in decimal.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Only text is produced.
    pub response_format: Option<ResponseFormat>,
    /// vLLM: a name for the request, instead of ours.
    pub request_id: Option<String>,
    /// vLLM: the prefix cache is shared only among requests with the same salt.
    pub cache_salt: Option<String>,
    /// vLLM: log probabilities of the prompt, with so many alternatives.
    pub prompt_logprobs: Option<u32>,
    /// vLLM: token ids beside the text.
    pub return_token_ids: Option<bool>,
}

impl Common {
    /// Whether to stream.
    pub fn is_streaming(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Tokens to generate at most, if the client said so.
    pub fn limit(&self) -> Option<usize> {
        self.max_completion_tokens
            .or(self.max_tokens)
            .map(|tokens| tokens as usize)
    }

    /// Checks ranges. `max_tokens` of the result is `default_max` where the client named none; log probabilities are
    /// the caller's.
    ///
    /// # Errors
    ///
    /// 400 with the field.
    pub fn sampling(&self, default_max: usize, vocab: usize) -> Result<SamplingParams, ApiError> {
        let limit_name = match self.max_completion_tokens {
            Some(_) => "max_completion_tokens",
            None => "max_tokens",
        };
        let max_tokens = self.limit().unwrap_or(default_max);
        if max_tokens == 0 {
            return Err(ApiError::invalid(limit_name, "must be at least 1"));
        }
        let min_tokens = self.min_tokens.unwrap_or(0) as usize;
        if min_tokens > max_tokens {
            return Err(ApiError::invalid(
                "min_tokens",
                format!("must not exceed the tokens to generate, {max_tokens}"),
            ));
        }
        let n = self.n.unwrap_or(1) as usize;
        if n == 0 || n > MAX_N {
            return Err(ApiError::invalid("n", format!("must be from 1 to {MAX_N}")));
        }
        if let Some(format) = &self.response_format
            && format.kind != "text"
        {
            return Err(ApiError::unsupported(
                "response_format.type",
                "only `text` is supported",
            ));
        }
        if self.stream_options.is_some() && !self.is_streaming() {
            return Err(ApiError::invalid(
                "stream_options",
                "is only allowed when `stream` is true",
            ));
        }
        let top_k = self.top_k.unwrap_or(0);
        if top_k < -1 {
            return Err(ApiError::invalid("top_k", "must be -1, 0 or more"));
        }
        let prompt_logprobs = self.prompt_logprobs.map(|top| top as usize);
        if prompt_logprobs.is_some_and(|top| top > MAX_LOGPROBS) {
            return Err(ApiError::invalid(
                "prompt_logprobs",
                format!("must be from 0 to {MAX_LOGPROBS}"),
            ));
        }
        if let Some(token) = self
            .stop_token_ids
            .iter()
            .flatten()
            .find(|&&token| token as usize >= vocab)
        {
            return Err(ApiError::invalid(
                "stop_token_ids",
                format!("token {token} is not in the vocabulary of {vocab}"),
            ));
        }
        Ok(SamplingParams {
            max_tokens,
            min_tokens,
            temperature: within("temperature", self.temperature, 1.0, 0.0..=2.0)?,
            top_k: usize::try_from(top_k).unwrap_or(0),
            top_p: positive("top_p", self.top_p, 1.0, 1.0)?,
            min_p: within("min_p", self.min_p, 0.0, 0.0..=1.0)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, 0.0, -2.0..=2.0)?,
            frequency_penalty: within(
                "frequency_penalty",
                self.frequency_penalty,
                0.0,
                -2.0..=2.0,
            )?,
            repetition_penalty: positive(
                "repetition_penalty",
                self.repetition_penalty,
                1.0,
                f32::MAX,
            )?,
            // The bits matter, not the sign.
            seed: self.seed.map(i64::cast_unsigned),
            n,
            stop: self.stops()?,
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logit_bias: self.biases(vocab)?,
            prompt_logprobs,
            logprobs: None,
        })
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        if stops.len() > MAX_STOPS {
            return Err(ApiError::invalid(
                "stop",
                format!("at most {MAX_STOPS} strings"),
            ));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ApiError::invalid("stop", "must not hold an empty string"));
        }
        if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
            return Err(ApiError::invalid(
                "stop",
                format!("strings have at most {MAX_STOP_BYTES} bytes"),
            ));
        }
        Ok(stops)
    }

    fn biases(&self, vocab: usize) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let Some(biases) = &self.logit_bias else {
            return Ok(Vec::new());
        };
        if biases.len() > MAX_BIASES {
            return Err(ApiError::invalid(
                "logit_bias",
                format!("at most {MAX_BIASES} tokens"),
            ));
        }
        biases
            .iter()
            .map(|(token, &bias)| {
                let param = || format!("logit_bias.{token}");
                let id: TokenId = token
                    .parse()
                    .map_err(|_| ApiError::invalid(param(), "the key is not a token id"))?;
                if id as usize >= vocab {
                    return Err(ApiError::invalid(
                        param(),
                        format!("not in the vocabulary of {vocab}"),
                    ));
                }
                if !(-100.0..=100.0).contains(&bias) {
                    return Err(ApiError::invalid(param(), "must be from -100 to 100"));
                }
                Ok((id, bias))
            })
            .collect()
    }
}

fn within(
    param: &'static str,
    value: Option<f32>,
    default: f32,
    range: std::ops::RangeInclusive<f32>,
) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(ApiError::invalid(
            param,
            format!(
                "{param} is {value}, must be from {} to {}",
                range.start(),
                range.end()
            ),
        ))
    }
}

/// Above 0, at most `most`.
fn positive(
    param: &'static str,
    value: Option<f32>,
    default: f32,
    most: f32,
) -> Result<f32, ApiError> {
    let value = within(param, value, default, 0.0..=most)?;
    if value > 0.0 {
        Ok(value)
    } else {
        Err(ApiError::invalid(param, format!("{param} must be above 0")))
    }
}

/// Fields that ask for what this engine does not do, with the values under which they ask for nothing.
///
/// # Errors
///
/// 400: better than an answer that ignores what was asked.
pub fn refuse_unsupported(body: &Value) -> Result<(), ApiError> {
    let is_empty = |value: &Value| {
        value.is_null()
            || value == &Value::Bool(false)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_str().is_some_and(str::is_empty)
    };
    for field in [
        "tools",
        "functions",
        "suffix",
        "audio",
        "prediction",
        "use_beam_search",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
    ] {
        if body.get(field).is_some_and(|value| !is_empty(value)) {
            return Err(ApiError::unsupported(
                field,
                format!("{field} is not supported by this engine"),
            ));
        }
    }
    if let (Some(best_of), n) = (
        body.get("best_of").filter(|value| !value.is_null()),
        body.get("n").and_then(Value::as_u64).unwrap_or(1),
    ) && best_of.as_u64() != Some(n)
    {
        return Err(ApiError::unsupported(
            "best_of",
            "only supported where it equals n",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::json::read;
    use serde_json::json;

    fn sampling(body: Value) -> Result<SamplingParams, ApiError> {
        read::<Common>(&body)?.sampling(16, 100)
    }

    fn param(body: Value) -> String {
        sampling(body).unwrap_err().param.unwrap()
    }

    #[test]
    fn defaults_are_openai_s() {
        assert_eq!(sampling(json!({})).unwrap(), SamplingParams::default());
        let nulls = json!({"temperature": null, "stop": null, "n": null, "seed": null});
        assert_eq!(sampling(nulls).unwrap(), SamplingParams::default());
    }

    #[test]
    fn every_field_arrives() {
        let body = json!({
            "max_tokens": 5, "max_completion_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9,
            "top_k": 40, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1,
            "seed": -1, "n": 3, "stop": ["a", "b"], "stop_token_ids": [4], "ignore_eos": true,
            "logit_bias": {"7": -100}, "user": "someone", "response_format": {"type": "text"},
        });
        let expected = SamplingParams {
            max_tokens: 7,
            min_tokens: 2,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.1,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            repetition_penalty: 1.1,
            seed: Some(u64::MAX),
            n: 3,
            stop: vec!["a".into(), "b".into()],
            stop_token_ids: vec![4],
            ignore_eos: true,
            logit_bias: vec![(7, -100.0)],
            logprobs: None,
            prompt_logprobs: None,
        };
        assert_eq!(sampling(body).unwrap(), expected);
    }

    #[test]
    fn ranges_are_kept_and_named() {
        for (body, expected) in [
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": 1e300}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"n": 0}), "n"),
            (json!({"n": 1000}), "n"),
            (json!({"n": -1}), "n"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
            (json!({"min_tokens": 17}), "min_tokens"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": 1}), "stop"),
            (json!({"stop_token_ids": [100]}), "stop_token_ids"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
            (json!({"logit_bias": {"100": 1}}), "logit_bias.100"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
            (json!({"stream_options": {}}), "stream_options"),
            (
                json!({"response_format": {"type": "json_object"}}),
                "response_format.type",
            ),
        ] {
            assert_eq!(param(body.clone()), expected, "{body}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let refused = |body: Value| refuse_unsupported(&body).unwrap_err().param.unwrap();
        assert_eq!(refused(json!({"tools": [{"type": "function"}]})), "tools");
        assert_eq!(refused(json!({"best_of": 2})), "best_of");
        assert_eq!(refused(json!({"suffix": "x"})), "suffix");
        refuse_unsupported(&json!({"tools": [], "best_of": 2, "n": 2, "suffix": null})).unwrap();
    }
}
