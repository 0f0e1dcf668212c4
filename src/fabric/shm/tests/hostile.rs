//! Peers that lie in every word they share. None may make the victim write outside of what was registered, count what
//! did not happen, map what could kill it, or panic.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use super::{
    super::{
        ShmConfig, sys,
        wire::{Geometry, MAX_DEPTH, Note, Op, pack},
    },
    GEOMETRY, PAGE, PATIENCE, POISON, Rogue, ShmDevice, Victim, greet,
};
use crate::{
    fabric::{CompletionKind, Opcode, RemoteKey, Sge, Status, WorkRequest},
    memory::{HostMemory, Memory as _},
};

fn victim() -> Victim {
    Victim::new(ShmConfig::default())
}

fn key_length(key: RemoteKey, length: u32) -> u64 {
    u64::from(key.0) << 32 | u64::from(length)
}

/// A page of the rogue's own memory, named as the kernel reads it.
fn element(length: u32, address: u64) -> [u64; 2] {
    [u64::from(length) << 32, address]
}

fn write(victim: &Victim, op: Op, at: u64, length: u32, from: [u64; 2]) -> [u64; 5] {
    let what = pack(op, false, 1);
    let key_length = key_length(victim.keys.remote, length);
    [what, at, key_length, from[0], from[1]]
}

/// The control: a rogue that tells the truth gets its page written and counted, so the cases below can fail.
#[test]
fn an_honest_rogue_is_served() {
    let mut victim = victim();
    let rogue = Rogue::connect(&mut victim);
    let page = HostMemory::new(PAGE as u64).unwrap();
    page.fill(0, PAGE as u64, 0x77).unwrap();
    let from = element(PAGE as u32, page.address());
    let target = victim.target();
    let request = write(&victim, Op::WriteImm(5), target, PAGE as u32, from);
    rogue.slot(0, request);
    rogue.publish(1);
    victim.until("the page", |victim| victim.arrived() == [5]);
    victim.assert_contained();
    assert!(victim.bytes()[PAGE..2 * PAGE].iter().all(|&b| b == 0x77));
}

#[test]
fn wrong_descriptions_end_the_lane() {
    let page = HostMemory::new(PAGE as u64).unwrap();
    let good = element(PAGE as u32, page.address());
    type Change = fn(&mut [u64; 5], &Victim);
    let cases: [(&str, Change); 13] = [
        ("beyond the registration", |r, _| r[1] += 1),
        ("before the registration", |r, _| r[1] -= 1),
        ("a range that wraps", |r, _| r[1] = u64::MAX - 5),
        ("another key", |r, _| r[2] ^= 1 << 40),
        ("longer than its elements", |r, v| {
            r[2] = key_length(v.keys.remote, PAGE as u32 + 1);
        }),
        ("shorter than its elements", |r, v| {
            r[2] = key_length(v.keys.remote, PAGE as u32 - 1);
        }),
        ("longer than any message", |r, v| {
            r[2] = key_length(v.keys.remote, u32::MAX);
        }),
        ("more elements than a slot has", |r, _| {
            r[0] = pack(Op::Write, false, 60_000);
        }),
        ("no operation", |r, _| r[0] = 9),
        ("inline beyond the slot", |r, _| {
            r[0] = pack(Op::Write, true, 0);
        }),
        ("memory that is not mapped", |r, _| r[4] = 8),
        ("a file that was not announced", |r, _| r[3] |= 7),
        ("memory of the kernel", |r, _| r[4] = 0xffff_8000_0000_0000),
    ];
    for (name, change) in cases {
        let mut victim = victim();
        let rogue = Rogue::connect(&mut victim);
        let target = victim.target();
        let mut request = write(&victim, Op::WriteImm(1), target, PAGE as u32, good);
        if name == "inline beyond the slot" {
            request[2] = key_length(victim.keys.remote, 41);
        }
        change(&mut request, &victim);
        rogue.slot(0, request);
        rogue.publish(1);
        victim.until_failed(name);
        assert!(victim.arrived().is_empty(), "{name}");
        victim.assert_contained();
        assert!(
            victim
                .bytes()
                .iter()
                .all(|&byte| byte == POISON || byte == 0),
            "{name}"
        );
    }
}

