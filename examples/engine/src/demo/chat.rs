//! One chat over two engines: prefill in one process, decode in the other, and what it took.
//!
//! Plays the gateway: decode reserves and answers with a ticket, prefill gets the ticket with the same prompt, the text
//! comes from decode.

use std::{
    fmt,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use kvpush::fabric::FabricKind;

use super::{
    peer::{Peer, PeerError},
    protocol::{Command, LayerEnd, Leg, Submit, What},
    worker::Options,
};
use crate::{
    model::{Message, ModelError, Source, fetch, tokenizer_of},
    runtime::Role,
};

/// How long an engine may take to load its model, or to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// What to show.
#[derive(Clone, Debug)]
pub struct Chat {
    /// `tiny`, `tiny-three`, a GGUF file or a folder; by default the model that `fetch` has brought, or `tiny`.
    pub model: Option<String>,
    /// Ranks of the prefill engine.
    pub prefill_tp: u32,
    /// Ranks of the decode engine.
    pub decode_tp: u32,
    /// Fabrics; all if empty.
    pub fabrics: Vec<FabricKind>,
    /// What is asked.
    pub message: String,
    /// Tokens to answer with at most.
    pub max_tokens: usize,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            model: None,
            prefill_tp: 1,
            decode_tp: 1,
            fabrics: Vec::new(),
            message: "Explain in a few sentences why large language models keep a cache of keys and values, what a \
                      prefill and a decode step do with it, and why it can be worth it to run them on different \
                      machines."
                .to_owned(),
            max_tokens: 96,
        }
    }
}

/// Why there was nothing to see.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// An engine.
    #[error("{role}: {source}")]
    Peer {
        /// Which.
        role: Role,
        /// Why.
        source: PeerError,
    },
    /// A request has failed.
    #[error("the {role} leg has failed: {message}")]
    Failed {
        /// Which.
        role: Role,
        /// Why.
        message: String,
    },
    /// An engine has said what was not asked.
    #[error("{0} has said something else than what was due")]
    OutOfTurn(Role),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The terminal, or this program's own file.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, those whose keys and values came from the prefill engine.
    pub pushed_tokens: usize,
    /// Of these, those that decode computed itself although they should have come.
    pub recomputed_tokens: usize,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Bytes that the prefill engine has pushed.
    pub bytes_pushed: u64,
    /// Bytes that have arrived at the decode engine.
    pub bytes_arrived: u64,
    /// Layers whose bytes had all been posted before the next layer ended.
    pub layers_overlapped: usize,
    /// Layers that had a next one, over all chunks of the prompt.
    pub layers: usize,
    /// From asking to the first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub others: Duration,
    /// Ranks of both sides.
    pub tp: [usize; 2],
    /// What carried the bytes.
    pub fabric: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tp, .. } = self;
        let rate = (self.tokens.saturating_sub(1)) as f64 / self.others.as_secs_f64().max(1e-9);
        writeln!(
            f,
            "model               {} (prefill on {} ranks, decode on {})",
            self.model, tp[0], tp[1]
        )?;
        writeln!(
            f,
            "prompt              {} tokens, {} pushed, {} recomputed",
            self.prompt_tokens, self.pushed_tokens, self.recomputed_tokens
        )?;
        writeln!(
            f,
            "bytes pushed        {} ({} arrived)",
            self.bytes_pushed, self.bytes_arrived
        )?;
        writeln!(
            f,
            "layers overlapped   {} of {} (posted before the next layer ended)",
            self.layers_overlapped, self.layers
        )?;
        writeln!(f, "fabric              {}", self.fabric)?;
        writeln!(
            f,
            "time to first token {:.1} ms",
            self.first_token.as_secs_f64() * 1e3
        )?;
        write!(
            f,
            "decode              {} tokens, {rate:.1} tokens/s",
            self.tokens
        )
    }
}

