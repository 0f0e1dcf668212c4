//! Between messages and what the rest of the server works with.

use std::time::Duration;

use tonic::{Code, Status};

use super::{
    Alternative, FetchLeg, GenerateRequest, Sampling, TokenLogprob, generate_request, kv_event,
};
use crate::{
    engine::KvChange,
    request::{FinishReason, OnFailure, SamplingParams, TokenId, Usage},
    serve::{
        App,
        dialect::{Part, Peer, native, relay},
        error::ApiError,
        kv_events::Told,
        openai::params::{Common, MAX_LOGPROBS, OneOrMany},
        text::{ChatMessage, Chunk, TokenLogprob as Logprob},
    },
};

/// An error as gRPC says it. The HTTP status and the code travel in the metadata.
pub(super) fn status(error: &ApiError) -> Status {
    let code = match error.status.as_u16() {
        400 if error.code == "context_length_exceeded" => Code::OutOfRange,
        400 | 405 => Code::InvalidArgument,
        404 => Code::NotFound,
        408 | 504 => Code::DeadlineExceeded,
        409 => Code::AlreadyExists,
        413 | 429 => Code::ResourceExhausted,
        499 => Code::Cancelled,
        502 => Code::Aborted,
        503 => Code::Unavailable,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, error.message.clone());
    let metadata = status.metadata_mut();
    metadata.insert("kvpush-http-status", error.status.as_u16().into());
    metadata.insert(
        "kvpush-code",
        tonic::metadata::MetadataValue::from_static(error.code),
    );
    if let Some(after) = error.retry_after {
        let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        metadata.insert("kvpush-retry-after-ms", millis.into());
    }
    if let Some(Ok(param)) = error.param.as_deref().map(str::parse) {
        metadata.insert("kvpush-param", param);
    }
    status
}

/// Sampling parameters, by the checks of the HTTP API; and whether the client set a limit.
pub(super) fn sampling(
    app: &App,
    sampling: &Sampling,
    room: usize,
) -> Result<(SamplingParams, bool), ApiError> {
    let common = Common {
        max_tokens: sampling.max_tokens,
        min_tokens: sampling.min_tokens,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        n: sampling.n,
        stop: (!sampling.stop.is_empty()).then(|| OneOrMany::Many(sampling.stop.clone())),
        stop_token_ids: Some(sampling.stop_token_ids.clone()),
        ignore_eos: Some(sampling.ignore_eos),
        logit_bias: Some(
            sampling
                .logit_bias
                .iter()
                .map(|(token, &bias)| (token.to_string(), bias))
                .collect(),
        ),
        ..Common::default()
    };
    let vocab = app.handle.model().vocab;
    let mut params = common.sampling(room.max(1), vocab)?;
    if let Some(top) = sampling.logprobs {
        let top = top as usize;
        if top > MAX_LOGPROBS {
            return Err(ApiError::invalid(
                "logprobs",
                format!("must be from 0 to {MAX_LOGPROBS}"),
            ));
        }
        params.logprobs = Some(top);
    }
    Ok((params, sampling.max_tokens.is_some()))
}

/// The tokens of the prompt.
pub(super) fn prompt(app: &App, request: &GenerateRequest) -> Result<Vec<TokenId>, ApiError> {
    let tokens = match &request.prompt {
        None => return Err(ApiError::invalid("prompt", "is missing")),
        Some(generate_request::Prompt::Tokens(tokens)) => tokens.ids.clone(),
        Some(generate_request::Prompt::Text(text)) => app
            .text
            .encode(text, true)
            .map_err(|error| ApiError::invalid("text", error))?,
        Some(generate_request::Prompt::Chat(chat)) => self::chat(app, chat)?,
    };
    if tokens.is_empty() {
        return Err(ApiError::invalid("prompt", "has no tokens"));
    }
    crate::serve::info::check_tokens(app, &tokens)?;
    Ok(tokens)
}

/// The tokens of a chat.
pub(super) fn chat(app: &App, chat: &super::Chat) -> Result<Vec<TokenId>, ApiError> {
    let messages: Vec<ChatMessage> = chat
        .messages
        .iter()
        .map(|message| ChatMessage {
            role: message.role.clone(),
            content: message.content.clone(),
            name: message.name.clone(),
        })
        .collect();
    app.text
        .chat(&messages, true)
        .and_then(|text| app.text.encode(&text, false))
        .map_err(|error| ApiError::invalid("chat", error))
}

