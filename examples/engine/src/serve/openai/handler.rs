//! What chat and plain completions have in common: from a body to an answer, whole or as a stream.
//!
//! A stream's status line is held back until the first thing has come of it, so that what fails before that has its
//! status. Afterwards an error is an event `data: {"error": …}`, and the stream ends.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Instant};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{State, rejection::BytesRejection},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde_json::{Value, json};

use super::{logprobs, params::Common};
use crate::{
    request::{FinishReason, RequestError, SamplingParams, TokenId, Usage},
    serve::{
        App,
        dialect::{Disaggregation, Part, native, relay},
        error::ApiError,
        generate::{Generation, Output, Submission},
        json, random_id,
        text::{Chunk, TokenLogprob},
    },
};

/// Bodies from this size on are read on a thread that may be busy for long: tokenizing takes its time.
const LARGE_BODY: usize = 32 << 10;

/// What a body asks for.
pub struct Asked {
    /// Its prompts, at least one, none empty.
    pub prompts: Vec<Vec<TokenId>>,
    /// Their texts, to be put before the completions.
    pub echo: Option<Vec<String>>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The fields themselves.
    pub common: Common,
}

/// Chat or plain completions.
pub trait Flavour: Send + 'static {
    /// For metrics.
    const ROUTE: &'static str;
    /// Of ids.
    const ID_PREFIX: &'static str;
    /// Of whole answers.
    const OBJECT: &'static str;
    /// Of the chunks of a stream.
    const CHUNK_OBJECT: &'static str;

    /// Reads a body.
    ///
    /// # Errors
    ///
    /// 400.
    fn read(app: &App, body: &Value) -> Result<Asked, ApiError>;
    /// What a stream begins with, for each completion.
    fn opening(index: usize) -> Option<Value>;
    /// A choice of a chunk, without its finish reason. `offset` counts characters of the completion.
    fn delta(chunk: &Chunk, wants_logprobs: bool, offset: &mut usize) -> Value;
    /// A choice of a whole answer, without its finish reason.
    fn whole(chunk: &Chunk, wants_logprobs: bool) -> Value;
}

/// The handler of a route.
pub async fn handle<F: Flavour>(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let request_id = headers.get("x-request-id").cloned();
    let mut response = answer::<F>(&app, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response);
    app.meters.answered(F::ROUTE, response.status().as_u16());
    if let Some(request_id) = request_id {
        let name = HeaderName::from_static("x-request-id");
        response.headers_mut().insert(name, request_id);
    }
    response
}

async fn answer<F: Flavour>(
    app: &Arc<App>,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let is_large = body.as_ref().is_ok_and(|body| body.len() >= LARGE_BODY);
    let body = Arc::new(json::object(body)?);
    let prepared = if is_large {
        let (app, headers, body) = (Arc::clone(app), headers.clone(), Arc::clone(&body));
        tokio::task::spawn_blocking(move || prepare::<F>(&app, &headers, &body))
            .await
            .map_err(|error| ApiError::internal(format!("reading the body: {error}")))
            .flatten()
    } else {
        prepare::<F>(app, headers, &body)
    };
    let (submission, reply) = prepared.inspect_err(|_| {
        // The decode engine must not wait for what will not come.
        if let Some(ticket) = native::ticket_of(&body) {
            app.handle.reject(ticket);
        }
    })?;
    let mut generation = Generation::start(app, submission).await?;
    let first = generation.next().await.transpose()?;
    if reply.is_streaming {
        return Ok(Stream::<F>::new(app, generation, reply, first).into_response());
    }
    match first {
        Some(Output::Reserved(ticket)) => Ok(two_lines::<F>(app, generation, reply, &ticket)),
        first => {
            let value = collect::<F>(app, &mut generation, &reply, first).await?;
            Ok(Json(value).into_response())
        }
    }
}

/// 404 for any other model than this engine's.
///
/// # Errors
///
/// 404, or 400 if it is no string.
pub fn check_model(app: &App, body: &Value) -> Result<(), ApiError> {
    let served = &app.settings.model_name;
    match body.get("model") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(model)) if model == served || model.is_empty() => Ok(()),
        Some(Value::String(model)) => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "model_not_found",
            format!("the model `{model}` does not exist here; this engine serves `{served}`"),
        )
        .with_param("model")),
        Some(_) => Err(ApiError::invalid("model", "model: expected a string")),
    }
}

