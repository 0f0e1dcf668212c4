//! Lanes that fail while something ends: the tail, a push that is stopped, an endpoint that drains, an access; and what
//! was placed but not looked at yet.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    recovery::{LAYERS, PAGES, Pair, SECOND, config, contents, log_messages, one_lane},
    world::World,
};
use crate::{
    endpoint::{
        AccessError,
        config::Config,
        core::{AccessOp, Command},
        drain::DrainEntry,
        shared::AccessShared,
    },
    fabric::{
        Access, Device,
        sim::{SimConfig, SimNet},
    },
    memory::{HostMemory, Memory},
    wire::Message,
};

/// Of a push of which everything else has been acknowledged.
#[test]
fn the_tail_survives_the_loss_of_its_lane() {
    let mut in_doubt = 0;
    for node in 0..2 {
        for step in 0..12 {
            let mut pair = Pair::new(step, [1, 1], &config());
            let (arrival, push) = pair.open();
            let pages: Vec<u32> = (0..PAGES).collect();
            for layer in 0..LAYERS {
                push.layer(layer, &pages).unwrap();
            }
            pair.run(5);
            let log = log_messages(&mut pair.world);
            push.start_finish("end").unwrap();
            pair.micros(step + 1);
            pair.fail_lanes(node, 0);
            pair.run(100);
            pair.assert_complete(&arrival, &push);
            pair.assert_recovered();
            let tail = log.borrow().iter().any(|(_, message)| match message {
                Message::LaneDown(down) => down.unacknowledged.len() == 1,
                _ => false,
            });
            in_doubt += usize::from(tail);
        }
    }
    assert!(in_doubt > 6, "the tail was hardly ever lost: {in_doubt}");
}

/// Whoever stops it, and whichever end of the lane fails then: the reader hears of the lane before it hears that nothing
/// is in flight, and nothing lands once its arrival is over.
#[test]
fn a_stopped_push_is_over_only_after_its_lane() {
    for revoked in [false, true] {
        for node in 0..2 {
            for step in 0..10 {
                // One lane, whose end is that of the push.
                let mut pair = Pair::new(step, [1, 1], &one_lane());
                let (arrival, push) = pair.open();
                let log = log_messages(&mut pair.world);
                // So something is in flight until the lane fails.
                pair.world.net.lose_answers("sim1-0", true);
                pair.push_all(&push);
                pair.micros(10 + step * 3);
                match revoked {
                    true => arrival.start_revoke(),
                    false => push.start_cancel(),
                }
                pair.micros(1 + step * 30);
                pair.fail_lanes(node, 0);
                pair.world.net.lose_answers("sim1-0", false);
                let memory = pair.to.clone();
                let mut over = false;
                pair.world.run(SECOND / 10, |_| {
                    if !over && arrival.poll_complete().is_some() {
                        over = true;
                        for memory in &memory {
                            memory.fill(0, memory.length(), 0x77).unwrap();
                        }
                    }
                });
                assert!(over && push.poll_ended().is_some());
                assert_eq!((pair.sessions(0), pair.sessions(1)), (1, 1));
                for memory in &memory {
                    let bytes = contents(memory);
                    assert!(bytes.iter().all(|&byte| byte == 0x77), "written later");
                }
                let log = log.borrow();
                let place = |wanted: fn(&Message) -> bool| {
                    log.iter()
                        .position(|(from, message)| *from == 0 && wanted(message))
                };
                let down = place(|message| matches!(message, Message::LaneDown(_)));
                let end = place(|m| matches!(m, Message::Drained { .. } | Message::Cancel(_)));
                assert!(down.is_some() && end.is_some(), "{down:?} {end:?}");
                assert!(down < end, "{down:?} {end:?}");
            }
        }
    }
}

/// What an endpoint that goes away waits for includes what a lane that fails has to send again.
#[test]
fn a_drain_waits_for_lanes_that_fail() {
    for draining in 0..2 {
        for node in 0..2 {
            for step in 0..6 {
                let mut pair = Pair::new(step, [1, 1], &config());
                let (arrival, push) = pair.open();
                pair.push_all(&push);
                pair.micros(5 + step * 7);
                let endpoint = Arc::clone(&pair.world.nodes[draining].shared);
                endpoint.drain.begin();
                let entry = DrainEntry::new(2 * SECOND, Arc::clone(&endpoint));
                endpoint.command(Command::Drain(entry));
                pair.fail_lanes(node, 0);
                pair.run(1000);
                let end = arrival.poll_complete();
                assert!(
                    matches!(&end, Some(Ok(tail)) if &tail[..] == b"end"),
                    "{end:?}"
                );
                pair.assert_bytes();
                let report = endpoint
                    .drain
                    .report()
                    .expect("it does not wait for longer");
                let ran = [report.pushes, report.arrivals][draining];
                assert_eq!((ran.completed, ran.ended, ran.cut), (1, 0, 0));
                assert!(push.poll_ended().is_some());
            }
        }
    }
}

