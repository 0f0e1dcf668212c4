//! The engine thread.

use std::{collections::VecDeque, time::Duration};

use super::{
    Stats,
    handle::{Command, Shared},
};
use crate::{
    model::{Chunk, Model, Observer, Wanted},
    request::{Event, FinishReason, Request, RequestError, Token, Usage},
    transfer::Transfers,
};

struct Nobody;

impl Observer for Nobody {
    fn layer_written(&mut self, _: usize, _: std::ops::Range<usize>) {}
}

/// Runs until it is shut down.
pub(super) fn run(
    shared: &std::sync::Arc<Shared>,
    mut model: Box<dyn Model>,
    transfers: Option<Box<dyn Transfers>>,
) {
    let mut transfers = transfers;
    if let Some(transfers) = &mut transfers {
        let shared = std::sync::Arc::clone(shared);
        transfers.on_ready(Box::new(move || shared.rouse()));
    }
    let mut stats = Stats::default();
    stats.blocks.total = shared.facts.blocks;
    stats.blocks.free = shared.facts.blocks;
    let mut commands = VecDeque::new();
    while shared.receive(&mut commands) {
        while let Some(command) = commands.pop_front() {
            match command {
                Command::Submit(request) => {
                    shared.left_queue(1, Duration::from_secs(1));
                    stats.requests += 1;
                    match serve(model.as_mut(), &request, &mut stats) {
                        Ok(usage) => {
                            stats.succeeded += 1;
                            let _ = request.events.send(Event::Done(usage));
                        }
                        Err(error) => {
                            stats.failed += 1;
                            let _ = request.events.send(Event::Failed(error));
                        }
                    }
                    shared.ended([request.id.as_str()]);
                    shared.show(stats);
                }
                Command::PushHeld { id, ticket } => drop((id, ticket)),
                Command::Abort { id } => drop(id),
                Command::Finish { id, index } => drop((id, index)),
                Command::ClearPrefixCache => shared.tell(vec![super::KvChange::Cleared]),
            }
        }
        shared.sleep(None);
    }
    shared.die();
}

/// The whole request at once, greedily.
fn serve(
    model: &mut dyn Model,
    request: &Request,
    stats: &mut Stats,
) -> Result<Usage, RequestError> {
    let mut tokens = request.prompt.clone();
    let mut computed = 0;
    let last = request.prompt.len() + request.sampling.max_tokens;
    let blocks: Vec<u32> = (0..last.div_ceil(model.block_tokens()) as u32).collect();
    let internal = |error: crate::model::ModelError| RequestError::Internal(error.to_string());
    let mut reason = FinishReason::Length;
    while tokens.len() < last {
        let chunk = Chunk {
            tokens: &tokens[computed..],
            start: computed,
            blocks: &blocks,
            logits: Wanted::Last,
        };
        let logits = model.forward(&[chunk], &mut Nobody).map_err(internal)?;
        stats.steps += 1;
        computed = tokens.len();
        let best = (0..)
            .zip(logits.row(0))
            .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
        let id = best.map_or(0, |(token, _)| token);
        tokens.push(id);
        stats.generated_tokens += 1;
        let token = Token {
            index: 0,
            id,
            logprob: None,
            top: Vec::new(),
        };
        if request.events.send(Event::Token(token)).is_err() {
            return Err(RequestError::Aborted);
        }
        if model.config().eos.contains(&id) && !request.sampling.ignore_eos {
            reason = FinishReason::Stop;
            break;
        }
    }
    let _ = request.events.send(Event::Finished { index: 0, reason });
    Ok(Usage {
        prompt_tokens: request.prompt.len(),
        completion_tokens: tokens.len() - request.prompt.len(),
        ..Usage::default()
    })
}
