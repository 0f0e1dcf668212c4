//! Peers that do not keep to the protocol: nothing is written that should not be, nothing panics, and the lane fails.

use super::{
    super::wire::{FLAG_ACK, Op, Refusal, TRAIN},
    *,
};

const PAGE: usize = 4096;

/// An end with a registered, poisoned page in a lane that a hand-played peer has joined.
struct Scene {
    end: End,
    raw: Raw,
    lane: LaneId,
    memory: Block,
    keys: MemoryKeys,
}

fn scene() -> Scene {
    let mut end = End::new(patient());
    let memory = Block::new(3 * PAGE, 0x5a);
    // Only the middle page is registered.
    let keys = end.register_part(&memory, PAGE, PAGE, Access::REMOTE_WRITE);
    let (lane, address) = end.awaiting();
    let raw = Raw::join(&mut end, &address, 0);
    Scene {
        end,
        raw,
        lane,
        memory,
        keys,
    }
}

impl Scene {
    /// A sound frame that writes `length` bytes to the start of the registered page.
    fn frame(&self, op: Op, sequence: u64, length: usize) -> Header {
        let mut header = Header::new(op, sequence);
        header.flags = FLAG_ACK;
        header.key = self.keys.remote.0.into();
        header.length = (length as u32).into();
        header.remaining = (length as u32).into();
        header.address = (self.memory.address() + PAGE as u64).into();
        header
    }

    fn untouched(&self) -> bool {
        self.memory.bytes().iter().all(|byte| *byte == 0x5a)
    }
}

#[test]
fn sound_frames_are_accepted_byte_by_byte() {
    let mut s = scene();
    let mut first = s.frame(Op::Write, 0, 24);
    first.follow = 1.into();
    let mut second = s.frame(Op::WriteImm, 1, 8);
    second.imm = 0x0102_0304.into();
    second.address = (first.address.get() + 24).into();
    let mut bytes = [first.as_bytes(), second.as_bytes()].concat();
    bytes.extend(1..=32u8);
    for byte in bytes {
        s.raw.send(&[byte]);
        s.end.poll();
    }
    let imm = CompletionKind::Received { imm: 0x0102_0304 };
    s.end
        .until("the immediate", |end| end.count(imm, Status::Success) == 1);
    let found = s.memory.bytes();
    assert_eq!(found[PAGE..PAGE + 32], (1..=32).collect::<Vec<u8>>());
    assert!(
        found[..PAGE]
            .iter()
            .chain(&found[PAGE + 32..])
            .all(|byte| *byte == 0x5a)
    );
    // The first may have been acknowledged on its own.
    let acks = std::iter::repeat_with(|| s.end.next_header(&mut s.raw));
    let last = acks.take(2).find(|ack| ack.ack.get() == 2);
    let last = last.expect("an acknowledgement of both");
    assert_eq!((last.op(), last.credit.get()), (Some(Op::Ack), 4));
}

/// Each of these breaks the protocol: the lane fails and nothing is placed.
#[test]
fn unsound_frames_fail_the_lane() {
    type Spoil = fn(&mut Header);
    let spoils: [(&str, Spoil); 13] = [
        ("operation", |h| h.as_mut_bytes()[0] = 99),
        ("flags", |h| h.flags = 0x80),
        ("reserved", |h| h.as_mut_bytes()[20] = 1),
        ("train too long", |h| h.follow = (TRAIN as u16).into()),
        ("sequence ahead", |h| h.sequence = 1.into()),
        ("acknowledges what was not sent", |h| h.ack = 1.into()),
        ("segment longer than its message", |h| {
            h.remaining = 1.into()
        }),
        ("segment longer than a train", |h| {
            h.length = u32::MAX.into();
            h.remaining = u32::MAX.into();
        }),
        ("empty segment of a long message", |h| h.length = 0.into()),
        ("answers no read", |h| {
            h.as_mut_bytes()[0] = Op::ReadResponse as u8
        }),
        ("acknowledgement with payload", |h| {
            h.as_mut_bytes()[0] = Op::Ack as u8
        }),
        ("refuses what was not sent", |h| {
            *h = Header::new(Op::Nak, 3);
            h.imm = (Refusal::Access as u32).into();
        }),
        ("read with payload", |h| {
            h.as_mut_bytes()[0] = Op::Read as u8
        }),
    ];
    for (what, spoil) in spoils {
        let mut s = scene();
        let mut header = s.frame(Op::Write, 0, 64);
        spoil(&mut header);
        s.raw.send(header.as_bytes());
        // The acceptor may have closed already.
        let _ = s.raw.0.write_all(&[0x11; TRAIN * Header::BYTES]);
        let closed = s.raw.is_closed(&mut s.end);
        let acked_ahead = what == "acknowledges what was not sent";
        assert!(closed, "{what}: still connected");
        s.end.until(what, |end| end.has_failed());
        assert!(acked_ahead || s.untouched(), "{what}: memory changed");
    }
}

