//! How a gateway says which part of a request this engine does.
//!
//! | Dialect | Body | Spoken by |
//! |---|---|---|
//! | native | `kvpush: {leg, ticket, prefill_tp, on_failure, deadline_ms}` | kvpush-gateway |
//! | relay | `kv_transfer_params: {do_remote_decode, do_remote_prefill, remote_*}` | vllm-router, llm-d, vLLM's proxies |
//! | rooms | `bootstrap_host`, `bootstrap_port`, `bootstrap_room` | sglang-router, smg |
//!
//! In the native one the gateway carries the ticket from decode to prefill. In the others it cannot: there the decode
//! engine hands its ticket to the prefill engine itself, at `POST /kvpush/tickets/{room}`.

pub mod native;
pub mod relay;
pub mod rooms;

use std::time::Duration;

use serde_json::Value;

use crate::{
    request::OnFailure,
    serve::{Role, error::ApiError},
};

/// Where the other engine's HTTP is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Peer {
    /// Accepts IPv6 addresses in brackets, and refuses what is no host.
    ///
    /// # Errors
    ///
    /// 400 with `param`.
    pub fn parse(param: &str, host: &str, port: u16) -> Result<Self, ApiError> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_host = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
        if host.is_empty() || host.len() > 253 || !host.chars().all(is_host) {
            return Err(ApiError::invalid(param, "is not a host name or address"));
        }
        if port == 0 {
            return Err(ApiError::invalid(param, "port 0 cannot be reached"));
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What this engine does of one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// Native prefill leg: push to where the ticket says.
    Prefill {
        /// From the decode leg's first event.
        ticket: Vec<u8>,
    },
    /// Native decode leg: the ticket goes to the client.
    Decode {
        /// Ranks of the prefill engine.
        prefill_tp: u32,
        /// What to do when pages do not arrive.
        on_failure: OnFailure,
    },
    /// Prefill, and wait for a ticket of that room.
    Hold {
        /// `None`: named after the request.
        room: Option<String>,
    },
    /// Decode, and hand the ticket to the prefill engine.
    Fetch {
        /// The prefill engine.
        peer: Peer,
        /// The name that it knows the request by.
        room: String,
        /// Its ranks, if the gateway knows them; they are asked for otherwise.
        prefill_tp: Option<u32>,
    },
}

impl Part {
    /// Whether an engine of that role does this.
    ///
    /// # Errors
    ///
    /// 400 with `param`.
    pub fn check(&self, role: Role, param: &str) -> Result<(), ApiError> {
        let (needs, is_done) = match self {
            Self::Whole => return Ok(()),
            Self::Prefill { .. } | Self::Hold { .. } => ("prefill", role != Role::Decode),
            Self::Decode { .. } | Self::Fetch { .. } => ("decode", role != Role::Prefill),
        };
        if is_done {
            return Ok(());
        }
        Err(ApiError::invalid(
            param,
            format!("asks for a {needs} leg, this engine's role is {role}"),
        ))
    }
}

/// What a body says about disaggregation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Disaggregation {
    /// One part for each prompt. Empty: every prompt is done whole.
    pub parts: Vec<Part>,
    /// Time for the request, if the client limits it.
    pub deadline: Option<Duration>,
    /// The answer carries `kv_transfer_params` for the decode engine.
    pub relays: bool,
}

impl Disaggregation {
    /// The part of one prompt.
    pub fn part(&self, prompt: usize) -> Part {
        self.parts.get(prompt).cloned().unwrap_or_default()
    }

    /// Reads a request body for an engine of that role, with that many prompts. `default_bootstrap_port` is used
    /// where a room names none.
    ///
    /// # Errors
    ///
    /// 400: fields of the wrong type, more than one dialect, or a part that this role does not do.
    pub fn of(
        body: &Value,
        role: Role,
        prompts: usize,
        default_bootstrap_port: u16,
    ) -> Result<Self, ApiError> {
        let given = |field: &str| body.get(field).is_some_and(|value| !value.is_null());
        let spoken: Vec<&str> = ["kvpush", "kv_transfer_params", "bootstrap_room"]
            .into_iter()
            .filter(|field| given(field))
            .collect();
        let read = match spoken.as_slice() {
            [] => Self::default(),
            ["kvpush"] => native::read(body, role)?,
            ["kv_transfer_params"] => relay::read(body)?,
            ["bootstrap_room"] => rooms::read(body, role, prompts, default_bootstrap_port)?,
            _ => {
                return Err(ApiError::invalid(
                    spoken[1],
                    format!("cannot be given together with {}", spoken[0]),
                ));
            }
        };
        if !read.parts.is_empty() && read.parts.len() != prompts {
            return Err(ApiError::invalid(
                spoken[0],
                format!(
                    "covers {} prompts, the request has {prompts}",
                    read.parts.len()
                ),
            ));
        }
        for part in &read.parts {
            part.check(role, spoken[0])?;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
