//! A tokenizer of bytes, and completions put together with it.

use super::*;

/// One token for each byte. Token 256 and above are special.
pub(crate) struct Bytes;

impl Text for Bytes {
    fn encode(&self, text: &str, _add_special: bool) -> Result<Vec<TokenId>, String> {
        Ok(text.bytes().map(TokenId::from).collect())
    }

    fn decode(&self, tokens: &[TokenId], _skip_special: bool) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .filter_map(|&token| u8::try_from(token).ok())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        u8::try_from(token).map_or_else(|_| b"<special>".to_vec(), |byte| vec![byte])
    }

    fn chat(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let mut prompt = String::new();
        for message in messages {
            prompt.push_str(&format!("{}: {}\n", message.role, message.content));
        }
        if add_generation_prompt {
            prompt.push_str("assistant: ");
        }
        Ok(prompt)
    }

    fn decoder(&self, _skip_special: bool) -> Box<dyn StreamDecoder> {
        Box::new(Decoder(Vec::new()))
    }
}

struct Decoder(Vec<u8>);

impl StreamDecoder for Decoder {
    fn push(&mut self, token: TokenId, out: &mut String) {
        self.0.extend(u8::try_from(token));
        loop {
            match std::str::from_utf8(&self.0) {
                Ok(text) => {
                    out.push_str(text);
                    self.0.clear();
                    return;
                }
                Err(error) => {
                    let whole = error.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.0[..whole]));
                    match error.error_len() {
                        None => {
                            self.0.drain(..whole);
                            return;
                        }
                        Some(bad) => {
                            out.push('\u{fffd}');
                            self.0.drain(..whole + bad);
                        }
                    }
                }
            }
        }
    }

    fn finish(&mut self, out: &mut String) {
        if !self.0.is_empty() {
            out.push('\u{fffd}');
            self.0.clear();
        }
    }
}

fn token(id: u32) -> Token {
    Token {
        index: 0,
        id,
        logprob: Some(-0.5),
        top: vec![(id, -0.5)],
    }
}

fn assembler(stop: &str, min_tokens: usize) -> Assembler {
    let stops = vec![stop.to_owned()];
    Assembler::new(
        3,
        Bytes.decoder(true),
        StopScanner::new(stops, false),
        min_tokens,
    )
}

fn run(assembler: &mut Assembler, text: &str) -> Vec<Chunk> {
    let bytes = text.bytes();
    bytes
        .filter_map(|byte| assembler.push(&token(byte.into()), &Bytes).chunk)
        .collect()
}

fn text(chunks: &[Chunk]) -> String {
    chunks.iter().map(|chunk| chunk.text.as_str()).collect()
}

#[test]
fn a_stop_string_ends_a_completion_and_nothing_follows() {
    let mut assembler = assembler("END", 0);
    let chunks = run(&mut assembler, "one ENDmore");
    assert_eq!(text(&chunks), "one ");
    assert_eq!(assembler.tokens(), 7);
    let last = chunks.last().unwrap();
    assert!(last.finish.as_ref().unwrap().stopped_by_text);
    assert_eq!(last.index, 3);
    // The tokens of the stop string are told, its text is not.
    assert_eq!(last.tokens, [69, 78, 68]);
    assert!(assembler.finish(FinishReason::Length).is_none());
}

#[test]
fn held_text_comes_with_the_end() {
    let mut assembler = assembler("END", 0);
    assert_eq!(text(&run(&mut assembler, "xEN")), "x");
    let last = assembler.finish(FinishReason::Length).unwrap();
    assert_eq!(last.text, "EN");
    assert_eq!(last.finish.unwrap().reason, FinishReason::Length);
}

#[test]
fn tokens_and_log_probabilities_come_with_their_text() {
    let mut assembler = assembler("END", 0);
    // Two bytes, one character.
    let chunks = run(&mut assembler, "é");
    assert_eq!(chunks.len(), 1);
    assert_eq!(chunks[0].text, "é");
    assert_eq!(chunks[0].tokens.len(), 2);
    let bytes: Vec<_> = chunks[0].logprobs.iter().map(|l| l.bytes.clone()).collect();
    assert_eq!(bytes, [vec![0xc3], vec![0xa9]]);
}

#[test]
fn half_a_character_at_the_end_is_replaced() {
    let mut assembler = assembler("END", 0);
    assert!(assembler.push(&token(0xc3), &Bytes).chunk.is_none());
    assert_eq!(
        assembler.finish(FinishReason::Length).unwrap().text,
        "\u{fffd}"
    );
}

#[test]
fn nothing_stops_before_min_tokens() {
    let mut assembler = assembler("a", 3);
    assert_eq!(text(&run(&mut assembler, "aaxa")), "aax");
    assert!(assembler.is_finished());
}