#[test]
fn segments_must_continue_their_message() {
    type Spoil = fn(&mut Header);
    let spoils: [(&str, Spoil); 5] = [
        ("address", |h| h.address = (h.address.get() + 1).into()),
        ("key", |h| h.key = (h.key.get() ^ 1).into()),
        ("remaining", |h| h.remaining = 33.into()),
        ("operation", |h| h.as_mut_bytes()[0] = Op::WriteImm as u8),
        ("next message", |h| h.sequence = 1.into()),
    ];
    for (what, spoil) in spoils {
        let mut s = scene();
        let mut first = s.frame(Op::Write, 0, 32);
        first.remaining = 64.into();
        let mut second = s.frame(Op::Write, 0, 32);
        second.address = (first.address.get() + 32).into();
        spoil(&mut second);
        s.raw.send(&[first.as_bytes(), &[0x5a; 32]].concat());
        s.raw.send(&[second.as_bytes(), &[0x11; 32]].concat());
        assert!(s.raw.is_closed(&mut s.end), "{what}: still connected");
        s.end.until(what, |end| end.has_failed());
        assert!(s.untouched(), "{what}: memory changed");
    }
}

#[test]
fn credit_is_enforced() {
    let mut s = scene();
    for sequence in 0..5 {
        let mut header = s.frame(Op::WriteImm, sequence, 0);
        header.imm = (sequence as u32).into();
        s.raw.send(header.as_bytes());
    }
    let refusal = loop {
        let header = s.end.next_header(&mut s.raw);
        if header.op() != Some(Op::Ack) {
            break header;
        }
    };
    assert_eq!(refusal.op(), Some(Op::Nak));
    assert_eq!(
        (refusal.sequence.get(), refusal.imm.get()),
        (4, Refusal::NoReceive as u32)
    );
    s.end.poll();
    let received = s
        .end
        .done
        .iter()
        .filter(|c| c.status == Status::Success)
        .count();
    assert_eq!(received, 4);
    assert!(s.raw.is_closed(&mut s.end));
}

#[test]
fn range_is_checked_as_a_whole_before_the_first_byte() {
    let mut s = scene();
    // The first segment is inside; the message is not.
    let mut header = s.frame(Op::Write, 0, PAGE);
    header.remaining = (PAGE as u32 + 1).into();
    s.raw.send(&[header.as_bytes(), &[0x11; PAGE]].concat());
    let refusal = s.end.next_header(&mut s.raw);
    assert_eq!(refusal.op(), Some(Op::Nak));
    assert_eq!(
        (refusal.sequence.get(), refusal.imm.get()),
        (0, Refusal::Access as u32)
    );
    assert!(s.untouched());
    s.end.until("the flush", |end| end.has_failed());
}

#[test]
fn registration_that_ends_in_mid_frame_is_not_written() {
    let mut s = scene();
    let header = s.frame(Op::Write, 0, PAGE);
    s.raw.send(&[header.as_bytes(), &[0x11; PAGE / 2]].concat());
    let (memory, keys) = (&s.memory, s.keys);
    s.end.until("half of the page", |_| {
        memory.bytes()[PAGE + PAGE / 2 - 1] == 0x11
    });
    s.end.context.deregister(keys.mr).unwrap();
    s.raw.send(&[0x22; PAGE / 2]);
    let refusal = s.end.next_header(&mut s.raw);
    assert_eq!(refusal.op(), Some(Op::Nak));
    assert!(!s.memory.bytes().contains(&0x22));
    s.end.until("the flush", |end| end.has_failed());
}

