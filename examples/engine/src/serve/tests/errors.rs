//! Errors: status, object and the field; and that nothing in a body makes the server panic.

use axum::{body::Body, http::Request};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const ROUTES: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/kvpush/tickets",
    "/abort_request",
];

async fn refused(fixture: &Fixture, path: &str, body: Value) -> (u16, String) {
    let (status, answer) = fixture.post(path, &body).await;
    let error = &answer["error"];
    assert!(error["message"].is_string(), "{body} {answer}");
    assert!(error["type"].is_string() && error["code"].is_string());
    let param = error["param"].as_str().unwrap_or_default();
    (status.as_u16(), param.to_owned())
}

#[tokio::test]
async fn the_field_that_is_wrong_is_named() {
    let fixture = Fixture::new();
    let long = "x".repeat(600);
    for (path, body, status, param) in [
        (ROUTES[1], json!({}), 400, "prompt"),
        (ROUTES[1], json!({"prompt": 7}), 400, "prompt"),
        (ROUTES[1], json!({"prompt": ""}), 400, "prompt"),
        (ROUTES[1], json!({"prompt": []}), 400, "prompt"),
        (ROUTES[1], json!({"prompt": [1, "x"]}), 400, "prompt"),
        (ROUTES[1], json!({"prompt": [999]}), 400, "prompt"),
        (
            ROUTES[1],
            json!({"prompt": "x", "temperature": "hot"}),
            400,
            "temperature",
        ),
        (
            ROUTES[1],
            json!({"prompt": "x", "logprobs": 99}),
            400,
            "logprobs",
        ),
        (
            ROUTES[1],
            json!({"prompt": "x", "model": "gpt-4"}),
            404,
            "model",
        ),
        (ROUTES[1], json!({"prompt": "x", "model": 4}), 400, "model"),
        (ROUTES[1], json!({"prompt": long}), 400, ""),
        (
            ROUTES[1],
            json!({"prompt": "x", "max_tokens": 5000}),
            400,
            "",
        ),
        (ROUTES[1], json!({"prompt": vec!["x"; 65]}), 400, "prompt"),
        (ROUTES[0], json!({"messages": []}), 400, "messages"),
        (
            ROUTES[0],
            json!({"messages": [{"content": "x"}]}),
            400,
            "messages[0].role",
        ),
        (
            ROUTES[0],
            json!({"messages": [{"role": "user"}]}),
            400,
            "messages[0].content",
        ),
        (
            ROUTES[0],
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            "messages[0].content[0].type",
        ),
        (
            ROUTES[0],
            json!({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}),
            400,
            "top_logprobs",
        ),
        (ROUTES[2], json!({}), 400, "prompt"),
        (ROUTES[3], json!({"tokens": [1, 256]}), 400, "tokens"),
        (ROUTES[3], json!({"tokens": "x"}), 400, "tokens"),
        (
            ROUTES[4],
            json!({"room": "1", "ticket": "*"}),
            400,
            "ticket",
        ),
        (
            ROUTES[4],
            json!({"room": "", "ticket": "AA=="}),
            400,
            "room",
        ),
        (
            ROUTES[4],
            json!({"room": "1", "ticket": "AA==", "deadline_ms": 1}),
            408,
            "",
        ),
    ] {
        let shown: String = body.to_string().chars().take(100).collect();
        let got = refused(&fixture, path, body).await;
        assert_eq!(got, (status, param.to_owned()), "{path} {shown}");
    }
}

#[tokio::test]
async fn other_routes_methods_and_sizes() {
    let settings = Settings {
        max_body: 1000,
        ..Settings::default()
    };
    let fixture = Fixture::with(Shape::default(), settings);
    assert_eq!(fixture.get("/nothing").await.0, StatusCode::NOT_FOUND);
    assert_eq!(
        fixture.get("/v1/completions").await.0,
        StatusCode::METHOD_NOT_ALLOWED
    );
    let large = json!({"prompt": "x".repeat(2000)});
    let (status, answer) = fixture.post("/v1/completions", &large).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(answer["error"]["code"], "request_too_large");
}

