//! Chat: messages in, `chat.completion` objects out.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    handler::{Asked, Flavour},
    logprobs,
    params::{Common, MAX_LOGPROBS, refuse_unsupported},
};
use crate::{
    request::TokenId,
    serve::{
        App,
        error::ApiError,
        json,
        text::{ChatMessage, Chunk},
    },
};

#[derive(Deserialize)]
struct Body {
    messages: Vec<Message>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    /// vLLM: leave the turn of the assistant open (the default).
    add_generation_prompt: Option<bool>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// Reads a body: its prompt, and what is asked for beside it.
///
/// # Errors
///
/// 400 with the field.
pub fn read(app: &App, body: &Value) -> Result<Asked, ApiError> {
    refuse_unsupported(body)?;
    let common: Common = json::read(body)?;
    let chat: Body = json::read(body)?;
    if chat.messages.is_empty() {
        return Err(ApiError::invalid("messages", "must not be empty"));
    }
    let messages = chat
        .messages
        .iter()
        .enumerate()
        .map(|(index, message)| message_text(index, message))
        .collect::<Result<Vec<_>, _>>()?;
    let text = app
        .text
        .chat(&messages, chat.add_generation_prompt.unwrap_or(true))
        .map_err(|error| ApiError::invalid("messages", error))?;
    // The template has written the special tokens.
    let prompt: Vec<TokenId> = app
        .text
        .encode(&text, false)
        .map_err(|error| ApiError::invalid("messages", error))?;
    let context = app.handle.model().context;
    let room = context.saturating_sub(prompt.len()).max(1);
    let mut sampling = common.sampling(room, app.handle.model().vocab)?;
    let top = chat.top_logprobs.unwrap_or(0) as usize;
    if top > MAX_LOGPROBS {
        return Err(ApiError::invalid(
            "top_logprobs",
            format!("must be from 0 to {MAX_LOGPROBS}"),
        ));
    }
    if chat.logprobs.unwrap_or(false) {
        sampling.logprobs = Some(top);
    } else if top > 0 {
        return Err(ApiError::invalid(
            "top_logprobs",
            "needs `logprobs` to be true",
        ));
    }
    Ok(Asked {
        prompts: vec![prompt],
        echo: None,
        sampling,
        common,
    })
}

fn message_text(index: usize, message: &Message) -> Result<ChatMessage, ApiError> {
    if message.role.is_empty() {
        return Err(ApiError::invalid(
            format!("messages[{index}].role"),
            "must not be empty",
        ));
    }
    let content = match &message.content {
        None if message.role == "assistant" => String::new(),
        None => {
            return Err(ApiError::invalid(
                format!("messages[{index}].content"),
                "is missing",
            ));
        }
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(parts)) => {
            let mut texts = Vec::with_capacity(parts.len());
            for (number, part) in parts.iter().enumerate() {
                match (part.kind.as_str(), &part.text) {
                    ("text", Some(text)) => texts.push(text.as_str()),
                    ("text", None) => {
                        return Err(ApiError::invalid(
                            format!("messages[{index}].content[{number}].text"),
                            "is missing",
                        ));
                    }
                    _ => {
                        return Err(ApiError::unsupported(
                            format!("messages[{index}].content[{number}].type"),
                            "only `text` is supported",
                        ));
                    }
                }
            }
            texts.join("\n")
        }
    };
    Ok(ChatMessage {
        role: message.role.clone(),
        content,
        name: message.name.clone(),
    })
}

/// How chat is answered.
pub struct Chat;

impl Flavour for Chat {
    const ROUTE: &'static str = "/v1/chat/completions";
    const ID_PREFIX: &'static str = "chatcmpl-";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";

    fn read(app: &App, body: &Value) -> Result<Asked, ApiError> {
        read(app, body)
    }

    fn opening(index: usize) -> Option<Value> {
        Some(json!({
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": null,
            "finish_reason": null,
        }))
    }

    fn delta(chunk: &Chunk, wants_logprobs: bool, _offset: &mut usize) -> Value {
        let mut delta = json!({});
        if !chunk.text.is_empty() {
            delta["content"] = Value::from(chunk.text.as_str());
        }
        json!({
            "index": chunk.index,
            "delta": delta,
            "logprobs": wants_logprobs.then(|| logprobs::chat(&chunk.logprobs)),
        })
    }

    fn whole(chunk: &Chunk, wants_logprobs: bool) -> Value {
        json!({
            "index": chunk.index,
            "message": {"role": "assistant", "content": chunk.text, "refusal": null},
            "logprobs": wants_logprobs.then(|| logprobs::chat(&chunk.logprobs)),
        })
    }
}
