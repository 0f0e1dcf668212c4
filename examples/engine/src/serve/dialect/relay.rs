//! vLLM's relay: prefill answers with `kv_transfer_params`, which the router copies into the decode request.
//!
//! Which blocks those are, vLLM tells by number. Here the decode engine reserves, and hands its ticket to the prefill
//! engine under `remote_request_id`; the numbers only keep routers content that look for them.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Disaggregation, Part, Peer, native};
use crate::serve::{error::ApiError, json};

#[derive(Deserialize)]
struct Body {
    kv_transfer_params: Fields,
}

#[derive(Deserialize)]
struct Fields {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    remote_request_id: Option<String>,
    remote_host: Option<String>,
    remote_port: Option<Port>,
    tp_size: Option<u32>,
}

/// A number, or its decimal text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a port number")]
enum Port {
    Number(u16),
    Text(String),
}

impl Port {
    fn number(&self) -> Option<u16> {
        match self {
            Self::Number(port) => Some(*port),
            Self::Text(text) => text.parse().ok(),
        }
    }
}

/// Longest name of a room.
pub const MAX_ROOM: usize = 256;

/// Reads `kv_transfer_params`.
///
/// # Errors
///
/// 400.
pub fn read(body: &Value) -> Result<Disaggregation, ApiError> {
    let Body {
        kv_transfer_params: fields,
    } = json::read(body)?;
    let decode = fields.do_remote_decode.unwrap_or(false);
    let prefill = fields.do_remote_prefill.unwrap_or(false);
    match (decode, prefill) {
        (false, false) => Ok(Disaggregation::default()),
        (true, true) => Err(ApiError::invalid(
            "kv_transfer_params",
            "do_remote_decode and do_remote_prefill exclude each other",
        )),
        (true, false) => Ok(Disaggregation {
            parts: vec![Part::Hold { room: None }],
            deadline: None,
            relays: true,
        }),
        (false, true) => {
            let missing = |field: &str| {
                let param = format!("kv_transfer_params.{field}");
                let message = format!(
                    "{param} is missing: copy kv_transfer_params from the answer of a kvpush-engine's prefill"
                );
                ApiError::invalid(param, message)
            };
            let host = fields.remote_host.ok_or_else(|| missing("remote_host"))?;
            let port = fields
                .remote_port
                .as_ref()
                .and_then(Port::number)
                .ok_or_else(|| missing("remote_port"))?;
            let room = fields
                .remote_request_id
                .ok_or_else(|| missing("remote_request_id"))?;
            if room.is_empty() || room.len() > MAX_ROOM {
                return Err(missing("remote_request_id"));
            }
            let prefill_tp = fields
                .tp_size
                .map(|tp| native::ranks("kv_transfer_params.tp_size", tp))
                .transpose()?;
            Ok(Disaggregation {
                parts: vec![Part::Fetch {
                    peer: Peer::parse("kv_transfer_params.remote_host", &host, port)?,
                    room,
                    prefill_tp,
                }],
                deadline: None,
                relays: false,
            })
        }
    }
}

/// What a prefill answers, for the router to copy.
pub fn answer(peer: &Peer, engine_id: &str, room: &str, blocks: usize, tp: u32) -> Value {
    json!({
        "do_remote_prefill": true,
        "do_remote_decode": false,
        "remote_engine_id": engine_id,
        "remote_request_id": room,
        "remote_block_ids": (0..blocks).collect::<Vec<_>>(),
        "remote_host": peer.host,
        "remote_port": peer.port,
        "tp_size": tp,
    })
}
