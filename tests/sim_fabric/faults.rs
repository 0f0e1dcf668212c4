//! Faults, and how the transport recovers or gives up.

use kvpush::fabric::{FabricErrorKind, Opcode, Status, WorkRequest};

use crate::rig::{LANE, MTU, Rig, Write, seeded, write};

#[test]
fn loss_is_repaired_and_nothing_counts_twice() {
    let mut retransmissions = 0;
    for seed in 0..40 {
        let mut rig = Rig::new(seeded(seed), 2);
        rig.net.set_loss(0.1);
        for id in 0..8 {
            let lane = id as usize % 2;
            let at = id as usize * 8 * MTU;
            let imm = Some(id as u32);
            rig.post(
                lane,
                Write {
                    imm,
                    ..write(id, at, 5 * MTU)
                },
            );
        }
        // What lane 0 wrote before; the other lane may still be at work.
        let (mut read, sge) = rig.request(&write(8, 100 * MTU, 5 * MTU));
        read.opcode = Opcode::Read;
        read.remote_address = rig.b.memory.address();
        rig.post_raw(0, &[read], &[sge]).unwrap();
        rig.post(0, write(9, 150 * MTU, 5 * MTU));
        rig.settle();
        let mut sent = rig.a.sent();
        sent.sort_by_key(|(id, _)| *id);
        let expected: Vec<_> = (0..10).map(|id| (id, Status::Success)).collect();
        assert_eq!(sent, expected, "seed {seed}\n{}", rig.net.trace());
        assert_eq!(rig.b.poll().len(), 8, "seed {seed}");
        for id in 0..8 {
            assert!(rig.same(id * 8 * MTU, id * 8 * MTU, 5 * MTU), "seed {seed}");
        }
        assert!(rig.same(150 * MTU, 150 * MTU, 5 * MTU), "seed {seed}");
        assert!(rig.same(100 * MTU, 0, 5 * MTU), "seed {seed}");
        let stats = rig.net.stats();
        assert!(stats.lost > 0);
        assert_eq!(stats.bytes, (8 + 1 + 1) * 5 * MTU as u64, "seed {seed}");
        assert_eq!(stats.messages, 10, "seed {seed}");
        retransmissions += stats.retransmissions;
    }
    assert!(retransmissions > 0);
}

#[test]
fn a_partition_ends_in_retries_exceeded_for_the_oldest_request() {
    let mut rig = Rig::new(seeded(41), 1);
    rig.net.partition("b", "a", true);
    for id in 0..3 {
        rig.post(0, write(id, 0, 2 * MTU));
    }
    rig.settle();
    let expected = [
        (0, Status::RetryExceeded),
        (1, Status::Flushed),
        (2, Status::Flushed),
    ];
    assert_eq!(rig.a.sent(), expected);
    // The first try and retry_count more, each with its time-out.
    assert_eq!(rig.net.stats().timeouts, 8);
    assert_eq!(rig.b.memory.byte(0), 0);
}

#[test]
fn a_partition_that_ends_in_time_is_repaired() {
    let mut rig = Rig::new(seeded(42), 1);
    rig.net.partition("a", "b", true);
    rig.post(0, write(1, 0, 5 * MTU));
    rig.step_until(|rig| rig.net.stats().timeouts == 7);
    rig.net.partition("a", "b", false);
    rig.settle();
    assert_eq!(rig.a.sent(), [(1, Status::Success)]);
    assert!(rig.same(0, 0, 5 * MTU));
}

#[test]
fn a_message_can_land_although_its_sender_is_told_that_it_failed() {
    let landed = |seed| {
        let mut rig = Rig::new(seeded(seed), 1);
        rig.post(0, write(1, 0, 64));
        // The write is through, its acknowledgement is not yet sent or on its way: it is lost if it was not sent.
        rig.step_until(|rig| rig.net.stats().packets == 1);
        rig.net.set_loss(1.0);
        rig.settle();
        assert_eq!(rig.a.sent(), [(1, Status::RetryExceeded)]);
        rig.same(0, 0, 64)
    };
    assert!((0..4).all(landed));
}

#[test]
fn a_failed_lane_is_known_to_its_peer_only_when_used() {
    let mut rig = Rig::new(seeded(43), 2);
    assert!(rig.net.fail_lane("b", rig.lanes[0].1));
    assert!(!rig.net.fail_lane("b", kvpush::fabric::LaneId(999)));
    assert!(!rig.net.fail_lane("nobody", rig.lanes[0].1));
    rig.settle();
    assert_eq!(rig.a.poll(), []);
    assert_eq!(rig.b.poll().len(), LANE.receive_depth as usize);
    rig.post(0, write(1, 0, 64));
    rig.post(1, write(2, 0, 64));
    rig.settle();
    let mut sent = rig.a.sent();
    sent.sort_by_key(|(id, _)| *id);
    assert_eq!(sent, [(1, Status::RetryExceeded), (2, Status::Success)]);
}