#[test]
fn fence_in_mid_frame_is_final() {
    let mut s = scene();
    let header = s.frame(Op::Write, 0, PAGE);
    s.raw.send(&[header.as_bytes(), &[0x11; PAGE / 2]].concat());
    let memory = &s.memory;
    s.end.until("half of the page", |_| {
        memory.bytes()[PAGE + PAGE / 2 - 1] == 0x11
    });
    // These bytes are in the socket's buffer when the fence comes.
    s.raw.send(&[0x22; PAGE / 2]);
    std::thread::sleep(Duration::from_millis(20));
    s.end.context.fence_lane(s.lane).unwrap();
    assert!(s.raw.is_closed(&mut s.end));
    assert!(!s.memory.bytes().contains(&0x22));
}

/// A frame of which half has arrived: what comes after the window was taken back is not placed, and is refused.
#[test]
fn a_window_taken_back_in_mid_frame_is_shut() {
    for read_on in [false, true] {
        let mut s = scene();
        let bind = WindowBind {
            id: 5,
            mr: s.keys.mr,
            address: s.memory.address() + PAGE as u64,
            length: PAGE as u64,
            access: Access::REMOTE_WRITE,
        };
        let window = s.end.context.bind_window(s.lane, &bind).unwrap();
        let mut header = s.frame(Op::Write, 0, PAGE);
        header.key = window.remote.0.into();
        s.raw.send(&[header.as_bytes(), &[0x11; PAGE / 2]].concat());
        let memory = &s.memory;
        s.end.until("half of the page", |_| {
            memory.bytes()[PAGE + PAGE / 2 - 1] == 0x11
        });
        // In the socket's buffer when the window is taken back, or sent afterwards.
        if !read_on {
            s.raw.send(&[0x22; PAGE / 2]);
            std::thread::sleep(Duration::from_millis(20));
        }
        s.end
            .context
            .invalidate_window(s.lane, 6, window.id)
            .unwrap();
        if read_on {
            s.raw.send(&[0x22; PAGE / 2]);
        }
        let nak = s.end.next_header(&mut s.raw);
        assert_eq!(nak.op(), Some(Op::Nak));
        let sent = s.end.sends();
        assert_eq!(sent, [(5, Status::Success), (6, Status::Success)]);
        assert!(!s.memory.bytes().contains(&0x22));
    }
}

#[test]
fn peer_that_dies_in_mid_frame_fails_the_lane() {
    let mut s = scene();
    let from = Block::new(PAGE, 1);
    let keys = s.end.register(&from, Access::LOCAL);
    let requests = [1, 2].map(|id| write(id, Opcode::Write, 0, RemoteKey(1), 1));
    s.end
        .post(s.lane, &requests, &[piece(&from, keys.local)])
        .unwrap();
    let header = s.frame(Op::Write, 0, PAGE);
    s.raw.send(&[header.as_bytes(), &[0x11; PAGE / 2]].concat());
    drop(s.raw);
    s.end.until("the failure", |end| {
        end.sends().len() == 2 && end.has_failed()
    });
    let wanted = [(1, Status::RetryExceeded), (2, Status::Flushed)];
    assert_eq!(s.end.sends(), wanted);
}

#[test]
fn sockets_without_a_valid_hello_are_dropped() {
    let mut end = End::new(TcpConfig {
        hello_timeout: Duration::from_millis(200),
        ..patient()
    });
    let (_, address) = end.awaiting();
    let (_, token) = decode_address(&address).unwrap();
    let mut wrong = token;
    wrong[15] ^= 1;
    let hellos = [
        (
            "wrong token",
            Hello::new(wrong, PEER, 4).as_bytes().to_vec(),
        ),
        (
            "wrong sender",
            Hello::new(token, [8; 16], 4).as_bytes().to_vec(),
        ),
        ("garbage", vec![0xff; Hello::BYTES]),
        ("silence", vec![]),
        ("half", Hello::new(token, PEER, 4).as_bytes()[..20].to_vec()),
    ];
    for (what, hello) in hellos {
        let mut raw = Raw::silent(&address);
        raw.send(&hello);
        assert!(raw.is_closed(&mut end), "{what}");
    }
    // The lane still waits for its true peer, and takes it only once.
    let _joined = Raw::join(&mut end, &address, 4);
    let mut again = Raw::greet(&address, 4);
    assert!(
        again.is_closed(&mut end),
        "a token is good for one connection"
    );
    assert!(end.done.is_empty());
}

