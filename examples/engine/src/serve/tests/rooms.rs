//! Rooms over HTTP, on an engine that cannot push: every failure is told to the other side at once.

use serde_json::json;

use super::*;

#[tokio::test]
async fn a_prefill_that_is_refused_fails_the_ticket_that_waits() {
    let fixture = Fixture::with_role(Role::Prefill);
    let ticket = json!({"room": "7", "ticket": "AAAA", "deadline_ms": 60_000});
    let prefill =
        json!({"prompt": "x", "bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7});
    let (waits, refused) = tokio::join!(fixture.post("/kvpush/tickets", &ticket), async {
        until("the ticket waits", || fixture.app.rooms.waits("7")).await;
        fixture.post("/v1/completions", &prefill).await
    });
    assert_eq!(refused.0, StatusCode::BAD_REQUEST, "{}", refused.1);
    assert_eq!(waits.0, StatusCode::BAD_REQUEST, "{}", waits.1);
}

#[tokio::test]
async fn a_ticket_after_the_refusal_fails_at_once() {
    let fixture = Fixture::with_role(Role::Prefill);
    let prefill = json!({"prompt": "x", "bootstrap_room": 8});
    let (status, _) = fixture.post("/v1/completions", &prefill).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let ticket = json!({"room": "8", "ticket": "AAAA", "deadline_ms": 60_000});
    let (status, answer) = fixture.post("/kvpush/tickets", &ticket).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_a_retryable_error() {
    let fixture = Fixture::with_role(Role::Decode);
    // Port 1 of this host: nobody listens.
    let decode = json!({"prompt": "x", "bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 9});
    let (status, answer) = fixture.post("/v1/completions", &decode).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    assert_eq!(answer["error"]["code"], "kv_transfer_failed");
}
