//! Depths, limits, receives and which completions there are.

use std::time::Duration;

use kvpush::fabric::{Access, FabricErrorKind, LaneConfig, Opcode, Status};

use crate::harness::{LANE, Memory, Pair, request, sge};

pub(crate) fn only_signaled_requests_complete(mut pair: Pair) {
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let requests: Vec<_> = (0..30u64)
        .map(|id| {
            let mut write = request(id, Opcode::Write, to.address(), target.remote, 1);
            write.signaled = id % 10 == 9;
            write
        })
        .collect();
    let sges = [sge(&from, &source, 0, 4096)];
    pair.a.post(lane, &requests, &sges).expect("post");
    pair.until("the signaled ones", |pair| pair.a.sends().len() == 3);
    pair.poll_for(Duration::from_millis(20));
    let ok = Status::Success;
    assert_eq!(pair.a.sends(), [(9, ok), (19, ok), (29, ok)]);
    assert!(
        pair.b.done.is_empty(),
        "plain writes are one-sided: {:?}",
        pair.b.done
    );
    // A signaled completion frees the slots of all requests before it.
    for _ in 0..20 {
        let before = pair.a.sends().len();
        pair.a.post(lane, &requests, &sges).expect("post again");
        pair.until("the signaled ones", |pair| {
            pair.a.sends().len() == before + 3
        });
    }
}

pub(crate) fn full_queue_says_how_many_were_posted(mut pair: Pair) {
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let config = LaneConfig {
        send_depth: 8,
        ..LANE
    };
    let (lane, _) = pair.lane(&config);
    let requests: Vec<_> = (0..3000u64)
        .map(|id| request(id, Opcode::Write, to.address(), target.remote, 1))
        .collect();
    let sges = [sge(&from, &source, 0, 64)];
    let error = pair
        .a
        .post(lane, &requests, &sges)
        .expect_err("more than the depth");
    assert!(
        matches!(error.source.kind, FabricErrorKind::QueueFull { .. }),
        "{error}"
    );
    assert!(error.source.is_retryable());
    // Devices may round the depth up, but never accept what they did not grant.
    assert!(error.posted >= 8 && error.posted < 3000, "{error}");
    let first = error.posted;
    let error = pair
        .a
        .post(lane, &requests[..1], &sges)
        .expect_err("still full");
    assert_eq!(error.posted, 0);
    pair.until("the accepted ones", |pair| pair.a.sends().len() == first);
    let wanted: Vec<_> = (0..first as u64).map(|id| (id, Status::Success)).collect();
    assert_eq!(pair.a.sends(), wanted);
    pair.a
        .post(lane, &requests[..8], &sges)
        .expect("room again");
    pair.until("the rest", |pair| pair.a.sends().len() == first + 8);
}

pub(crate) fn immediate_waits_for_a_receive(mut pair: Pair) {
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let config = LaneConfig {
        receive_depth: 2,
        ..LANE
    };
    let (lane, peer) = pair.lane(&config);
    let requests: Vec<_> = (0..5u32)
        .map(|imm| {
            request(
                imm.into(),
                Opcode::WriteImm(imm),
                to.address(),
                target.remote,
                1,
            )
        })
        .collect();
    let sges = [sge(&from, &source, 0, 4096)];
    pair.a.post(lane, &requests, &sges).expect("post");
    pair.until("two immediates", |pair| pair.b.receives().len() == 2);
    pair.poll_for(Duration::from_millis(100));
    assert_eq!(pair.b.receives().len(), 2, "no receive, no immediate");
    assert_eq!(pair.a.sends().len(), 2, "not complete before it is placed");
    // The other direction still moves while this one waits.
    let back = request(9, Opcode::WriteImm(77), 0, target.remote, 0);
    pair.b.post(peer, &[back], &[]).expect("post back");
    pair.until("the way back", |pair| {
        pair.a.receives() == [(77, Status::Success)] && pair.b.sends() == [(9, Status::Success)]
    });
    pair.b.context.post_receives(peer, 1).expect("replenish");
    pair.until("the third", |pair| pair.b.receives().len() == 3);
    pair.b.context.post_receives(peer, 2).expect("replenish");
    pair.until("the rest", |pair| {
        pair.b.receives().len() == 5 && pair.a.sends().len() == 5
    });
    let imms: Vec<_> = (0..5).map(|imm| (imm, Status::Success)).collect();
    assert_eq!(pair.b.receives(), imms);
}

pub(crate) fn receives_beyond_depth_are_refused(mut pair: Pair) {
    let (lane, _) = pair.lane(&LANE);
    let error = pair
        .b
        .context
        .post_receives(lane, 1 << 15)
        .expect_err("far beyond the depth");
    assert!(
        matches!(error.kind, FabricErrorKind::QueueFull { .. }),
        "{error}"
    );
}

pub(crate) fn limits_are_enforced(mut pair: Pair) {
    let caps = pair.a.device.info().caps.clone();
    let beyond = LaneConfig {
        send_depth: caps.max_send_depth.saturating_add(1),
        ..LANE
    };
    let refused = pair.a.context.create_lane(&beyond);
    assert!(refused.is_err(), "a deeper queue than the device has");
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let piece = sge(&from, &source, 0, 16);
    let many = vec![piece; 200];
    let write = request(1, Opcode::Write, to.address(), target.remote, 200);
    let error = pair
        .a
        .post(lane, &[write], &many)
        .expect_err("too many elements");
    assert_eq!(error.posted, 0);
    let write = request(2, Opcode::Write, to.address(), target.remote, 2);
    let error = pair
        .a
        .post(lane, &[write], &[piece])
        .expect_err("beyond the list");
    assert_eq!(error.posted, 0);
    let mut write = request(3, Opcode::Write, to.address(), target.remote, 1);
    write.inline = true;
    let long = [sge(&from, &source, 0, 4096)];
    let error = pair
        .a
        .post(lane, &[write], &long)
        .expect_err("too long for inline");
    assert_eq!(error.posted, 0);
    // None of that harmed the lane.
    let write = request(4, Opcode::Write, to.address(), target.remote, 1);
    pair.a.post(lane, &[write], &[piece]).expect("post");
    pair.until("the write", |pair| pair.a.sends() == [(4, Status::Success)]);
}
