//! Memory windows: what a key opens, for whom, and for how long.

use std::time::Duration;

use kvpush::fabric::{
    Access, FabricErrorKind, LaneConfig, LaneId, MemoryKeys, Opcode, RemoteKey, Status, Window,
    WindowBind, WindowCaps, WindowId,
};

use crate::{
    checker::same_bytes,
    harness::{LANE, Memory, Pair, Random, request, sge},
};

const PAGE: usize = 4096;
const POISON: u8 = 0x5a;
/// Completions of bindings and invalidations.
const BOUND: u64 = 1 << 40;
const TAKEN: u64 = 1 << 41;

const WRITE: Access = Access {
    local_write: false,
    ..Access::REMOTE_WRITE
};

/// The windows of the reader's device; says so if it has none.
fn caps(pair: &Pair) -> Option<WindowCaps> {
    let caps = pair.b.device.info().caps.windows;
    if caps.is_none() {
        println!("skipped: the device has no memory windows");
    }
    caps
}

fn bind_of(keys: &MemoryKeys, memory: &Memory, offset: usize, length: usize) -> WindowBind {
    WindowBind {
        id: BOUND,
        mr: keys.mr,
        address: memory.address() + offset as u64,
        length: length as u64,
        access: WRITE,
    }
}

/// Binds a window of `b` and waits until it is.
fn bound(pair: &mut Pair, lane: LaneId, bind: WindowBind) -> Window {
    let before = completed(pair, bind.id);
    let window = pair.b.context.bind_window(lane, &bind).expect("bind");
    pair.until("the binding", |pair| completed(pair, bind.id) > before);
    window
}

/// Takes a window of `b` back and waits until it is.
fn taken(pair: &mut Pair, lane: LaneId, window: WindowId) {
    let before = completed(pair, TAKEN);
    pair.b
        .context
        .invalidate_window(lane, TAKEN, window)
        .expect("invalidate");
    pair.until("the invalidation", |pair| completed(pair, TAKEN) > before);
}

fn completed(pair: &Pair, id: u64) -> usize {
    let sends = pair.b.sends();
    sends
        .iter()
        .filter(|sent| **sent == (id, Status::Success))
        .count()
}

/// Writes `length` bytes of `0x33` and gives the status.
fn write(pair: &mut Pair, lane: LaneId, to: u64, key: RemoteKey, length: usize) -> Status {
    let from = Memory::new(length, 0x33);
    let source = pair.a.register(&from, Access::LOCAL);
    let before = pair.a.sends().len();
    let write = request(9, Opcode::Write, to, key, 1);
    let piece = sge(&from, &source, 0, length);
    pair.a.post(lane, &[write], &[piece]).expect("post");
    pair.until("the write", |pair| pair.a.sends().len() > before);
    pair.a.sends()[before].1
}

