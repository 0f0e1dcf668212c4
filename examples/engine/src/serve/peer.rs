//! Talking to another engine's HTTP: handing over a ticket, and asking for its ranks.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use axum::http::{Request, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};

use super::dialect::{Peer, native};
use crate::request::RequestError;

/// Most bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a peer's ranks are believed.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Peers remembered at most.
const MAX_PEERS: usize = 1024;

/// Other engines.
#[derive(Default)]
pub struct Peers {
    ranks: Mutex<HashMap<Peer, (u32, Instant)>>,
}

impl Peers {
    /// Tensor parallel ranks of a peer.
    ///
    /// # Errors
    ///
    /// It does not answer within `patience`, or is no kvpush-engine.
    pub async fn ranks(&self, peer: &Peer, patience: Duration) -> Result<u32, RequestError> {
        if let Some((ranks, at)) = self.ranks.lock().get(peer)
            && at.elapsed() < REMEMBERED
        {
            return Ok(*ranks);
        }
        let info = call(peer, "GET", "/server_info", None, patience).await?;
        let ranks = info
            .get("tp_size")
            .and_then(Value::as_u64)
            .and_then(|ranks| u32::try_from(ranks).ok())
            .filter(|&ranks| (1..=native::MAX_RANKS).contains(&ranks))
            .ok_or_else(|| failed(peer, "/server_info names no tp_size", false))?;
        let mut known = self.ranks.lock();
        if known.len() >= MAX_PEERS {
            known.clear();
        }
        known.insert(peer.clone(), (ranks, Instant::now()));
        Ok(ranks)
    }

    /// Hands a ticket to the prefill engine of `room`. Returns when that has taken it.
    ///
    /// # Errors
    ///
    /// It was refused, or not taken within `patience`.
    pub async fn hand_over(
        &self,
        peer: &Peer,
        room: &str,
        ticket: &[u8],
        patience: Duration,
    ) -> Result<(), RequestError> {
        let body = json!({
            "room": room,
            "ticket": native::ticket_text(ticket),
            "deadline_ms": u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        });
        let result = call(peer, "POST", "/kvpush/tickets", Some(&body), patience).await;
        if result.is_err() {
            // It may have been restarted with other ranks.
            self.ranks.lock().remove(peer);
        }
        result.map(|_| ())
    }
}

fn failed(peer: &Peer, message: impl std::fmt::Display, is_retryable: bool) -> RequestError {
    RequestError::Transfer {
        message: format!("prefill engine at {peer}: {message}"),
        is_retryable,
    }
}

async fn call(
    peer: &Peer,
    method: &str,
    path: &str,
    body: Option<&Value>,
    patience: Duration,
) -> Result<Value, RequestError> {
    let exchange = exchange(peer, method, path, body);
    timeout(patience, exchange)
        .await
        .unwrap_or_else(|_| Err(failed(peer, format!("no answer in {patience:?}"), true)))
}

async fn exchange(
    peer: &Peer,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, RequestError> {
    let stream = timeout(CONNECT, TcpStream::connect((peer.host.as_str(), peer.port)))
        .await
        .map_err(|_| failed(peer, format!("no connection in {CONNECT:?}"), true))?
        .map_err(|error| failed(peer, error, true))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(peer, error, true))?;
    let bytes = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", peer.to_string())
        .header("content-type", "application/json")
        .header("connection", "close")
        .body(Full::new(Bytes::from(bytes)))
        .map_err(|error| failed(peer, error, false))?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failed(peer, error, true))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| failed(peer, error, true))?
            .to_bytes();
        Ok::<_, RequestError>((status, body))
    };
    // The connection is driven here, so that it ends with the call.
    tokio::pin!(connection);
    tokio::pin!(answer);
    let mut is_open = true;
    let (status, body) = loop {
        tokio::select! {
            answer = &mut answer => break answer?,
            // What went wrong with it, the request is told too.
            _ = &mut connection, if is_open => is_open = false,
        }
    };
    let value: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    if status.is_success() {
        return Ok(value);
    }
    let message = value
        .pointer("/error/message")
        .and_then(Value::as_str)
        .map_or_else(
            || format!("{status}"),
            |message| format!("{status}: {message}"),
        );
    let is_retryable = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
    Err(failed(peer, message, is_retryable))
}
