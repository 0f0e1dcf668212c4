//! Bytes arrive where they belong, when they should, and nowhere else.

use kvpush::fabric::{Access, LaneConfig, LaneId, Opcode, Status, WorkRequest};

use crate::{
    checker::same_bytes,
    harness::{LANE, Memory, Pair, Random, request, sge},
};

const POISON: u8 = 0xa5;

/// Writes a page and expects it with `flip` applied to its last byte.
pub(crate) fn write_and_compare(mut pair: Pair, flip: u8) {
    let (from, to) = (Memory::new(4096, 0x11), Memory::new(4096, POISON));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let write = request(1, Opcode::Write, to.address(), target.remote, 1);
    let posted = pair.a.post(lane, &[write], &[sge(&from, &source, 0, 4096)]);
    posted.expect("post");
    pair.until("the write", |pair| !pair.a.sends().is_empty());
    let mut expected = from.all();
    expected[4095] ^= flip;
    same_bytes("page", &to.all(), &expected);
}

pub(crate) fn scattered_write_lands_exactly(mut pair: Pair) {
    let mut random = Random::new("scattered_write_lands_exactly");
    let (from, to) = (Memory::new(4 << 20, 0), Memory::new(4 << 20, POISON));
    from.write(0, &random.bytes(4 << 20));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let max_sge = pair.a.device.info().caps.max_sge.min(16);
    let (lane, _) = pair.lane(&LaneConfig { max_sge, ..LANE });
    let mut expected = to.all();
    for round in 0..60 {
        let count = 1 + random.below(max_sge as usize);
        let sges: Vec<_> = (0..count)
            .map(|_| {
                // Some messages are longer than any segment of any fabric.
                let most = if round % 4 == 0 { 200_000 } else { 9_000 };
                let length = 1 + random.below(most);
                sge(&from, &source, random.below(from.len() - length), length)
            })
            .collect();
        let mut payload = Vec::new();
        for piece in &sges {
            let offset = (piece.address - from.address()) as usize;
            payload.extend_from_slice(&from.read(offset, piece.length as usize));
        }
        let at = random.below(to.len() - payload.len());
        expected[at..at + payload.len()].copy_from_slice(&payload);
        let to_address = to.address() + at as u64;
        let write = request(
            round,
            Opcode::Write,
            to_address,
            target.remote,
            count as u32,
        );
        pair.a.post(lane, &[write], &sges).expect("post");
        pair.until("a scattered write", |pair| {
            pair.a.sends().len() as u64 > round
        });
        assert_eq!(pair.a.sends().last(), Some(&(round, Status::Success)));
        if round % 10 == 9 {
            same_bytes("destination", &to.all(), &expected);
        }
    }
}

/// Posts random writes into `[first, first + length)` of the destination and then a write with immediate; returns
/// what the destination must then hold.
struct Batch {
    requests: Vec<WorkRequest>,
    sges: Vec<kvpush::fabric::Sge>,
}

fn random_batch(
    random: &mut Random,
    (from, source): (&Memory, &kvpush::fabric::MemoryKeys),
    (to, target): (&Memory, &kvpush::fabric::MemoryKeys),
    range: std::ops::Range<usize>,
    expected: &mut [u8],
    imm: u32,
) -> Batch {
    let mut batch = Batch {
        requests: Vec::new(),
        sges: Vec::new(),
    };
    let writes = 1 + random.below(24);
    for index in 0..=writes {
        let most = range
            .len()
            .min(if random.below(4) == 0 { 300_000 } else { 6_000 });
        let length = 1 + random.below(most);
        let here = random.below(from.len() - length + 1);
        let there = range.start + random.below(range.len() - length + 1);
        expected[there..there + length].copy_from_slice(&from.read(here, length));
        let last = index == writes;
        batch.requests.push(WorkRequest {
            id: u64::from(imm) << 32 | index as u64,
            opcode: if last {
                Opcode::WriteImm(imm)
            } else {
                Opcode::Write
            },
            remote_address: to.address() + there as u64,
            remote_key: target.remote,
            first_sge: batch.sges.len() as u32,
            sge_count: 1,
            signaled: last,
            inline: false,
        });
        batch.sges.push(sge(from, source, here, length));
    }
    batch
}

