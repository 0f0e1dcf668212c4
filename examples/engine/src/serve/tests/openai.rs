//! Completions as OpenAI has them.

use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::*;

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

fn greedy(extra: Value) -> Value {
    let mut body = json!({"prompt": "once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

fn text(value: &Value) -> &str {
    value["choices"][0]["text"].as_str().expect("a text")
}

#[tokio::test]
async fn a_completion_has_text_usage_and_a_reason() {
    let fixture = Fixture::new();
    let (status, answer) = fixture.post(PLAIN, &greedy(json!({}))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "fake");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["prompt_tokens"], 16);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    assert_eq!(answer["usage"]["total_tokens"], 28);
    assert!(!text(&answer).is_empty());
}

#[tokio::test]
async fn a_stream_has_the_same_text() {
    let fixture = Fixture::new();
    let (_, whole) = fixture.post(PLAIN, &greedy(json!({}))).await;
    let body = greedy(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut chunks = fixture.chunks(PLAIN, &body).await;
    let usage = chunks.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()));
    let streamed: String = chunks.iter().map(text).collect();
    assert_eq!(streamed, text(&whole));
    let reasons: Vec<_> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(reasons.last().unwrap().as_str(), Some("length"));
    assert!(reasons[..reasons.len() - 1].iter().all(|r| r.is_null()));
}

#[tokio::test]
async fn a_chat_opens_with_the_role() {
    let fixture = Fixture::new();
    let body = json!({
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_completion_tokens": 6, "temperature": 0, "ignore_eos": true,
    });
    let (status, whole) = fixture.post(CHAT, &body).await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let mut body = body;
    body["stream"] = json!(true);
    let chunks = fixture.chunks(CHAT, &body).await;
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    let streamed: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(streamed, message["content"].as_str().unwrap());
    // A chat without a limit may use the whole context.
    let (_, long) = fixture
        .post(
            CHAT,
            &json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true}),
        )
        .await;
    assert_eq!(long["usage"]["total_tokens"], 512, "{long}");
}

#[tokio::test]
async fn the_seed_decides() {
    let fixture = Fixture::new();
    let body =
        |seed: i64| greedy(json!({"temperature": 1.0, "seed": seed, "return_token_ids": true}));
    let tokens = |answer: (StatusCode, Value)| answer.1["choices"][0]["token_ids"].clone();
    let first = tokens(fixture.post(PLAIN, &body(7)).await);
    assert_eq!(first.as_array().unwrap().len(), 12);
    assert_eq!(first, tokens(fixture.post(PLAIN, &body(7)).await));
    assert_ne!(first, tokens(fixture.post(PLAIN, &body(8)).await));
}