#[test]
fn a_post_can_fail_in_the_middle() {
    let mut rig = Rig::new(seeded(44), 1);
    rig.net.post_fails_at(2);
    let (request, sge) = rig.request(&write(0, 0, 64));
    let requests: Vec<_> = (0..4).map(|id| WorkRequest { id, ..request }).collect();
    // Too short to be hit.
    rig.post_raw(0, &requests[..2], &[sge]).unwrap();
    let error = rig.post_raw(0, &requests, &[sge]).unwrap_err();
    assert_eq!(
        (error.posted, error.source.kind),
        (2, FabricErrorKind::Os(libc::ENOMEM))
    );
    // Once only.
    rig.post_raw(0, &requests[2..], &[sge]).unwrap();
    rig.settle();
    let ids: Vec<_> = rig.a.sent().into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, [0, 1, 0, 1, 2, 3]);
}

#[test]
fn a_killed_device_is_silent_and_its_context_fails() {
    let mut rig = Rig::new(seeded(45), 1);
    rig.post(0, write(1, 0, 32 * MTU));
    rig.step_until(|rig| rig.b.memory.byte(4 * MTU) != 0);
    assert!(rig.net.kill_device("b"));
    assert!(!rig.net.kill_device("b"));
    let before = rig.b.memory.bytes(0, 32 * MTU);
    rig.settle();
    assert!(rig.b.memory.bytes(0, 32 * MTU) == before);
    assert_eq!(rig.a.sent(), [(1, Status::RetryExceeded)]);
    let error = rig.b.context.poll(&mut Vec::new()).unwrap_err();
    assert!(matches!(error.kind, FabricErrorKind::Fatal(_)), "{error}");
}

#[test]
fn a_packet_on_the_wire_outlives_its_sender() {
    let mut rig = Rig::new(seeded(46), 1);
    rig.post(0, write(1, 0, 64));
    rig.step_until(|rig| rig.net.stats().packets == 1);
    rig.net.kill_device("a");
    assert_eq!(rig.b.memory.byte(1), 0);
    rig.settle();
    assert_ne!(rig.b.memory.byte(1), 0);
}

#[test]
fn a_delay_spike_holds_up_its_lane() {
    let arrival = |p| {
        let mut rig = Rig::new(seeded(47), 1);
        rig.net.set_delay_spikes(p, 300_000);
        rig.post(0, write(1, 0, 64));
        rig.settle();
        assert_eq!(rig.a.sent(), [(1, Status::Success)]);
        rig.net.now()
    };
    assert!(arrival(0.0) < 300_000);
    assert!(arrival(1.0) > 600_000);
}

#[test]
fn a_slow_link_retransmits_without_harm() {
    // Answers always come after the time-out: everything is sent several times and placed once.
    for seed in 0..20 {
        let config = kvpush::fabric::sim::SimConfig {
            timeout: 3_000,
            ..seeded(seed)
        };
        let mut rig = Rig::new(config, 1);
        rig.post(0, write(1, 0, 4 * MTU));
        rig.post_imm(0, 2, 5);
        rig.settle();
        assert_eq!(
            rig.a.sent(),
            [(1, Status::Success), (2, Status::Success)],
            "seed {seed}"
        );
        assert_eq!(rig.b.poll().len(), 1);
        assert_eq!(rig.net.stats().bytes, 4 * MTU as u64);
    }
}

/// Loses everything sent until `count` packets have been.
fn lose_until(rig: &mut Rig, count: u64) {
    rig.net.set_loss(1.0);
    rig.step_until(|rig| rig.net.stats().packets == count);
    rig.net.set_loss(0.0);
}

