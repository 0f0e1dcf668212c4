//! What tests and measurements can ask of the double, beside verbs. Of the whole process.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Whether payload is moved and keys are checked.
static MOVES: AtomicBool = AtomicBool::new(false);
static DEVICES: AtomicU32 = AtomicU32::new(1);
/// Requests that have been posted.
static POSTED: AtomicU64 = AtomicU64::new(0);
/// Calls of `ibv_post_send`.
static DOORBELLS: AtomicU64 = AtomicU64::new(0);
/// Completions of requests and receives.
static COMPLETIONS: AtomicU64 = AtomicU64::new(0);

/// Most devices.
pub(crate) const MOST_DEVICES: u32 = 8;

/// From now on payload is moved and keys are checked, or not.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_move_bytes(moves: bool) {
    MOVES.store(moves, Ordering::Relaxed);
}

/// How many devices there are, at most [`MOST_DEVICES`]; 1 at first.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_devices(count: u32) {
    DEVICES.store(count.min(MOST_DEVICES), Ordering::Relaxed);
}

/// Requests posted so far.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_posted() -> u64 {
    POSTED.load(Ordering::Relaxed)
}

/// Calls of `ibv_post_send` so far.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_doorbells() -> u64 {
    DOORBELLS.load(Ordering::Relaxed)
}

/// Completions made so far.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_completions() -> u64 {
    COMPLETIONS.load(Ordering::Relaxed)
}

pub(crate) fn moves() -> bool {
    MOVES.load(Ordering::Relaxed)
}

pub(crate) fn devices() -> u32 {
    DEVICES.load(Ordering::Relaxed)
}

pub(crate) fn posted(requests: u64) {
    POSTED.fetch_add(requests, Ordering::Relaxed);
    DOORBELLS.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn completed() {
    COMPLETIONS.fetch_add(1, Ordering::Relaxed);
}