#[test]
fn impossible_counters_end_the_lane() {
    // Offset of the word, value.
    let cases = [
        ("more requests than slots", 0, 9),
        ("far more requests than slots", 0, u64::MAX),
        ("requests executed that were not published", 8, 1),
        ("fewer receives than before", 16, 0),
        ("answers to no reads", 24, 1),
        ("reads that were not answered", 32, 1),
        ("an unknown state", 48, 0xff),
        ("a refusal of no request", 48, 0x0502),
    ];
    for (name, offset, value) in cases {
        let mut victim = victim();
        let rogue = Rogue::connect_with(&mut victim, |outbox| {
            assert_eq!(outbox.length(), 4096 + 8 * 64);
        });
        rogue.put(16, 4);
        rogue.wake();
        for _ in 0..100 {
            victim.poll();
        }
        assert!(victim.done.is_empty(), "{name}: {:?}", victim.done);
        rogue.put(offset, value);
        rogue.wake();
        victim.until_failed(name);
        victim.assert_contained();
    }
}

#[test]
fn requests_that_go_back_end_the_lane() {
    let mut victim = victim();
    let rogue = Rogue::connect(&mut victim);
    let empty = [pack(Op::Write, false, 0), 0, 0, 0, 0];
    for slot in 0..4 {
        rogue.slot(slot, empty);
    }
    rogue.publish(4);
    for _ in 0..100 {
        victim.poll();
    }
    assert!(victim.done.is_empty());
    rogue.publish(3);
    victim.until_failed("requests that go back");
}

#[test]
fn immediates_without_receives_are_refused() {
    let mut victim = victim();
    let rogue = Rogue::connect(&mut victim);
    for slot in 0..8 {
        let imm = Op::WriteImm(slot as u32);
        rogue.slot(slot, [pack(imm, false, 0), 0, 0, 0, 0]);
    }
    rogue.publish(8);
    victim.until("four immediates", |victim| victim.arrived() == [0, 1, 2, 3]);
    let lane = rogue.lane;
    // A failed lane has no receives left to flush; its requests say that it has failed.
    let request = request(&victim, Opcode::Write);
    // SAFETY: no elements.
    unsafe { victim.context.post(lane, &[request], &[]) }.expect("post");
    victim.until_failed("the fifth immediate");
    assert_eq!(victim.arrived(), [0, 1, 2, 3]);
}

fn request(victim: &Victim, opcode: Opcode) -> WorkRequest {
    WorkRequest {
        id: 77,
        opcode,
        remote_address: victim.target(),
        remote_key: RemoteKey(1),
        first_sge: 0,
        sge_count: 0,
        signaled: true,
        inline: false,
    }
}

/// Answers to the victim's read that point anywhere: it copies nothing that is not the rogue's, and fails.
#[test]
fn answers_that_lie_are_not_believed() {
    let cases = [
        ("an unmapped place", [0, 8]),
        ("a file that was not announced", [3, 0]),
        ("memory of the kernel", [0, 0xffff_8000_0000_0000]),
    ];
    for (name, answer) in cases {
        let mut victim = victim();
        let rogue = Rogue::connect(&mut victim);
        let read = WorkRequest {
            sge_count: 1,
            ..request(&victim, Opcode::Read)
        };
        let piece = Sge {
            address: victim.target(),
            length: PAGE as u32,
            key: victim.keys.local,
        };
        // SAFETY: the element lies in the victim's registered page, which lives as long as its context.
        unsafe { victim.context.post(rogue.lane, &[read], &[piece]) }.expect("post");
        rogue.put(1024, answer[0]);
        rogue.put(1032, answer[1]);
        rogue.put(24, 1);
        rogue.wake();
        victim.until_failed(name);
        victim.assert_contained();
    }
}

