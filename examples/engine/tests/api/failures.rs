//! When one side fails, the other is told, and every block comes back.

use std::time::Duration;

use kvpush_engine::{runtime::Role, serve::Settings};
use serde_json::json;

use crate::{
    client::{begin, events, post},
    stack::{Node, PATH, Pair, ask},
};

/// The decode leg's client goes away: the grant is revoked, so the prefill's push fails, at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_decode_that_is_dropped_fails_the_prefill() {
    let pair = Pair::start(1, 1).await;
    let leg = json!({"stream": true, "kvpush": {"leg": "decode"}});
    let mut decode = begin(pair.decode.address, PATH, &ask(leg)).await;
    let first = decode.until("\n\n").await.to_owned();
    let ticket = events(&first)[0]["ticket"].clone();
    drop(decode);
    pair.decode.is_empty().await;
    let leg = json!({"kvpush": {"ticket": ticket}});
    let (status, answer) = post(pair.prefill.address, PATH, &ask(leg)).await;
    assert!([502, 503].contains(&status), "{status} {answer}");
    assert_eq!(answer["error"]["code"], "kv_transfer_failed");
    pair.end().await;
}

/// Another prompt than the one that was reserved for: refused, on both sides.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_for_another_prompt_is_refused() {
    let pair = Pair::start(1, 1).await;
    let leg = json!({"stream": true, "kvpush": {"leg": "decode", "deadline_ms": 3000}});
    let mut decode = begin(pair.decode.address, PATH, &ask(leg)).await;
    let first = decode.until("\n\n").await.to_owned();
    let ticket = events(&first)[0]["ticket"].clone();
    let leg = json!({"prompt": "something else", "kvpush": {"ticket": ticket}});
    let (status, answer) = post(pair.prefill.address, PATH, &ask(leg)).await;
    assert!(status >= 400, "{answer}");
    let rest = decode.rest().await;
    assert!(
        events(&rest).iter().any(|event| event["error"].is_object()),
        "{rest}"
    );
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_is_none_is_an_error() {
    let prefill = Node::start(Role::Prefill, 1).await;
    let leg = json!({"kvpush": {"ticket": "bm90IGEgdGlja2V0"}});
    let (status, answer) = post(prefill.address, PATH, &ask(leg)).await;
    assert!(
        (400..500).contains(&status) || status == 502,
        "{status} {answer}"
    );
    prefill.is_empty().await;
    prefill.drain().await;
}

/// Nobody decodes what a relayed prefill holds: the blocks come back at the deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_prefill_lets_go_at_its_deadline() {
    let settings = Settings {
        deadline: Duration::from_millis(700),
        ..Settings::default()
    };
    let prefill = Node::with(Role::Prefill, 1, settings).await;
    let relay = json!({"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": true}});
    let (status, answer) = post(prefill.address, PATH, &ask(relay)).await;
    assert_eq!(status, 200, "{answer}");
    assert!(prefill.app.handle.stats().blocks.used > 0);
    prefill.is_empty().await;
    let room = &answer["kv_transfer_params"]["remote_request_id"];
    let ticket = json!({"room": room, "ticket": "AAAA"});
    let (status, _) = post(prefill.address, "/kvpush/tickets", &ticket).await;
    assert_eq!(status, 504);
    prefill.drain().await;
}

/// The prefill engine refuses (it drains): the decode engine's ticket is refused, and its request fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_without_prefill_fails_the_decode() {
    let pair = Pair::start(1, 1).await;
    let room = json!({
        "bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.address.port(), "bootstrap_room": 5,
        "logprobs": 99,
    });
    let (status, _) = post(pair.prefill.address, PATH, &ask(room.clone())).await;
    assert_eq!(status, 400);
    let mut body = ask(room);
    body["logprobs"] = serde_json::Value::Null;
    // Nothing was held for the room: the ticket waits until its own deadline.
    let started = std::time::Instant::now();
    let decode = Settings {
        deadline: Duration::from_millis(600),
        ..Settings::default()
    };
    let decode = Node::with(Role::Decode, 1, decode).await;
    let (status, answer) = post(decode.address, PATH, &body).await;
    assert!([408, 502, 503, 504].contains(&status), "{status} {answer}");
    assert!(started.elapsed() < Duration::from_secs(20));
    decode.is_empty().await;
    decode.drain().await;
    pair.end().await;
}
