//! What servers need of a tokenizer, and text that is put together from tokens as they come.

use crate::request::{FinishReason, Token, TokenId};

use super::stop::StopScanner;

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`…
    pub role: String,
    /// The text.
    pub content: String,
    /// Who speaks, if said.
    pub name: Option<String>,
}

/// A tokenizer, as servers see it. Errors are messages for the client.
pub trait Text: Send + Sync {
    /// Tokens of a text.
    ///
    /// # Errors
    ///
    /// The text cannot be tokenized.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String>;
    /// Text of tokens.
    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String;
    /// The bytes of one token, special ones by name.
    fn token_bytes(&self, token: TokenId) -> Vec<u8>;
    /// The prompt of a chat.
    ///
    /// # Errors
    ///
    /// The model's template does not take these messages.
    fn chat(&self, messages: &[ChatMessage], add_generation_prompt: bool)
    -> Result<String, String>;
    /// Puts text together from tokens.
    fn decoder(&self, skip_special: bool) -> Box<dyn StreamDecoder>;
}

/// Puts text together. Never lets half a character through.
pub trait StreamDecoder: Send {
    /// Takes a token, appends the text that is whole.
    fn push(&mut self, token: TokenId, out: &mut String);
    /// No more tokens come: appends the rest.
    fn finish(&mut self, out: &mut String);
}

/// Log probability of a token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Its bytes: half characters are possible.
    pub bytes: Vec<u8>,
    /// Natural logarithm; `None` for the first token of a prompt, which nothing comes before.
    pub logprob: Option<f32>,
    /// Alternatives, likeliest first.
    pub top: Vec<(TokenId, Vec<u8>, f32)>,
}

impl TokenLogprob {
    /// Of a token that the engine has told.
    pub fn of(token: &Token, text: &dyn Text) -> Self {
        let top = token.top.iter();
        Self {
            id: token.id,
            bytes: text.token_bytes(token.id),
            logprob: token.logprob,
            top: top
                .map(|&(id, logprob)| (id, text.token_bytes(id), logprob))
                .collect(),
        }
    }
}

/// New text of one completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Which completion, over all prompts.
    pub index: usize,
    /// New text; may be empty.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// The same with log probabilities, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// The completion has ended.
    pub finish: Option<Finish>,
}

/// Why a completion has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// As the engine says it.
    pub reason: FinishReason,
    /// The stop string or the stop token, if one was found.
    pub stopped_by_text: bool,
}

/// One completion: from tokens to text.
pub struct Assembler {
    index: usize,
    decoder: Box<dyn StreamDecoder>,
    stop: StopScanner,
    min_tokens: usize,
    tokens: usize,
    pending: Chunk,
    is_finished: bool,
}

/// What came of a token.
#[derive(Debug, Default, PartialEq)]
pub struct Assembled {
    /// To be shown.
    pub chunk: Option<Chunk>,
    /// A stop string was found: the engine must be told.
    pub stopped: bool,
}

impl Assembler {
    /// For the completion `index`.
    pub fn new(
        index: usize,
        decoder: Box<dyn StreamDecoder>,
        stop: StopScanner,
        min_tokens: usize,
    ) -> Self {
        Self {
            index,
            decoder,
            stop,
            min_tokens,
            tokens: 0,
            pending: Chunk::default(),
            is_finished: false,
        }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// Takes a token. After the end nothing comes of it.
    pub fn push(&mut self, token: &Token, text: &dyn Text) -> Assembled {
        if self.is_finished {
            return Assembled::default();
        }
        self.tokens += 1;
        self.pending.tokens.push(token.id);
        if token.logprob.is_some() {
            self.pending.logprobs.push(TokenLogprob::of(token, text));
        }
        let mut piece = String::new();
        self.decoder.push(token.id, &mut piece);
        let scanned = self.stop.push(&piece, self.tokens >= self.min_tokens);
        self.pending.text.push_str(&scanned.text);
        if scanned.stopped {
            return Assembled {
                chunk: Some(self.end(Finish {
                    reason: FinishReason::Stop,
                    stopped_by_text: true,
                })),
                stopped: true,
            };
        }
        Assembled {
            chunk: (!self.pending.text.is_empty()).then(|| self.take()),
            stopped: false,
        }
    }

    /// The engine has ended it.
    pub fn finish(&mut self, reason: FinishReason) -> Option<Chunk> {
        if self.is_finished {
            return None;
        }
        let mut rest = String::new();
        self.decoder.finish(&mut rest);
        let scanned = self.stop.push(&rest, self.tokens >= self.min_tokens);
        self.pending.text.push_str(&scanned.text);
        if !scanned.stopped {
            self.pending.text.push_str(&self.stop.finish());
        }
        Some(self.end(Finish {
            reason,
            stopped_by_text: scanned.stopped,
        }))
    }

    fn end(&mut self, finish: Finish) -> Chunk {
        self.is_finished = true;
        Chunk {
            finish: Some(finish),
            ..self.take()
        }
    }

    fn take(&mut self) -> Chunk {
        Chunk {
            index: self.index,
            ..std::mem::take(&mut self.pending)
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
