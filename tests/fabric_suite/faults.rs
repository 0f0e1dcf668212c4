//! Fences, flushes, lost peers, and nothing left behind.

use std::time::Duration;

use kvpush::fabric::{
    Access, FabricErrorKind, LaneAddress, LaneConfig, LaneId, Opcode, RemoteKey, Status,
};

use crate::{
    checker::same_bytes,
    harness::{LANE, Memory, Pair, request, sge},
};

pub(crate) fn fence_stops_a_stream(mut pair: Pair) {
    const LENGTH: usize = 32 << 20;
    const WRITES: u64 = 8;
    let (from, to) = (Memory::new(LENGTH, 0x99), Memory::new(LENGTH, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, peer) = pair.lane(&LANE);
    let requests: Vec<_> = (0..WRITES)
        .map(|id| {
            let part = LENGTH / WRITES as usize;
            let there = to.address() + id * part as u64;
            let mut write = request(id, Opcode::Write, there, target.remote, 1);
            write.first_sge = id as u32;
            write
        })
        .collect();
    let part = LENGTH / WRITES as usize;
    let sges: Vec<_> = (0..WRITES as usize)
        .map(|id| sge(&from, &source, id * part, part))
        .collect();
    pair.a.post(lane, &requests, &sges).expect("post");
    pair.until("the first byte", |_| to.read(0, 1) == [0x99]);
    pair.b.context.fence_lane(peer).expect("fence");
    let fenced = to.all();
    assert_eq!(
        fenced.last(),
        Some(&0),
        "the stream had ended before the fence"
    );
    pair.poll_for(Duration::from_millis(500));
    same_bytes("fenced memory", &to.all(), &fenced);
    pair.until("the writer's failures", |pair| {
        pair.a.sends().len() == WRITES as usize
    });
    let ids: Vec<_> = pair.a.sends().iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, (0..WRITES).collect::<Vec<_>>(), "in order");
    let failed: Vec<_> = pair.a.sends().iter().map(|(_, status)| *status).collect();
    let failed = failed
        .iter()
        .skip_while(|status| **status == Status::Success);
    let failed: Vec<_> = failed.collect();
    assert_eq!(failed.first(), Some(&&Status::RetryExceeded));
    assert!(
        failed
            .iter()
            .skip(1)
            .all(|status| **status == Status::Flushed),
        "{failed:?}"
    );
    same_bytes("fenced memory", &to.all(), &fenced);
    // The receives of the fenced lane are flushed.
    pair.until("flushed receives", |pair| pair.b.receives().len() == 16);
    assert!(
        pair.b
            .receives()
            .iter()
            .all(|(_, status)| *status == Status::Flushed)
    );
}

pub(crate) fn fence_flushes_in_order(mut pair: Pair) {
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let config = LaneConfig {
        receive_depth: 1,
        ..LANE
    };
    let (lane, _) = pair.lane(&config);
    // One receive: the second immediate and all behind it cannot finish.
    let requests: Vec<_> = (0..20u32)
        .map(|id| {
            let mut write = request(
                id.into(),
                Opcode::WriteImm(id),
                to.address(),
                target.remote,
                1,
            );
            write.signaled = id % 3 == 0;
            write
        })
        .collect();
    let sges = [sge(&from, &source, 0, 4096)];
    pair.a.post(lane, &requests, &sges).expect("post");
    pair.until("the first", |pair| pair.a.sends().len() == 1);
    pair.a.context.fence_lane(lane).expect("fence");
    pair.until("the flush", |pair| pair.a.sends().len() == 20);
    let mut wanted = vec![(0, Status::Success)];
    wanted.extend((1..20).map(|id| (id, Status::Flushed)));
    assert_eq!(pair.a.sends(), wanted);
    pair.a
        .context
        .fence_lane(lane)
        .expect("fences may be repeated");
    pair.a
        .post(lane, &requests[..2], &sges)
        .expect("posts are accepted");
    pair.until("the late flush", |pair| pair.a.sends().len() == 22);
    assert_eq!(
        pair.a.sends()[20..],
        [(0, Status::Flushed), (1, Status::Flushed)]
    );
}