/// How to write the answer.
struct Reply {
    id: String,
    created: u64,
    model: String,
    is_streaming: bool,
    include_usage: bool,
    continuous_usage: bool,
    wants_logprobs: bool,
    wants_tokens: bool,
    wants_prompt_logprobs: bool,
    echo: Option<Vec<String>>,
    n: usize,
    relays: bool,
    /// The prefill's answer ends as vLLM's and SGLang's would: by the one token that was asked for.
    handed_is_length: bool,
}

fn prepare<F: Flavour>(
    app: &App,
    headers: &HeaderMap,
    body: &Value,
) -> Result<(Submission, Reply), ApiError> {
    check_model(app, body)?;
    let Asked {
        prompts,
        echo,
        mut sampling,
        common,
    } = F::read(app, body)?;
    let disaggregation = Disaggregation::of(
        body,
        app.settings.role,
        prompts.len(),
        app.settings.default_bootstrap_port,
    )?;
    fit_context(app, &prompts, &mut sampling, common.limit().is_some())?;
    let id = match &common.request_id {
        None => format!("{}{}", F::ID_PREFIX, random_id()),
        Some(id) if id.is_empty() || id.len() > relay::MAX_ROOM => {
            return Err(ApiError::invalid(
                "request_id",
                format!("must have 1 to {} bytes", relay::MAX_ROOM),
            ));
        }
        Some(id) => format!("{}{id}", F::ID_PREFIX),
    };
    let options = common.stream_options.unwrap_or_default();
    let reply = Reply {
        id: id.clone(),
        created: now(),
        model: app.settings.model_name.clone(),
        is_streaming: common.is_streaming(),
        include_usage: options.include_usage.unwrap_or(false),
        continuous_usage: options.continuous_usage_stats.unwrap_or(false),
        wants_logprobs: sampling.logprobs.is_some(),
        wants_tokens: common.return_token_ids.unwrap_or(false),
        wants_prompt_logprobs: common.prompt_logprobs.is_some(),
        echo,
        n: sampling.n,
        relays: disaggregation.relays,
        handed_is_length: matches!(disaggregation.part(0), Part::Hold { .. }),
    };
    let submission = Submission {
        id,
        deadline: app.deadline(disaggregation.deadline),
        prompts: prompts
            .into_iter()
            .enumerate()
            .map(|(index, prompt)| (prompt, disaggregation.part(index)))
            .collect(),
        sampling,
        cache_salt: common.cache_salt.clone(),
        include_stop: common.include_stop_str_in_output.unwrap_or(false),
        skip_special: common.skip_special_tokens.unwrap_or(true),
        traceparent: headers
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned),
    };
    Ok((submission, reply))
}