pub(crate) fn a_window_opens_its_range(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    const FIRST: usize = PAGE + 13;
    const LENGTH: usize = 2 * PAGE - 5;
    let to = Memory::new(4 * PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (a, b) = pair.lane(&LANE);
    let window = bound(&mut pair, b, bind_of(&target, &to, FIRST, LENGTH));
    assert_ne!(window.remote, target.remote);
    let there = to.address() + FIRST as u64;
    let mut expected = vec![POISON; to.len()];
    for (offset, length) in [(0, 1), (LENGTH - 1, 1), (100, 200), (0, LENGTH)] {
        let status = write(&mut pair, a, there + offset as u64, window.remote, length);
        assert_eq!(status, Status::Success, "{offset}..+{length}");
        expected[FIRST + offset..][..length].fill(0x33);
        same_bytes("inside", &to.all(), &expected);
    }
}

/// One byte too far on either side, across either end, and elsewhere in the registration.
pub(crate) fn outside_of_the_window_is_refused(mut pair: Pair) {
    let Some(caps) = caps(&pair) else { return };
    const FIRST: usize = PAGE + 13;
    const LENGTH: usize = 1000;
    let to = Memory::new(4 * PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    for (first, length) in [
        (FIRST - 1, 1),
        (FIRST + LENGTH, 1),
        (FIRST - 1, LENGTH),
        (FIRST + 1, LENGTH),
        (FIRST - 1, LENGTH + 2),
        (3 * PAGE, 10),
    ] {
        let (a, b) = pair.lane(&LANE);
        let window = bound(&mut pair, b, bind_of(&target, &to, FIRST, LENGTH));
        let there = to.address() + first as u64;
        let status = write(&mut pair, a, there, window.remote, length);
        if caps.bounded {
            assert_eq!(status, Status::RemoteAccess, "{first}..+{length}");
            same_bytes("untouched", &to.all(), &vec![POISON; to.len()]);
        } else {
            // What `WindowCaps::bounded` warns of; should a kernel learn to compare, this tells.
            println!("{first}..+{length}: {status:?}: the device compares with the registration");
            assert_eq!(status, Status::Success);
        }
        pair.a.context.destroy_lane(a).expect("destroy");
        pair.b.context.destroy_lane(b).expect("destroy");
    }
    // Nothing opens what lies outside of the registration.
    let (a, b) = pair.lane(&LANE);
    let window = bound(&mut pair, b, bind_of(&target, &to, 3 * PAGE, PAGE));
    let there = to.address() + to.len() as u64 - 1;
    let status = write(&mut pair, a, there, window.remote, 2);
    assert_eq!(status, Status::RemoteAccess);
}

pub(crate) fn a_window_taken_back_is_shut(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    let to = Memory::new(2 * PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (a, b) = pair.lane(&LANE);
    let (other_a, other_b) = pair.lane(&LANE);
    let window = bound(&mut pair, b, bind_of(&target, &to, 0, PAGE));
    let other = bound(&mut pair, other_b, bind_of(&target, &to, PAGE, PAGE));
    assert_eq!(
        write(&mut pair, a, to.address(), window.remote, 1),
        Status::Success
    );
    taken(&mut pair, b, window.id);
    let before = to.all();
    let status = write(&mut pair, a, to.address(), window.remote, PAGE);
    assert_eq!(status, Status::RemoteAccess);
    same_bytes("shut", &to.all(), &before);
    // The lane has failed for that, and no other.
    let there = to.address() + PAGE as u64;
    assert_eq!(
        write(&mut pair, other_a, there, other.remote, PAGE),
        Status::Success
    );
    let again = pair.b.context.invalidate_window(b, TAKEN, window.id);
    assert!(again.is_err(), "a window is taken back once");
}

pub(crate) fn another_lane_cannot_use_a_window(mut pair: Pair) {
    let Some(caps) = caps(&pair) else { return };
    if !caps.per_lane {
        println!("skipped: windows of type 2A");
        return;
    }
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (a, b) = pair.lane(&LANE);
    let (thief, _) = pair.lane(&LANE);
    let window = bound(&mut pair, b, bind_of(&target, &to, 0, PAGE));
    let status = write(&mut pair, thief, to.address(), window.remote, 10);
    assert_eq!(status, Status::RemoteAccess);
    same_bytes("untouched", &to.all(), &[POISON; PAGE]);
    assert_eq!(
        write(&mut pair, a, to.address(), window.remote, PAGE),
        Status::Success
    );
}

pub(crate) fn binding_again_gives_another_key(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (a, b) = pair.lane(&LANE);
    let mut keys = Vec::new();
    for _ in 0..20 {
        let window = bound(&mut pair, b, bind_of(&target, &to, 0, PAGE));
        assert!(!keys.contains(&window.remote), "a key came again");
        assert_eq!(
            write(&mut pair, a, to.address(), window.remote, 1),
            Status::Success
        );
        taken(&mut pair, b, window.id);
        keys.push(window.remote);
    }
    let window = bound(&mut pair, b, bind_of(&target, &to, 0, PAGE));
    let before = to.all();
    let stale = keys.swap_remove(7);
    assert_ne!(stale, window.remote);
    let status = write(&mut pair, a, to.address(), stale, PAGE);
    assert_eq!(status, Status::RemoteAccess);
    same_bytes("a stale key", &to.all(), &before);
}

/// Windows of random ranges, overlapping or not, on two lanes; each byte written through its own.
pub(crate) fn many_windows(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    const LENGTH: usize = 16 * PAGE;
    let mut random = Random::new("many_windows");
    let to = Memory::new(LENGTH, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let lanes = [pair.lane(&LANE), pair.lane(&LANE)];
    let mut expected = vec![POISON; LENGTH];
    let mut windows = Vec::new();
    for index in 0..150 {
        let (a, b) = lanes[index % 2];
        let first = random.below(LENGTH - 1);
        let length = 1 + random.below((LENGTH - first).min(3 * PAGE));
        let window = bound(&mut pair, b, bind_of(&target, &to, first, length));
        windows.push((a, b, first, length, window));
    }
    while !windows.is_empty() {
        let (a, b, first, length, window) = windows.swap_remove(random.below(windows.len()));
        let there = to.address() + first as u64;
        assert_eq!(
            write(&mut pair, a, there, window.remote, length),
            Status::Success
        );
        expected[first..][..length].fill(0x33);
        taken(&mut pair, b, window.id);
    }
    same_bytes("all windows", &to.all(), &expected);
    pair.b
        .context
        .deregister(target.mr)
        .expect("no window is left");
}

pub(crate) fn windows_run_out_with_a_typed_error(mut pair: Pair) {
    let Some(caps) = caps(&pair) else { return };
    if caps.max > 1 << 16 {
        println!("skipped: {} windows would take too long", caps.max);
        return;
    }
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (_, b) = pair.lane(&LANE);
    let (mut refused, mut made, mut last) = (None, 0, None);
    while refused.is_none() {
        pair.b.done.clear();
        let mut batch = 0;
        while batch < LANE.send_depth as usize && refused.is_none() {
            match pair
                .b
                .context
                .bind_window(b, &bind_of(&target, &to, 0, PAGE))
            {
                Ok(window) => {
                    last = Some(window.id);
                    batch += 1;
                }
                Err(error) => refused = Some(error),
            }
        }
        made += batch as u32;
        pair.until("the bindings", |pair| completed(pair, BOUND) == batch);
    }
    let error = refused.expect("the loop's condition");
    // Another process may hold some of a device's windows; then it is the driver that refuses.
    let typed = matches!(
        error.kind,
        FabricErrorKind::Limit { .. } | FabricErrorKind::Os(libc::ENOMEM)
    );
    assert!(typed, "after {made}: {error}");
    assert!(made <= caps.max);
    // One back is one to have.
    taken(&mut pair, b, last.expect("a window"));
    bound(&mut pair, b, bind_of(&target, &to, 0, PAGE));
    // And all are back with the lane.
    assert!(pair.b.context.deregister(target.mr).is_err(), "in use");
    pair.b.context.destroy_lane(b).expect("destroy");
    pair.b.context.deregister(target.mr).expect("not in use");
    let again = pair.b.register(&to, Access::REMOTE_WRITE);
    let (_, b) = pair.lane(&LANE);
    bound(&mut pair, b, bind_of(&again, &to, 0, PAGE));
}

pub(crate) fn impossible_windows_are_refused(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    let to = Memory::new(4 * PAGE, POISON);
    let target = pair
        .b
        .register_part(&to, PAGE, 2 * PAGE, Access::REMOTE_WRITE);
    let config = LaneConfig {
        send_depth: 2,
        ..LANE
    };
    let (_, b) = pair.lane(&config);
    let (_, other) = pair.lane(&config);
    let good = bind_of(&target, &to, PAGE, 2 * PAGE);
    let bad = [
        bind_of(&target, &to, PAGE - 1, 10),
        bind_of(&target, &to, 3 * PAGE - 9, 10),
        bind_of(&target, &to, PAGE, 0),
        WindowBind {
            length: u64::MAX,
            ..good
        },
        WindowBind {
            access: Access::ALL,
            ..good
        },
        WindowBind {
            mr: kvpush::fabric::MrId(u64::MAX),
            ..good
        },
    ];
    for bind in bad {
        let error = pair
            .b
            .context
            .bind_window(b, &bind)
            .expect_err("impossible");
        assert!(matches!(error.kind, FabricErrorKind::Memory(_)), "{error}");
    }
    let window = bound(&mut pair, b, good);
    let busy = pair.b.context.deregister(target.mr);
    assert!(busy.is_err(), "a registration with windows stays");
    for (lane, id) in [(other, window.id), (b, WindowId(u64::MAX))] {
        let error = pair.b.context.invalidate_window(lane, TAKEN, id);
        let error = error.expect_err("no such window");
        assert!(matches!(error.kind, FabricErrorKind::Memory(_)), "{error}");
    }
    // Slots of the send queue count.
    for _ in 0..config.send_depth {
        pair.b.context.bind_window(b, &good).expect("bind");
    }
    let error = pair.b.context.bind_window(b, &good).expect_err("full");
    assert!(
        matches!(error.kind, FabricErrorKind::QueueFull { .. }),
        "{error}"
    );
    let full = pair.b.context.invalidate_window(b, TAKEN, window.id);
    assert!(matches!(
        full.expect_err("full").kind,
        FabricErrorKind::QueueFull { .. }
    ));
    pair.until("the bindings", |pair| completed(pair, BOUND) == 3);
    taken(&mut pair, b, window.id);
    // A lane that is not connected, or not any more, has none.
    let (lone, _) = pair.b.context.create_lane(&LANE).expect("create a lane");
    pair.b.context.fence_lane(b).expect("fence");
    for lane in [lone, b, LaneId(0x00ff_ffff)] {
        let error = pair.b.context.bind_window(lane, &good);
        let error = error.expect_err("no lane for it");
        assert!(
            matches!(error.kind, FabricErrorKind::LaneState { .. }),
            "{error}"
        );
    }
}

pub(crate) fn rights_of_a_window_are_its_own(mut pair: Pair) {
    if caps(&pair).is_none() {
        return;
    }
    if !pair.b.device.info().caps.read {
        println!("skipped: the device serves no reads");
        return;
    }
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::ALL);
    let into = Memory::new(PAGE, 0);
    let into_keys = pair.a.register(&into, Access::LOCAL);
    let (a, b) = pair.lane(&LANE);
    let read_only = WindowBind {
        access: Access {
            local_write: false,
            remote_write: false,
            ..Access::ALL
        },
        ..bind_of(&target, &to, 0, PAGE)
    };
    let window = bound(&mut pair, b, read_only);
    let read = request(1, Opcode::Read, to.address(), window.remote, 1);
    let piece = sge(&into, &into_keys, 0, PAGE);
    pair.a.post(a, &[read], &[piece]).expect("post");
    pair.until("the read", |pair| pair.a.sends().len() == 1);
    assert_eq!(pair.a.sends(), [(1, Status::Success)]);
    same_bytes("read", &into.all(), &[POISON; PAGE]);
    let status = write(&mut pair, a, to.address(), window.remote, 1);
    assert_eq!(status, Status::RemoteAccess);
    same_bytes("not written", &to.all(), &[POISON; PAGE]);
}

/// In the middle of a message. After the completion not one byte more, and only this lane has failed.
pub(crate) fn taking_back_stops_a_stream(mut pair: Pair) {
    let Some(caps) = caps(&pair) else { return };
    const LENGTH: usize = 32 << 20;
    const WRITES: usize = 8;
    let (from, to) = (Memory::new(LENGTH, 0x99), Memory::new(LENGTH + PAGE, 0));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (a, b) = pair.lane(&LANE);
    let (other_a, other_b) = pair.lane(&LANE);
    let window = bound(&mut pair, b, bind_of(&target, &to, 0, LENGTH));
    let other = bound(&mut pair, other_b, bind_of(&target, &to, LENGTH, PAGE));
    let part = LENGTH / WRITES;
    let stream: Vec<_> = (0..WRITES)
        .map(|id| {
            let there = to.address() + (id * part) as u64;
            let mut write = request(id as u64, Opcode::Write, there, window.remote, 1);
            write.first_sge = id as u32;
            write
        })
        .collect();
    let sges: Vec<_> = (0..WRITES)
        .map(|id| sge(&from, &source, id * part, part))
        .collect();
    pair.a.post(a, &stream, &sges).expect("post");
    pair.until("the first byte", |_| to.read(0, 1) == [0x99]);
    let took = pair.b.context.invalidate_window(b, TAKEN, window.id);
    took.expect("invalidate");
    let answer = |pair: &Pair| {
        let sends = pair.b.sends();
        let found = sends.into_iter().find(|(id, _)| *id == TAKEN);
        found.map(|(_, status)| status)
    };
    pair.until("the invalidation", |pair| answer(pair).is_some());
    if answer(&pair) != Some(Status::Success) {
        // The peer's next packet may be refused, and the lane fail for that, before a device reports what it has done.
        assert_eq!(answer(&pair), Some(Status::Flushed));
        pair.b.context.fence_lane(b).expect("fence");
    } else if !caps.final_when_done {
        // One packet may still be copied; no test can wait for that but by time.
        pair.poll_for(Duration::from_millis(100));
    }
    let shut = to.all();
    assert_eq!(shut[LENGTH - 1], 0, "the stream had ended before");
    pair.poll_for(Duration::from_millis(300));
    same_bytes("after the invalidation", &to.all(), &shut);
    pair.until("the writer's failures", |pair| {
        pair.a.sends().len() == WRITES
    });
    let sends = pair.a.sends();
    let mut failed = sends
        .iter()
        .map(|(_, status)| *status)
        .skip_while(|status| *status == Status::Success);
    assert_eq!(failed.next(), Some(Status::RemoteAccess));
    assert!(failed.all(|status| status == Status::Flushed), "{sends:?}");
    let there = to.address() + LENGTH as u64;
    assert_eq!(
        write(&mut pair, other_a, there, other.remote, PAGE),
        Status::Success
    );
}
