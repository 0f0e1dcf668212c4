//! Plain completions: prompts as text or tokens, one or several.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    handler::{Asked, Flavour},
    logprobs,
    params::{Common, MAX_LOGPROBS, refuse_unsupported},
};
use crate::{
    request::TokenId,
    serve::{App, error::ApiError, json, text::Chunk},
};

#[derive(Deserialize)]
struct Body {
    prompt: Prompt,
    logprobs: Option<u32>,
    echo: Option<bool>,
    /// vLLM: put the special tokens before the prompt (the default).
    add_special_tokens: Option<bool>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of tokens, or a list of lists of tokens"
)]
enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<TokenId>>),
}

const DEFAULT_MAX_TOKENS: usize = 16;

/// Reads a body.
///
/// # Errors
///
/// 400 with the field.
pub fn read(app: &App, body: &Value) -> Result<Asked, ApiError> {
    refuse_unsupported(body)?;
    let common: Common = json::read(body)?;
    let fields: Body = json::read(body)?;
    let add_special = fields.add_special_tokens.unwrap_or(true);
    let encode = |text: &String| {
        app.text
            .encode(text, add_special)
            .map_err(|error| ApiError::invalid("prompt", error))
    };
    let prompts: Vec<Vec<TokenId>> = match &fields.prompt {
        Prompt::Text(text) => vec![encode(text)?],
        // An empty list has no type.
        Prompt::Tokens(tokens) => vec![tokens.clone()],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::TokenLists(lists) => lists.clone(),
    };
    let vocab = app.handle.model().vocab;
    for tokens in &prompts {
        if tokens.is_empty() {
            return Err(ApiError::invalid("prompt", "has no tokens"));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(ApiError::invalid(
                "prompt",
                format!("token {token} is not in the vocabulary of {vocab}"),
            ));
        }
    }
    if prompts.len() > app.settings.max_prompts {
        return Err(ApiError::invalid(
            "prompt",
            format!("at most {} prompts", app.settings.max_prompts),
        ));
    }
    let mut sampling = common.sampling(DEFAULT_MAX_TOKENS, vocab)?;
    let echo = fields.echo.unwrap_or(false).then(|| {
        let text = |tokens: &Vec<TokenId>| app.text.decode(tokens, true);
        match &fields.prompt {
            Prompt::Text(text) => vec![text.clone()],
            Prompt::Texts(texts) => texts.clone(),
            Prompt::Tokens(_) | Prompt::TokenLists(_) => prompts.iter().map(text).collect(),
        }
    });
    if let Some(top) = fields.logprobs.map(|top| top as usize) {
        if top > MAX_LOGPROBS {
            return Err(ApiError::invalid(
                "logprobs",
                format!("must be from 0 to {MAX_LOGPROBS}"),
            ));
        }
        if echo.is_some() {
            // The echoed tokens have theirs, too.
            sampling.prompt_logprobs = sampling.prompt_logprobs.max(Some(top));
        }
        sampling.logprobs = Some(top);
    }
    Ok(Asked {
        prompts,
        echo,
        sampling,
        common,
    })
}

/// How plain completions are answered.
pub struct Plain;

impl Flavour for Plain {
    const ROUTE: &'static str = "/v1/completions";
    const ID_PREFIX: &'static str = "cmpl-";
    const OBJECT: &'static str = "text_completion";
    const CHUNK_OBJECT: &'static str = "text_completion";

    fn read(app: &App, body: &Value) -> Result<Asked, ApiError> {
        read(app, body)
    }

    fn opening(_index: usize) -> Option<Value> {
        None
    }

    fn delta(chunk: &Chunk, wants_logprobs: bool, offset: &mut usize) -> Value {
        json!({
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": wants_logprobs.then(|| logprobs::completion(&chunk.logprobs, offset)),
        })
    }

    fn whole(chunk: &Chunk, wants_logprobs: bool) -> Value {
        Self::delta(chunk, wants_logprobs, &mut 0)
    }
}