#[test]
fn crowd_of_silent_sockets_does_not_lock_out_a_peer() {
    let mut end = End::new(TcpConfig {
        max_pending: 4,
        hello_timeout: Duration::from_secs(60),
        ..patient()
    });
    let (_, address) = end.awaiting();
    let mut crowd: Vec<_> = (0..12).map(|_| Raw::silent(&address)).collect();
    end.poll();
    let _joined = Raw::join(&mut end, &address, 4);
    assert!(crowd[0].is_closed(&mut end), "the oldest made room");
}

#[test]
fn random_frames_never_write_outside() {
    let seed = getrandom::u64().unwrap();
    let seed = std::env::var("KVPUSH_SEED").map_or(seed, |text| text.parse().unwrap());
    println!("KVPUSH_SEED={seed}");
    let mut state = seed | 1;
    let mut random = move |bound: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    };
    for _ in 0..300 {
        let mut s = scene();
        let mut bytes = Vec::new();
        let mut sequence = 0;
        for _ in 0..1 + random(6) {
            let count = 1 + random(4);
            let mut payload = 0;
            for index in 0..count {
                let op = [Op::Write, Op::WriteImm, Op::Read, Op::Ack][random(4)];
                let length = if matches!(op, Op::Write | Op::WriteImm) {
                    random(200)
                } else {
                    0
                };
                let mut header = s.frame(op, sequence, length);
                if op == Op::Ack {
                    header.sequence = 0.into();
                } else {
                    sequence += 1;
                }
                header.follow = ((count - 1 - index) as u16).into();
                payload += length;
                bytes.extend_from_slice(header.as_bytes());
            }
            bytes.extend((0..payload).map(|_| 0x5a));
        }
        for _ in 0..random(4) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        // The acceptor may close at any point.
        for part in bytes.chunks(1 + random(500)) {
            if s.raw.0.write_all(part).is_err() {
                break;
            }
            s.end.poll();
        }
        drop(s.raw);
        let late = write(1, Opcode::Write, 0, RemoteKey(0), 0);
        s.end.post(s.lane, &[late], &[]).unwrap();
        s.end.until("the end", |end| end.sends().len() == 1);
        assert_ne!(s.end.sends(), [(1, Status::Success)]);
        let found = s.memory.bytes();
        let outside = found[..PAGE].iter().chain(&found[2 * PAGE..]);
        assert!(outside.into_iter().all(|byte| *byte == 0x5a));
    }
}

#[test]
fn source_of_a_read_may_end_while_it_streams() {
    let length = 16 << 20;
    let (mut a, mut b) = (End::new(patient()), End::new(patient()));
    let (here, there) = (Block::new(length, 0), Block::new(length, 9));
    let (local, remote) = (
        a.register(&here, Access::LOCAL),
        b.register(&there, Access::ALL),
    );
    let (lane_a, at_a) = a.context.create_lane(&LANE).unwrap();
    let (lane_b, at_b) = b.context.create_lane(&LANE).unwrap();
    b.context.connect_lane(lane_b, &at_a, HOST, false).unwrap();
    a.context.connect_lane(lane_a, &at_b, HOST, true).unwrap();
    let read = write(1, Opcode::Read, there.address(), remote.remote, 1);
    let after = write(2, Opcode::Write, there.address(), remote.remote, 0);
    a.post(lane_a, &[read, after], &[piece(&here, local.local)])
        .unwrap();
    let first = here.0[0].get();
    a.until("the first byte", |_| {
        b.poll();
        // SAFETY: one byte of live memory through its cell.
        unsafe { first.read_volatile() == 9 }
    });
    b.context.deregister(remote.mr).unwrap();
    a.until("the failure", |a| {
        b.poll();
        a.sends().len() == 2
    });
    assert_ne!(here.bytes().last(), Some(&9), "the read had ended before");
    let [(1, first), (2, Status::Flushed)] = a.sends()[..] else {
        panic!("{:?}", a.sends());
    };
    // A train that is cut off ends the lane without a word; between trains the refusal is sent.
    assert!(
        matches!(first, Status::RemoteAccess | Status::RetryExceeded),
        "{first:?}"
    );
}
