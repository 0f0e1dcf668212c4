//! The gateway of this workspace: it carries the ticket itself.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::Value;

use super::{Disaggregation, Part};
use crate::{
    request::OnFailure,
    serve::{Role, error::ApiError, json},
};

/// Longest ticket, in bytes.
pub const MAX_TICKET: usize = 1 << 20;
/// Most ranks of the other engine.
pub const MAX_RANKS: u32 = 64;

#[derive(Deserialize)]
struct Body {
    kvpush: Fields,
}

#[derive(Deserialize)]
struct Fields {
    leg: Option<LegName>,
    ticket: Option<String>,
    prefill_tp: Option<u32>,
    on_failure: Option<OnFailureName>,
    deadline_ms: Option<u64>,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum LegName {
    Both,
    Prefill,
    Decode,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnFailureName {
    Fail,
    Recompute,
}

/// Decodes a ticket's base64.
///
/// # Errors
///
/// 400 with `param`.
pub fn ticket(param: &str, text: &str) -> Result<Vec<u8>, ApiError> {
    if text.len() > MAX_TICKET.div_ceil(3) * 4 {
        return Err(ApiError::invalid(param, "is longer than any ticket"));
    }
    match STANDARD.decode(text) {
        Ok(bytes) if !bytes.is_empty() => Ok(bytes),
        Ok(_) => Err(ApiError::invalid(param, "is empty")),
        Err(error) => Err(ApiError::invalid(param, format!("is not base64: {error}"))),
    }
}

/// The ticket of a body that may be wrong otherwise.
pub fn ticket_of(body: &Value) -> Option<Vec<u8>> {
    let text = body.pointer("/kvpush/ticket")?.as_str()?;
    ticket("kvpush.ticket", text).ok()
}

/// Encodes a ticket for JSON.
pub fn ticket_text(ticket: &[u8]) -> String {
    STANDARD.encode(ticket)
}

/// Ranks, within bounds.
///
/// # Errors
///
/// 400 with `param`.
pub fn ranks(param: &str, ranks: u32) -> Result<u32, ApiError> {
    if (1..=MAX_RANKS).contains(&ranks) {
        Ok(ranks)
    } else {
        Err(ApiError::invalid(
            param,
            format!("must be from 1 to {MAX_RANKS}"),
        ))
    }
}

/// Reads `kvpush`.
///
/// # Errors
///
/// 400.
pub fn read(body: &Value, role: Role) -> Result<Disaggregation, ApiError> {
    let Body { kvpush } = json::read(body)?;
    let leg = match (kvpush.leg, &kvpush.ticket) {
        (Some(leg), _) => leg,
        (None, Some(_)) => LegName::Prefill,
        // Only a time limit was given: an engine that has but one role does that.
        (None, None) if role == Role::Decode && kvpush.prefill_tp.is_some() => LegName::Decode,
        (None, None) => LegName::Both,
    };
    let parts = match (leg, kvpush.ticket) {
        (LegName::Both, None) => Vec::new(),
        (LegName::Prefill, Some(text)) => vec![Part::Prefill {
            ticket: ticket("kvpush.ticket", &text)?,
        }],
        (LegName::Prefill, None) => {
            return Err(ApiError::invalid(
                "kvpush.ticket",
                "a prefill leg needs the ticket of the decode leg's first event",
            ));
        }
        (LegName::Decode, None) => vec![Part::Decode {
            prefill_tp: ranks("kvpush.prefill_tp", kvpush.prefill_tp.unwrap_or(1))?,
            on_failure: match kvpush.on_failure {
                Some(OnFailureName::Recompute) => OnFailure::Recompute,
                Some(OnFailureName::Fail) | None => OnFailure::Fail,
            },
        }],
        (LegName::Both | LegName::Decode, Some(_)) => {
            return Err(ApiError::invalid(
                "kvpush.ticket",
                "only a prefill leg takes a ticket",
            ));
        }
    };
    let deadline = match kvpush.deadline_ms {
        None => None,
        Some(0) => {
            return Err(ApiError::invalid(
                "kvpush.deadline_ms",
                "must be at least 1",
            ));
        }
        Some(ms) => Some(Duration::from_millis(ms)),
    };
    Ok(Disaggregation {
        parts,
        deadline,
        relays: false,
    })
}
