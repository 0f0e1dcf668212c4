//! The calls.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use tonic::{Request, Response, Status};

use super::{
    AbortRequest, AbortResponse, DeliverTicketRequest, DeliverTicketResponse, DetokenizeRequest,
    DetokenizeResponse, DrainRequest, DrainResponse, GenerateRequest, GenerateResponse,
    HealthRequest, HealthResponse, KvEvent, KvEventsRequest, Reserved, ServerInfoRequest,
    ServerInfoResponse, TokenizeRequest, TokenizeResponse, convert, generate_request,
    generate_response, tokenize_request, worker_server::Worker,
};
use crate::serve::{
    App,
    dialect::{Part, native},
    error::ApiError,
    generate::{Generation, Output, Submission},
    info,
    kv_events::Feed,
    openai::handler::fit_context,
    random_id,
};

/// The service of one engine.
pub(super) struct Service {
    app: Arc<App>,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    pub(super) fn new(app: &Arc<App>) -> Self {
        Self {
            app: Arc::clone(app),
        }
    }

    fn prepare(&self, request: GenerateRequest) -> Result<Submission, ApiError> {
        let app = &self.app;
        let prompt = convert::prompt(app, &request)?;
        let room = app.handle.model().context.saturating_sub(prompt.len());
        let wanted = request.sampling.unwrap_or_default();
        let (mut sampling, is_explicit) = convert::sampling(app, &wanted, room)?;
        let prompts = [prompt];
        fit_context(app, &prompts, &mut sampling, is_explicit)?;
        let [prompt] = prompts;
        let part: Part = convert::part(app, request.leg)?;
        Ok(Submission {
            id: if request.request_id.is_empty() {
                format!("grpc-{}", random_id())
            } else {
                request.request_id
            },
            prompts: vec![(prompt, part)],
            sampling,
            include_stop: wanted.include_stop,
            skip_special: !wanted.keep_special_tokens,
            deadline: app.deadline(convert::millis(request.deadline_ms)),
            cache_salt: (!request.cache_salt.is_empty()).then_some(request.cache_salt),
            traceparent: (!request.traceparent.is_empty()).then_some(request.traceparent),
        })
    }
}

/// A generation on its way to the client.
struct Replies {
    generation: Generation,
    id: String,
    is_over: bool,
}

impl Replies {
    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        if self.is_over {
            return None;
        }
        let event = match self.generation.next().await {
            Some(Ok(Output::Reserved(ticket))) => generate_response::Event::Reserved(Reserved {
                request_id: self.id.clone(),
                ticket,
            }),
            Some(Ok(Output::Chunk(chunk))) => {
                generate_response::Event::Chunk(convert::chunk(chunk))
            }
            Some(Err(error)) => {
                self.is_over = true;
                return Some(Err(convert::status(&error)));
            }
            None => {
                self.is_over = true;
                generate_response::Event::Usage(convert::usage(&self.generation.usage()))
            }
        };
        Some(Ok(GenerateResponse { event: Some(event) }))
    }
}

#[tonic::async_trait]
impl Worker for Service {
    type GenerateStream = Streamed<GenerateResponse>;
    type KvEventsStream = Streamed<KvEvent>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let ticket = match &request.leg {
            Some(generate_request::Leg::Prefill(leg)) => leg.ticket.clone(),
            _ => Vec::new(),
        };
        let submission = self.prepare(request).map_err(|error| {
            // The decode engine must not wait for what will not come.
            if !ticket.is_empty() {
                self.app.handle.reject(ticket);
            }
            convert::status(&error)
        })?;
        let id = submission.id.clone();
        let generation = Generation::start(&self.app, submission)
            .await
            .map_err(|error| convert::status(&error))?;
        let replies = Replies {
            generation,
            id,
            is_over: false,
        };
        Ok(Response::new(Box::pin(stream::unfold(
            replies,
            |mut replies| async move { Some((replies.next().await?, replies)) },
        ))))
    }

    async fn abort(
        &self,
        request: Request<AbortRequest>,
    ) -> Result<Response<AbortResponse>, Status> {
        self.app.handle.abort(&request.into_inner().request_id);
        Ok(Response::new(AbortResponse {}))
    }

    async fn deliver_ticket(
        &self,
        request: Request<DeliverTicketRequest>,
    ) -> Result<Response<DeliverTicketResponse>, Status> {
        let DeliverTicketRequest {
            room,
            ticket,
            deadline_ms,
        } = request.into_inner();
        if ticket.is_empty() || ticket.len() > native::MAX_TICKET {
            let error = ApiError::invalid("ticket", "is empty, or longer than any ticket");
            return Err(convert::status(&error));
        }
        info::deliver(&self.app, room, ticket, convert::millis(deadline_ms))
            .await
            .map_err(|error| convert::status(&error))?;
        Ok(Response::new(DeliverTicketResponse {}))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        let alive = self.app.handle.is_alive();
        Ok(Response::new(HealthResponse {
            alive,
            ready: alive && !self.app.is_draining(),
        }))
    }

    async fn server_info(
        &self,
        _: Request<ServerInfoRequest>,
    ) -> Result<Response<ServerInfoResponse>, Status> {
        let app = &self.app;
        let json = info::server_info_json(app);
        let number = |path: &str| {
            let number = json.pointer(path).and_then(serde_json::Value::as_u64);
            u32::try_from(number.unwrap_or(0)).unwrap_or(u32::MAX)
        };
        let text = |path: &str| {
            let text = json.pointer(path).and_then(serde_json::Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        Ok(Response::new(ServerInfoResponse {
            engine_id: text("/engine_id"),
            role: text("/role"),
            model: text("/model"),
            model_digest: text("/model_digest"),
            tp_size: number("/tp_size"),
            block_size: number("/block_size"),
            kv_cache_dtype: text("/kv_cache_dtype"),
            blocks_total: number("/blocks/total"),
            blocks_free: number("/blocks/free"),
            blocks_cached: number("/blocks/cached"),
            running: number("/running"),
            waiting: number("/waiting"),
            kvpush_addresses: app.settings.kvpush_addresses.clone(),
            context: number("/context"),
            json: json.to_string(),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let app = Arc::clone(&self.app);
        let work = move || match request.into_inner().prompt {
            None => Err(ApiError::invalid("prompt", "is missing")),
            Some(tokenize_request::Prompt::Text(text)) => app
                .text
                .encode(&text, true)
                .map_err(|error| ApiError::invalid("text", error)),
            Some(tokenize_request::Prompt::Chat(chat)) => convert::chat(&app, &chat),
        };
        let tokens = tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| convert::status(&error))?;
        Ok(Response::new(TokenizeResponse { tokens }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let request = request.into_inner();
        info::check_tokens(&self.app, &request.tokens).map_err(|error| convert::status(&error))?;
        let text = self
            .app
            .text
            .decode(&request.tokens, request.skip_special_tokens);
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn kv_events(
        &self,
        request: Request<KvEventsRequest>,
    ) -> Result<Response<Self::KvEventsStream>, Status> {
        let feed = Feed::new(&self.app, request.into_inner().from);
        let state = (feed, Arc::clone(&self.app));
        Ok(Response::new(Box::pin(stream::unfold(
            state,
            |(mut feed, app)| async move {
                let told = tokio::select! {
                    told = feed.next() => told?,
                    // A listener must not hold up the end.
                    () = app.ended() => return None,
                };
                Some((Ok(convert::kv_event(told)), (feed, app)))
            },
        ))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.app.start_drain();
        Ok(Response::new(DrainResponse {}))
    }
}
