//! The formula of contents, and random numbers.

/// A small random number generator (splitmix64; Steele, Lea and Flood, OOPSLA 2014).
pub(crate) struct Random(u64);

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64: a bijection in which every input bit affects all output bits.
#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Fisher and Yates; the bias of the remainder is of no matter here.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.next() % (last as u64 + 1);
            items.swap(last, other as usize);
        }
    }
}

/// The formula: writes the content of one head of one token.
pub(super) fn head_content(key: u64, token: u32, head: u32, out: &mut [u8]) {
    let start = mix(key ^ mix((u64::from(token) << 32 | u64::from(head)).wrapping_add(GOLDEN)));
    for (index, chunk) in (0u64..).zip(out.chunks_mut(8)) {
        let word = mix(start.wrapping_add(index.wrapping_mul(GOLDEN))).to_le_bytes();
        if let Some(word) = word.get(..chunk.len()) {
            chunk.copy_from_slice(word);
        }
    }
}

/// What the contents of one page of one plane depend on.
pub(super) fn page_key(seed: u64, request: u32, layer: u32, role: u8, position: u32) -> u64 {
    let place = u64::from(request) << 32 | u64::from(position);
    mix(mix(seed ^ mix(place.wrapping_add(GOLDEN))) ^ (u64::from(layer) << 8 | u64::from(role)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_seed_request_position_layer_token_or_head_is_other_content() {
        let base = (1, 2, 3, 1, 4, 5, 6);
        let content = |(seed, request, layer, role, position, token, head)| {
            let mut out = [0; 24];
            head_content(
                page_key(seed, request, layer, role, position),
                token,
                head,
                &mut out,
            );
            out
        };
        let others = [
            (2, 2, 3, 1, 4, 5, 6),
            (1, 3, 3, 1, 4, 5, 6),
            (1, 2, 4, 1, 4, 5, 6),
            (1, 2, 3, 2, 4, 5, 6),
            (1, 2, 3, 1, 5, 5, 6),
            (1, 2, 3, 1, 4, 6, 6),
            (1, 2, 3, 1, 4, 5, 7),
            (1, 4, 3, 1, 2, 5, 6),
            (1, 2, 3, 1, 4, 6, 5),
        ];
        for other in others {
            assert_ne!(content(base), content(other), "{other:?}");
        }
        assert_eq!(content(base), content(base));
    }
}