#[tokio::test]
async fn several_prompts_and_completions_have_their_indices() {
    let fixture = Fixture::new();
    let body = json!({"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "ignore_eos": true, "echo": true, "seed": 1});
    let (status, answer) = fixture.post(PLAIN, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let choices = answer["choices"].as_array().unwrap();
    let begin = |index: usize| &choices[index]["text"].as_str().unwrap()[..3];
    assert_eq!(
        [begin(0), begin(1), begin(2), begin(3)],
        ["one", "one", "two", "two"]
    );
    assert_eq!(choices[3]["index"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 12);

    let tokens = json!({"prompt": [[111, 110, 101]], "max_tokens": 3, "ignore_eos": true, "echo": true, "stream": true});
    let chunks = fixture.chunks(PLAIN, &tokens).await;
    assert_eq!(text(&chunks[0]), "one");
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let fixture = Fixture::new();
    let body = greedy(json!({"max_tokens": 60, "logit_bias": letters()}));
    let (_, whole) = fixture.post(PLAIN, &body).await;
    let whole = text(&whole).to_owned();
    let stop = &whole[20..23];
    let expected = &whole[..whole.find(stop).unwrap()];
    for stream in [false, true] {
        let mut body = body.clone();
        body["stop"] = json!([stop]);
        body["stream"] = json!(stream);
        let (got, reason) = if stream {
            let chunks = fixture.chunks(PLAIN, &body).await;
            let got = chunks.iter().map(text).collect::<String>();
            let last = &chunks.last().unwrap()["choices"][0];
            (got, last["finish_reason"].clone())
        } else {
            let (_, answer) = fixture.post(PLAIN, &body).await;
            // Not all 60: the engine was told.
            assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 60);
            (
                text(&answer).to_owned(),
                answer["choices"][0]["finish_reason"].clone(),
            )
        };
        assert_eq!((got.as_str(), reason), (expected, json!("stop")));
    }
}

/// Leaves only letters likely.
fn letters() -> Value {
    let biased = (b'a'..=b'z').map(|letter| (letter.to_string(), json!(100)));
    Value::Object(biased.collect())
}

#[tokio::test]
async fn log_probabilities_come_as_asked_for() {
    let fixture = Fixture::new();
    let body = greedy(json!({"logprobs": 2, "max_tokens": 3}));
    let (status, answer) = fixture.post(PLAIN, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 3);
    assert!(logprobs["token_logprobs"][0].as_f64().unwrap() <= 0.0);

    let body = json!({
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "logprobs": true, "top_logprobs": 3,
        "ignore_eos": true,
    });
    let (_, answer) = fixture.post(CHAT, &body).await;
    let content = &answer["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 2, "{answer}");
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn the_prompt_s_log_probabilities_come_with_the_echo() {
    let fixture = Fixture::new();
    let body = greedy(json!({"logprobs": 1, "max_tokens": 3, "echo": true, "prompt": "abcd"}));
    let (status, answer) = fixture.post(PLAIN, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 7, "{answer}");
    assert!(logprobs["token_logprobs"][0].is_null());
    assert!(logprobs["token_logprobs"][1].is_number());
    assert!(text(&answer).starts_with("abcd"));
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_its_request() {
    let fixture = Fixture::slow();
    let body = greedy(json!({"stream": true, "max_tokens": 400}));
    let request = Request::post(PLAIN).body(Body::from(body.to_string()));
    let mut response = fixture.send(request.unwrap()).await;
    let _ = response.body_mut().frame().await.unwrap().unwrap();
    drop(response);
    until("aborted", || fixture.app.handle.stats().aborted == 1).await;
    let stats = fixture.app.handle.stats();
    assert_eq!(stats.blocks.used, 0);
    assert!(stats.generated_tokens < 400);
}

#[tokio::test]
async fn a_client_that_does_not_wait_aborts_too() {
    let fixture = Fixture::slow();
    let body = greedy(json!({"max_tokens": 400}));
    let asked = fixture.post(PLAIN, &body);
    let gone = tokio::time::timeout(Duration::from_millis(100), asked).await;
    assert!(gone.is_err());
    until("aborted", || fixture.app.handle.stats().aborted == 1).await;
}

#[tokio::test]
async fn models_tokens_and_facts() {
    let fixture = Fixture::new();
    let (_, models) = fixture.get("/v1/models").await;
    assert_eq!(models["data"][0]["id"], "fake");
    assert_eq!(fixture.get("/v1/models/fake").await.0, StatusCode::OK);
    assert_eq!(fixture.get("/v1/models/a/b").await.0, StatusCode::NOT_FOUND);
    let (_, tokens) = fixture.post("/tokenize", &json!({"prompt": "hi"})).await;
    assert_eq!(tokens["tokens"], json!([104, 105]));
    assert_eq!(tokens["count"], 2);
    let messages = json!({"messages": [{"role": "user", "content": "hi"}]});
    let (_, tokens) = fixture.post("/tokenize", &messages).await;
    assert_eq!(tokens["count"], "user: hi\nassistant: ".len());
    let (_, text) = fixture
        .post("/detokenize", &json!({"tokens": [104, 105]}))
        .await;
    assert_eq!(text["prompt"], "hi");
    let (_, info) = fixture.get("/server_info").await;
    assert_eq!(info["role"], "both");
    assert_eq!(info["tp_size"], 1);
    assert_eq!(info["block_size"], 16);
    assert_eq!(info["blocks"]["total"], 64);
    assert_eq!(info["model_digest"].as_str().unwrap().len(), 64);
}
