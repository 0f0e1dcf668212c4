//! SGLang's rooms: the router sends the same body to both engines, with the prefill engine's address and a number.
//! Which part an engine does is its role. For several prompts, or `n` above 1, the fields are lists.

use serde::Deserialize;
use serde_json::Value;

use super::{Disaggregation, Part, Peer};
use crate::serve::{Role, error::ApiError, json};

#[derive(Deserialize)]
struct Body {
    bootstrap_host: Option<Listed<String>>,
    bootstrap_port: Option<Listed<Option<u16>>>,
    bootstrap_room: Listed<u64>,
}

#[derive(Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a value or a list of values, hosts as strings, ports as 16-bit numbers, rooms as 64-bit numbers"
)]
enum Listed<T> {
    Many(Vec<T>),
    One(T),
}

impl<T: Clone> Listed<T> {
    /// The value for the prompt `index`: single ones hold for all.
    fn at(&self, index: usize) -> Option<T> {
        match self {
            Self::One(value) => Some(value.clone()),
            Self::Many(values) => values.get(index).cloned(),
        }
    }
}

/// Reads the three fields.
///
/// # Errors
///
/// 400.
pub fn read(
    body: &Value,
    role: Role,
    prompts: usize,
    default_port: u16,
) -> Result<Disaggregation, ApiError> {
    let fields: Body = json::read(body)?;
    if let (Listed::One(_), 2..) = (&fields.bootstrap_room, prompts) {
        return Err(ApiError::invalid(
            "bootstrap_room",
            "several prompts need a room each",
        ));
    }
    let parts = (0..prompts)
        .map(|prompt| {
            let room = fields.bootstrap_room.at(prompt).ok_or_else(|| {
                ApiError::invalid("bootstrap_room", "there are more prompts than rooms")
            })?;
            let room = room.to_string();
            match role {
                Role::Prefill => Ok(Part::Hold { room: Some(room) }),
                Role::Decode => {
                    let host = fields
                        .bootstrap_host
                        .as_ref()
                        .and_then(|host| host.at(prompt))
                        .ok_or_else(|| {
                            ApiError::invalid("bootstrap_host", "where is the prefill engine?")
                        })?;
                    let port = fields
                        .bootstrap_port
                        .as_ref()
                        .and_then(|port| port.at(prompt))
                        .flatten()
                        .unwrap_or(default_port);
                    Ok(Part::Fetch {
                        peer: Peer::parse("bootstrap_host", &host, port)?,
                        room,
                        prefill_tp: None,
                    })
                }
                Role::Both => Err(ApiError::invalid(
                    "bootstrap_room",
                    "the same body goes to prefill and decode: start this engine with --role prefill or decode",
                )),
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Disaggregation {
        parts,
        deadline: None,
        relays: false,
    })
}
