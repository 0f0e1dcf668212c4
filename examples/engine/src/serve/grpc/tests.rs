//! The service over a socket, by its own client; and whether its code is of today's `.proto`.

use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tonic::{Code, transport::Channel};

use super::{
    Chat, ChatMessage, DeliverTicketRequest, DrainRequest, GenerateRequest, HealthRequest,
    KvEventsRequest, PrefillLeg, Sampling, ServerInfoRequest, TokenizeRequest, Tokens,
    generate_request, generate_response, kv_event, tokenize_request, worker_client::WorkerClient,
};
use crate::serve::tests::{Fixture, until};

#[test]
fn the_code_is_of_this_proto() {
    let proto = include_bytes!("../../../proto/engine.proto");
    let digest: String = Sha256::digest(proto)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let generated = include_str!("generated.rs");
    let line = generated.lines().nth(1).unwrap_or_default();
    assert!(
        line.ends_with(&digest),
        "engine.proto has changed: run `cargo xtask proto`"
    );
}

async fn client(fixture: &Fixture) -> WorkerClient<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = fixture.app.clone();
    tokio::spawn(async move { super::serve(&app, listener).await });
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"));
    WorkerClient::new(endpoint.unwrap().connect().await.unwrap())
}

fn greedy(tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(generate_request::Prompt::Text("once upon a time".into())),
        sampling: Some(Sampling {
            max_tokens: Some(tokens),
            temperature: Some(0.0),
            logprobs: Some(2),
            ignore_eos: true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

#[tokio::test]
async fn a_generation_streams_chunks_and_ends_with_the_usage() {
    let fixture = Fixture::new();
    let mut client = client(&fixture).await;
    let mut stream = client.generate(greedy(8)).await.unwrap().into_inner();
    let (mut text, mut tokens, mut reason, mut usage) = (String::new(), 0, String::new(), None);
    while let Some(reply) = stream.message().await.unwrap() {
        match reply.event.unwrap() {
            generate_response::Event::Chunk(chunk) => {
                text += &chunk.text;
                tokens += chunk.tokens.len();
                assert_eq!(chunk.logprobs.len(), chunk.tokens.len());
                reason = chunk.finish_reason;
            }
            generate_response::Event::Usage(ended) => usage = Some(ended),
            generate_response::Event::Reserved(_) => panic!("nothing was to be reserved"),
        }
    }
    assert_eq!((tokens, reason.as_str()), (8, "length"));
    let usage = usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (16, 8));
    // The same as over HTTP.
    let body = serde_json::json!({"prompt": "once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let (_, answer) = fixture.post("/v1/completions", &body).await;
    assert_eq!(answer["choices"][0]["text"], text);
}

#[tokio::test]
async fn a_call_that_is_dropped_aborts() {
    let fixture = Fixture::slow();
    let mut client = client(&fixture).await;
    let mut stream = client.generate(greedy(400)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    until("aborted", || fixture.app.handle.stats().aborted == 1).await;
}

#[tokio::test]
async fn errors_have_codes_and_the_http_status() {
    let fixture = Fixture::new();
    let mut client = client(&fixture).await;
    let status = client.generate(GenerateRequest::default()).await;
    let status = status.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.metadata().get("kvpush-http-status").unwrap(), "400");
    assert_eq!(status.metadata().get("kvpush-param").unwrap(), "prompt");
    let unknown = GenerateRequest {
        prompt: Some(generate_request::Prompt::Tokens(Tokens { ids: vec![999] })),
        ..GenerateRequest::default()
    };
    let status = client.generate(unknown).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let empty = GenerateRequest {
        leg: Some(generate_request::Leg::Prefill(PrefillLeg::default())),
        ..greedy(1)
    };
    let status = client.generate(empty).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let nobody = DeliverTicketRequest {
        room: "1".into(),
        ticket: vec![1],
        deadline_ms: 1,
    };
    let status = client.deliver_ticket(nobody).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn facts_tokens_events_and_drain() {
    let fixture = Fixture::new();
    let mut client = client(&fixture).await;
    let info = client.server_info(ServerInfoRequest {}).await.unwrap();
    let info = info.into_inner();
    assert_eq!(
        (info.tp_size, info.block_size, info.role.as_str()),
        (1, 16, "both")
    );
    let chat = TokenizeRequest {
        prompt: Some(tokenize_request::Prompt::Chat(Chat {
            messages: vec![ChatMessage {
                role: "user".into(),
                content: "hi".into(),
                name: None,
            }],
        })),
    };
    let tokens = client.tokenize(chat).await.unwrap().into_inner().tokens;
    assert_eq!(tokens.len(), "user: hi\nassistant: ".len());

    let mut events = client
        .kv_events(KvEventsRequest { from: Some(1) })
        .await
        .unwrap()
        .into_inner();
    let mut stream = client.generate(greedy(4)).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    let event = events.message().await.unwrap().unwrap();
    assert_eq!(event.sequence, 1);
    assert!(matches!(event.change, Some(kv_event::Change::Stored(_))));

    client.drain(DrainRequest {}).await.unwrap();
    let health = client.health(HealthRequest {}).await.unwrap().into_inner();
    assert!(health.alive && !health.ready);
    let status = client.generate(greedy(1)).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}
