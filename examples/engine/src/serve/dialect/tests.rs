//! Bodies as routers send them.

use super::*;
use serde_json::json;

const PORT: u16 = 8998;

fn of(body: &Value, role: Role) -> Result<Disaggregation, ApiError> {
    Disaggregation::of(body, role, 1, PORT)
}

fn param(body: &Value, role: Role) -> String {
    of(body, role).unwrap_err().param.unwrap()
}

#[test]
fn a_plain_body_is_done_whole() {
    for role in [Role::Both, Role::Prefill, Role::Decode] {
        let body = json!({"prompt": "x", "kv_transfer_params": null, "bootstrap_host": null, "bootstrap_room": null});
        assert_eq!(of(&body, role).unwrap(), Disaggregation::default());
    }
}

/// vllm-router 0.1 and vLLM's NIXL proxies: what is sent to prefill.
#[test]
fn a_relayed_prefill_holds() {
    let body = json!({
        "model": "m", "prompt": "Hello", "max_tokens": 1, "max_completion_tokens": 1, "stream": false,
        "kv_transfer_params": {
            "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null,
        },
    });
    for role in [Role::Prefill, Role::Both] {
        let read = of(&body, role).unwrap();
        assert_eq!(read.parts, [Part::Hold { room: None }]);
        assert!(read.relays);
    }
    assert_eq!(param(&body, Role::Decode), "kv_transfer_params");
    // The shortest form, from llm-d's sidecar.
    let body = json!({"prompt": "x", "kv_transfer_params": {"do_remote_decode": true}});
    assert!(of(&body, Role::Prefill).unwrap().relays);
}

/// What those routers send to decode: the client's body with the prefill's parameters.
#[test]
fn a_relayed_decode_fetches() {
    let peer = Peer {
        host: "10.0.0.7".into(),
        port: 8000,
    };
    let params = relay::answer(&peer, "engine-1", "cmpl-1", 3, 2);
    assert_eq!(params["remote_block_ids"], json!([0, 1, 2]));
    let body =
        json!({"prompt": "Hello", "max_tokens": 150, "stream": true, "kv_transfer_params": params});
    let expected = Part::Fetch {
        peer,
        room: "cmpl-1".into(),
        prefill_tp: Some(2),
    };
    assert_eq!(of(&body, Role::Decode).unwrap().parts, [expected]);
    assert_eq!(param(&body, Role::Prefill), "kv_transfer_params");
    for field in ["remote_host", "remote_port", "remote_request_id"] {
        let mut body = body.clone();
        body["kv_transfer_params"][field] = Value::Null;
        assert_eq!(
            param(&body, Role::Decode),
            format!("kv_transfer_params.{field}")
        );
    }
}

/// sglang-router 0.3 and smg: one body for both.
#[test]
fn a_room_is_held_by_prefill_and_fetched_by_decode() {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": true,
        "bootstrap_host": "prefill-0", "bootstrap_port": 9001, "bootstrap_room": 9_223_372_036_854_775_807_u64,
    });
    let room = "9223372036854775807".to_owned();
    assert_eq!(
        of(&body, Role::Prefill).unwrap().parts,
        [Part::Hold {
            room: Some(room.clone())
        }]
    );
    let fetch = |port| Part::Fetch {
        peer: Peer {
            host: "prefill-0".into(),
            port,
        },
        room: room.clone(),
        prefill_tp: None,
    };
    assert_eq!(of(&body, Role::Decode).unwrap().parts, [fetch(9001)]);
    assert_eq!(param(&body, Role::Both), "bootstrap_room");
    let mut body = body;
    body["bootstrap_port"] = Value::Null;
    assert_eq!(of(&body, Role::Decode).unwrap().parts, [fetch(PORT)]);
}

