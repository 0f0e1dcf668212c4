//! Queues: depths, slots, overflow, flushing.

use kvpush::fabric::{
    CompletionKind, Device, FabricErrorKind, LaneAddress, LaneConfig, LaneId, Opcode, Status,
    WorkRequest,
    sim::{SimConfig, SimNet},
};

use crate::rig::{CQ_DEPTH, HOST, LANE, MTU, Rig, Write, seeded, write};

#[test]
fn a_send_slot_is_free_only_when_a_completion_at_or_after_it_is_polled() {
    let mut rig = Rig::with(
        seeded(21),
        1,
        LaneConfig {
            send_depth: 4,
            ..LANE
        },
        CQ_DEPTH,
    );
    let (request, sge) = rig.request(&write(0, 0, 64));
    let quiet = WorkRequest {
        signaled: false,
        ..request
    };
    let error = rig
        .post_raw(0, &[quiet, quiet, request, quiet, quiet], &[sge])
        .unwrap_err();
    assert_eq!(error.posted, 4);
    let full = FabricErrorKind::QueueFull {
        queue: "send queue",
        depth: 4,
    };
    assert_eq!(error.source.kind, full);
    assert!(error.source.is_retryable());
    rig.settle();
    // Done, but not polled.
    let error = rig.post_raw(0, &[quiet], &[sge]).unwrap_err();
    assert_eq!((error.posted, &error.source.kind), (0, &full));
    assert_eq!(rig.a.sent(), [(0, Status::Success)]);
    // Three slots are free again; the quiet request behind the completion holds the fourth.
    let error = rig
        .post_raw(0, &[quiet, quiet, quiet, quiet], &[sge])
        .unwrap_err();
    assert_eq!((error.posted, &error.source.kind), (3, &full));
    assert_eq!(rig.net.stats().queue_full, 3);
}

#[test]
fn an_unsignaled_success_makes_no_completion_and_its_failure_does() {
    let mut rig = Rig::new(seeded(22), 1);
    let (request, sge) = rig.request(&write(1, 0, 64));
    let quiet = WorkRequest {
        signaled: false,
        ..request
    };
    rig.post_raw(0, &[quiet], &[sge]).unwrap();
    rig.settle();
    assert_eq!(rig.a.sent(), []);
    assert!(rig.same(0, 0, 64));
    rig.post_raw(0, &[quiet], &[sge]).unwrap();
    rig.a.context.fence_lane(rig.lanes[0].0).unwrap();
    assert_eq!(rig.a.sent(), [(1, Status::Flushed)]);
}

#[test]
fn a_failed_lane_flushes_in_order_and_then_what_is_posted_to_it() {
    let mut rig = Rig::new(seeded(23), 1);
    for id in 0..8 {
        rig.post(0, write(id, 0, 8 * MTU));
    }
    rig.step_until(|rig| rig.b.memory.byte(MTU) != 0);
    rig.a.context.fence_lane(rig.lanes[0].0).unwrap();
    rig.post(0, write(8, 0, 64));
    let flushed: Vec<_> = (0..9).map(|id| (id, Status::Flushed)).collect();
    assert_eq!(rig.a.sent(), flushed);
    rig.a.context.post_receives(rig.lanes[0].0, 2).unwrap();
    let receives = rig.a.poll();
    assert_eq!(receives.len(), 2);
    // What means nothing is garbage.
    assert_ne!(receives[0].kind, receives[1].kind);
    assert!(receives.iter().all(|c| c.status == Status::Flushed));
    // It stays failed.
    rig.settle();
    rig.a.context.fence_lane(rig.lanes[0].0).unwrap();
    assert_eq!(rig.a.poll(), []);
    rig.post(0, write(9, 0, 64));
    rig.settle();
    assert_eq!(rig.a.sent(), [(9, Status::Flushed)]);
}

