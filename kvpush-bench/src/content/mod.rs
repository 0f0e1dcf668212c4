//! What every byte must be, pools that are filled accordingly, and their verification.
//!
//! The content of a head of a token is a formula of (seed, request, layer, role, position in the request, token, head
//! of the model): it depends neither on layouts nor on ranks nor on page numbers, so the decode side can recompute it
//! without the source. Bytes that no request owns are [`POISON`] at the decode side, and something else at the prefill
//! side, so that a wrong page or a missing write is seen.

mod block;
mod cache;
mod formula;

pub(crate) use self::{
    block::Block,
    cache::{Cache, Expected, Mismatch},
    formula::Random,
};

/// Decode bytes that nobody has written.
const POISON: u8 = 0xa5;
/// Prefill bytes that no request owns.
const UNUSED: u8 = 0x3c;

/// Threads that fill and verify.
pub(crate) fn threads() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(16)) as u64
}