/// The same routers, for a list of prompts and for `n` above 1 (then with more rooms than prompts).
#[test]
fn rooms_come_in_lists() {
    let body = json!({
        "bootstrap_host": ["p", "p"], "bootstrap_port": [1, null], "bootstrap_room": [5, 6],
    });
    let read = Disaggregation::of(&body, Role::Decode, 2, PORT).unwrap();
    let fetch = |port, room: &str| Part::Fetch {
        peer: Peer {
            host: "p".into(),
            port,
        },
        room: room.into(),
        prefill_tp: None,
    };
    assert_eq!(read.parts, [fetch(1, "5"), fetch(PORT, "6")]);
    assert_eq!(of(&body, Role::Decode).unwrap().parts, [fetch(1, "5")]);
    let error = Disaggregation::of(&body, Role::Decode, 3, PORT).unwrap_err();
    assert_eq!(error.param.unwrap(), "bootstrap_room");
    let one = json!({"bootstrap_host": "p", "bootstrap_room": 5});
    let error = Disaggregation::of(&one, Role::Prefill, 2, PORT).unwrap_err();
    assert_eq!(error.param.unwrap(), "bootstrap_room");
}

#[test]
fn the_native_legs() {
    let decode = json!({"kvpush": {"leg": "decode", "prefill_tp": 3, "on_failure": "recompute", "deadline_ms": 1500}});
    let read = of(&decode, Role::Decode).unwrap();
    assert_eq!(
        read.parts,
        [Part::Decode {
            prefill_tp: 3,
            on_failure: OnFailure::Recompute
        }]
    );
    assert_eq!(read.deadline, Some(Duration::from_millis(1500)));
    let prefill = json!({"kvpush": {"ticket": native::ticket_text(b"bytes")}});
    assert_eq!(
        of(&prefill, Role::Prefill).unwrap().parts,
        [Part::Prefill {
            ticket: b"bytes".to_vec()
        }]
    );
    for (body, role, expected) in [
        (
            json!({"kvpush": {"leg": "prefill"}}),
            Role::Both,
            "kvpush.ticket",
        ),
        (
            json!({"kvpush": {"ticket": "*"}}),
            Role::Both,
            "kvpush.ticket",
        ),
        (
            json!({"kvpush": {"ticket": ""}}),
            Role::Both,
            "kvpush.ticket",
        ),
        (
            json!({"kvpush": {"leg": "decode", "ticket": "AA=="}}),
            Role::Both,
            "kvpush.ticket",
        ),
        (
            json!({"kvpush": {"leg": "middle"}}),
            Role::Both,
            "kvpush.leg",
        ),
        (
            json!({"kvpush": {"leg": "decode", "prefill_tp": 0}}),
            Role::Both,
            "kvpush.prefill_tp",
        ),
        (
            json!({"kvpush": {"deadline_ms": 0}}),
            Role::Both,
            "kvpush.deadline_ms",
        ),
        (json!({"kvpush": 7}), Role::Both, "kvpush"),
        (decode, Role::Prefill, "kvpush"),
        (prefill, Role::Decode, "kvpush"),
    ] {
        assert_eq!(param(&body, role), expected, "{body}");
    }
}

#[test]
fn one_dialect_at_a_time() {
    let body = json!({"kvpush": {"leg": "decode"}, "bootstrap_room": 1});
    assert_eq!(param(&body, Role::Decode), "bootstrap_room");
}

#[test]
fn hosts_are_checked() {
    for host in ["", "a/b", "a b", "a@b", "a\r\nb"] {
        let body = json!({"bootstrap_host": host, "bootstrap_room": 1});
        assert_eq!(param(&body, Role::Decode), "bootstrap_host", "{host:?}");
    }
    let body = json!({"bootstrap_host": "[::1]", "bootstrap_port": 80, "bootstrap_room": 1});
    let Part::Fetch { peer, .. } = of(&body, Role::Decode).unwrap().part(0) else {
        panic!("not fetched");
    };
    assert_eq!(peer.to_string(), "[::1]:80");
}
