//! Engines with the fake model, whose logits depend on every byte of the cache, and their servers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kvpush::fabric::FabricKind;
use kvpush_engine::{
    engine::{
        Config,
        fake::{FakeModel, Shape},
    },
    model::Tokenizer,
    runtime::{Link, Role, Runtime},
    serve::{
        App, Settings,
        server::{self, Ended, Listeners},
    },
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};

pub(crate) const PATH: &str = "/v1/completions";

/// An engine and its server.
pub(crate) struct Node {
    pub(crate) app: Arc<App>,
    pub(crate) address: SocketAddr,
    stop: mpsc::Sender<()>,
    server: JoinHandle<Ended>,
    // Last: it ends the engine.
    runtime: Runtime,
}

impl Node {
    pub(crate) async fn start(role: Role, tp: usize) -> Self {
        Self::with(role, tp, Settings::default()).await
    }

    pub(crate) async fn with(role: Role, tp: usize, settings: Settings) -> Self {
        let tokenizer = Tokenizer::bytes().expect("a tokenizer");
        let model = FakeModel::new(Shape {
            tp,
            vocab: tokenizer.vocab(),
            layer_time: Duration::from_micros(200),
            ..Shape::default()
        });
        let link = Link::new(role.to_string(), "127.0.0.1:0", Some("tests".to_owned()));
        let link = link.fabrics([FabricKind::Tcp]);
        let model = Box::new(model.expect("a model"));
        let runtime = Runtime::start(role, model, Some(&link), Config::default());
        let runtime = runtime.expect("an engine");
        let settings = Settings { role, ..settings };
        let app = App::new(runtime.handle(), Arc::new(tokenizer), settings, None);
        let http = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = http.local_addr().expect("an address");
        let (stop, asked) = mpsc::channel(1);
        let served = Arc::clone(&app);
        let server = tokio::spawn(async move {
            let listeners = Listeners {
                http,
                bootstrap: None,
                grpc: None,
            };
            let ended = server::run(&served, listeners, asked).await;
            ended.expect("the server ends well")
        });
        Self {
            app,
            address,
            stop,
            server,
            runtime,
        }
    }

    /// Waits until nothing is under way and every block is back.
    pub(crate) async fn is_empty(&self) {
        for _ in 0..2000 {
            let stats = self.app.handle.stats();
            let blocks = stats.blocks;
            if stats.running + stats.waiting + stats.parked == 0
                && blocks.used + blocks.granted + blocks.lost == 0
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("blocks are missing: {:?}", self.app.handle.stats());
    }

    /// Drains; panics if something had to be cut off.
    pub(crate) async fn drain(self) {
        let Self {
            app,
            stop,
            server,
            runtime,
            ..
        } = self;
        stop.send(()).await.expect("the server runs");
        assert_eq!(server.await.expect("no panic"), Ended::Drained);
        drop(app);
        let shut = tokio::task::spawn_blocking(|| runtime.shutdown(Duration::from_secs(5)));
        shut.await.expect("no panic");
    }
}

/// A prefill and a decode engine.
pub(crate) struct Pair {
    pub(crate) prefill: Node,
    pub(crate) decode: Node,
}

impl Pair {
    pub(crate) async fn start(prefill_tp: usize, decode_tp: usize) -> Self {
        Self {
            prefill: Node::start(Role::Prefill, prefill_tp).await,
            decode: Node::start(Role::Decode, decode_tp).await,
        }
    }

    /// Nothing is left anywhere, and the pages came from the other side.
    pub(crate) async fn end(self) {
        self.prefill.is_empty().await;
        self.decode.is_empty().await;
        self.prefill.drain().await;
        self.decode.drain().await;
    }
}

/// What is asked in every test; its prompt has several blocks.
pub(crate) fn ask(extra: Value) -> Value {
    let mut body = json!({
        "prompt": "a prompt that is long enough to fill more than two blocks of the cache",
        "max_tokens": 12, "temperature": 0.8, "seed": 11, "ignore_eos": true,
    });
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// What one engine answers.
pub(crate) async fn expected(extra: Value) -> String {
    let both = Node::start(Role::Both, 1).await;
    let (status, answer) = crate::client::post(both.address, PATH, &ask(extra)).await;
    assert_eq!(status, 200, "{answer}");
    both.drain().await;
    text(&answer).to_owned()
}

pub(crate) fn text(answer: &Value) -> &str {
    let text = answer["choices"][0]["text"].as_str();
    text.unwrap_or_else(|| panic!("no text: {answer}"))
}
