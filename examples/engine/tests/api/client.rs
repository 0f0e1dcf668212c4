//! As much of an HTTP client as the tests need.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// An answer that has begun. Its connection ends with it.
pub(crate) struct Answer {
    pub(crate) status: u16,
    body: Incoming,
    text: String,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Sends a body, waits for the head of the answer.
pub(crate) async fn begin(address: SocketAddr, path: &str, body: &Value) -> Answer {
    let stream = TcpStream::connect(address).await.expect("a server");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    let connection = tokio::spawn(async move {
        // What goes wrong here, the request is told.
        let _ = connection.await;
    });
    let request = Request::post(path)
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("a request");
    let response = sender.send_request(request).await.expect("an answer");
    Answer {
        status: response.status().as_u16(),
        body: response.into_body(),
        text: String::new(),
        connection,
    }
}

/// Sends a body, waits for all of the answer.
pub(crate) async fn post(address: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    let mut answer = begin(address, path, body).await;
    let text = answer.rest().await;
    let value = serde_json::from_str(&text);
    (answer.status, value.unwrap_or(Value::String(text)))
}

impl Answer {
    /// Waits until the text has `part`.
    pub(crate) async fn until(&mut self, part: &str) -> &str {
        while !self.text.contains(part) {
            assert!(
                self.more().await,
                "it has ended without {part:?}: {}",
                self.text
            );
        }
        &self.text
    }

    /// All of it.
    pub(crate) async fn rest(&mut self) -> String {
        while self.more().await {}
        std::mem::take(&mut self.text)
    }

    async fn more(&mut self) -> bool {
        let Some(frame) = self.body.frame().await else {
            return false;
        };
        let data = frame.expect("a whole answer").into_data();
        self.text += std::str::from_utf8(&data.expect("data")).expect("UTF-8");
        true
    }
}

/// The JSON of a stream of events.
pub(crate) fn events(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| line.strip_prefix("data:"))
        .filter_map(|data| serde_json::from_str(data.trim()).ok())
        .collect()
}

/// The text of a streamed completion.
pub(crate) fn streamed(text: &str) -> String {
    events(text)
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect()
}
