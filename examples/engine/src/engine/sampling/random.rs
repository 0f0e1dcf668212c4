//! Random numbers by counter: the number for a token is a function of the seed, the completion and the token's place.
//! So there is no state to carry from step to step, or from a prefill engine to a decode engine.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A number from 0 up to but not including 1, for token `place` of completion `index`.
pub(super) fn uniform(seed: u64, index: usize, place: usize) -> f64 {
    let stream = scramble(scramble(seed).wrapping_add(index as u64));
    let bits = scramble(stream.wrapping_add(place as u64));
    // The 53 bits that a double holds.
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// A seed that nobody has chosen.
pub(in crate::engine) fn fresh_seed() -> u64 {
    // Keys of this hasher are random.
    RandomState::new().build_hasher().finish()
}

/// splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
pub(super) fn scramble(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