/// What the client asks for must fit; a limit of ours is lowered until it does.
pub(in crate::serve) fn fit_context(
    app: &App,
    prompts: &[Vec<TokenId>],
    sampling: &mut SamplingParams,
    is_explicit: bool,
) -> Result<(), ApiError> {
    let context = app.handle.model().context;
    let prompt = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let room = context.saturating_sub(prompt);
    if room == 0 || is_explicit && sampling.max_tokens > room {
        return Err(RequestError::ContextLength {
            context,
            prompt,
            max_tokens: sampling.max_tokens,
        }
        .into());
    }
    sampling.max_tokens = sampling.max_tokens.min(room);
    sampling.min_tokens = sampling.min_tokens.min(sampling.max_tokens);
    Ok(())
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl Reply {
    fn finish_reason(&self, reason: FinishReason) -> &'static str {
        match reason {
            FinishReason::Stop => "stop",
            FinishReason::Handed if !self.handed_is_length => "handed",
            FinishReason::Length | FinishReason::Handed => "length",
        }
    }

    /// The finish reason and vLLM's extras of a choice.
    fn complete(&self, app: &App, generation: &Generation, choice: &mut Value, chunk: &Chunk) {
        let reason = chunk.finish.as_ref().map(|finish| {
            let reason = self.finish_reason(finish.reason);
            app.meters.finished(reason);
            reason
        });
        choice["finish_reason"] = reason.into();
        if self.wants_prompt_logprobs && reason.is_some() {
            choice["prompt_logprobs"] =
                logprobs::prompt(generation.prompt_logprobs_of(chunk.index));
        }
        if self.wants_tokens {
            choice["token_ids"] = chunk.tokens.clone().into();
            choice["prompt_token_ids"] = generation.prompt_of(chunk.index).into();
        }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    fn transfer_params(&self, app: &App, generation: &Generation) -> Option<Value> {
        let room = generation.room().filter(|_| self.relays)?;
        let tokens = generation.prompt_of(0).len();
        let blocks = tokens.div_ceil(app.handle.block_tokens());
        let tp = u32::try_from(app.handle.tp()).unwrap_or(u32::MAX);
        Some(relay::answer(
            &app.advertised(),
            &app.engine_id,
            room,
            blocks,
            tp,
        ))
    }

    /// The prompt's text, to be put before a completion, with its log probabilities where those are wanted.
    fn echo_of(&self, app: &App, generation: &Generation, completion: usize) -> Option<Chunk> {
        let text = self.echo.as_ref()?.get(completion / self.n)?;
        let mut logprobs = Vec::new();
        if self.wants_logprobs {
            let first = generation.prompt_of(completion).first();
            logprobs.extend(first.map(|&id| TokenLogprob {
                id,
                bytes: app.text.token_bytes(id),
                logprob: None,
                top: Vec::new(),
            }));
            logprobs.extend_from_slice(generation.prompt_logprobs_of(completion));
        }
        Some(Chunk {
            index: completion,
            text: text.clone(),
            tokens: Vec::new(),
            logprobs,
            finish: None,
        })
    }
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "kvpush": {
            "pushed_tokens": usage.pushed_tokens,
            "recomputed_tokens": usage.recomputed_tokens,
        },
    })
}

/// The ticket on its way to the gateway.
fn reserved_json(reply: &Reply, app: &App, ticket: &[u8]) -> Value {
    json!({
        "id": reply.id,
        "object": "kvpush.reserved",
        "ticket": native::ticket_text(ticket),
        "engine_id": app.engine_id,
    })
}

/// Waits for all of it.
async fn collect<F: Flavour>(
    app: &App,
    generation: &mut Generation,
    reply: &Reply,
    first: Option<Output>,
) -> Result<Value, ApiError> {
    let mut wholes: Vec<Chunk> = (0..generation.completions())
        .map(|index| Chunk {
            index,
            ..Chunk::default()
        })
        .collect();
    let mut next = first;
    while let Some(output) = next {
        if let Output::Chunk(chunk) = output
            && let Some(whole) = wholes.get_mut(chunk.index)
        {
            whole.text.push_str(&chunk.text);
            whole.tokens.extend(chunk.tokens);
            whole.logprobs.extend(chunk.logprobs);
            whole.finish = chunk.finish.or(whole.finish.take());
        }
        next = generation.next().await.transpose()?;
    }
    for whole in &mut wholes {
        if let Some(mut echo) = reply.echo_of(app, generation, whole.index) {
            whole.text.insert_str(0, &echo.text);
            echo.logprobs.append(&mut whole.logprobs);
            whole.logprobs = echo.logprobs;
        }
    }
    let choices = wholes
        .iter()
        .map(|whole| {
            let mut choice = F::whole(whole, reply.wants_logprobs);
            reply.complete(app, generation, &mut choice, whole);
            choice
        })
        .collect();
    let mut value = reply.envelope(F::OBJECT, choices);
    value["usage"] = usage_json(&generation.usage());
    if let Some(params) = reply.transfer_params(app, generation) {
        value["kv_transfer_params"] = params;
    }
    Ok(value)
}

