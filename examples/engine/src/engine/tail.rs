//! What a prefill engine sends after the pages: the first token of each completion, and the sampling state.
//!
//! Little-endian: version (1 byte), seed (8), completions (1), then for each: token (4), whether it has a log
//! probability (1) and that (4), alternatives (1), and for each alternative token (4) and log probability (4).

use super::sampling::Choice;

const VERSION: u8 = 1;

/// The sampling state and the first tokens.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tail {
    /// The seed that the prefill engine has used: with the number of tokens, all the state there is.
    pub(super) seed: u64,
    /// One for each completion.
    pub(super) firsts: Vec<Choice>,
}

/// The bytes are not a tail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tail is malformed: {0}")]
pub(super) struct BadTail(&'static str);

impl Tail {
    /// At most 255 completions with 255 alternatives each are encoded; an engine's limits are far below.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend(self.seed.to_le_bytes());
        out.push(u8::try_from(self.firsts.len()).unwrap_or(u8::MAX));
        for first in self.firsts.iter().take(u8::MAX.into()) {
            out.extend(first.id.to_le_bytes());
            out.push(u8::from(first.logprob.is_some()));
            out.extend(first.logprob.unwrap_or(0.0).to_le_bytes());
            out.push(u8::try_from(first.top.len()).unwrap_or(u8::MAX));
            for (token, logprob) in first.top.iter().take(u8::MAX.into()) {
                out.extend(token.to_le_bytes());
                out.extend(logprob.to_le_bytes());
            }
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BadTail> {
        let mut rest = bytes;
        if take::<1>(&mut rest)? != [VERSION] {
            return Err(BadTail("unknown version"));
        }
        let seed = u64::from_le_bytes(take(&mut rest)?);
        let [completions] = take(&mut rest)?;
        let mut firsts = Vec::new();
        for _ in 0..completions {
            let id = u32::from_le_bytes(take(&mut rest)?);
            let [has_logprob] = take(&mut rest)?;
            let logprob = f32::from_le_bytes(take(&mut rest)?);
            let [alternatives] = take(&mut rest)?;
            let top = (0..alternatives)
                .map(|_| {
                    let token = u32::from_le_bytes(take(&mut rest)?);
                    Ok((token, f32::from_le_bytes(take(&mut rest)?)))
                })
                .collect::<Result<_, _>>()?;
            firsts.push(Choice {
                id,
                logprob: (has_logprob == 1).then_some(logprob),
                top,
            });
        }
        if !rest.is_empty() {
            return Err(BadTail("more bytes than it should have"));
        }
        Ok(Self { seed, firsts })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], BadTail> {
    let (head, tail) = rest.split_first_chunk().ok_or(BadTail("cut off"))?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else_is() {
        let tail = Tail {
            seed: 0x0123_4567_89ab_cdef,
            firsts: vec![
                Choice {
                    id: 7,
                    logprob: Some(-0.5),
                    top: vec![(7, -0.5), (9, -1.5)],
                },
                Choice {
                    id: 8,
                    logprob: None,
                    top: Vec::new(),
                },
            ],
        };
        let bytes = tail.encode();
        assert_eq!(Tail::decode(&bytes), Ok(tail));
        for length in 0..bytes.len() {
            assert_eq!(Tail::decode(&bytes[..length]), Err(BadTail("cut off")));
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(Tail::decode(&longer).is_err());
        let newer = [&[2], &bytes[1..]].concat();
        assert_eq!(Tail::decode(&newer), Err(BadTail("unknown version")));
    }
}
