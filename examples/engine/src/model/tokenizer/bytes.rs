//! The built-in models' tokenizer: a token is a byte, or one of four special tokens.

use super::special::split;
use crate::request::TokenId;

/// Begins a text.
pub(crate) const BEGIN: TokenId = 256;
/// Ends a text, or a message's answer.
pub(crate) const END: TokenId = 259;
/// Tokens there are.
pub(crate) const VOCAB: usize = 260;

/// Texts of the special tokens, from 256 on.
pub(crate) const SPECIAL: [&str; 4] = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// In the manner of ChatML.
pub(super) const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
     {% endif %}";

/// Whether a token is a printable ASCII character, or the end.
pub(crate) fn is_printable(token: TokenId) -> bool {
    (32..127).contains(&token) || token == END
}

pub(super) fn encode(text: &str) -> Vec<TokenId> {
    let mut tokens = Vec::with_capacity(text.len());
    for (part, special) in split(text, &SPECIAL) {
        tokens.extend(part.bytes().map(TokenId::from));
        tokens.extend(special.map(|index| BEGIN + index as TokenId));
    }
    tokens
}

pub(super) fn decode(tokens: &[TokenId], skip_special: bool) -> String {
    let mut bytes = Vec::with_capacity(tokens.len());
    for token in tokens {
        match u8::try_from(*token) {
            Ok(byte) => bytes.push(byte),
            Err(_) if skip_special => {}
            Err(_) => bytes.extend(text(*token).unwrap_or_default().bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A special token's text.
pub(super) fn text(token: TokenId) -> Option<&'static str> {
    SPECIAL
        .get(usize::try_from(token.checked_sub(BEGIN)?).ok()?)
        .copied()
}
