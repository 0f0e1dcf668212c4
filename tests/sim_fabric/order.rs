//! What is ordered, what is not, and when bytes become visible.

use std::collections::BTreeSet;

use kvpush::fabric::{CompletionKind, Opcode, Status};

use crate::rig::{LANE, MTU, Rig, Write, seeded, write};

#[test]
fn a_write_moves_its_bytes_and_only_those() {
    let mut rig = Rig::new(seeded(1), 1);
    let (length, to) = (3 * MTU + 17, 5 * MTU + 3);
    rig.b.memory.fill(0xee);
    rig.post(
        0,
        Write {
            from: 11,
            to,
            ..write(7, 0, length)
        },
    );
    rig.settle();
    assert!(rig.same(11, to, length));
    assert_eq!(
        (rig.b.memory.byte(to - 1), rig.b.memory.byte(to + length)),
        (0xee, 0xee)
    );
    assert_eq!(rig.a.sent(), [(7, Status::Success)]);
    assert_eq!(rig.b.poll(), []);
}

#[test]
fn a_message_is_visible_in_parts_in_order_and_completes_after_all_of_them() {
    let packets = 16;
    let mut rig = Rig::new(seeded(2), 1);
    rig.a.memory.fill(0x5a);
    rig.post(0, write(1, 0, packets * MTU));
    let mut seen = BTreeSet::new();
    let mut completed = Vec::new();
    rig.step_until(|rig| {
        let placed: Vec<bool> = (0..packets)
            .map(|packet| rig.b.memory.byte(packet * MTU + MTU - 1) == 0x5a)
            .collect();
        let count = placed.iter().filter(|placed| **placed).count();
        assert!(
            placed[..count].iter().all(|placed| *placed),
            "a hole: {placed:?}"
        );
        completed.extend(rig.a.sent());
        assert!(completed.is_empty() || count == packets);
        seen.insert(count);
        !completed.is_empty()
    });
    assert_eq!(seen, (0..=packets).collect());
}

#[test]
fn the_immediate_comes_after_everything_before_it_on_its_lane() {
    for seed in 0..50 {
        let mut rig = Rig::new(seeded(seed), 2);
        rig.post(0, write(1, 0, 9 * MTU));
        rig.post(1, write(2, 100 * MTU, 9 * MTU));
        rig.post_imm(0, 3, 0xfeed);
        let mut received = Vec::new();
        rig.step_until(|rig| {
            received.extend(rig.b.poll());
            !received.is_empty()
        });
        assert!(rig.same(0, 0, 9 * MTU), "seed {seed}\n{}", rig.net.trace());
        assert_eq!(received[0].kind, CompletionKind::Received { imm: 0xfeed });
        assert_eq!(received[0].lane, rig.lanes[0].1);
        // Without faults the wire keeps each lane in order, so nothing is ever sent twice.
        rig.settle();
        assert_eq!(rig.net.stats().retransmissions, 0, "seed {seed}");
    }
}

#[test]
fn a_send_completion_means_that_the_peer_has_the_bytes() {
    for seed in 0..50 {
        let mut rig = Rig::new(seeded(seed), 3);
        for lane in 0..3 {
            rig.post(lane, write(lane as u64, lane * 64 * MTU, 20 * MTU));
        }
        let mut done = 0;
        rig.step_until(|rig| {
            for (id, status) in rig.a.sent() {
                assert_eq!(status, Status::Success);
                let at = id as usize * 64 * MTU;
                assert!(
                    rig.same(at, at, 20 * MTU),
                    "seed {seed}\n{}",
                    rig.net.trace()
                );
                done += 1;
            }
            done == 3
        });
    }
}

#[test]
fn completions_of_one_lane_keep_their_order() {
    for seed in 0..50 {
        let mut rig = Rig::new(seeded(seed), 4);
        for id in 0..16 {
            for lane in 0..4 {
                let marker = Write {
                    imm: Some(id),
                    ..write(id.into(), 0, 0)
                };
                rig.post(lane, marker);
            }
        }
        rig.settle();
        let (sent, received) = (rig.a.poll(), rig.b.poll());
        for lane in 0..4 {
            let ids: Vec<_> = sent
                .iter()
                .filter(|c| c.lane == rig.lanes[lane].0)
                .map(|c| c.kind)
                .collect();
            let imms: Vec<_> = received
                .iter()
                .filter(|c| c.lane == rig.lanes[lane].1)
                .map(|c| c.kind)
                .collect();
            assert!(
                ids.iter()
                    .copied()
                    .eq((0..16).map(|id| CompletionKind::Sent { id })),
                "seed {seed}: {ids:?}"
            );
            assert!(
                imms.iter()
                    .copied()
                    .eq((0..16).map(|imm| CompletionKind::Received { imm })),
                "seed {seed}: {imms:?}"
            );
        }
    }
}

/// In which order the markers of two lanes arrive, the first one's posted first.
fn arrival_order(seed: u64) -> Vec<u32> {
    let mut rig = Rig::new(seeded(seed), 2);
    for imm in 0..4 {
        rig.post_imm((imm / 2) as usize, imm.into(), imm);
    }
    let mut order = Vec::new();
    rig.step_until(|rig| {
        // Polled at each step, so this is the order of the wire and not that of the completion queue.
        order.extend(rig.b.poll().into_iter().map(|c| match c.kind {
            CompletionKind::Received { imm } => imm,
            CompletionKind::Sent { id } => panic!("request {id} at the receiver"),
        }));
        order.len() == 4
    });
    order
}

