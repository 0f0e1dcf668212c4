//! What an operator and a gateway ask beside completions: models, health, facts, tokens; and tickets of other engines.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App,
    dialect::{native, relay},
    error::ApiError,
    json,
    openai::{self, handler::check_model},
    tickets::Arrival,
};
use crate::request::TokenId;

type Body = Result<Bytes, BytesRejection>;

fn model_object(app: &App) -> Value {
    json!({
        "id": app.settings.model_name,
        "object": "model",
        "created": app.created,
        "owned_by": "kvpush-engine",
        "root": app.handle.model().name,
        "max_model_len": app.handle.model().context,
    })
}

/// `GET /v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_object(&app)]}))
}

/// `GET /v1/models/{name}`. Names may hold slashes.
pub async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    check_model(&app, &json!({"model": name}))?;
    Ok(Json(model_object(&app)))
}

/// `GET /health`: whether the engine lives. A draining engine does.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    if app.handle.is_alive() {
        Json(json!({"status": "ok"})).into_response()
    } else {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "engine_dead",
            "the engine thread has ended",
        )
        .into_response()
    }
}

/// `GET /ready`: whether it takes requests.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.is_draining() || !app.handle.is_alive() {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "draining",
            "the engine takes no more requests",
        )
        .into_response()
    } else {
        Json(json!({"status": "ready"})).into_response()
    }
}

/// The facts about this engine.
pub fn server_info_json(app: &App) -> Value {
    let model = app.handle.model();
    let config = app.handle.config();
    let stats = app.handle.stats();
    let digest: String = model.digest.iter().map(|b| format!("{b:02x}")).collect();
    json!({
        "engine": "kvpush-engine",
        "version": env!("CARGO_PKG_VERSION"),
        "engine_id": app.engine_id,
        "role": app.settings.role.to_string(),
        "model": app.settings.model_name,
        // sglang-router and smg look for these three.
        "model_path": model.name,
        "served_model_name": app.settings.model_name,
        "disaggregation_mode": match app.settings.role {
            super::Role::Both => "null",
            super::Role::Prefill => "prefill",
            super::Role::Decode => "decode",
        },
        "model_digest": digest,
        "tp_size": app.handle.tp(),
        "dp_size": 1,
        "context": model.context,
        "max_model_len": model.context,
        "vocab": model.vocab,
        "layers": model.layers,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "block_size": app.handle.block_tokens(),
        "kv_cache_dtype": app.settings.kv_dtype,
        "max_num_batched_tokens": config.max_batch_tokens,
        "max_num_seqs": config.max_running,
        "kvpush_addresses": app.settings.kvpush_addresses,
        "draining": app.is_draining(),
        "blocks": {
            "total": stats.blocks.total,
            "free": stats.blocks.free,
            "cached": stats.blocks.cached,
            "used": stats.blocks.used,
            "granted": stats.blocks.granted,
            "lost": stats.blocks.lost,
        },
        "running": stats.running,
        "waiting": stats.waiting,
        "parked": stats.parked,
    })
}

/// `GET /server_info`.
pub async fn server_info(State(app): State<Arc<App>>) -> Json<Value> {
    Json(server_info_json(&app))
}

/// `GET /get_model_info`, as SGLang has it.
pub async fn model_info(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({
        "model_path": app.handle.model().name,
        "served_model_name": app.settings.model_name,
        "is_generation": true,
        "vocab_size": app.handle.model().vocab,
        "max_context_length": app.handle.model().context,
    }))
}

/// `GET /version`, as vLLM has it.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.meters.render(&app.handle) {
        Some(text) => (
            [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        None => ApiError::new(
            StatusCode::NOT_FOUND,
            "no_metrics",
            "this process has no metrics recorder",
        )
        .into_response(),
    }
}

#[derive(Deserialize)]
struct Tokenize {
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
}

