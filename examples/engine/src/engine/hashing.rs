//! Names of blocks: a chain of SHA-256 over the model, the salts and the tokens. Pure.
//!
//! Invariant: equal names mean equal keys and values, as far as SHA-256 has no collisions: the digest of the model, the
//! number of tokens of a block and both salts go into the first name, and each name goes into the next.

use sha2::{Digest, Sha256};

use super::BlockHash;
use crate::request::TokenId;

/// Names the blocks of one engine.
#[derive(Clone)]
pub(super) struct Hashing {
    seed: Sha256,
    model: [u8; 32],
    block_tokens: usize,
}

impl Hashing {
    pub(super) fn new(model: [u8; 32], salt: &str, block_tokens: usize) -> Self {
        let mut seed = Sha256::new_with_prefix(b"kvpush-engine block 1");
        seed.update(model);
        seed.update((block_tokens as u64).to_le_bytes());
        seed.update((salt.len() as u64).to_le_bytes());
        seed.update(salt);
        Self {
            seed,
            model,
            block_tokens,
        }
    }

    /// What the first block's name is chained to. No salt is not the empty salt.
    pub(super) fn root(&self, salt: Option<&str>) -> BlockHash {
        let mut hash = self.seed.clone();
        if let Some(salt) = salt {
            hash.update([1]);
            hash.update(salt);
        }
        BlockHash(hash.finalize().into())
    }

    /// The name of a full block after `parent`.
    pub(super) fn block(&self, parent: &BlockHash, tokens: &[TokenId]) -> BlockHash {
        let mut hash = Sha256::new_with_prefix(parent.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        BlockHash(hash.finalize().into())
    }

    /// Appends the names of the full blocks of `tokens` that `names` lacks.
    pub(super) fn extend(&self, root: &BlockHash, tokens: &[TokenId], names: &mut Vec<BlockHash>) {
        let blocks = tokens.chunks_exact(self.block_tokens).skip(names.len());
        for block in blocks {
            let name = self.block(names.last().unwrap_or(root), block);
            names.push(name);
        }
    }

    /// What both engines of a pair must agree on: the model and the prompt.
    pub(super) fn prompt(&self, tokens: &[TokenId]) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(b"kvpush-engine prompt 1");
        hash.update(self.model);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(model: u8, engine: &str, salt: Option<&str>, tokens: &[TokenId]) -> Vec<BlockHash> {
        let hashing = Hashing::new([model; 32], engine, 2);
        let mut names = Vec::new();
        hashing.extend(&hashing.root(salt), tokens, &mut names);
        names
    }

    #[test]
    fn names_depend_on_everything_before() {
        let base = names(1, "", None, &[1, 2, 3, 4, 5]);
        assert_eq!(base.len(), 2);
        assert_eq!(base, names(1, "", None, &[1, 2, 3, 4]));
        let same_first = names(1, "", None, &[1, 2, 9, 4]);
        assert_eq!(base[0], same_first[0]);
        assert_ne!(base[1], same_first[1]);
        let all = [
            base,
            names(1, "", None, &[9, 2, 3, 4]),
            names(2, "", None, &[1, 2, 3, 4]),
            names(1, "a", None, &[1, 2, 3, 4]),
            names(1, "", Some(""), &[1, 2, 3, 4]),
            names(1, "", Some("a"), &[1, 2, 3, 4]),
            names(1, "", Some("b"), &[1, 2, 3, 4]),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().flatten().collect();
        assert_eq!(distinct.len(), 2 * all.len());
    }

    #[test]
    fn names_are_what_another_implementation_computes() {
        // python3: sha256(parent + tokens as u32 little-endian)
        let hashing = Hashing::new([0; 32], "", 2);
        let name = hashing.block(&BlockHash([7; 32]), &[1, 0x0102_0304]);
        assert_eq!(
            name.to_string(),
            "c6850bca10b357fccb82301f320cedd3eae082ca68cdea270ac0ede8db7e9a45"
        );
    }
}
