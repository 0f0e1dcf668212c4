//! A request under way.

use std::time::Instant;

use tokio::sync::mpsc;

use crate::{
    engine::{
        BlockHash,
        sampling::{Choice, History, Sampler},
    },
    request::{BlockId, Event, OnFailure, SamplingParams, Token, TokenId, Usage},
    transfer::{RequestNumber, Ticket},
};

/// See the module.
pub(super) struct Job {
    /// Requests that came earlier have lower ones, and go first.
    pub(super) number: RequestNumber,
    pub(super) id: String,
    pub(super) came: Instant,
    pub(super) deadline: Instant,
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) params: SamplingParams,
    pub(super) sampler: Sampler,
    pub(super) role: Role,
    pub(super) phase: Phase,
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// What the first block's name is chained to.
    pub(super) root: BlockHash,
    /// One until the prompt is computed, then one for each completion.
    pub(super) sequences: Vec<Sequence>,
    /// Blocks that a peer may write to, after those of the first sequence.
    pub(super) granted: Vec<BlockId>,
    /// A push or reservation whose outcome has not come.
    pub(super) is_travelling: bool,
    pub(super) usage: Usage,
    /// Whether it has left the queue once.
    pub(super) was_admitted: bool,
    /// Whether its prompt has been counted; a decode leg's is counted again when it is computed here after all.
    pub(super) is_counted: bool,
    /// As far as they are known; nothing if not asked for, or told.
    pub(super) prompt_logprobs: Option<Vec<Token>>,
}

/// What is done here.
pub(super) enum Role {
    Both,
    /// What a decode leg becomes when its pages have not come.
    Recompute,
    Prefill(Push),
    Decode {
        prefill_tp: u32,
        on_failure: OnFailure,
    },
}

/// A prefill leg's push.
pub(super) struct Push {
    /// Not needed any more once the push is open.
    pub(super) ticket: Option<Ticket>,
    /// The ticket comes later.
    pub(super) is_held: bool,
    /// Blocks that the other side has.
    pub(super) held: usize,
    /// Blocks handed over, or held.
    pub(super) sent: usize,
    pub(super) firsts: Vec<Choice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// In the queue. Has no blocks.
    Waiting,
    /// In steps.
    Running,
    /// A decode leg's pages are on their way.
    Arriving,
    /// A prefill leg has computed its prompt and waits for a ticket.
    Holding,
    /// A prefill leg has handed everything over.
    Pushing,
    /// Ended as far as its client knows; a transfer still has its blocks.
    Closing,
}

impl Phase {
    /// For people.
    pub(super) fn doing(self) -> &'static str {
        match self {
            Self::Waiting => "waiting in the queue",
            Self::Running => "computing",
            Self::Arriving => "waiting for pages",
            Self::Holding => "holding pages for a decode engine",
            Self::Pushing => "pushing pages",
            Self::Closing => "ending",
        }
    }
}

/// One completion.
#[derive(Clone)]
pub(super) struct Sequence {
    /// Prompt, and what has been generated.
    pub(super) tokens: Vec<TokenId>,
    /// Of these, how many have keys and values.
    pub(super) computed: usize,
    /// How many had before a preemption.
    pub(super) had: usize,
    /// They cover at least what is computed.
    pub(super) blocks: Vec<BlockId>,
    /// Names of full blocks, as far as they were needed.
    pub(super) names: Vec<BlockHash>,
    /// Blocks that were told to the prefix cache.
    pub(super) published: usize,
    pub(super) history: History,
    pub(super) is_finished: bool,
}

impl Sequence {
    pub(super) fn new(prompt: Vec<TokenId>) -> Self {
        Self {
            history: History::new(&prompt),
            tokens: prompt,
            computed: 0,
            had: 0,
            blocks: Vec::new(),
            names: Vec::new(),
            published: 0,
            is_finished: false,
        }
    }

    /// Tokens without keys and values.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

impl Job {
    /// The push of a prefill leg.
    pub(super) fn push(&mut self) -> Option<&mut Push> {
        match &mut self.role {
            Role::Prefill(push) => Some(push),
            _ => None,
        }
    }

    /// Whether pages may be read or written by peers while it runs, so that its blocks cannot be taken.
    pub(super) fn is_preemptible(&self) -> bool {
        !matches!(self.role, Role::Prefill(_))
    }

    /// Completions that count against the limit of a step.
    pub(super) fn width(&self) -> usize {
        match self.role {
            Role::Prefill(_) => 1,
            _ => self.params.n,
        }
    }

    /// The sequence whose blocks of the prompt others share after a preemption.
    pub(super) fn leader(&self) -> usize {
        let is_live = |sequence: &Sequence| !sequence.is_finished;
        let has_begun = |sequence: &Sequence| is_live(sequence) && sequence.computed > 0;
        let begun = self.sequences.iter().position(has_begun);
        begun
            .or_else(|| self.sequences.iter().position(is_live))
            .unwrap_or(0)
    }

    /// Whether nobody listens any more, and that is a reason to stop.
    pub(super) fn is_deserted(&self) -> bool {
        let may_be = match &self.role {
            Role::Prefill(push) => {
                push.is_held && matches!(self.phase, Phase::Holding | Phase::Pushing)
            }
            _ => false,
        };
        self.events.is_closed() && !may_be
    }

    /// Tells the client. Nobody may listen any more; that is found in the next step.
    pub(super) fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }
}