const REGION: u64 = 1 << 20;

fn ended(access: &AccessShared) -> Option<Result<(), AccessError>> {
    access.signal.look(Clone::clone)
}

fn fill(memory: &HostMemory) {
    let bytes: Vec<u8> = (0..memory.length())
        .map(|at| (at ^ at >> 9) as u8)
        .collect();
    memory.write(0, &bytes).unwrap();
}

/// A read or a write whose lane fails begins again, and is not reported before all its bytes are there.
#[test]
fn an_access_begins_again() {
    let mut renewed = 0;
    for read in [false, true] {
        for node in 0..2 {
            for step in 0..6 {
                let mut world = World::new(step, 2, &config());
                let (_exported, token, theirs) = world.nodes[1].export(REGION, Access::ALL);
                let (local, _, ours) = world.nodes[0].export(REGION, Access::LOCAL);
                let open = world.nodes[0].access(&token, AccessOp::Open);
                world.run(SECOND / 50, |_| {});
                assert_eq!(ended(&open), Some(Ok(())));
                fill(if read { &theirs } else { &ours });
                let op = AccessOp::Move {
                    read,
                    local,
                    local_offset: 0,
                    remote: open.keys.look(Clone::clone).unwrap(),
                    remote_offset: 0,
                    length: REGION,
                };
                let access = world.nodes[0].access(&token, op);
                world.run(Duration::from_micros(2 + step * 14), |_| {});
                assert_eq!(ended(&access), None, "too late");
                let device = World::rail_name(node, 0);
                for lane in world.net.lanes_of(&device) {
                    assert!(world.net.fail_lane(&device, lane));
                }
                world.run(SECOND / 20, |_| {
                    if let Some(end) = ended(&access) {
                        assert_eq!(end, Ok(()));
                        assert!(contents(&ours) == contents(&theirs), "reported too early");
                    }
                });
                assert_eq!(ended(&access), Some(Ok(())), "{read} {node} {step}");
                renewed += world.nodes[0].core.renewals;
            }
        }
    }
    assert!(renewed >= 24, "{renewed}");
}

/// What is placed, and acknowledged, after the reader has looked and before its lane is fenced: the writer will never
/// send it again, so the reader must count it, whichever side ends the lane.
#[test]
fn what_is_placed_before_the_fence_counts() {
    for node in 0..2 {
        for seed in 0..4 {
            let deep = Config {
                receive_depth: 64,
                ..Config::default()
            };
            let mut pair = Pair::new(seed, [1, 1], &deep);
            let (arrival, push) = pair.open();
            pair.world.nodes[1].late[0].store(true, Ordering::Relaxed);
            pair.push_all(&push);
            pair.run(5);
            let end = push.poll_ended();
            assert!(matches!(end, Some(Ok(_))), "{end:?}");
            assert_eq!(arrival.poll_complete(), None, "it has not looked");
            assert!(pair.world.net.change_address(&World::rail_name(node, 0)));
            pair.run(50);
            pair.assert_complete(&arrival, &push);
            pair.assert_recovered();
            assert!(!pair.world.nodes[1].late[0].load(Ordering::Relaxed));
        }
    }
}

/// Two rails of which one is four times as fast carry a push in about these shares.
#[test]
fn rails_carry_a_push_by_their_speed() {
    let net = SimNet::new(SimConfig::seeded(9));
    // A core reads a device's speed once, when it starts.
    let slow: Vec<Arc<dyn Device>> = (0..2)
        .map(|node| {
            let name = World::rail_name(node, 1);
            let device = net.device(&name);
            assert!(net.set_speed(&name, 25_000_000_000));
            device as Arc<dyn Device>
        })
        .collect();
    let config = Config {
        parts_per_layer: 32,
        receive_depth: 64,
        ..Config::default()
    };
    let mut pair = Pair::over(World::over(net, 9, &[2, 2], &config));
    drop(slow);
    let (arrival, push) = pair.open();
    pair.push_all(&push);
    pair.run(100);
    pair.assert_complete(&arrival, &push);
    let stats = pair.world.nodes[0].shared.telemetry.stats();
    let rails = &stats.peers[0].rails;
    let (fast, slow) = (rails[0].bytes, rails[1].bytes);
    assert!(fast > slow * 3 && fast < slow * 5, "{fast} and {slow}");
}
