//! Each dialect, with streams and without.

use serde_json::{Value, json};

use crate::{
    client::{begin, events, post, streamed},
    stack::{PATH, Pair, ask, expected, text},
};

fn with(mut body: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// kvpush-gateway: the ticket comes with the decode leg's first event, while its stream stays open.
#[tokio::test(flavor = "multi_thread")]
async fn native_streams() {
    let expected = expected(json!({})).await;
    for (prefill_tp, decode_tp) in [(1, 1), (2, 1), (1, 4)] {
        let pair = Pair::start(prefill_tp, decode_tp).await;
        let leg = json!({"stream": true, "kvpush": {"leg": "decode", "prefill_tp": prefill_tp}});
        let mut decode = begin(pair.decode.address, PATH, &ask(leg)).await;
        assert_eq!(decode.status, 200);
        let first = decode.until("\n\n").await.to_owned();
        assert!(first.starts_with("event: kvpush.reserved\n"), "{first}");
        let reserved = &events(&first)[0];
        let leg = json!({"kvpush": {"ticket": reserved["ticket"]}});
        let (status, prefill) = post(pair.prefill.address, PATH, &ask(leg)).await;
        assert_eq!(status, 200, "{prefill}");
        assert_eq!(prefill["choices"][0]["finish_reason"], "handed");
        let all = decode.rest().await;
        assert_eq!(streamed(&all), expected, "{all}");
        // The prefill's token is the first of the text.
        assert!(expected.starts_with(text(&prefill)));
        let stats = pair.decode.app.handle.stats();
        assert!(stats.pushed_tokens > 0 && stats.recomputed_tokens == 0);
        pair.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn native_without_a_stream_has_two_lines() {
    let expected = expected(json!({})).await;
    let pair = Pair::start(1, 1).await;
    let leg = json!({"kvpush": {"leg": "decode"}});
    let mut decode = begin(pair.decode.address, PATH, &ask(leg)).await;
    let first: Value = serde_json::from_str(decode.until("\n").await).unwrap();
    assert_eq!(first["object"], "kvpush.reserved");
    let leg = json!({"kvpush": {"ticket": first["ticket"]}});
    let (status, prefill) = post(pair.prefill.address, PATH, &ask(leg)).await;
    assert_eq!(status, 200, "{prefill}");
    let lines = decode.rest().await;
    let answer: Value = serde_json::from_str(lines.lines().nth(1).unwrap()).unwrap();
    assert_eq!(text(&answer), expected);
    assert!(answer["usage"]["kvpush"]["pushed_tokens"].as_u64() > Some(0));
    pair.end().await;
}

/// vllm-router and vLLM's proxies: prefill first, to its end; then decode, with what prefill has answered.
#[tokio::test(flavor = "multi_thread")]
async fn relay() {
    let expected = expected(json!({})).await;
    let pair = Pair::start(2, 1).await;
    let params = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null,
    });
    let prefill = with(
        ask(json!({"max_tokens": 1, "stream": false})),
        &json!({"kv_transfer_params": params}),
    );
    let (status, prefilled) = post(pair.prefill.address, PATH, &prefill).await;
    assert_eq!(status, 200, "{prefilled}");
    assert_eq!(prefilled["choices"][0]["finish_reason"], "length");
    let params = &prefilled["kv_transfer_params"];
    assert_eq!(params["do_remote_prefill"], true);
    assert_eq!(params["tp_size"], 2);
    assert_eq!(params["remote_port"], pair.prefill.address.port());
    for stream in [true, false] {
        // The second time the room has ended: an error at once, no hang.
        let extra = json!({"stream": stream, "kv_transfer_params": params});
        let mut decode = begin(pair.decode.address, PATH, &ask(extra)).await;
        let body = decode.rest().await;
        if stream {
            assert_eq!(streamed(&body), expected, "{body}");
            pair.prefill.is_empty().await;
        } else {
            assert_eq!(decode.status, 502, "{body}");
        }
    }
    pair.end().await;
}

/// sglang-router and smg: the same body to both, at the same time, whoever is faster.
#[tokio::test(flavor = "multi_thread")]
async fn rooms() {
    let expected = expected(json!({})).await;
    let pair = Pair::start(1, 2).await;
    for (room, lead) in [(1_u64, "prefill"), (2, "decode"), (i64::MAX as u64, "none")] {
        let extra = json!({
            "bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.address.port(), "bootstrap_room": room,
        });
        let body = ask(extra);
        let pause = |who| {
            let waits = lead != "none" && lead != who;
            tokio::time::sleep(std::time::Duration::from_millis(if waits {
                100
            } else {
                0
            }))
        };
        let (prefilled, decoded) = tokio::join!(
            async {
                pause("prefill").await;
                post(pair.prefill.address, PATH, &body).await
            },
            async {
                pause("decode").await;
                post(pair.decode.address, PATH, &body).await
            }
        );
        assert_eq!(
            (prefilled.0, decoded.0),
            (200, 200),
            "{prefilled:?} {decoded:?}"
        );
        assert_eq!(text(&decoded.1), expected, "{lead}");
    }
    pair.end().await;
}

/// The same for a list of prompts, each with its room.
#[tokio::test(flavor = "multi_thread")]
async fn rooms_in_lists() {
    let pair = Pair::start(1, 1).await;
    let port = pair.prefill.address.port();
    let prompts = [
        "the first of two prompts, with a few blocks",
        "and the second of them",
    ];
    let body = ask(json!({
        "prompt": prompts, "bootstrap_host": ["127.0.0.1", "127.0.0.1"], "bootstrap_port": [port, port],
        "bootstrap_room": [21, 22],
    }));
    let (prefilled, decoded) = tokio::join!(
        post(pair.prefill.address, PATH, &body),
        post(pair.decode.address, PATH, &body)
    );
    assert_eq!(
        (prefilled.0, decoded.0),
        (200, 200),
        "{prefilled:?} {decoded:?}"
    );
    for (index, prompt) in prompts.iter().enumerate() {
        let expected = expected(json!({"prompt": prompt})).await;
        assert_eq!(decoded.1["choices"][index]["text"], expected);
    }
    pair.end().await;
}