#[test]
fn a_gap_is_asked_for_and_not_waited_for() {
    for (seed, opcode) in [(48, Opcode::Write), (49, Opcode::Read)] {
        let mut rig = Rig::new(seeded(seed), 1);
        rig.b.memory.fill(9);
        let (request, sge) = rig.request(&write(1, 0, 64 * MTU));
        rig.post_raw(0, &[WorkRequest { opcode, ..request }], &[sge])
            .unwrap();
        let stats = |rig: &Rig| rig.net.stats();
        for _ in 0..2 {
            // In the middle, then again after the first repair has begun.
            let (packets, bytes) = (stats(&rig).packets, stats(&rig).bytes);
            rig.step_until(|rig| {
                stats(rig).packets >= packets + 3 && stats(rig).bytes > bytes + 2 * MTU as u64
            });
            let packets = stats(&rig).packets;
            lose_until(&mut rig, packets + 2);
            let again = stats(&rig).retransmissions;
            rig.step_until(|rig| stats(rig).retransmissions > again);
        }
        rig.settle();
        assert_eq!(rig.a.sent(), [(1, Status::Success)]);
        assert!(rig.same(0, 0, 64 * MTU));
        assert_eq!(
            (stats(&rig).timeouts, stats(&rig).bytes),
            (0, 64 * MTU as u64),
            "{opcode:?}"
        );
        assert!(stats(&rig).lost >= 4);
    }
}

#[test]
fn read_data_answers_the_writes_before_it() {
    let mut rig = Rig::new(seeded(50), 1);
    rig.post(0, write(1, 0, 64));
    let (read, sge) = rig.request(&write(2, 0, 64));
    rig.post_raw(
        0,
        &[WorkRequest {
            opcode: Opcode::Read,
            ..read
        }],
        &[sge],
    )
    .unwrap();
    rig.step_until(|rig| rig.net.stats().packets == 2);
    // The write's acknowledgement is lost.
    rig.net.set_loss(1.0);
    rig.step_until(|rig| rig.net.stats().messages == 1);
    rig.net.set_loss(0.0);
    assert_eq!(rig.net.stats().lost, 1);
    rig.settle();
    assert_eq!(rig.a.sent(), [(1, Status::Success), (2, Status::Success)]);
    assert_eq!(
        (rig.net.stats().timeouts, rig.net.stats().retransmissions),
        (0, 0)
    );
}

#[test]
fn a_write_behind_a_read_needs_no_repair() {
    for seed in 0..20 {
        let mut rig = Rig::new(seeded(seed), 1);
        let (read, sge) = rig.request(&write(1, 0, 32 * MTU));
        rig.post_raw(
            0,
            &[WorkRequest {
                opcode: Opcode::Read,
                ..read
            }],
            &[sge],
        )
        .unwrap();
        rig.post(0, write(2, 50 * MTU, 64));
        rig.settle();
        assert_eq!(rig.a.sent(), [(1, Status::Success), (2, Status::Success)]);
        let stats = rig.net.stats();
        assert_eq!(
            (stats.timeouts, stats.retransmissions),
            (0, 0),
            "seed {seed}"
        );
    }
}

#[test]
fn progress_renews_the_patience() {
    let mut rig = Rig::new(seeded(51), 1);
    for id in 0..3 {
        rig.net.partition("a", "b", true);
        rig.post(0, write(id, 0, 64));
        rig.step_until(|rig| rig.net.stats().timeouts == (id + 1) * 7);
        rig.net.partition("a", "b", false);
        rig.settle();
        assert_eq!(rig.a.sent(), [(id, Status::Success)]);
    }

    let config = kvpush::fabric::sim::SimConfig {
        rnr_retry: 3,
        ..seeded(52)
    };
    let lane = kvpush::fabric::LaneConfig {
        receive_depth: 1,
        ..LANE
    };
    let mut rig = Rig::with(config, 1, lane, 64);
    rig.post_imm(0, 0, 0);
    rig.settle();
    assert_eq!(rig.a.sent(), [(0, Status::Success)]);
    for id in 1..4 {
        rig.post_imm(0, id, 0);
        rig.step_until(|rig| rig.net.stats().rnr_waits == id * 3);
        assert_eq!(rig.b.poll().len(), 1);
        rig.b.context.post_receives(rig.lanes[0].1, 1).unwrap();
        rig.settle();
        assert_eq!(rig.a.sent(), [(id, Status::Success)]);
    }
}

#[test]
fn the_trace_keeps_the_latest_events() {
    let config = kvpush::fabric::sim::SimConfig {
        trace_capacity: 10,
        ..seeded(53)
    };
    let mut rig = Rig::new(config, 1);
    rig.post(0, write(99, 0, 64 * MTU));
    rig.settle();
    let trace = rig.net.trace();
    assert_eq!(trace.entries.len(), 10);
    assert!(trace.forgotten > 64);
    let text = trace.to_string();
    assert!(
        text.contains("earlier events forgotten") && text.contains("id: Some(99)"),
        "{text}"
    );
}