/// A read cannot be said to be executed before it was taken.
#[test]
fn a_read_that_was_not_taken_is_not_executed() {
    let mut victim = victim();
    let rogue = Rogue::connect(&mut victim);
    let read = request(&victim, Opcode::Read);
    // SAFETY: no elements.
    unsafe { victim.context.post(rogue.lane, &[read], &[]) }.expect("post");
    rogue.put(8, 1);
    rogue.wake();
    victim.until_failed("the lie");
    let sent = |c: &&crate::fabric::Completion| matches!(c.kind, CompletionKind::Sent { .. });
    let sent: Vec<_> = victim.done.iter().filter(sent).collect();
    assert!(sent.iter().all(|c| c.status != Status::Success), "{sent:?}");
}

#[test]
fn files_that_could_kill_are_not_mapped() {
    let unsealed = sys::memory_file(1 << 20).expect("memfd");
    let sealed = HostMemory::memfd("sealed", PAGE as u64).unwrap();
    let sealed = sealed.fd().unwrap();
    let null = std::fs::File::open("/dev/null").expect("open");
    let plain = std::fs::File::open("/proc/self/exe").expect("open");
    let cases = [
        ("one that may shrink", Some(unsealed.as_fd()), 4096),
        ("one that is shorter", Some(sealed), 4097),
        ("one that is far shorter", Some(sealed), u64::MAX),
        ("a device", Some(null.as_fd()), 4096),
        ("a file of a disk", Some(plain.as_fd()), 4096),
        ("none", None, 4096),
    ];
    for (name, fd, length) in cases {
        let mut victim = victim();
        let rogue = Rogue::connect(&mut victim);
        rogue.say(&Note::File { file: 1, length }.encode(), fd);
        victim.until_failed(name);
    }
    // The control.
    let mut victim = victim();
    let rogue = Rogue::connect(&mut victim);
    rogue.say(
        &Note::File {
            file: 1,
            length: 4096,
        }
        .encode(),
        Some(sealed),
    );
    let target = victim.target();
    let from = [u64::from(PAGE as u32) << 32 | 1, 0];
    rogue.slot(
        0,
        write(&victim, Op::WriteImm(3), target, PAGE as u32, from),
    );
    rogue.publish(1);
    victim.until("the page", |victim| victim.arrived() == [3]);
    // A file is left only as far as it reaches.
    let from = [u64::from(PAGE as u32) << 32 | 1, 1];
    rogue.slot(
        1,
        write(&victim, Op::WriteImm(4), target, PAGE as u32, from),
    );
    rogue.publish(2);
    victim.until_failed("beyond the file");
    assert_eq!(victim.arrived(), [3]);
}

#[test]
fn outboxes_that_could_kill_are_not_mapped() {
    let memory_file = |seal: bool, length| {
        let file = sys::memory_file(length).expect("memfd");
        if seal {
            sys::seal(file.as_fd(), sys::RING_SEALS).expect("seal");
        }
        file
    };
    let deep = Geometry {
        depth: MAX_DEPTH,
        ..GEOMETRY
    };
    let cases = [
        ("may shrink", GEOMETRY, memory_file(false, 1 << 20)),
        ("too short", GEOMETRY, memory_file(true, 4096)),
        ("shorter than it says", deep, memory_file(true, 1 << 16)),
    ];
    for (name, geometry, file) in cases {
        let mut victim = victim();
        let device = ShmDevice::open(ShmConfig::default()).expect("open");
        let (_, _socket) = greet(&mut victim, &device, geometry, &file);
        victim.until_failed(name);
    }
}

#[test]
fn garbage_in_the_socket_ends_the_lane() {
    let wake = Note::Wake.encode();
    let mut long = wake.to_vec();
    long.push(0);
    let unknown = [9; Note::BYTES];
    let forget = Note::Forget { file: 4 }.encode();
    for message in [&wake[..5], &long, &unknown, &forget] {
        let mut victim = victim();
        let rogue = Rogue::connect(&mut victim);
        rogue.say(message, None);
        victim.until_failed("garbage");
    }
}

