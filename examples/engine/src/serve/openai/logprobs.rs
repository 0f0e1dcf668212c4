//! Log probabilities, as chat and as plain completions write them.

use serde_json::{Map, Value, json};

use crate::serve::text::TokenLogprob;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Where a probability is 0 its logarithm is no number of JSON's; OpenAI writes this instead.
fn finite(logprob: f32) -> Value {
    json!(if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    })
}

/// For chat: `{content: [{token, logprob, bytes, top_logprobs}]}`.
pub fn chat(tokens: &[TokenLogprob]) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({"token": text(bytes), "logprob": finite(logprob), "bytes": bytes});
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut entry = one(&token.bytes, token.logprob.unwrap_or(0.0));
            entry["top_logprobs"] = token
                .top
                .iter()
                .map(|(_, bytes, logprob)| one(bytes, *logprob))
                .collect();
            entry
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// For plain completions: parallel lists. `offset` is the position, in characters, of the first token's text.
pub fn completion(tokens: &[TokenLogprob], offset: &mut usize) -> Value {
    let mut offsets = Vec::with_capacity(tokens.len());
    let mut tops = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(*offset);
        *offset += text(&token.bytes).chars().count();
        let mut top: Map<String, Value> = token
            .top
            .iter()
            .map(|(_, bytes, logprob)| (text(bytes), finite(*logprob)))
            .collect();
        tops.push(match token.logprob {
            None => Value::Null,
            Some(logprob) => {
                if !top.is_empty() {
                    let own = top.entry(text(&token.bytes));
                    own.or_insert_with(|| finite(logprob));
                }
                Value::Object(top)
            }
        });
    }
    json!({
        "tokens": tokens.iter().map(|token| text(&token.bytes)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": tops,
        "text_offset": offsets,
    })
}

/// vLLM's `prompt_logprobs`: nothing for the first token, then an object for each, by token id.
pub fn prompt(tokens: &[TokenLogprob]) -> Value {
    let entry = |bytes: &[u8], logprob: f32| json!({"logprob": finite(logprob), "decoded_token": text(bytes)});
    let rest = tokens.iter().map(|token| {
        let mut entries: Map<String, Value> = token
            .top
            .iter()
            .map(|(id, bytes, logprob)| (id.to_string(), entry(bytes, *logprob)))
            .collect();
        let own = entries.entry(token.id.to_string());
        own.or_insert_with(|| entry(&token.bytes, token.logprob.unwrap_or(0.0)));
        Value::Object(entries)
    });
    std::iter::once(Value::Null).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Vec<TokenLogprob> {
        let of = |bytes: &[u8], logprob| TokenLogprob {
            id: 0,
            bytes: bytes.to_vec(),
            logprob: Some(logprob),
            top: vec![(1, b"x".to_vec(), -0.25)],
        };
        vec![of("é".as_bytes(), -0.5), of(b"b", f32::NEG_INFINITY)]
    }

    #[test]
    fn chat_has_bytes_and_alternatives() {
        let value = chat(&tokens());
        assert_eq!(value["content"][0]["token"], "é");
        assert_eq!(value["content"][0]["bytes"], json!([0xc3, 0xa9]));
        assert_eq!(value["content"][0]["top_logprobs"][0]["logprob"], -0.25);
        assert_eq!(value["content"][1]["logprob"], -9999.0);
    }

    #[test]
    fn completions_have_parallel_lists_and_offsets() {
        let mut offset = 3;
        let value = completion(&tokens(), &mut offset);
        assert_eq!(value["text_offset"], json!([3, 4]));
        assert_eq!(offset, 5);
        assert_eq!(value["token_logprobs"], json!([-0.5, -9999.0]));
        assert_eq!(value["top_logprobs"][0], json!({"x": -0.25, "é": -0.5}));
    }
}
