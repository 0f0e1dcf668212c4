//! Sleeping on the descriptor of a context loses nothing, and an idle context sleeps.

use std::time::{Duration, Instant};

use kvpush::fabric::{Access, Opcode, Status};

use crate::harness::{End, LANE, Memory, PATIENCE, Pair, request, sge};

/// Waits until the descriptor is readable; `false` after `time`.
fn sleep_on(end: &End, time: Duration) -> bool {
    let mut fd = libc::pollfd {
        fd: end.context.wait_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd that lives through the call.
    let n = unsafe { libc::poll(&mut fd, 1, time.as_millis() as i32) };
    assert!(n >= 0, "poll: {}", std::io::Error::last_os_error());
    n > 0
}

/// Drives `end` as a poller that sleeps whenever it may, until `done`. Returns how often it woke.
fn drive(end: &mut End, mut done: impl FnMut(&End) -> bool) -> u32 {
    let start = Instant::now();
    let mut wakes = 0;
    loop {
        end.poll();
        if done(end) {
            return wakes;
        }
        if end.context.arm().expect("arm") {
            assert!(sleep_on(end, PATIENCE), "slept through: {:?}", end.done);
            wakes += 1;
        }
        assert!(start.elapsed() < PATIENCE, "{:?}", end.done);
    }
}

/// Both ends on threads of their own, both sleeping.
fn ping_pong(mut pair: Pair, rounds: usize, length: usize) {
    let (at_a, at_b) = (Memory::new(2 * length, 1), Memory::new(2 * length, 2));
    let keys_a = pair.a.register(&at_a, Access::REMOTE_WRITE);
    let keys_b = pair.b.register(&at_b, Access::REMOTE_WRITE);
    let (lane_a, lane_b) = pair.lane(&LANE);
    let there = |memory: &Memory| memory.address() + length as u64;
    let to_b = request(1, Opcode::WriteImm(1), there(&at_b), keys_b.remote, 1);
    let to_a = request(2, Opcode::WriteImm(2), there(&at_a), keys_a.remote, 1);
    let from_a = sge(&at_a, &keys_a, 0, length);
    let from_b = sge(&at_b, &keys_b, 0, length);
    let Pair { mut a, mut b } = pair;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                drive(&mut b, |b| b.receives().len() >= round);
                b.context.post_receives(lane_b, 1).expect("replenish");
                b.post(lane_b, &[to_a], &[from_b]).expect("pong");
                drive(&mut b, |b| b.sends().len() >= round);
            }
        });
        for round in 1..=rounds {
            a.post(lane_a, &[to_b], &[from_a]).expect("ping");
            drive(&mut a, |a| {
                a.receives().len() >= round && a.sends().len() >= round
            });
            a.context.post_receives(lane_a, 1).expect("replenish");
        }
    });
    let all_good = |end: &End| end.done.iter().all(|c| c.status == Status::Success);
    assert!(all_good(&a) && all_good(&b));
}

pub(crate) fn sleeper_wakes_for_a_receive(pair: Pair) {
    ping_pong(pair, 200, 64);
}

pub(crate) fn sleeper_wakes_for_a_send_completion(pair: Pair) {
    // Long enough that a post fills the socket and goes on when it drains.
    ping_pong(pair, 4, 8 << 20);
}

pub(crate) fn idle_context_sleeps(mut pair: Pair) {
    let (lane, _) = pair.lane(&LANE);
    let write = request(1, Opcode::WriteImm(1), 0, kvpush::fabric::RemoteKey(0), 0);
    pair.a.post(lane, &[write], &[]).expect("post");
    pair.until("an immediate", |pair| {
        pair.a.done.len() == 1 && pair.b.done.len() == 1
    });
    pair.poll_for(Duration::from_millis(50));
    for end in [&mut pair.a, &mut pair.b] {
        let mut wakes = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            if end.context.arm().expect("arm") && !sleep_on(end, Duration::from_millis(300)) {
                continue;
            }
            wakes += 1;
            end.poll();
        }
        assert!(wakes < 5, "an idle context woke {wakes} times");
    }
}