pub(crate) fn unsignaled_failure_completes(mut pair: Pair) {
    let (lane, _) = pair.lane(&LANE);
    let requests: Vec<_> = (0..4)
        .map(|id| {
            let mut write = request(id, Opcode::WriteImm(1), 0, RemoteKey(0), 0);
            write.signaled = false;
            write
        })
        .collect();
    pair.a.context.fence_lane(lane).expect("fence");
    pair.a.post(lane, &requests, &[]).expect("post");
    pair.until("the failures", |pair| pair.a.sends().len() == 4);
    assert!(
        pair.a
            .sends()
            .iter()
            .all(|(_, status)| *status == Status::Flushed)
    );
}

pub(crate) fn destroyed_peer_is_noticed(mut pair: Pair) {
    let (from, to) = (Memory::new(4096, 1), Memory::new(4096, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, peer) = pair.lane(&LANE);
    let write = |id| request(id, Opcode::Write, to.address(), target.remote, 1);
    let sges = [sge(&from, &source, 0, 4096)];
    pair.a.post(lane, &[write(1)], &sges).expect("post");
    pair.until("the write", |pair| pair.a.sends() == [(1, Status::Success)]);
    pair.b.context.destroy_lane(peer).expect("destroy");
    to.write(0, &[0; 4096]);
    pair.a
        .post(lane, &[write(2), write(3)], &sges)
        .expect("post");
    pair.until("the loss", |pair| pair.a.sends().len() == 3);
    let wanted = [(2, Status::RetryExceeded), (3, Status::Flushed)];
    assert_eq!(pair.a.sends()[1..], wanted);
    same_bytes("untouched", &to.all(), &[0; 4096]);
}

pub(crate) fn unknown_lane_is_an_error(mut pair: Pair) {
    let nobody = LaneId(0x7fff_fff0);
    let state = |error: kvpush::fabric::FabricError| {
        assert!(
            matches!(error.kind, FabricErrorKind::LaneState { .. }),
            "{error}"
        );
    };
    state(pair.a.post(nobody, &[], &[]).expect_err("post").source);
    let context = &mut pair.a.context;
    state(context.fence_lane(nobody).expect_err("fence"));
    state(context.destroy_lane(nobody).expect_err("destroy"));
    state(context.post_receives(nobody, 1).expect_err("post_receives"));
    let (lane, _) = context.create_lane(&LANE).expect("create");
    let write = request(1, Opcode::Write, 0, RemoteKey(0), 0);
    state(
        pair.a
            .post(lane, &[write], &[])
            .expect_err("not connected")
            .source,
    );
    let garbage = LaneAddress::new(vec![0xff; 7]).expect("short");
    let error = pair
        .a
        .context
        .connect_lane(lane, &garbage, pair.b.host, true);
    let error = error.expect_err("garbage is no address");
    assert!(
        matches!(error.kind, FabricErrorKind::BadAddress(_)),
        "{error}"
    );
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

pub(crate) fn descriptors_do_not_leak(mut pair: Pair) {
    let cycle = |pair: &mut Pair| {
        let (lane, peer) = pair.lane(&LANE);
        let write = request(1, Opcode::WriteImm(1), 0, RemoteKey(0), 0);
        pair.a.post(lane, &[write], &[]).expect("post");
        pair.until("an immediate", |pair| {
            !pair.b.done.is_empty() && !pair.a.done.is_empty()
        });
        pair.a.done.clear();
        pair.b.done.clear();
        pair.a.context.destroy_lane(lane).expect("destroy");
        pair.b.context.destroy_lane(peer).expect("destroy");
    };
    for _ in 0..5 {
        cycle(&mut pair);
    }
    let before = descriptors();
    for _ in 0..200 {
        cycle(&mut pair);
    }
    assert_eq!(descriptors(), before, "descriptors after 200 lanes");
}