#[test]
fn lanes_overtake_each_other_in_every_way() {
    let orders: BTreeSet<_> = (0..300).map(arrival_order).collect();
    // All orders that keep 0 before 1 and 2 before 3.
    assert_eq!(orders.len(), 6, "{orders:?}");
}

#[test]
fn the_completion_queue_reorders_lanes_only_if_asked() {
    let order = |reorder_completions| {
        let config = kvpush::fabric::sim::SimConfig {
            reorder_completions,
            ..seeded(3)
        };
        let mut rig = Rig::new(config, 8);
        for id in 0..8 {
            rig.post_imm(id as usize, id, id as u32);
            rig.settle();
        }
        rig.a
            .sent()
            .into_iter()
            .map(|(id, _)| id)
            .collect::<Vec<_>>()
    };
    let made: Vec<_> = (0..8).collect();
    assert_eq!(order(false), made);
    assert_ne!(order(true), made);
}

#[test]
fn the_source_is_read_at_transmission_unless_inline() {
    for (inline, arrives) in [(false, 2), (true, 1)] {
        let mut rig = Rig::new(seeded(4), 1);
        rig.a.memory.fill(1);
        let (request, sge) = rig.request(&write(1, 0, 64));
        // Inline data needs no key.
        let key = if inline {
            crate::rig::wrong_keys(rig.a.keys).0
        } else {
            sge.key
        };
        let request = kvpush::fabric::WorkRequest { inline, ..request };
        rig.post_raw(0, &[request], &[kvpush::fabric::Sge { key, ..sge }])
            .unwrap();
        rig.a.memory.fill(2);
        rig.settle();
        assert_eq!(rig.b.memory.bytes(0, 64), [arrives; 64], "inline: {inline}");
    }
}

#[test]
fn gathered_pieces_arrive_as_one_message() {
    let mut rig = Rig::new(seeded(5), 1);
    let (mut request, _) = rig.request(&write(1, 0, 0));
    let sges = [
        rig.a.sge(0, 1),
        rig.a.sge(5 * MTU, MTU + 5),
        rig.a.sge(9, 3000),
        rig.a.sge(77, 1),
    ];
    (request.first_sge, request.sge_count) = (1, 3);
    rig.post_raw(0, &[request], &sges).unwrap();
    rig.settle();
    let mut expected = rig.a.memory.bytes(5 * MTU, MTU + 5);
    expected.extend(rig.a.memory.bytes(9, 3000));
    expected.extend(rig.a.memory.bytes(77, 1));
    assert_eq!(rig.b.memory.bytes(0, expected.len()), expected);
    assert_eq!(rig.b.memory.byte(expected.len()), 0);
}

#[test]
fn a_read_scatters_the_peers_bytes_and_follows_the_writes_before_it() {
    let mut rig = Rig::new(seeded(6), 1);
    rig.post(0, write(1, 0, 3 * MTU));
    let (mut read, _) = rig.request(&write(2, 0, 0));
    read.opcode = Opcode::Read;
    read.sge_count = 2;
    let sges = [rig.a.sge(100 * MTU, 5), rig.a.sge(110 * MTU, 3 * MTU - 5)];
    rig.post_raw(0, &[read], &sges).unwrap();
    rig.settle();
    assert_eq!(rig.a.sent(), [(1, Status::Success), (2, Status::Success)]);
    let source = rig.a.memory.bytes(0, 3 * MTU);
    assert_eq!(rig.a.memory.bytes(100 * MTU, 5), source[..5]);
    assert_eq!(rig.a.memory.bytes(110 * MTU, 3 * MTU - 5), source[5..]);
}

#[test]
fn nothing_moves_until_time_does() {
    let mut rig = Rig::new(seeded(7), 1);
    rig.post(0, write(1, 0, MTU));
    for _ in 0..100 {
        assert!(rig.a.poll().is_empty() && rig.b.poll().is_empty());
    }
    assert_eq!((rig.net.now(), rig.b.memory.byte(MTU - 1)), (0, 0));
    let next = rig.net.next_event().unwrap();
    rig.net.advance_to(next + 1_000_000);
    assert_eq!(rig.net.now(), next + 1_000_000);
    assert_eq!(rig.a.sent(), [(1, Status::Success)]);
}

fn run(seed: u64) -> (u64, String) {
    let mut rig = Rig::with(seeded(seed), 3, LANE, 4096);
    rig.net.set_loss(0.05);
    for round in 0..10 {
        for lane in 0..3 {
            rig.post(lane, write(round, 64 * MTU * lane, 7 * MTU));
            rig.post_imm(lane, 100 + round, round as u32);
        }
        for _ in 0..50 {
            rig.net.step();
        }
        rig.a.poll();
        rig.b.poll();
    }
    rig.settle();
    (rig.net.trace_hash(), rig.net.trace().to_string())
}

#[test]
fn equal_seeds_give_equal_runs_and_others_do_not() {
    let (hash, text) = run(42);
    assert_eq!((hash, &text), (run(42).0, &run(42).1));
    let hashes: BTreeSet<_> = (0..20).map(|seed| run(seed).0).collect();
    assert_eq!(hashes.len(), 20);
    assert!(text.contains("ns a lane"), "{text}");
}