#[test]
fn no_receive_makes_the_sender_wait_and_a_new_one_lets_it_go_on() {
    let mut rig = Rig::with(
        seeded(24),
        1,
        LaneConfig {
            receive_depth: 1,
            ..LANE
        },
        CQ_DEPTH,
    );
    rig.post_imm(0, 1, 10);
    rig.post(
        0,
        Write {
            imm: Some(11),
            ..write(2, 0, 3 * MTU)
        },
    );
    rig.post(0, write(3, 50 * MTU, 64));
    rig.step_until(|rig| rig.net.stats().rnr_waits >= 20);
    // Not a packet until the timer ends, whatever is posted.
    rig.post(0, write(4, 50 * MTU, 64));
    let packets = rig.net.stats().packets;
    rig.net
        .advance_to(rig.net.now() + SimConfig::default().rnr_timer - 1);
    assert_eq!(rig.net.stats().packets, packets);
    let received = |rig: &mut Rig| {
        let kinds = rig.b.poll().into_iter().map(|c| (c.kind, c.status));
        kinds.collect::<Vec<_>>()
    };
    let imm = |imm| [(CompletionKind::Received { imm }, Status::Success)];
    assert_eq!(received(&mut rig), imm(10));
    assert_eq!(rig.a.sent(), [(1, Status::Success)]);
    // What is behind the immediate waits with it; the packets before it are placed.
    assert_eq!(rig.b.memory.byte(50 * MTU), 0);
    assert!(rig.same(0, 0, 2 * MTU));
    rig.b.context.post_receives(rig.lanes[0].1, 1).unwrap();
    rig.settle();
    assert_eq!(received(&mut rig), imm(11));
    assert!(rig.same(0, 0, 3 * MTU) && rig.same(50 * MTU, 50 * MTU, 64));
    let done: Vec<_> = (2..5).map(|id| (id, Status::Success)).collect();
    assert_eq!(rig.a.sent(), done);
}

#[test]
fn the_sender_gives_up_after_its_rnr_retries() {
    let config = SimConfig {
        rnr_retry: 3,
        ..seeded(25)
    };
    let mut rig = Rig::with(
        config,
        1,
        LaneConfig {
            receive_depth: 0,
            ..LANE
        },
        CQ_DEPTH,
    );
    rig.post(0, write(1, 0, 64));
    rig.post_imm(0, 2, 1);
    rig.post_imm(0, 3, 1);
    rig.settle();
    assert_eq!(rig.net.stats().rnr_waits, 3);
    let expected = [
        (1, Status::Success),
        (2, Status::RnrRetryExceeded),
        (3, Status::Flushed),
    ];
    assert_eq!(rig.a.sent(), expected);
}

#[test]
fn a_receive_slot_is_free_only_when_its_completion_is_polled() {
    let mut rig = Rig::new(seeded(26), 1);
    let lane = rig.lanes[0].1;
    let full = FabricErrorKind::QueueFull {
        queue: "receive queue",
        depth: LANE.receive_depth,
    };
    let refused = |rig: &mut Rig, count| rig.b.context.post_receives(lane, count).unwrap_err().kind;
    assert_eq!(refused(&mut rig, 1), full);
    rig.post_imm(0, 1, 1);
    rig.settle();
    assert_eq!(refused(&mut rig, 1), full);
    rig.b.poll();
    assert_eq!(refused(&mut rig, 2), full);
    assert_eq!(refused(&mut rig, u32::MAX), full);
    rig.b.context.post_receives(lane, 1).unwrap();
}

