//! One engine of the demo: commands come on the standard input, replies go to the standard output, as lines of JSON.
//! Ends when the input does, so no engine outlives the demo.

use std::{
    io::{self, BufRead, Write},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kvpush::fabric::FabricKind;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{
    protocol::{Blocks, Command, Leg, Ready, Reply, State, Submit, What},
    watch::{Notes, Watched},
};
use crate::{
    engine::{Config, fake},
    model::{LoadOptions, Memory, Model, ModelError, Source, load},
    request::{self, Event, OnFailure, Request, SamplingParams},
    runtime::{Link, Role, Runtime},
};

/// The key that the engines of one demo share. From the environment, so that it is not in the list of processes.
pub const KEY_VARIABLE: &str = "KVPUSH_KEY";

/// The model that computes hashes, not text: [`fake::FakeModel`].
pub const FAKE: &str = "fake";

/// What an engine is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its role.
    pub role: Role,
    /// Its ranks.
    pub tp: u32,
    /// The model: [`FAKE`], or as [`Source::of`] takes it.
    pub model: String,
    /// Fabrics; all if empty.
    pub fabrics: Vec<FabricKind>,
    /// Blocks of the cache.
    pub blocks: u32,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// How long a layer of the fake model takes.
    pub layer_time: Duration,
    /// Layers of the fake model.
    pub layers: usize,
    /// How long a peer may be silent.
    pub silence: Option<Duration>,
    /// As [`Link::ack_timeout`].
    pub ack_timeout: Option<u8>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            role: Role::Both,
            tp: 1,
            model: FAKE.to_owned(),
            fabrics: Vec::new(),
            blocks: 256,
            chunk: 512,
            layer_time: Duration::ZERO,
            layers: 4,
            silence: None,
            ack_timeout: None,
        }
    }
}

impl Options {
    /// As arguments of the program.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["worker".to_owned()];
        let mut add = |name: &str, value: String| {
            arguments.push(format!("--{name}"));
            arguments.push(value);
        };
        add("role", self.role.to_string());
        add("tp", self.tp.to_string());
        add("model", self.model.clone());
        for fabric in &self.fabrics {
            add("fabric", fabric.to_string());
        }
        add("blocks", self.blocks.to_string());
        add("chunk", self.chunk.to_string());
        add("layer-us", self.layer_time.as_micros().to_string());
        add("layers", self.layers.to_string());
        if let Some(silence) = self.silence {
            add("silence-ms", silence.as_millis().to_string());
        }
        if let Some(timeout) = self.ack_timeout {
            add("ack-timeout", timeout.to_string());
        }
        arguments
    }

    /// Reads what [`Options::arguments`] wrote, without the first.
    ///
    /// # Errors
    ///
    /// What makes no sense.
    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut arguments = arguments.iter();
        while let Some(name) = arguments.next() {
            let value = arguments.next();
            let value = value.ok_or_else(|| format!("{name} needs a value"))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|error| format!("{name} {value}: {error}"))
            };
            match name.as_str() {
                "--role" => options.role = value.parse()?,
                "--tp" => options.tp = number()? as u32,
                "--model" => options.model = value.clone(),
                "--fabric" => options.fabrics.push(fabric(value)?),
                "--blocks" => options.blocks = number()? as u32,
                "--chunk" => options.chunk = number()? as usize,
                "--layer-us" => options.layer_time = Duration::from_micros(number()?),
                "--layers" => options.layers = number()? as usize,
                "--silence-ms" => options.silence = Some(Duration::from_millis(number()?)),
                "--ack-timeout" => options.ack_timeout = Some(number()? as u8),
                _ => return Err(format!("{name} is no option of a worker")),
            }
        }
        Ok(options)
    }

    fn load(&self) -> Result<Box<dyn Model>, ModelError> {
        if self.model == FAKE {
            let shape = fake::Shape {
                blocks: self.blocks,
                layers: self.layers,
                tp: self.tp as usize,
                context: 1 << 16,
                layer_time: self.layer_time,
                kv_heads: 12,
                ..fake::Shape::default()
            };
            return Ok(Box::new(fake::FakeModel::new(shape)?));
        }
        load(&LoadOptions {
            source: Source::of(&self.model),
            tp: self.tp,
            memory: Memory::Blocks(self.blocks),
            ..LoadOptions::default()
        })
    }
}

/// The fabric of this name.
///
/// # Errors
///
/// There is none.
pub fn fabric(name: &str) -> Result<FabricKind, String> {
    let all = [FabricKind::Tcp, FabricKind::Shm, FabricKind::Verbs];
    let found = all.into_iter().find(|kind| kind.to_string() == name);
    found.ok_or_else(|| format!("{name:?} is no fabric: tcp, shm, verbs"))
}