#[tokio::test]
async fn a_draining_server_takes_nothing_more() {
    let fixture = Fixture::new();
    assert_eq!(fixture.get("/ready").await.0, StatusCode::OK);
    assert_eq!(
        fixture.post("/drain", &json!({})).await.0,
        StatusCode::ACCEPTED
    );
    let request = Request::post("/v1/completions").body(Body::from(r#"{"prompt": "x"}"#));
    let response = fixture.send(request.unwrap()).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(
        fixture.get("/ready").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    assert_eq!(fixture.get("/health").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_deadline_is_a_timeout() {
    let fixture = Fixture::slow();
    let body = json!({"prompt": "x", "max_tokens": 400, "ignore_eos": true, "kvpush": {"deadline_ms": 60}});
    let (status, answer) = fixture.post("/v1/completions", &body).await;
    assert!(
        [StatusCode::REQUEST_TIMEOUT, StatusCode::GATEWAY_TIMEOUT].contains(&status),
        "{answer}"
    );
    assert_eq!(answer["error"]["code"], "deadline_exceeded");
    // In a stream that has begun it is an event.
    let mut body = body;
    body["stream"] = json!(true);
    body["kvpush"]["deadline_ms"] = json!(300);
    let events = fixture.stream("/v1/completions", &body).await;
    let error: Value = serde_json::from_str(&events[events.len() - 2].1).unwrap();
    assert_eq!(error["error"]["code"], "deadline_exceeded", "{events:?}");
    assert_eq!(events.last().unwrap().1, "[DONE]");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..300).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(vec![
            "user",
            "text",
            "1",
            "decode",
            "prefill",
            "localhost",
            "AAAA",
            "fake"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(field(), inner, 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Fields that the server reads, and others.
fn field() -> impl Strategy<Value = String> {
    let known = [
        "prompt",
        "messages",
        "role",
        "content",
        "type",
        "text",
        "model",
        "stream",
        "stream_options",
        "include_usage",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
        "seed",
        "logprobs",
        "top_logprobs",
        "echo",
        "logit_bias",
        "stop_token_ids",
        "ignore_eos",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "kvpush",
        "leg",
        "ticket",
        "prefill_tp",
        "on_failure",
        "room",
        "kv_transfer_params",
        "do_remote_decode",
        "do_remote_prefill",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "tokens",
        "rid",
        "request_id",
        "cache_salt",
        "prompt_logprobs",
        "best_of",
        "tools",
        "0",
        "x",
        "return_token_ids",
    ];
    prop::sample::select(known.to_vec()).prop_map(str::to_owned)
}

/// Any body is answered, and never by a fault of ours.
#[test]
fn no_body_is_a_fault() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let fixture = runtime.block_on(async {
        let settings = Settings {
            deadline: Duration::from_millis(50),
            max_deadline: Duration::from_millis(50),
            ..Settings::default()
        };
        Fixture::with(Shape::default(), settings)
    });
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let fields = prop::collection::btree_map(field(), any_json(), 0..8);
    let bodies = (prop::sample::select(ROUTES.to_vec()), fields, any::<bool>());
    let result = runner.run(&bodies, |(route, fields, is_complete)| {
        let mut body = Value::Object(fields.into_iter().collect());
        if is_complete {
            // So that what comes after the prompt is reached, too.
            body["prompt"] = json!("x");
            body["messages"] = json!([{"role": "user", "content": "x"}]);
            body["model"] = Value::Null;
        }
        let (status, answer) = runtime.block_on(fixture.post(route, &body));
        prop_assert!(
            !status.is_server_error() || status == StatusCode::GATEWAY_TIMEOUT,
            "{status} {answer}"
        );
        Ok(())
    });
    result.unwrap();
    let (status, answer) =
        runtime.block_on(fixture.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1})));
    assert_eq!(status, StatusCode::OK, "the engine lives: {answer}");
}
