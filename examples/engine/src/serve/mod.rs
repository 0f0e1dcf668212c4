//! HTTP and gRPC: OpenAI's API over one engine, and what gateways need beside it.
//!
//! | Module | Does |
//! |---|---|
//! | [`openai`] | `/v1/chat/completions`, `/v1/completions`: bodies, checks, answers, streams |
//! | [`dialect`] | which part of a request is done here, as three kinds of gateways say it |
//! | [`generate`] | submits to the engine and puts text together; everything above renders what comes of it |
//! | [`text`], [`stop`] | tokens to text, stop strings |
//! | [`tickets`], [`peer`] | tickets between engines, where the gateway does not carry them |
//! | [`info`], [`kv_events`], [`measure`] | what an operator and a gateway see |
//! | [`grpc`] | the same functions as a gRPC service |
//! | [`server`] | listeners, drain, the end |
//!
//! Threads: all of it runs on a tokio runtime; the engine is reached by messages only. No body of a request can make
//! it panic, and what a client can make it hold is bounded: bodies, queues, tickets, time.

pub mod dialect;
pub mod error;
pub mod generate;
pub mod grpc;
pub mod info;
pub mod json;
pub mod kv_events;
pub mod measure;
pub mod openai;
pub mod peer;
pub mod server;
pub mod stop;
pub mod text;
pub mod tickets;
mod tokenizer;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;

use crate::engine::Handle;
pub use crate::request::Role;

/// What an operator chooses.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What it does.
    pub role: Role,
    /// Name in `/v1/models`; others are answered by 404.
    pub model_name: String,
    /// Host by which other engines reach this one's HTTP.
    pub advertised_host: String,
    /// Time for a request that names none.
    pub deadline: Duration,
    /// Most time that a request may ask for.
    pub max_deadline: Duration,
    /// Largest body, in bytes.
    pub max_body: usize,
    /// Most prompts of one request.
    pub max_prompts: usize,
    /// Port of prefill engines whose `bootstrap_port` is null.
    pub default_bootstrap_port: u16,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// Where the kvpush endpoint listens, if there is one.
    pub kvpush_addresses: Vec<String>,
    /// `float32` or `fp8_e4m3`.
    pub kv_dtype: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            role: Role::Both,
            model_name: String::new(),
            advertised_host: "127.0.0.1".to_owned(),
            deadline: Duration::from_secs(600),
            max_deadline: Duration::from_secs(3600),
            max_body: 4 << 20,
            max_prompts: 64,
            default_bootstrap_port: 8998,
            drain_timeout: Duration::from_secs(30),
            kvpush_addresses: Vec::new(),
            kv_dtype: "float32".to_owned(),
        }
    }
}

/// What all handlers share.
pub struct App {
    /// The engine.
    pub handle: Handle,
    /// Its tokenizer.
    pub text: Arc<dyn text::Text>,
    /// What the operator chose.
    pub settings: Settings,
    /// Metrics.
    pub meters: measure::Meters,
    /// Tickets and held prefills.
    pub rooms: tickets::Rooms,
    /// Other engines.
    pub peers: peer::Peers,
    /// Random name of this start.
    pub engine_id: String,
    /// When it was made, for `/v1/models`.
    created: u64,
    http_port: std::sync::OnceLock<u16>,
    phase: watch::Sender<Phase>,
}

/// Where a server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    Draining,
    Ended,
}

impl App {
    /// Serves `handle`.
    pub fn new(
        handle: Handle,
        text: Arc<dyn text::Text>,
        mut settings: Settings,
        recorder: Option<kvpush::endpoint::telemetry::prometheus::Metrics>,
    ) -> Arc<Self> {
        if settings.model_name.is_empty() {
            settings.model_name.clone_from(&handle.model().name);
        }
        Arc::new(Self {
            meters: measure::Meters::new(&settings.model_name, recorder),
            engine_id: random_id(),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            http_port: std::sync::OnceLock::new(),
            phase: watch::Sender::new(Phase::Serving),
            rooms: tickets::Rooms::default(),
            peers: peer::Peers::default(),
            handle,
            text,
            settings,
        })
    }

    /// When a request must have ended, that may ask for a time of its own.
    pub fn deadline(&self, asked: Option<Duration>) -> Instant {
        let time = asked.unwrap_or(self.settings.deadline);
        Instant::now() + time.min(self.settings.max_deadline)
    }

    /// Where other engines reach this one.
    pub fn advertised(&self) -> dialect::Peer {
        dialect::Peer {
            host: self.settings.advertised_host.clone(),
            port: self.http_port.get().copied().unwrap_or(0),
        }
    }

    /// Takes no more requests. The server ends once those under way have ended.
    pub fn start_drain(&self) {
        self.handle.start_drain();
        if self.advance(Phase::Draining) {
            tracing::info!("draining: no more requests are taken");
        }
    }

    /// Whether it takes no more requests.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() != Phase::Serving || self.handle.is_draining()
    }

    /// Returns when the server ends: what would go on for ever stops then.
    pub async fn ended(&self) {
        self.reached(Phase::Ended).await;
    }

    fn advance(&self, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let is_later = *phase < to;
            *phase = (*phase).max(to);
            is_later
        })
    }

    async fn reached(&self, wanted: Phase) {
        let mut phase = self.phase.subscribe();
        // The sender is ours, so it cannot be gone.
        let _ = phase.wait_for(|phase| *phase >= wanted).await;
    }
}

/// 32 random hexadecimal digits.
pub fn random_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    // The standard library's hash keys are random; ids must be unique, not secret.
    let half = || RandomState::new().hash_one(Instant::now());
    format!("{:016x}{:016x}", half(), half())
}

#[cfg(test)]
mod tests;