/// A decode leg that is not streamed: the ticket at once as one line of JSON, the answer or the error as another.
fn two_lines<F: Flavour>(
    app: &Arc<App>,
    mut generation: Generation,
    reply: Reply,
    ticket: &[u8],
) -> Response {
    let line = |value: &Value| Ok::<_, Infallible>(Bytes::from(format!("{value}\n")));
    let first = line(&reserved_json(&reply, app, ticket));
    let app = Arc::clone(app);
    let second = stream::once(async move {
        let value = match generation.next().await.transpose() {
            Ok(next) => collect::<F>(&app, &mut generation, &reply, next).await,
            Err(error) => Err(error),
        };
        line(&value.unwrap_or_else(|error| error.to_json()))
    });
    let lines = futures_util::StreamExt::chain(stream::iter([first]), second);
    (
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/x-ndjson"),
        )],
        Body::from_stream(lines),
    )
        .into_response()
}

/// A streamed answer.
struct Stream<F> {
    app: Arc<App>,
    generation: Generation,
    reply: Reply,
    /// Characters of each completion, and whether it has begun.
    offsets: Vec<(usize, bool)>,
    ready: VecDeque<Event>,
    is_over: bool,
    started: Instant,
    flavour: std::marker::PhantomData<F>,
}

impl<F: Flavour> Stream<F> {
    fn new(app: &Arc<App>, generation: Generation, reply: Reply, first: Option<Output>) -> Self {
        let mut stream = Self {
            app: Arc::clone(app),
            offsets: vec![(0, false); generation.completions()],
            generation,
            reply,
            ready: VecDeque::new(),
            is_over: false,
            started: Instant::now(),
            flavour: std::marker::PhantomData,
        };
        match first {
            Some(output) => stream.take(output),
            None => stream.end(),
        }
        stream
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            match self.generation.next().await {
                Some(Ok(output)) => self.take(output),
                Some(Err(error)) => {
                    let after = self.started.elapsed();
                    tracing::info!(id = self.reply.id, %error, ?after, "a stream has failed");
                    self.push(&error.to_json());
                    self.done();
                }
                None => self.end(),
            }
        }
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Reserved(ticket) => {
                let value = reserved_json(&self.reply, &self.app, &ticket);
                let event = Event::default().event("kvpush.reserved");
                self.ready.push_back(event.data(value.to_string()));
            }
            Output::Chunk(chunk) => self.chunk(&chunk),
        }
    }

    fn chunk(&mut self, chunk: &Chunk) {
        let Some((offset, has_begun)) = self.offsets.get_mut(chunk.index) else {
            return;
        };
        let mut choices = Vec::with_capacity(2);
        if !std::mem::replace(has_begun, true) {
            choices.extend(F::opening(chunk.index));
            if let Some(echo) = self.reply.echo_of(&self.app, &self.generation, chunk.index) {
                let mut choice = F::delta(&echo, self.reply.wants_logprobs, offset);
                choice["finish_reason"] = Value::Null;
                choices.push(choice);
            }
        }
        let mut choice = F::delta(chunk, self.reply.wants_logprobs, offset);
        self.reply
            .complete(&self.app, &self.generation, &mut choice, chunk);
        choices.push(choice);
        for choice in choices {
            let is_last = !choice["finish_reason"].is_null();
            let mut value = self.reply.envelope(F::CHUNK_OBJECT, vec![choice]);
            if self.reply.continuous_usage {
                value["usage"] = usage_json(&self.generation.usage());
            } else if self.reply.include_usage {
                value["usage"] = Value::Null;
            }
            if is_last && let Some(params) = self.reply.transfer_params(&self.app, &self.generation)
            {
                value["kv_transfer_params"] = params;
            }
            self.push(&value);
        }
    }

    fn end(&mut self) {
        if self.reply.include_usage {
            let mut value = self.reply.envelope(F::CHUNK_OBJECT, Vec::new());
            value["usage"] = usage_json(&self.generation.usage());
            self.push(&value);
        }
        self.done();
    }

    fn done(&mut self) {
        self.ready.push_back(Event::default().data("[DONE]"));
        self.is_over = true;
    }

    fn push(&mut self, value: &Value) {
        self.ready
            .push_back(Event::default().data(value.to_string()));
    }
}

impl<F: Flavour> IntoResponse for Stream<F> {
    fn into_response(self) -> Response {
        let events = stream::unfold(self, |mut stream| async move {
            let event = stream.next().await?;
            Some((Ok::<_, Infallible>(event), stream))
        });
        Sse::new(events)
            .keep_alive(KeepAlive::default())
            .into_response()
    }
}