impl Chat {
    /// Starts both engines from `program`, streams the answer to `out`, and says what it took.
    ///
    /// # Errors
    ///
    /// The model cannot be loaded, an engine cannot be started or fails.
    pub fn run(&self, program: &Path, out: &mut dyn Write) -> Result<Report, DemoError> {
        let name = match &self.model {
            Some(name) => name.clone(),
            None => fetch::cached()
                .map_or_else(|_| "tiny".to_owned(), |path| path.display().to_string()),
        };
        let tokenizer = tokenizer_of(&Source::of(&name))?;
        let message = Message {
            role: "user".to_owned(),
            content: self.message.clone(),
        };
        let text = tokenizer.chat(&[message], true)?;
        let prompt = tokenizer.encode(&text, false)?;

        // Both know it, and nobody else on this host.
        let key = secret()?;
        let start = |role, tp| {
            let options = Options {
                role,
                tp,
                model: name.clone(),
                fabrics: self.fabrics.clone(),
                blocks: 512,
                ..Options::default()
            };
            Peer::start(program, &options, &key, PATIENCE).map_err(peer(role))
        };
        let mut decode = start(Role::Decode, self.decode_tp)?;
        let mut prefill = start(Role::Prefill, self.prefill_tp)?;

        let submit = |leg| {
            Command::Submit(Submit {
                id: "demo".to_owned(),
                prompt: prompt.clone(),
                max_tokens: self.max_tokens,
                logprobs: None,
                ignore_eos: false,
                deadline_ms: PATIENCE.as_millis() as u64,
                leg,
            })
        };
        let begun = Instant::now();
        let leg = Leg::Decode {
            prefill_tp: prefill.ready.tp as u32,
            recompute: false,
        };
        decode.send(&submit(leg)).map_err(peer(Role::Decode))?;
        let ticket = match event(&mut decode, Role::Decode)? {
            What::Reserved(ticket) => ticket,
            _ => return Err(DemoError::OutOfTurn(Role::Decode)),
        };
        prefill
            .send(&submit(Leg::Prefill(ticket)))
            .map_err(peer(Role::Prefill))?;

        let mut detokenizer = tokenizer.detokenizer(true);
        let (mut tokens, mut first) = (0, begun);
        // The engine's own times: this process may be late.
        let (mut first_at, mut last_at) = (0, 0);
        let (pushed_tokens, recomputed_tokens) = loop {
            let (at, what) = timed_event(&mut decode, Role::Decode)?;
            match what {
                What::Token { id, .. } => {
                    last_at = at;
                    if tokens == 0 {
                        (first, first_at) = (Instant::now(), at);
                    }
                    tokens += 1;
                    write!(out, "{}", detokenizer.push(id))?;
                    out.flush()?;
                }
                What::Done {
                    pushed, recomputed, ..
                } => break (pushed, recomputed),
                What::Finished { .. } => {}
                What::Reserved(_) | What::Failed { .. } => {
                    return Err(DemoError::OutOfTurn(Role::Decode));
                }
            }
        };
        writeln!(out, "{}", detokenizer.finish())?;
        while !matches!(event(&mut prefill, Role::Prefill)?, What::Done { .. }) {}

        let sent = prefill.state(PATIENCE).map_err(peer(Role::Prefill))?;
        let came = decode.state(PATIENCE).map_err(peer(Role::Decode))?;
        // The first has none before it.
        let ends = sent.layers.get(1..).unwrap_or_default();
        let report = Report {
            model: prefill.ready.model.clone(),
            prompt_tokens: prompt.len(),
            pushed_tokens,
            recomputed_tokens,
            tokens,
            bytes_pushed: sent.bytes_pushed,
            bytes_arrived: came.bytes_arrived,
            layers_overlapped: ends
                .iter()
                .filter(|end| LayerEnd::is_overlapped(end))
                .count(),
            layers: ends.len(),
            first_token: first - begun,
            others: Duration::from_micros(last_at.saturating_sub(first_at)),
            tp: [prefill.ready.tp, decode.ready.tp],
            fabric: sent.used.join(", "),
        };
        prefill.stop().map_err(peer(Role::Prefill))?;
        decode.stop().map_err(peer(Role::Decode))?;
        Ok(report)
    }
}

/// The next event of an engine's only request. A failure is an error.
fn event(engine: &mut Peer, role: Role) -> Result<What, DemoError> {
    timed_event(engine, role).map(|(_, what)| what)
}

/// The same, and when it was.
fn timed_event(engine: &mut Peer, role: Role) -> Result<(u64, What), DemoError> {
    match engine.event(PATIENCE).map_err(peer(role))? {
        (_, _, What::Failed { message, .. }) => Err(DemoError::Failed { role, message }),
        (_, at, what) => Ok((at, what)),
    }
}

fn peer(role: Role) -> impl Fn(PeerError) -> DemoError {
    move |source| DemoError::Peer { role, source }
}

/// Something that nobody can guess.
fn secret() -> Result<String, std::io::Error> {
    let mut bytes = [0; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
