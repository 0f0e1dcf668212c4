//! The model's tokenizer, as servers see it.

use super::text::{ChatMessage, StreamDecoder, Text};
use crate::{
    model::{Detokenizer, Message, Tokenizer},
    request::TokenId,
};

impl Text for Tokenizer {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        Self::encode(self, text, add_special).map_err(|error| error.to_string())
    }

    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        Self::decode(self, tokens, skip_special)
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.token_text(token).into_bytes()
    }

    fn chat(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let messages: Vec<Message> = messages
            .iter()
            .map(|message| Message {
                role: message.role.clone(),
                content: message.content.clone(),
            })
            .collect();
        Self::chat(self, &messages, add_generation_prompt).map_err(|error| error.to_string())
    }

    fn decoder(&self, skip_special: bool) -> Box<dyn StreamDecoder> {
        Box::new(self.detokenizer(skip_special))
    }
}

impl StreamDecoder for Detokenizer {
    fn push(&mut self, token: TokenId, out: &mut String) {
        out.push_str(Self::push(self, token));
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(Self::finish(self));
    }
}