#[test]
fn a_completion_too_many_ends_the_context_and_is_counted() {
    let mut rig = Rig::with(seeded(27), 2, LANE, 3);
    for id in 0..3 {
        rig.post(0, write(id, 0, 64));
    }
    rig.settle();
    assert_eq!(
        (rig.net.stats().cq_high_water, rig.net.stats().cq_overflows),
        (3, 0)
    );
    rig.post(1, write(3, 0, 64));
    rig.settle();
    assert_eq!(rig.net.stats().cq_overflows, 1);
    let error = rig.a.context.poll(&mut Vec::new()).unwrap_err();
    assert!(matches!(error.kind, FabricErrorKind::Fatal(_)), "{error}");
    assert!(
        error.to_string().contains("completion queue overflow"),
        "{error}"
    );
    let (request, sge) = rig.request(&write(4, 0, 64));
    let error = rig.post_raw(0, &[request], &[sge]).unwrap_err();
    assert!(
        matches!(error.source.kind, FabricErrorKind::Fatal(_)),
        "{error}"
    );
    assert!(rig.a.context.arm().is_err());
    // The peer is not harmed.
    assert_eq!(rig.b.poll(), []);
}

#[test]
fn destroying_a_lane_discards_its_completions_and_no_others() {
    let mut rig = Rig::new(seeded(28), 2);
    rig.post(0, write(1, 0, 64));
    rig.post(1, write(2, 0, 64));
    rig.settle();
    rig.a.context.destroy_lane(rig.lanes[0].0).unwrap();
    assert_eq!(rig.a.sent(), [(2, Status::Success)]);
    let (gone, _) = rig.lanes[0];
    let unknown = FabricErrorKind::LaneState {
        lane: gone,
        state: "unknown",
    };
    assert_eq!(rig.a.context.destroy_lane(gone).unwrap_err().kind, unknown);
    assert_eq!(rig.a.context.fence_lane(gone).unwrap_err().kind, unknown);
    assert_eq!(
        rig.a.context.post_receives(gone, 1).unwrap_err().kind,
        unknown
    );
    let (request, sge) = rig.request(&write(3, 0, 64));
    assert_eq!(
        rig.post_raw(0, &[request], &[sge]).unwrap_err().source.kind,
        unknown
    );
    // Its number is not used again.
    let (new, _) = rig.a.context.create_lane(&LANE).unwrap();
    assert!(new > gone);
}

#[test]
fn limits_of_requests_are_checked_at_the_post() {
    let mut rig = Rig::new(seeded(29), 1);
    let (request, sge) = rig.request(&write(1, 0, 64));
    let sges = [sge; 5];
    let long = kvpush::fabric::Sge {
        length: u32::MAX,
        ..sge
    };
    let limited = |rig: &mut Rig, request, sges: &[_], expected: &str| {
        let error = rig.post_raw(0, &[request], sges).unwrap_err();
        match error.source.kind {
            FabricErrorKind::Limit { what, .. } => assert_eq!(what, expected),
            other => panic!("{other}"),
        }
    };
    limited(
        &mut rig,
        WorkRequest {
            sge_count: 5,
            ..request
        },
        &sges,
        "gather elements",
    );
    limited(
        &mut rig,
        WorkRequest {
            first_sge: 5,
            ..request
        },
        &sges,
        "end of the gather list",
    );
    let beyond = WorkRequest {
        first_sge: u32::MAX,
        ..request
    };
    limited(&mut rig, beyond, &sges, "end of the gather list");
    let inline = WorkRequest {
        inline: true,
        sge_count: 2,
        ..request
    };
    limited(&mut rig, inline, &sges, "inline bytes");
    limited(&mut rig, request, &[long], "message");
    let read = WorkRequest {
        opcode: Opcode::Read,
        inline: true,
        ..request
    };
    let error = rig.post_raw(0, &[read], &sges).unwrap_err();
    assert_eq!(error.source.kind, FabricErrorKind::Os(libc::EINVAL));
    rig.settle();
    assert_eq!(rig.a.poll(), []);
}

