//! The whole server over an engine with the fake model and a tokenizer of bytes.

mod errors;
mod events;
mod openai;
mod rooms;

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Request, Response, StatusCode},
};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{App, Role, Settings, server::router, text::tests::Bytes};
use crate::engine::{
    Config, Engine,
    fake::{FakeModel, Shape},
};

/// A server without listeners.
pub(super) struct Fixture {
    pub(super) app: Arc<App>,
    // After the app: its drop ends the engine.
    _engine: Engine,
}

impl Fixture {
    pub(super) fn new() -> Self {
        Self::with(Shape::default(), Settings::default())
    }

    pub(super) fn with_role(role: Role) -> Self {
        let settings = Settings {
            role,
            ..Settings::default()
        };
        Self::with(Shape::default(), settings)
    }

    /// One whose tokens take their time, so that requests are caught under way.
    pub(super) fn slow() -> Self {
        let shape = Shape {
            layer_time: Duration::from_millis(5),
            ..Shape::default()
        };
        Self::with(shape, Settings::default())
    }

    pub(super) fn with(shape: Shape, settings: Settings) -> Self {
        let model = FakeModel::new(shape).expect("the shape is possible");
        let engine = Engine::start(Box::new(model), None, Config::default()).expect("a thread");
        Self {
            app: App::new(engine.handle(), Arc::new(Bytes), settings, None),
            _engine: engine,
        }
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Response<Body> {
        let response = router(&self.app).oneshot(request).await;
        response.expect("routers do not fail")
    }

    pub(super) async fn post_bytes(
        &self,
        path: &str,
        body: impl Into<Body>,
    ) -> (StatusCode, Value) {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .body(body.into())
            .expect("a request");
        read(self.send(request).await).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.post_bytes(path, body.to_string()).await
    }

    pub(super) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        read(self.send(request).await).await
    }

    /// The events of a stream: their names and data.
    pub(super) async fn stream(&self, path: &str, body: &Value) -> Vec<(String, String)> {
        let request = Request::post(path).body(Body::from(body.to_string()));
        let response = self.send(request.expect("a request")).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let body = response.into_body().collect().await.expect("a body");
        events(std::str::from_utf8(&body.to_bytes()).expect("UTF-8"))
    }

    /// The JSON of a stream that ends well.
    pub(super) async fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = self.stream(path, body).await;
        assert_eq!(events.pop().expect("an end").1, "[DONE]");
        let parse = |(_, data): (String, String)| serde_json::from_str(&data).expect("JSON");
        events.into_iter().map(parse).collect()
    }
}

/// Splits a stream into events.
pub(super) fn events(text: &str) -> Vec<(String, String)> {
    let field = |event: &str, name: &str| {
        let lines = event.lines().filter_map(|line| line.strip_prefix(name));
        lines.map(str::trim_start).collect::<Vec<_>>().join("\n")
    };
    text.split_terminator("\n\n")
        .filter(|event| !event.starts_with(':'))
        .map(|event| (field(event, "event:"), field(event, "data:")))
        .collect()
}

async fn read(response: Response<Body>) -> (StatusCode, Value) {
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body");
    let body = body.to_bytes();
    let value = serde_json::from_slice(&body);
    (
        status,
        value.unwrap_or_else(|_| json!(String::from_utf8_lossy(&body))),
    )
}

/// Waits until `done`, not for ever.
pub(super) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it did not happen: {what}");
}
