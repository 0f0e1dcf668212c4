//! Text for a stream of tokens.

use super::Tokenizer;
use crate::request::TokenId;

/// Tokens after which text is given out even though it ends in the middle of a character.
const PATIENCE: usize = 8;

/// Text for tokens that come one at a time. Never gives out half a character.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The last tokens: some that have been given out (what follows may depend on them), then those that have not.
    tokens: Vec<TokenId>,
    given: usize,
    text: String,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            tokens: Vec::new(),
            given: 0,
            text: String::new(),
        }
    }

    /// The text that the token completes; empty while a character is incomplete.
    pub fn push(&mut self, token: TokenId) -> &str {
        self.tokens.push(token);
        let waiting = self.tokens.len() - self.given;
        self.give_out(waiting > PATIENCE)
    }

    /// What is left at the end: U+FFFD for an incomplete character.
    pub fn finish(&mut self) -> &str {
        self.give_out(true)
    }

    fn give_out(&mut self, even_incomplete: bool) -> &str {
        let decode = |tokens| self.tokenizer.decode(tokens, self.skip_special);
        let before = decode(&self.tokens[..self.given]);
        let all = decode(&self.tokens);
        self.text.clear();
        if all.ends_with('\u{fffd}') && !even_incomplete {
            return &self.text;
        }
        self.text
            .push_str(all.get(before.len()..).unwrap_or_default());
        self.tokens.drain(..self.given);
        self.given = self.tokens.len();
        &self.text
    }
}
