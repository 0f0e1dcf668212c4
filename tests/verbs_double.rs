//! The verbs fabric without a device: cases of the endpoint suite over the double of libibverbs (`tests/verbs-double`),
//! which moves bytes and checks keys here, and what shows that the double can be believed.
//!
//! Real verbs are tested in guests (`cargo xtask rxe`). This runs everywhere, and is what the figures of
//! `benches/verbs_null.rs` rest on: the same requests that are counted there carry the right bytes here.

#[allow(dead_code, reason = "shared with the endpoint suite")]
#[path = "endpoint_suite/fixture.rs"]
mod fixture;
#[allow(dead_code, reason = "shared with the endpoint suite")]
#[path = "endpoint_suite/inputs.rs"]
mod inputs;
#[allow(dead_code, reason = "shared with the endpoint suite")]
#[path = "endpoint_suite/lifecycle.rs"]
mod lifecycle;
#[path = "verbs_double/loader.rs"]
mod loader;
#[allow(dead_code, reason = "shared with the endpoint suite")]
#[path = "endpoint_suite/mover.rs"]
mod mover;
#[path = "endpoint_suite/prepared.rs"]
mod prepared;
#[allow(dead_code, reason = "shared with the endpoint suite")]
#[path = "endpoint_suite/transfers.rs"]
mod transfers;

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use fixture::{Cache, Fabric, LONG, POISON};

/// Taken to write by whoever stops the double from moving bytes.
static MOVES: RwLock<()> = RwLock::new(());

fn moving() -> RwLockReadGuard<'static, ()> {
    let guard = MOVES.read().unwrap_or_else(PoisonError::into_inner);
    loader::load().move_bytes(true);
    guard
}

macro_rules! cases {
    ($($module:ident :: $case:ident),* $(,)?) => {$(
        #[test]
        fn $case() {
            let _moving = moving();
            $module::$case(&Fabric::verbs());
        }
    )*};
}

cases!(
    transfers::a_push_arrives_whole,
    transfers::layers_become_ready_one_by_one,
    transfers::chunks_arrive_in_any_order,
    transfers::random_layouts_arrive_exactly,
    transfers::shards_of_other_degrees_get_their_heads,
    transfers::more_parts_than_receives,
    transfers::many_pushes_at_once,
    transfers::both_ways_at_once,
    prepared::prepared_pages_arrive_as_others,
    prepared::layers_of_several_geometries,
    prepared::prepared_pages_of_a_shard,
    prepared::prepared_pages_are_of_one_push,
    inputs::a_grant_is_used_once,
    lifecycle::revoked_in_the_middle,
    lifecycle::cancelled_by_the_writer,
    lifecycle::a_lost_writer_ends_the_arrival,
    lifecycle::a_lost_reader_ends_the_push,
    lifecycle::nothing_is_left_behind,
);

/// A null device moves nothing, and what is posted to it can be counted.
#[test]
fn the_null_device_moves_nothing() {
    let _still = MOVES.write().unwrap_or_else(PoisonError::into_inner);
    let double = loader::load();
    double.move_bytes(false);
    let fabric = Fabric::verbs();
    let (prefill, decode) = fabric.pair();
    let layout = transfers::plain(2, 64);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let (posted, completed) = (double.posted(), double.completions());
    // No two are neighbours.
    let to: Vec<u32> = (0..20).map(|page| 63 - 3 * page).collect();
    let arrival = destination.pool.grant("x", &to, LONG).unwrap();
    let from: Vec<u32> = (0..20).collect();
    transfers::push(&prefill, &source, &arrival, &from, b"tail");
    let tail = arrival.complete_blocking(LONG).unwrap().unwrap();
    assert_eq!(&tail[..], b"tail", "inline payload is moved");
    // Keys and values of each page of both layers, and the tail.
    assert_eq!(double.posted() - posted, 20 * 2 * 2 + 1);
    // Four parts of each layer and the tail arrive; not every request is signalled.
    let completed = double.completions() - completed;
    assert!((2 * 4 + 1 + 1..2 * 20).contains(&completed), "{completed}");
    let untouched = destination.bytes().concat();
    assert!(untouched.iter().all(|&byte| byte == POISON));
}