/// Ends the scribbling thread also when an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Everything the rogue shares changes at random, all the time, while the victim works on it.
#[test]
fn a_scribbling_peer_stays_contained() {
    let seed = std::env::var("KVPUSH_SEED").ok();
    let seed = seed.and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("KVPUSH_SEED={seed}");
    let mut state = seed | 1;
    let mut next = move || {
        // xorshift64* (Vigna 2016).
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let page = HostMemory::new(PAGE as u64).unwrap();
    let mut served = 0;
    for _ in 0..60 {
        let mut victim = victim();
        let rogue = Rogue::connect(&mut victim);
        let words: Vec<[u64; 5]> = (0..8)
            .map(|_| {
                let length = (next() % PAGE as u64) as u32;
                let at = victim.target() + next() % PAGE as u64;
                write(
                    &victim,
                    Op::Write,
                    at,
                    length,
                    element(length, page.address()),
                )
            })
            .collect();
        // Some good ones first, so that there is something to disturb.
        for (slot, words) in words.iter().enumerate() {
            rogue.slot(slot, *words);
        }
        rogue.publish(2);
        victim.poll();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (rogue, flag) = (&rogue, &stop);
            let _stop = StopOnDrop(flag);
            let seed = next();
            scope.spawn(move || {
                let mut state = seed | 1;
                let mut published = 2;
                while !flag.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let random = state >> 20;
                    let slot = (random % 8) as usize;
                    match random % 97 {
                        // Seldom anything at all, anywhere.
                        0 => rogue.put((random as usize / 97 % 570) * 8, state),
                        // Often a part of a good description in the place of another.
                        1..40 => {
                            let word = (random / 97 % 5) as usize;
                            let from = words[(random / 500 % 8) as usize];
                            rogue.put(4096 + slot * 64 + word * 8, from[word]);
                        }
                        40..60 => rogue.slot(slot, words[slot]),
                        _ => {
                            published += 1;
                            rogue.put(0, published);
                        }
                    }
                }
            });
            let start = Instant::now();
            while victim.done.is_empty() {
                victim.poll();
                victim.assert_contained();
                assert!(start.elapsed() < PATIENCE, "the scribbling had no effect");
            }
        });
        victim.assert_contained();
        served += u32::from(victim.bytes()[PAGE..2 * PAGE].contains(&0));
    }
    assert!(served > 0, "no request was ever good, so nothing was tried");
}

/// Strangers at the socket: silent, talking nonsense, or with tokens of nobody.
#[test]
fn strangers_get_nowhere() {
    use zerocopy::IntoBytes;
    let mut victim = Victim::new(ShmConfig {
        max_pending: 4,
        ..ShmConfig::default()
    });
    let name = {
        let address = victim.device.address([0; 16]);
        super::super::connect::socket_name(&address)
    };
    let connect = || sys::connect(&name).expect("connect");
    let silent: Vec<_> = (0..10).map(|_| connect()).collect();
    let loud = connect();
    sys::send(&loud, b"who is there?", None).expect("send");
    let guess = connect();
    let file = sys::memory_file(1 << 16).expect("memfd");
    let hello = super::super::wire::Hello::new([3; 16], [4; 16], GEOMETRY, true);
    sys::send(&guess, hello.as_bytes(), Some(file.as_fd())).expect("send");
    for _ in 0..200 {
        victim.poll();
    }
    let gone = |socket: &OwnedFd| match sys::receive(socket, &mut [0; 99]) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() != Some(libc::EAGAIN),
    };
    assert!(gone(&loud), "nonsense");
    assert!(gone(&guess), "a token of nobody");
    assert!(silent.iter().filter(|socket| !gone(socket)).count() <= 4);
    // An honest peer is served all the same.
    let rogue = Rogue::connect(&mut victim);
    rogue.slot(0, [pack(Op::WriteImm(1), false, 0), 0, 0, 0, 0]);
    rogue.publish(1);
    victim.until("service", |victim| victim.arrived() == [1]);
}