#[test]
fn lanes_are_created_within_limits_and_connected_once() {
    let mut rig = Rig::new(seeded(30), 0);
    let caps = rig.a.device.info().caps.clone();
    for config in [
        LaneConfig {
            send_depth: caps.max_send_depth + 1,
            ..LANE
        },
        LaneConfig {
            receive_depth: caps.max_receive_depth + 1,
            ..LANE
        },
        LaneConfig {
            max_sge: caps.max_sge + 1,
            ..LANE
        },
        LaneConfig {
            max_inline: caps.max_inline + 1,
            ..LANE
        },
    ] {
        let error = rig.a.context.create_lane(&config).unwrap_err();
        assert!(
            matches!(error.kind, FabricErrorKind::Limit { .. }),
            "{error}"
        );
    }
    let (lane, address) = rig.a.context.create_lane(&LANE).unwrap();
    let (_, theirs) = rig.b.context.create_lane(&LANE).unwrap();
    let (request, sge) = rig.request(&write(1, 0, 64));
    let error = rig.a.post(lane, &[request], &[sge]).unwrap_err();
    let state = "not connected";
    assert_eq!(
        error.source.kind,
        FabricErrorKind::LaneState { lane, state }
    );

    // Any prefix, any longer one, any other net's.
    let mut bad: Vec<Vec<u8>> = (0..address.as_bytes().len())
        .map(|length| theirs.as_bytes()[..length].to_vec())
        .collect();
    bad.push([theirs.as_bytes(), &[0]].concat());
    let other = SimNet::new(seeded(30)).device("b");
    let mut context = other.open_context(16).unwrap();
    bad.push(context.create_lane(&LANE).unwrap().1.as_bytes().to_vec());
    for bytes in bad {
        let bad = LaneAddress::new(bytes).unwrap();
        let error = rig
            .a
            .context
            .connect_lane(lane, &bad, HOST, true)
            .unwrap_err();
        assert!(
            matches!(error.kind, FabricErrorKind::BadAddress(_)),
            "{error}"
        );
    }

    rig.a
        .context
        .connect_lane(lane, &theirs, HOST, true)
        .unwrap();
    let error = rig
        .a
        .context
        .connect_lane(lane, &theirs, HOST, true)
        .unwrap_err();
    let state = "ready";
    assert_eq!(error.kind, FabricErrorKind::LaneState { lane, state });
    let nobody = LaneId(999);
    let error = rig
        .a
        .context
        .connect_lane(nobody, &theirs, HOST, true)
        .unwrap_err();
    let state = "unknown";
    assert_eq!(
        error.kind,
        FabricErrorKind::LaneState {
            lane: nobody,
            state
        }
    );
}

#[test]
fn a_device_serves_one_context() {
    let rig = Rig::new(seeded(31), 0);
    let error = rig.net.device("a").open_context(16).err().unwrap();
    assert_eq!(error.kind, FabricErrorKind::Os(libc::EBUSY));
    let too_many = rig.a.device.info().caps.max_completions + 1;
    let error = rig.net.device("c").open_context(too_many).err().unwrap();
    assert!(
        matches!(error.kind, FabricErrorKind::Limit { .. }),
        "{error}"
    );
}

/// Whether the descriptor is readable now.
fn readable(context: &dyn kvpush::fabric::Context) -> bool {
    let mut wait = libc::pollfd {
        fd: context.wait_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut wait, 1, 0) > 0 }
}

#[test]
fn a_completion_wakes_an_armed_context_only() {
    let mut rig = Rig::new(seeded(32), 1);
    rig.post_imm(0, 1, 1);
    assert!(rig.b.context.arm().unwrap());
    assert!(!readable(rig.b.context.as_ref()));
    rig.settle();
    assert!(readable(rig.b.context.as_ref()));
    assert!(!readable(rig.a.context.as_ref()), "not armed");
    // Something is waiting, so there is no sleep.
    assert!(!rig.b.context.arm().unwrap());
    assert_eq!(rig.b.poll().len(), 1);
    assert!(rig.b.context.arm().unwrap());
    assert!(!readable(rig.b.context.as_ref()));
}
