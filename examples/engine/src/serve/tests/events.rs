//! KV events: live, replayed, with resets.

use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::*;

/// The first `count` events of a stream that does not end.
async fn listen(fixture: &Fixture, path: &str, count: usize) -> Vec<(String, Value)> {
    let request = Request::get(path).body(Body::empty()).unwrap();
    let mut body = fixture.send(request).await.into_body();
    let mut text = String::new();
    while events(&text).len() < count || !text.ends_with("\n\n") {
        let frame = tokio::time::timeout(Duration::from_secs(20), body.frame());
        let frame = frame.await.expect("an event").unwrap().unwrap();
        text.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
    }
    events(&text)
        .into_iter()
        .map(|(name, data)| (name, serde_json::from_str(&data).unwrap()))
        .collect()
}

#[tokio::test]
async fn what_was_missed_is_replayed() {
    let fixture = Fixture::new();
    let body = json!({"prompt": "x".repeat(40), "max_tokens": 1});
    let (status, _) = fixture.post("/v1/completions", &body).await;
    assert_eq!(status, StatusCode::OK);
    let told = listen(&fixture, "/kv_events?from=1", 1).await;
    let (name, stored) = &told[0];
    assert_eq!(name, "kv");
    assert_eq!(stored["type"], "stored");
    assert_eq!(stored["sequence"], 1);
    assert_eq!(stored["block_size"], 16);
    assert_eq!(
        stored["tokens"].as_array().unwrap().len(),
        16 * stored["hashes"].as_array().unwrap().len()
    );
    assert_eq!(stored["hashes"][0].as_str().unwrap().len(), 64);
}

#[tokio::test]
async fn a_number_of_another_start_is_reset() {
    let fixture = Fixture::new();
    let told = listen(&fixture, "/kv_events?from=1000", 1).await;
    assert_eq!(told[0].0, "reset");
    assert_eq!(told[0].1["next"], 1);
    let body = json!({"prompt": "x".repeat(40), "max_tokens": 1});
    fixture.post("/v1/completions", &body).await;
    // They are told a little after the answer.
    listen(&fixture, "/kv_events?from=1", 1).await;
    for from in [0, 1000] {
        // Two whole blocks are there.
        let told = listen(&fixture, &format!("/kv_events?from={from}"), 3).await;
        assert_eq!(told[0].0, "reset");
        assert!(told[1..].iter().all(|(_, event)| event["type"] == "stored"));
    }
    let (status, answer) = fixture.get("/kv_events?from=x").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer["error"]["param"], "from");
}