/// `POST /tokenize`: `{prompt}` or `{messages}`, as vLLM has it.
pub async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = json::object(body)?;
    check_model(&app, &body)?;
    let answer = tokio::task::spawn_blocking(move || {
        let fields: Tokenize = json::read(&body)?;
        let tokens = match fields.prompt {
            Some(prompt) => app
                .text
                .encode(&prompt, fields.add_special_tokens.unwrap_or(true))
                .map_err(|error| ApiError::invalid("prompt", error))?,
            None if body.get("messages").is_some() => {
                let mut asked = openai::chat::read(&app, &body)?;
                asked.prompts.pop().unwrap_or_default()
            }
            None => {
                return Err(ApiError::invalid("prompt", "give a `prompt` or `messages`"));
            }
        };
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": app.handle.model().context,
            "tokens": tokens,
        }))
    })
    .await
    .map_err(|error| ApiError::internal(format!("tokenizing: {error}")))??;
    Ok(Json(answer))
}

#[derive(Deserialize)]
struct Detokenize {
    tokens: Vec<TokenId>,
    skip_special_tokens: Option<bool>,
}

/// `POST /detokenize`.
pub async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = json::object(body)?;
    check_model(&app, &body)?;
    let fields: Detokenize = json::read(&body)?;
    check_tokens(&app, &fields.tokens)?;
    let skip = fields.skip_special_tokens.unwrap_or(false);
    Ok(Json(
        json!({"prompt": app.text.decode(&fields.tokens, skip)}),
    ))
}

/// Whether all are tokens of the vocabulary.
///
/// # Errors
///
/// 400.
pub fn check_tokens(app: &App, tokens: &[TokenId]) -> Result<(), ApiError> {
    let vocab = app.handle.model().vocab;
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        None => Ok(()),
        Some(token) => Err(ApiError::invalid(
            "tokens",
            format!("token {token} is not in the vocabulary of {vocab}"),
        )),
    }
}

#[derive(Deserialize)]
struct Ticket {
    room: String,
    ticket: String,
    deadline_ms: Option<u64>,
}

/// `POST /kvpush/tickets`: a decode engine's ticket for a prefill that is, or will be, under way here.
pub async fn ticket(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = json::object(body)?;
    let fields: Ticket = json::read(&body)?;
    let ticket = native::ticket("ticket", &fields.ticket)?;
    let patience = fields.deadline_ms.map(Duration::from_millis);
    deliver(&app, fields.room, ticket, patience).await?;
    Ok(Json(json!({"status": "taken"})))
}

/// `POST /abort_request`, as SGLang has it: `{rid}`.
pub async fn abort(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    #[derive(Deserialize)]
    struct Fields {
        rid: String,
    }
    let fields: Fields = json::read(&json::object(body)?)?;
    app.handle.abort(&fields.rid);
    Ok(Json(json!({"status": "ok"})))
}

/// `POST /drain`: as SIGTERM, for those who cannot send one.
pub async fn drain(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    app.start_drain();
    (StatusCode::ACCEPTED, Json(json!({"status": "draining"})))
}

/// Any other route.
pub async fn not_found(request: axum::extract::Request) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "not_found",
        format!("there is no {}", request.uri().path()),
    )
}

/// A route with another method.
pub async fn wrong_method(request: axum::extract::Request) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!(
            "{} does not take {}",
            request.uri().path(),
            request.method()
        ),
    )
}

/// Brings a ticket to its prefill, whichever comes first. Returns when it was taken.
///
/// # Errors
///
/// It was refused, or nobody came for it in time.
pub async fn deliver(
    app: &Arc<App>,
    room: String,
    ticket: Vec<u8>,
    patience: Option<Duration>,
) -> Result<(), ApiError> {
    if room.is_empty() || room.len() > relay::MAX_ROOM {
        return Err(ApiError::invalid(
            "room",
            format!("must have 1 to {} bytes", relay::MAX_ROOM),
        ));
    }
    let patience = patience
        .unwrap_or(app.settings.deadline)
        .min(app.settings.max_deadline);
    match app.rooms.arrive(&room, ticket.clone(), patience)? {
        Arrival::Held(request) => Ok(app.handle.push_held(&request, ticket)?),
        Arrival::Wait(taken) => {
            // Leaves no ticket behind, also if the sender goes away.
            let _forget = Forget { app, room: &room };
            match tokio::time::timeout(patience, taken).await {
                Ok(Ok(taken)) => taken,
                Ok(Err(_)) | Err(_) => Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "deadline_exceeded",
                    format!("no prefill came for room {room} in {patience:?}"),
                )),
            }
        }
    }
}

struct Forget<'a> {
    app: &'a App,
    room: &'a str,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.app.rooms.forget(self.room);
    }
}