pub(crate) fn immediate_follows_earlier_writes(mut pair: Pair) {
    let mut random = Random::new("immediate_follows_earlier_writes");
    let (from, to) = (Memory::new(1 << 20, 0), Memory::new(1 << 20, POISON));
    from.write(0, &random.bytes(1 << 20));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, peer) = pair.lane(&LANE);
    let mut expected = to.all();
    for imm in 0..40u32 {
        let whole = 0..to.len();
        let ends = ((&from, &source), (&to, &target));
        let batch = random_batch(&mut random, ends.0, ends.1, whole, &mut expected, imm);
        pair.a
            .post(lane, &batch.requests, &batch.sges)
            .expect("post");
        // Later writes may overtake nothing: the peer is looked at in the very poll that delivers the immediate.
        pair.until("the immediate", |pair| {
            pair.b.receives().len() > imm as usize
        });
        assert_eq!(pair.b.receives().last(), Some(&(imm, Status::Success)));
        same_bytes("destination at the immediate", &to.all(), &expected);
        pair.b.context.post_receives(peer, 1).expect("replenish");
        pair.until("the send", |pair| pair.a.sends().len() > imm as usize);
    }
    assert!(
        pair.a
            .sends()
            .iter()
            .all(|(_, status)| *status == Status::Success)
    );
}

pub(crate) fn many_lanes_at_once(mut pair: Pair) {
    const LANES: usize = 8;
    const PART: usize = 256 << 10;
    const ROUNDS: u32 = 6;
    let mut random = Random::new("many_lanes_at_once");
    let (from, to) = (Memory::new(1 << 20, 0), Memory::new(LANES * PART, POISON));
    from.write(0, &random.bytes(1 << 20));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let config = LaneConfig {
        send_depth: 256,
        ..LANE
    };
    let lanes: Vec<(LaneId, LaneId)> = (0..LANES).map(|_| pair.lane(&config)).collect();
    let mut expected = to.all();
    for round in 0..ROUNDS {
        for (index, (lane, _)) in lanes.iter().enumerate() {
            let part = index * PART..(index + 1) * PART;
            let ends = ((&from, &source), (&to, &target));
            let batch = random_batch(&mut random, ends.0, ends.1, part, &mut expected, round);
            pair.a
                .post(*lane, &batch.requests, &batch.sges)
                .expect("post");
        }
    }
    let all = LANES * ROUNDS as usize;
    pair.until("all immediates", |pair| pair.b.receives().len() == all);
    pair.until("all sends", |pair| pair.a.sends().len() == all);
    same_bytes("destination", &to.all(), &expected);
    for (_, peer) in &lanes {
        let here = pair.b.done.iter().filter(|c| c.lane == *peer);
        let imms: Vec<_> = here.map(|c| c.kind).collect();
        let wanted: Vec<_> = (0..ROUNDS)
            .map(|imm| kvpush::fabric::CompletionKind::Received { imm })
            .collect();
        assert_eq!(imms, wanted, "immediates of {peer} in order");
    }
}

pub(crate) fn both_directions_at_once(mut pair: Pair) {
    let mut random = Random::new("both_directions_at_once");
    let (at_a, at_b) = (Memory::new(8 << 20, 0), Memory::new(8 << 20, 0));
    // The lower half is the source, the upper half the destination.
    const HALF: usize = 4 << 20;
    at_a.write(0, &random.bytes(HALF));
    at_b.write(0, &random.bytes(HALF));
    let keys_a = pair.a.register(&at_a, Access::REMOTE_WRITE);
    let keys_b = pair.b.register(&at_b, Access::REMOTE_WRITE);
    let (lane_a, lane_b) = pair.lane(&LANE);
    for round in 0..4u64 {
        let write = |to: &Memory, key| {
            let there = to.address() + HALF as u64;
            request(round, Opcode::WriteImm(round as u32), there, key, 1)
        };
        let (to_b, to_a) = (write(&at_b, keys_b.remote), write(&at_a, keys_a.remote));
        let from_a = [sge(&at_a, &keys_a, 0, HALF)];
        pair.a.post(lane_a, &[to_b], &from_a).expect("post");
        let from_b = [sge(&at_b, &keys_b, 0, HALF)];
        pair.b.post(lane_b, &[to_a], &from_b).expect("post");
    }
    pair.until("both directions", |pair| {
        pair.a.done.len() == 8 && pair.b.done.len() == 8
    });
    same_bytes("at b", &at_b.read(HALF, HALF), &at_a.read(0, HALF));
    same_bytes("at a", &at_a.read(HALF, HALF), &at_b.read(0, HALF));
}

