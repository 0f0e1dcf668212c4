//! What a peer may not touch, it does not touch, and the writer is told.

use kvpush::fabric::{Access, LaneConfig, LocalKey, Opcode, RemoteKey, Status};

use crate::{
    checker::same_bytes,
    harness::{LANE, Memory, Pair, request, sge},
};

const PAGE: usize = 4096;
const POISON: u8 = 0x5a;

/// Posts one write or read of a page that must be refused, with more behind it.
fn refused(pair: &mut Pair, opcode: Opcode, to: u64, key: RemoteKey, untouched: &Memory) {
    let from = Memory::new(PAGE, 0x33);
    let source = pair.a.register(&from, Access::LOCAL);
    let (lane, _) = pair.lane(&LaneConfig {
        send_depth: 16,
        ..LANE
    });
    let mut bad = request(1, opcode, to, key, 1);
    bad.signaled = false;
    let behind = request(2, Opcode::Write, to, key, 1);
    let piece = sge(&from, &source, 0, PAGE);
    pair.a.post(lane, &[bad, behind], &[piece]).expect("post");
    pair.until("the refusal", |pair| pair.a.sends().len() == 2);
    let wanted = [(1, Status::RemoteAccess), (2, Status::Flushed)];
    assert_eq!(pair.a.sends(), wanted);
    // The lane stays failed.
    let late = request(3, Opcode::Write, to, key, 1);
    pair.a
        .post(lane, &[late], &[piece])
        .expect("posts to a failed lane are accepted");
    pair.until("the flush", |pair| pair.a.sends().len() == 3);
    assert_eq!(pair.a.sends().last(), Some(&(3, Status::Flushed)));
    same_bytes(
        "untouched",
        &untouched.all(),
        &vec![POISON; untouched.len()],
    );
    same_bytes("not read into", &from.all(), &[0x33; PAGE]);
    pair.a.context.destroy_lane(lane).expect("destroy");
}

pub(crate) fn unknown_key_is_refused(mut pair: Pair) {
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let wrong = RemoteKey(target.remote.0 ^ 0x0080_0100);
    refused(&mut pair, Opcode::Write, to.address(), wrong, &to);
}

pub(crate) fn range_beyond_registration_is_refused(mut pair: Pair) {
    let to = Memory::new(4 * PAGE, POISON);
    let target = pair
        .b
        .register_part(&to, PAGE, 2 * PAGE, Access::REMOTE_WRITE);
    // Half of the page is inside; not even that half may be written.
    let there = to.address() + (5 * PAGE / 2) as u64;
    refused(&mut pair, Opcode::Write, there, target.remote, &to);
}

pub(crate) fn wrapping_range_is_refused(mut pair: Pair) {
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    refused(&mut pair, Opcode::Write, u64::MAX - 100, target.remote, &to);
}

pub(crate) fn write_to_local_memory_is_refused(mut pair: Pair) {
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::LOCAL);
    refused(&mut pair, Opcode::Write, to.address(), target.remote, &to);
}

pub(crate) fn read_of_write_only_memory_is_refused(mut pair: Pair) {
    if !pair.a.device.info().caps.read {
        println!("the device serves no reads");
        return;
    }
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    refused(&mut pair, Opcode::Read, to.address(), target.remote, &to);
}

pub(crate) fn deregistered_key_is_refused(mut pair: Pair) {
    let to = Memory::new(PAGE, POISON);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    pair.b.context.deregister(target.mr).expect("deregister");
    // Registered again: the range is the same, the key is not.
    let again = pair.b.register(&to, Access::REMOTE_WRITE);
    assert_ne!(again.remote, target.remote);
    refused(&mut pair, Opcode::Write, to.address(), target.remote, &to);
    let error = pair.b.context.deregister(target.mr);
    assert!(error.is_err(), "a registration ends once");
}

pub(crate) fn foreign_local_key_is_refused(mut pair: Pair) {
    let (from, to) = (Memory::new(PAGE, 1), Memory::new(PAGE, POISON));
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let mut piece = sge(&from, &source, 0, PAGE);
    piece.key = LocalKey(source.local.0 ^ 0x0080_0100);
    let write = request(1, Opcode::Write, to.address(), target.remote, 1);
    let behind = request(2, Opcode::Write, to.address(), target.remote, 0);
    pair.a.post(lane, &[write, behind], &[piece]).expect("post");
    pair.until("both", |pair| pair.a.sends().len() == 2);
    // Soft-RoCE finds out so late that it calls it a local operation error (IBV_WC_LOC_QP_OP_ERR).
    let [(1, first), (2, Status::Flushed)] = pair.a.sends()[..] else {
        panic!("{:?}", pair.a.sends());
    };
    assert!(
        matches!(first, Status::LocalProtection | Status::Other(2)),
        "{first:?}"
    );
    same_bytes("untouched", &to.all(), &[POISON; PAGE]);
}

pub(crate) fn refusal_keeps_earlier_writes(mut pair: Pair) {
    const PAGES: usize = 20;
    let (from, to) = (
        Memory::new(PAGES * PAGE, 0x77),
        Memory::new(PAGES * PAGE, POISON),
    );
    let source = pair.a.register(&from, Access::LOCAL);
    let target = pair.b.register(&to, Access::REMOTE_WRITE);
    let (lane, _) = pair.lane(&LANE);
    let requests: Vec<_> = (0..PAGES)
        .map(|page| {
            let there = to.address() + (page * PAGE) as u64;
            let key = match page {
                13 => RemoteKey(target.remote.0 ^ 0x0080_0100),
                _ => target.remote,
            };
            let mut write = request(page as u64, Opcode::Write, there, key, 1);
            write.signaled = false;
            write
        })
        .collect();
    pair.a
        .post(lane, &requests, &[sge(&from, &source, 0, PAGE)])
        .expect("post");
    pair.until("the failures", |pair| pair.a.sends().len() == PAGES - 13);
    let mut wanted = vec![(13, Status::RemoteAccess)];
    wanted.extend((14..PAGES as u64).map(|id| (id, Status::Flushed)));
    assert_eq!(pair.a.sends(), wanted);
    let mut expected = vec![0x77; 13 * PAGE];
    expected.resize(PAGES * PAGE, POISON);
    same_bytes("the first thirteen pages", &to.all(), &expected);
}
