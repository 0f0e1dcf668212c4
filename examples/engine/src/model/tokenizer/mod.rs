//! Text to tokens and back, and chat templates.
//!
//! A [`Tokenizer`] is cheap to clone; any thread may call.

pub(crate) mod bytes;
pub(crate) mod chat;
mod detokenizer;
pub(crate) mod from_gguf;
mod special;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, path::Path, sync::Arc};

pub use self::{chat::Message, detokenizer::Detokenizer};
use self::chat::Template;
use super::ModelError;
use crate::request::TokenId;

/// A model's tokenizer.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    kind: Kind,
    /// Put before a text that is encoded with special tokens.
    begin: Option<TokenId>,
    eos: Vec<TokenId>,
    template: Option<Template>,
}

enum Kind {
    Bytes,
    Trained(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// The built-in models' tokenizer.
    pub fn bytes() -> Result<Self, ModelError> {
        let template = Template::new(bytes::TEMPLATE, HashMap::new())?;
        Ok(Self(Arc::new(Inner {
            kind: Kind::Bytes,
            begin: None,
            eos: vec![bytes::END],
            template: Some(template),
        })))
    }

    pub(crate) fn trained(
        tokenizer: tokenizers::Tokenizer,
        begin: Option<TokenId>,
        eos: Vec<TokenId>,
        template: Option<Template>,
    ) -> Self {
        Self(Arc::new(Inner {
            kind: Kind::Trained(Box::new(tokenizer)),
            begin,
            eos,
            template,
        }))
    }

    /// Reads `tokenizer.json`, and the template and end token of `tokenizer_config.json`, of a folder as the hub has it.
    pub(crate) fn from_folder(folder: &Path, eos: Vec<TokenId>) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Open {
            path: path.clone(),
            source,
        })?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(ModelError::tokenizer)?;
        let template = chat::from_folder(folder)?;
        // The file's own post-processor adds what a text begins with.
        Ok(Self::trained(tokenizer, None, eos, template))
    }

    /// Tokens of a text. Special tokens that stand in the text are recognised; `add_special` also puts before it what
    /// the model's texts begin with.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, ModelError> {
        let mut tokens = match &self.0.kind {
            Kind::Bytes => bytes::encode(text),
            Kind::Trained(tokenizer) => tokenizer
                .encode_fast(text, add_special)
                .map_err(ModelError::tokenizer)?
                .get_ids()
                .to_vec(),
        };
        if let Some(begin) = self.0.begin.filter(|_| add_special) {
            tokens.insert(0, begin);
        }
        Ok(tokens)
    }

    /// The text of tokens. Bytes that are no UTF-8 become U+FFFD; tokens that are not in the vocabulary are left out.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        match &self.0.kind {
            Kind::Bytes => bytes::decode(tokens, skip_special),
            Kind::Trained(tokenizer) => tokenizer.decode(tokens, skip_special).unwrap_or_default(),
        }
    }

    /// Text for tokens that come one at a time.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }

    /// One token alone, special tokens by name.
    pub fn token_text(&self, token: TokenId) -> String {
        self.decode(&[token], false)
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[TokenId] {
        &self.0.eos
    }

    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        match &self.0.kind {
            Kind::Bytes => bytes::VOCAB,
            Kind::Trained(tokenizer) => tokenizer.get_vocab_size(true),
        }
    }

    /// The prompt of a conversation, by the model's template.
    ///
    /// # Errors
    ///
    /// The model has no template, or the template refuses the messages.
    pub fn chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let template = self.0.template.as_ref().ok_or_else(|| {
            ModelError::Template("this model has no chat template; use completions".into())
        })?;
        template.render(messages, add_generation_prompt)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab", &self.vocab())
            .finish_non_exhaustive()
    }
}
