//! The tokenizer that a GGUF file describes.
//!
//! Only byte-level BPE (`tokenizer.ggml.model` = `gpt2`) is known. How text is cut before it is encoded is not in the
//! file but behind the name `tokenizer.ggml.pre`, so only names whose rules are known are accepted: a wrong rule would
//! give other tokens without any error.

use tokenizers::{
    AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{Tokenizer, chat::Template};
use crate::{
    model::{ModelError, file::gguf::Metadata},
    request::TokenId,
};

/// What Llama 3 cuts text into, from its `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// ggml's token types that are special.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Tokens that end an answer, by text, beside the file's end token.
const ENDS: [&str; 5] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "</s>",
];

pub(crate) fn tokenizer(metadata: &Metadata) -> Result<Tokenizer, ModelError> {
    let text = |key| metadata.text(key);
    let model = text("tokenizer.ggml.model").unwrap_or_default();
    if model != "gpt2" {
        return Err(ModelError::Unsupported(format!(
            "tokenizer {model:?}; known: gpt2 (byte-level BPE)"
        )));
    }
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let merges = metadata
        .texts("tokenizer.ggml.merges")?
        .iter()
        .map(|merge| {
            let (a, b) = merge.split_once(' ').ok_or_else(|| {
                ModelError::Tokenizer(format!("{merge:?} is no pair of tokens"))
            })?;
            Ok((a.to_owned(), b.to_owned()))
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    let vocab = (0..).zip(tokens).map(|(id, token): (TokenId, _)| (token.clone(), id));
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.collect::<Vocab>(), merges)
        .build()
        .map_err(ModelError::tokenizer)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(text("tokenizer.ggml.pre"))?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));

    let types = metadata.integers("tokenizer.ggml.token_type").unwrap_or_default();
    let of_type = |wanted: i64| {
        let both = tokens.iter().zip(&types);
        both.filter(move |(_, kind)| **kind == wanted)
            .map(|(token, _)| token.clone())
    };
    let special: Vec<_> = of_type(CONTROL).map(|token| AddedToken::from(token, true)).collect();
    tokenizer.add_special_tokens(&special);
    let added: Vec<_> = of_type(USER_DEFINED)
        .map(|token| AddedToken::from(token, false).normalized(false))
        .collect();
    tokenizer.add_tokens(&added);

    let id = |key| {
        let id = metadata.integer(key)?;
        TokenId::try_from(id).ok().filter(|id| (*id as usize) < tokens.len())
    };
    let begin = id("tokenizer.ggml.bos_token_id");
    let end = id("tokenizer.ggml.eos_token_id");
    let mut eos: Vec<TokenId> = end.into_iter().collect();
    for text in ENDS {
        eos.extend(tokenizer.token_to_id(text).filter(|id| {
            types.get(*id as usize) == Some(&CONTROL)
        }));
    }
    eos.sort_unstable();
    eos.dedup();
    let name = |id: Option<TokenId>| id.map_or_else(String::new, |id| tokens[id as usize].clone());
    let template = match text("tokenizer.chat_template") {
        Some(source) => {
            let names = [("bos_token", name(begin)), ("eos_token", name(end))];
            Some(Template::new(
                source,
                names.map(|(key, value)| (key.to_owned(), value)).into(),
            )?)
        }
        None => None,
    };
    let adds_begin = metadata.boolean("tokenizer.ggml.add_bos_token").unwrap_or(false);
    Ok(Tokenizer::trained(
        tokenizer,
        begin.filter(|_| adds_begin),
        eos,
        template,
    ))
}

/// How text is cut.
fn pre_tokenizer(name: Option<&str>) -> Result<PreTokenizerWrapper, ModelError> {
    let sequence = match name {
        // Digits one by one, then GPT-2's rule.
        Some("smollm") => vec![
            Digits::new(true).into(),
            ByteLevel::new(false, true, true).into(),
        ],
        Some("gpt-2") => vec![ByteLevel::new(false, true, true).into()],
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            let pattern = SplitPattern::Regex(LLAMA3.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(ModelError::tokenizer)?;
            vec![split.into(), ByteLevel::new(false, true, false).into()]
        }
        other => {
            return Err(ModelError::Unsupported(format!(
                "pre-tokenizer {other:?}; known: smollm, gpt-2, llama-bpe"
            )));
        }
    };
    Ok(Sequence::new(sequence).into())
}
