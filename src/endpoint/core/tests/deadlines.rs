//! What deadlines cost, and what still counts when one passes.

use std::{collections::VecDeque, time::Duration};

use super::world::World;
use crate::{
    endpoint::config::Config,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
};

fn layout(layers: u32) -> KvLayout {
    let shape = KvShape {
        layers,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 1),
        head_dim: 8,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(4).unwrap()
}

/// A reader that does not get to run until after the deadline. Its device has placed and completed everything before:
/// more than one poll takes.
#[test]
fn what_has_arrived_by_the_deadline_counts() {
    const LAYERS: u32 = 200;
    let config = Config {
        parts_per_layer: 1,
        ..Config::default()
    };
    let layout = layout(LAYERS);
    let mut world = World::new(6, 2, &config);
    let (source, _source_memory) = world.nodes[0].pool(&layout, 1);
    let (pool, _memory) = world.nodes[1].pool(&layout, 0);
    let deadline = Duration::from_millis(50);
    let arrival = pool.grant("late", &[1], deadline).unwrap();
    let shared = &world.nodes[0].shared;
    let push = shared.start_push(&source, arrival.grant().clone(), None);
    let push = push.unwrap();
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(push.poll_opened(), Some(Ok(())));

    world.nodes[1].running = false;
    for layer in 0..LAYERS as usize {
        push.layer(layer, &[1]).unwrap();
    }
    push.start_finish("end").unwrap();
    world.run(Duration::from_millis(20), |_| {});
    let end = push.poll_ended();
    assert!(matches!(end, Some(Ok(_))), "before the deadline: {end:?}");
    world.run(Duration::from_millis(100), |_| {});
    assert_eq!(arrival.poll_complete(), None, "nobody has looked");
    world.nodes[1].running = true;
    world.run(Duration::from_millis(20), |_| {});
    let end = arrival.poll_complete().expect("it has ended");
    assert_eq!(end.unwrap(), "end");
}

/// Slots are used again long before the deadlines of their earlier grants pass.
#[test]
fn timers_of_grants_do_not_accumulate() {
    let deadline = Duration::from_millis(300);
    let config = Config {
        max_transfers: 4,
        ..Config::default()
    };
    let layout = layout(1);
    let mut world = World::new(7, 2, &config);
    let (source, _source_memory) = world.nodes[0].pool(&layout, 1);
    let (pool, _memory) = world.nodes[1].pool(&layout, 0);
    let mut ahead = VecDeque::new();
    let mut most = 0;
    for round in 0..1000 {
        let arrival = pool.grant("x", &[1], deadline).unwrap();
        assert!(arrival.grant().id().slot < 4);
        ahead.push_back(world.now + deadline.as_nanos() as u64);
        let shared = &world.nodes[0].shared;
        let push = shared.start_push(&source, arrival.grant().clone(), None);
        let push = push.unwrap();
        while push.poll_opened().is_none() {
            world.run(Duration::from_micros(200), |_| {});
        }
        push.layer(0, &[1]).unwrap();
        push.start_finish("end").unwrap();
        while push.poll_ended().is_none() || arrival.poll_complete().is_none() {
            world.run(Duration::from_micros(200), |_| {});
        }
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
        while ahead.front().is_some_and(|&at| at < world.now) {
            ahead.pop_front();
        }
        let timers = world.nodes[1].arrival_timers();
        assert!(
            timers <= ahead.len(),
            "round {round}: {timers} timers, {} deadlines ahead",
            ahead.len()
        );
        most = most.max(timers);
    }
    assert!(most > 1, "no slot was used again before its deadline");
    assert!(ahead.len() < 1000, "no deadline has passed");
    world.run(2 * deadline, |_| {});
    assert_eq!(world.nodes[1].arrival_timers(), 0);
}