/// Runs an engine until the input ends.
///
/// # Errors
///
/// It cannot be started, or a line is no command.
pub fn run(arguments: &[String]) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let key = std::env::var(KEY_VARIABLE).ok();
    let mut link = Link::new(options.role.to_string(), "127.0.0.1:0", key);
    link.fabrics.clone_from(&options.fabrics);
    link.silence = options.silence;
    link.ack_timeout = options.ack_timeout;
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let endpoint = link.start().map_err(|error| text(&error))?;
    let notes = Notes::default();
    let model = options.load().map_err(|error| text(&error))?;
    let ready = Ready {
        model: model.config().name.clone(),
        tp: model.shards().len(),
        layers: model.config().layers,
        rails: endpoint
            .rails()
            .map(|rail| format!("{} {}", rail.kind, rail.name))
            .collect(),
    };
    let model = Box::new(Watched::new(model, endpoint.clone(), Arc::clone(&notes)));
    let config = Config {
        max_chunk_tokens: options.chunk,
        ..Config::default()
    };
    let runtime = Runtime::over(options.role, model, Some(endpoint), config);
    let runtime = runtime.map_err(|error| text(&error))?;
    let out = Arc::new(Out::default());
    out.say(&Reply::Ready(ready));
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| text(&error))?;
        let command = serde_json::from_str(&line).map_err(|error| format!("{line}: {error}"))?;
        match command {
            Command::Submit(submit) => begin(&runtime, &out, submit),
            Command::Abort(id) => runtime.handle().abort(&id),
            Command::State => out.say(&Reply::State(state(&runtime, &notes))),
        }
    }
    runtime.shutdown(Duration::from_secs(1));
    Ok(())
}

/// The standard output, a line at a time.
#[derive(Default)]
struct Out(Mutex<()>);

impl Out {
    fn say(&self, reply: &Reply) {
        let Ok(line) = serde_json::to_string(reply) else {
            return;
        };
        let _one = self.0.lock();
        let mut out = io::stdout().lock();
        // Nobody listens any more: the input ends, too.
        let _gone = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

fn begin(runtime: &Runtime, out: &Arc<Out>, submit: Submit) {
    let id = submit.id.clone();
    let event = move |out: &Out, what| {
        let at = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = at.map_or(0, |at| at.as_micros() as u64);
        out.say(&Reply::Event {
            id: id.clone(),
            at,
            what,
        });
    };
    let (sender, mut events) = mpsc::unbounded_channel();
    let request = request(submit, sender);
    if let Err(error) = runtime.handle().submit(request) {
        event(out, What::failed(&error));
        return;
    }
    let out = Arc::clone(out);
    std::thread::spawn(move || {
        while let Some(next) = events.blocking_recv() {
            let what = match next {
                Event::Reserved { ticket } => What::Reserved(ticket),
                Event::Token(token) => What::Token {
                    id: token.id,
                    top: token
                        .top
                        .iter()
                        .map(|&(id, value)| (id, value.to_bits()))
                        .collect(),
                },
                Event::Finished { reason, .. } => What::finished(reason),
                Event::Done(usage) => What::done(usage),
                Event::Failed(error) => What::failed(&error),
                // Nobody here asks for them.
                Event::PromptLogprobs(_) => continue,
            };
            event(&out, what);
        }
    });
}

fn request(submit: Submit, events: mpsc::UnboundedSender<Event>) -> Request {
    Request {
        id: submit.id,
        prompt: submit.prompt,
        sampling: SamplingParams {
            max_tokens: submit.max_tokens,
            temperature: 0.0,
            logprobs: submit.logprobs,
            ignore_eos: submit.ignore_eos,
            ..SamplingParams::default()
        },
        deadline: Instant::now() + Duration::from_millis(submit.deadline_ms),
        leg: match submit.leg {
            Leg::Both => request::Leg::Both,
            Leg::Prefill(ticket) => request::Leg::Prefill { ticket },
            Leg::Decode {
                prefill_tp,
                recompute,
            } => request::Leg::Decode {
                prefill_tp,
                on_failure: match recompute {
                    true => OnFailure::Recompute,
                    false => OnFailure::Fail,
                },
            },
        },
        traceparent: None,
        cache_salt: None,
        events,
    }
}

fn state(runtime: &Runtime, notes: &Notes) -> State {
    let stats = runtime.handle().stats();
    let levels = runtime.endpoint().map(|endpoint| endpoint.stats().levels);
    State {
        blocks: Blocks {
            total: stats.blocks.total,
            available: stats.blocks.available(),
            used: stats.blocks.used,
            granted: stats.blocks.granted,
            lost: stats.blocks.lost,
        },
        live: stats.running + stats.waiting + stats.parked,
        recomputed_tokens: stats.recomputed_tokens,
        bytes_pushed: stats.bytes_pushed,
        bytes_arrived: stats.bytes_arrived,
        used: runtime.endpoint().map(used).unwrap_or_default(),
        layers: std::mem::take(&mut *notes.lock()),
        transfers: levels.map_or(0, |levels| levels.pushes + levels.arrivals),
    }
}

/// Rails that have carried bytes away, each with its fabric.
fn used(endpoint: &kvpush::Endpoint) -> Vec<String> {
    let peers = endpoint.stats().peers;
    // The statistics list rails in the endpoint's order.
    let rails = endpoint.rails().enumerate().filter(|(index, _)| {
        let carried = |peer: &kvpush::endpoint::PeerStats| {
            peer.rails.get(*index).is_some_and(|rail| rail.bytes > 0)
        };
        peers.iter().any(carried)
    });
    rails
        .map(|(_, rail)| format!("{} ({})", rail.kind, rail.name))
        .collect()
}
