//! From logits to tokens, and what follows from them.

use super::{
    Core,
    job::{Job, Phase, Role, Sequence},
};
use crate::{
    engine::{sampling::Choice, tail::Tail},
    request::{Event, FinishReason, RequestError, Token},
    transfer::RequestNumber,
};

impl Core {
    /// The next token of a sequence, from the logits of its last one; of all completions, if it was the prompt's.
    pub(super) fn generate(&mut self, number: RequestNumber, sequence: usize, row: &[f32]) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        if job.phase != Phase::Running {
            return;
        }
        let Some(it) = job.sequences.get(sequence) else {
            return;
        };
        let is_first = it.history.count() == 0;
        let indices = if is_first {
            0..job.params.n
        } else {
            sequence..sequence + 1
        };
        let choices: Result<Vec<_>, _> = indices
            .map(|index| job.sampler.choose(row, index, &it.history))
            .collect();
        let choices = match choices {
            Ok(choices) => choices,
            Err(error) => {
                return self.fail(number, RequestError::Internal(error.to_string()));
            }
        };
        if let Some(found) = job.prompt_logprobs.take() {
            job.tell(Event::PromptLogprobs(found));
        }
        if is_first {
            self.begin(number, choices);
        } else {
            choices
                .into_iter()
                .for_each(|choice| self.take_token(number, sequence, choice));
        }
    }

    /// The prompt is there, and the first token of each completion.
    pub(super) fn begin(&mut self, number: RequestNumber, firsts: Vec<Choice>) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        if let Role::Prefill(push) = &mut job.role {
            push.firsts = firsts;
            return self.hand_over(number);
        }
        let Some(prompt) = job.sequences.first().cloned() else {
            return;
        };
        for _ in 1..firsts.len() {
            let blocks = prompt.blocks.iter();
            blocks.for_each(|&block| self.pool.share(block));
            job.sequences.push(Sequence::clone(&prompt));
        }
        for (sequence, choice) in firsts.into_iter().enumerate() {
            self.take_token(number, sequence, choice);
        }
    }

    /// A prefill leg is done computing.
    fn hand_over(&mut self, number: RequestNumber) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let Role::Prefill(push) = &job.role else {
            return;
        };
        let (is_held, firsts) = (push.is_held, push.firsts.clone());
        self.running.retain(|&other| other != number);
        job.phase = Phase::Holding;
        job.usage.completion_tokens += firsts.len();
        self.stats.generated_tokens += firsts.len() as u64;
        for (index, first) in firsts.into_iter().enumerate() {
            job.tell(Event::Token(token(index, first)));
        }
        if is_held {
            job.tell_handed();
        }
        if job.is_travelling {
            self.finish_push(number);
        }
    }

    /// What goes with the pages.
    pub(super) fn tail(job: &Job) -> Vec<u8> {
        let firsts = match &job.role {
            Role::Prefill(push) => push.firsts.clone(),
            _ => Vec::new(),
        };
        let seed = job.sampler.seed;
        Tail { seed, firsts }.encode()
    }

    fn take_token(&mut self, number: RequestNumber, sequence: usize, choice: Choice) {
        let context = self.model.config().context;
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let Some(it) = job.sequences.get_mut(sequence) else {
            return;
        };
        let id = choice.id;
        it.tokens.push(id);
        it.history.push(id);
        job.usage.completion_tokens += 1;
        self.stats.generated_tokens += 1;
        let reason = if job.sampler.is_stop(id, &it.history) {
            Some(FinishReason::Stop)
        } else if it.history.count() >= job.params.max_tokens || it.tokens.len() >= context {
            Some(FinishReason::Length)
        } else {
            None
        };
        job.tell(Event::Token(token(sequence, choice)));
        if let Some(reason) = reason {
            self.finish(number, sequence, reason);
        }
    }

    /// The server has found a stop string.
    pub(super) fn stop_completion(&mut self, number: RequestNumber, index: usize) {
        let Some(job) = self.jobs.get(&number) else {
            return;
        };
        let is_live = job
            .sequences
            .get(index)
            .is_some_and(|sequence| !sequence.is_finished && sequence.history.count() > 0);
        if is_live && matches!(job.phase, Phase::Running | Phase::Waiting) {
            self.finish(number, index, FinishReason::Stop);
        }
    }

    fn finish(&mut self, number: RequestNumber, sequence: usize, reason: FinishReason) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let Some(it) = job.sequences.get_mut(sequence) else {
            return;
        };
        it.is_finished = true;
        self.pool.release_all(it.blocks.drain(..));
        job.tell(Event::Finished {
            index: sequence,
            reason,
        });
        let is_done = job.sequences.len() == job.params.n
            && job.sequences.iter().all(|sequence| sequence.is_finished);
        if is_done {
            self.succeed(number);
        }
    }
}

impl Job {
    /// The other leg goes on with each completion.
    pub(super) fn tell_handed(&self) {
        for index in 0..self.params.n {
            let reason = FinishReason::Handed;
            self.tell(Event::Finished { index, reason });
        }
    }
}

fn token(index: usize, choice: Choice) -> Token {
    Token {
        index,
        id: choice.id,
        logprob: choice.logprob,
        top: choice.top,
    }
}