/// Which part is done here.
pub(super) fn part(app: &App, leg: Option<generate_request::Leg>) -> Result<Part, ApiError> {
    use generate_request::Leg;
    let part = match leg {
        None => Part::Whole,
        Some(Leg::Prefill(leg)) if leg.ticket.is_empty() => {
            return Err(ApiError::invalid("prefill.ticket", "is empty"));
        }
        Some(Leg::Prefill(leg)) => Part::Prefill { ticket: leg.ticket },
        Some(Leg::Decode(leg)) => Part::Decode {
            prefill_tp: native::ranks("decode.prefill_tp", leg.prefill_tp)?,
            on_failure: if leg.recompute_on_failure {
                OnFailure::Recompute
            } else {
                OnFailure::Fail
            },
        },
        Some(Leg::Hold(leg)) => Part::Hold {
            room: Some(room("hold.room", leg.room)?),
        },
        Some(Leg::Fetch(leg)) => fetch(leg)?,
    };
    part.check(app.settings.role, "leg")?;
    Ok(part)
}

fn fetch(leg: FetchLeg) -> Result<Part, ApiError> {
    let port = u16::try_from(leg.port)
        .map_err(|_| ApiError::invalid("fetch.port", "is not a port number"))?;
    Ok(Part::Fetch {
        peer: Peer::parse("fetch.host", &leg.host, port)?,
        room: room("fetch.room", leg.room)?,
        prefill_tp: match leg.prefill_tp {
            0 => None,
            ranks => Some(native::ranks("fetch.prefill_tp", ranks)?),
        },
    })
}

fn room(param: &str, room: String) -> Result<String, ApiError> {
    if room.is_empty() || room.len() > relay::MAX_ROOM {
        return Err(ApiError::invalid(
            param,
            format!("must have 1 to {} bytes", relay::MAX_ROOM),
        ));
    }
    Ok(room)
}

/// Milliseconds, 0 being none.
pub(super) fn millis(millis: u64) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_millis(millis))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// New text.
pub(super) fn chunk(chunk: Chunk) -> super::Chunk {
    let reason = chunk.finish.map(|finish| match finish.reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Handed => "handed",
    });
    super::Chunk {
        index: count(chunk.index),
        text: chunk.text,
        tokens: chunk.tokens,
        logprobs: chunk.logprobs.into_iter().map(logprob).collect(),
        finish_reason: reason.unwrap_or_default().to_owned(),
    }
}

fn logprob(token: Logprob) -> TokenLogprob {
    let alternative = |(id, bytes, logprob)| Alternative { id, bytes, logprob };
    TokenLogprob {
        id: token.id,
        bytes: token.bytes,
        logprob: token.logprob.unwrap_or(f32::NAN),
        top: token.top.into_iter().map(alternative).collect(),
    }
}

/// What was used.
pub(super) fn usage(usage: &Usage) -> super::Usage {
    super::Usage {
        prompt_tokens: count(usage.prompt_tokens),
        cached_tokens: count(usage.cached_tokens),
        completion_tokens: count(usage.completion_tokens),
        pushed_tokens: count(usage.pushed_tokens),
        recomputed_tokens: count(usage.recomputed_tokens),
    }
}

/// A change of the prefix cache.
pub(super) fn kv_event(told: Told) -> super::KvEvent {
    use kv_event::Change;
    let bytes = |hashes: Vec<crate::engine::BlockHash>| -> Vec<Vec<u8>> {
        hashes.into_iter().map(|hash| hash.0.to_vec()).collect()
    };
    let (sequence, change) = match told {
        Told::Reset(next) => (next, Change::Reset(super::KvReset {})),
        Told::Event(event) => {
            let change = match event.change {
                KvChange::Stored {
                    hashes,
                    parent,
                    tokens,
                    block_size,
                } => Change::Stored(super::KvStored {
                    hashes: bytes(hashes),
                    parent: parent.map(|hash| hash.0.to_vec()).unwrap_or_default(),
                    tokens,
                    block_size: count(block_size),
                }),
                KvChange::Removed { hashes } => Change::Removed(super::KvRemoved {
                    hashes: bytes(hashes),
                }),
                KvChange::Cleared => Change::Cleared(super::KvCleared {}),
            };
            (event.sequence, change)
        }
    };
    super::KvEvent {
        sequence,
        change: Some(change),
    }
}