pub(crate) fn zero_length_immediate(mut pair: Pair) {
    let to = Memory::new(4096, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let write = request(
        5,
        Opcode::WriteImm(0xdead_beef),
        to.address(),
        target.remote,
        0,
    );
    pair.a.post(lane, &[write], &[]).expect("post");
    pair.until("both completions", |pair| {
        pair.a.done.len() == 1 && pair.b.done.len() == 1
    });
    assert_eq!(pair.a.sends(), [(5, Status::Success)]);
    assert_eq!(pair.b.receives(), [(0xdead_beef, Status::Success)]);
    same_bytes("untouched", &to.all(), &[POISON; 4096]);
}

pub(crate) fn inline_payload_may_be_reused_at_once(mut pair: Pair) {
    if pair.a.device.info().caps.max_inline == 0 {
        println!("the device has no inline sends");
        return;
    }
    let max_inline = pair.a.device.info().caps.max_inline.min(64);
    // Not registered: inline needs no key.
    let from = Memory::new(64, 0);
    let to = Memory::new(4096, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LaneConfig { max_inline, ..LANE });
    let mut expected = to.all();
    let length = max_inline as usize;
    for round in 0..32usize {
        let bytes = vec![round as u8; length];
        from.write(0, &bytes);
        let at = round * 64;
        expected[at..at + length].copy_from_slice(&bytes);
        let there = to.address() + at as u64;
        let mut write = request(round as u64, Opcode::Write, there, target.remote, 1);
        write.inline = true;
        let piece = kvpush::fabric::Sge {
            address: from.address(),
            length: max_inline,
            key: kvpush::fabric::LocalKey(0),
        };
        pair.a.post(lane, &[write], &[piece]).expect("post");
        from.write(0, &vec![0xee; length]);
    }
    pair.until("all inline writes", |pair| pair.a.sends().len() == 32);
    same_bytes("destination", &to.all(), &expected);
}

pub(crate) fn read_gathers_exactly(mut pair: Pair) {
    if !pair.a.device.info().caps.read {
        println!("the device serves no reads");
        return;
    }
    let mut random = Random::new("read_gathers_exactly");
    let (here, there) = (Memory::new(4 << 20, POISON), Memory::new(4 << 20, 0));
    there.write(0, &random.bytes(4 << 20));
    let local = pair.a.register(&here, Access::LOCAL);
    let remote = pair.b.register(&there, Access::ALL);
    let (lane, _) = pair.lane(&LANE);
    let mut expected = here.all();
    for round in 0..30u64 {
        let count = 1 + random.below(4);
        let slice = here.len() / 4;
        let mut sges = Vec::new();
        let mut total = 0;
        for part in 0..count {
            let length = 1 + random.below(slice / 2);
            sges.push(sge(
                &here,
                &local,
                part * slice + random.below(slice / 2),
                length,
            ));
            total += length;
        }
        let mut from = random.below(there.len() - total);
        let address = there.address() + from as u64;
        for piece in &sges {
            let (at, length) = (
                (piece.address - here.address()) as usize,
                piece.length as usize,
            );
            expected[at..at + length].copy_from_slice(&there.read(from, length));
            from += length;
        }
        let read = request(round, Opcode::Read, address, remote.remote, count as u32);
        pair.a.post(lane, &[read], &sges).expect("post");
        pair.until("a read", |pair| pair.a.sends().len() as u64 > round);
        assert_eq!(pair.a.sends().last(), Some(&(round, Status::Success)));
        same_bytes("read memory", &here.all(), &expected);
    }
    assert!(
        pair.b.done.is_empty(),
        "reads are one-sided: {:?}",
        pair.b.done
    );
}

pub(crate) fn reads_and_writes_mix(mut pair: Pair) {
    const PAGE: usize = 64 << 10;
    if !pair.a.device.info().caps.read {
        println!("the device serves no reads");
        return;
    }
    let mut random = Random::new("reads_and_writes_mix");
    let (here, there) = (Memory::new(32 * PAGE, 0), Memory::new(32 * PAGE, 0));
    here.write(0, &random.bytes(16 * PAGE));
    there.write(0, &random.bytes(16 * PAGE));
    let local = pair.a.register(&here, Access::LOCAL);
    let remote = pair.b.register(&there, Access::ALL);
    let (lane, _) = pair.lane(&LANE);
    let (mut requests, mut sges) = (Vec::new(), Vec::new());
    for page in 0..16usize {
        for opcode in [Opcode::Write, Opcode::Read] {
            let write = opcode == Opcode::Write;
            let (to, from) = (
                if write { 16 + page } else { page },
                if write { page } else { 16 + page },
            );
            let address = there.address() + (to * PAGE) as u64;
            let mut request = request(sges.len() as u64, opcode, address, remote.remote, 1);
            request.first_sge = sges.len() as u32;
            requests.push(request);
            sges.push(sge(&here, &local, from * PAGE, PAGE));
        }
    }
    pair.a.post(lane, &requests, &sges).expect("post");
    pair.until("reads and writes", |pair| pair.a.sends().len() == 32);
    let wanted: Vec<_> = (0..32).map(|id| (id, Status::Success)).collect();
    assert_eq!(pair.a.sends(), wanted, "completions in order");
    same_bytes(
        "written",
        &there.read(16 * PAGE, 16 * PAGE),
        &here.read(0, 16 * PAGE),
    );
    same_bytes(
        "read",
        &here.read(16 * PAGE, 16 * PAGE),
        &there.read(0, 16 * PAGE),
    );
}
