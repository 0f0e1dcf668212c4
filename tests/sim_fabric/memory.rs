//! Who may touch what, and until when.

use std::sync::Arc;

use kvpush::fabric::{
    Access, Device, FabricErrorKind, Opcode, RemoteKey, Sge, Status, WorkRequest,
};

use crate::rig::{HOST, LANE, MTU, Rig, SIZE, Side, seeded, write, wrong_keys};

/// Posts one request between two good writes, and expects it to fail with `status` and to change nothing.
fn offence(status: Status, peer_fails: bool, make: impl FnOnce(&mut Rig) -> (WorkRequest, Sge)) {
    let mut rig = Rig::new(seeded(11), 1);
    rig.b.memory.fill(0xee);
    rig.post(0, write(1, 0, 64));
    let (request, sge) = make(&mut rig);
    let request = WorkRequest {
        id: 2,
        signaled: false,
        ..request
    };
    rig.post_raw(0, &[request], &[sge]).unwrap();
    rig.post(0, write(3, 0, 64));
    rig.settle();
    let sent = rig.a.sent();
    assert_eq!(
        sent,
        [(1, Status::Success), (2, status), (3, Status::Flushed)]
    );
    assert!(rig.same(0, 0, 64));
    assert_eq!(rig.b.memory.bytes(64, SIZE - 64), vec![0xee; SIZE - 64]);
    // A failed responder flushes its receives; one that was not asked keeps them.
    let flushed = rig.b.poll();
    assert!(
        flushed
            .iter()
            .all(|c| c.status == Status::Flushed && c.vendor_error != 0)
    );
    let expected = if peer_fails { LANE.receive_depth } else { 0 };
    assert_eq!(flushed.len(), expected as usize);
    let refused = u64::from(status == Status::RemoteAccess);
    assert_eq!(rig.net.stats().access_errors, refused);
}

#[test]
fn a_range_that_leaves_the_registration_is_refused_before_its_first_byte() {
    offence(Status::RemoteAccess, true, |rig| {
        let (request, sge) = rig.request(&write(0, 0, 3 * MTU));
        let remote_address = rig.b.memory.address() + (SIZE - 3 * MTU + 1) as u64;
        (
            WorkRequest {
                remote_address,
                ..request
            },
            sge,
        )
    });
    offence(Status::RemoteAccess, true, |rig| {
        let (request, sge) = rig.request(&write(0, 0, 2));
        let remote_address = rig.b.memory.address() - 1;
        (
            WorkRequest {
                remote_address,
                ..request
            },
            sge,
        )
    });
    offence(Status::RemoteAccess, true, |rig| {
        let (request, sge) = rig.request(&write(0, 0, 2));
        (
            WorkRequest {
                remote_address: u64::MAX,
                ..request
            },
            sge,
        )
    });
}

#[test]
fn a_wrong_remote_key_is_refused() {
    offence(Status::RemoteAccess, true, |rig| {
        let (request, sge) = rig.request(&write(0, MTU, 64));
        let remote_key = wrong_keys(rig.b.keys).1;
        (
            WorkRequest {
                remote_key,
                ..request
            },
            sge,
        )
    });
    // The peer's local key, and our own remote key.
    for pick in [
        |rig: &Rig| RemoteKey(rig.b.keys.local.0),
        |rig: &Rig| rig.a.keys.remote,
    ] {
        offence(Status::RemoteAccess, true, |rig| {
            let (request, sge) = rig.request(&write(0, MTU, 64));
            let remote_key = pick(rig);
            (
                WorkRequest {
                    remote_key,
                    ..request
                },
                sge,
            )
        });
    }
}

#[test]
fn rights_are_kept() {
    for (access, opcode) in [
        (Access::LOCAL, Opcode::Write),
        (Access::LOCAL, Opcode::WriteImm(1)),
        (Access::LOCAL, Opcode::Read),
        (Access::REMOTE_WRITE, Opcode::Read),
    ] {
        offence(Status::RemoteAccess, true, |rig| {
            let (request, sge) = rig.request(&write(0, MTU, 64));
            let address = rig.b.memory.address();
            // SAFETY: the rig's memory, which outlives its device.
            let keys = unsafe { rig.b.device.register(address, SIZE as u64, access) }.unwrap();
            let remote_key = keys.remote;
            (
                WorkRequest {
                    remote_key,
                    opcode,
                    ..request
                },
                sge,
            )
        });
    }
}

#[test]
fn a_gather_list_outside_its_registration_fails_locally_and_in_its_turn() {
    offence(Status::LocalProtection, false, |rig| {
        let (request, sge) = rig.request(&write(0, MTU, 64));
        (
            request,
            Sge {
                address: sge.address + (SIZE - MTU - 63) as u64,
                ..sge
            },
        )
    });
    offence(Status::LocalProtection, false, |rig| {
        let (request, sge) = rig.request(&write(0, MTU, 64));
        (
            request,
            Sge {
                key: wrong_keys(rig.a.keys).0,
                ..sge
            },
        )
    });
    offence(Status::LocalProtection, false, |rig| {
        let (request, sge) = rig.request(&write(0, MTU, 64));
        let key = wrong_keys(rig.a.keys).0;
        (
            WorkRequest {
                opcode: Opcode::Read,
                ..request
            },
            Sge { key, ..sge },
        )
    });
}

#[test]
fn a_deregistered_key_is_dead_even_in_the_middle_of_a_message() {
    let mut rig = Rig::new(seeded(12), 1);
    rig.post(0, write(1, 0, 32 * MTU));
    rig.step_until(|rig| rig.b.memory.byte(5 * MTU) != 0);
    rig.b.context.deregister(rig.b.keys.mr).unwrap();
    let before = rig.b.memory.bytes(0, 32 * MTU);
    // The same memory again: the slot is the same, the key is not.
    let address = rig.b.memory.address();
    // SAFETY: the rig's memory, which outlives its device.
    let keys = unsafe { rig.b.device.register(address, SIZE as u64, Access::ALL) }.unwrap();
    assert_ne!(keys.remote, rig.b.keys.remote);
    rig.settle();
    assert_eq!(rig.a.sent(), [(1, Status::RemoteAccess)]);
    assert!(rig.b.memory.bytes(0, 32 * MTU) == before);
    let error = rig.b.context.deregister(rig.b.keys.mr).unwrap_err();
    assert!(matches!(error.kind, FabricErrorKind::Memory(_)));
}

#[test]
fn bad_registrations_are_refused() {
    let rig = Rig::new(seeded(13), 1);
    let address = rig.a.memory.address();
    let only_remote = Access {
        local_write: false,
        ..Access::REMOTE_WRITE
    };
    for (address, length, access) in [
        (address, 0, Access::LOCAL),
        (0, 64, Access::LOCAL),
        (u64::MAX - 3, 64, Access::LOCAL),
        (address, u64::MAX, Access::LOCAL),
        (address, 64, only_remote),
    ] {
        // SAFETY: refused, so nothing is registered.
        unsafe { rig.a.device.register(address, length, access) }.unwrap_err();
    }
}

/// Runs `end` on the receiver in the middle of a message, and expects its memory to be constant from then on.
fn no_late_write(seed: u64, end: impl Fn(&mut Rig)) {
    let mut rig = Rig::new(seeded(seed), 2);
    rig.post(0, write(1, 0, 64 * MTU));
    rig.post_imm(0, 2, 9);
    rig.post(1, write(3, 128 * MTU, 64 * MTU));
    rig.step_until(|rig| rig.b.memory.byte((seed as usize % 60) * MTU) != 0);
    end(&mut rig);
    let before = rig.b.memory.bytes(0, 64 * MTU);
    let in_flight = rig.net.stats().refused;
    rig.settle();
    assert!(
        rig.b.memory.bytes(0, 64 * MTU) == before,
        "seed {seed}\n{}",
        rig.net.trace()
    );
    assert!(rig.net.stats().refused > in_flight, "nothing was in flight");
    // The other lane does not notice; the sender finds out by itself.
    assert!(rig.same(128 * MTU, 128 * MTU, 64 * MTU));
    let mut sent = rig.a.sent();
    sent.sort_by_key(|(id, _)| *id);
    let expected = [
        (1, Status::RetryExceeded),
        (2, Status::Flushed),
        (3, Status::Success),
    ];
    assert_eq!(sent, expected);
}

#[test]
fn a_fence_stops_the_peer_in_the_middle_of_a_message() {
    for seed in 1..40 {
        no_late_write(seed, |rig| {
            rig.b.context.fence_lane(rig.lanes[0].1).unwrap();
            let flushed = rig.b.poll();
            assert_eq!(flushed.len(), LANE.receive_depth as usize);
            assert!(flushed.iter().all(|c| c.status == Status::Flushed));
        });
    }
}

#[test]
fn destroying_a_lane_stops_the_peer_too() {
    for seed in 1..40 {
        no_late_write(seed, |rig| {
            rig.b.context.destroy_lane(rig.lanes[0].1).unwrap()
        });
    }
}

#[test]
fn a_fenced_reader_gets_no_late_data() {
    let mut rig = Rig::new(seeded(14), 1);
    rig.b.memory.fill(7);
    let (read, sge) = rig.request(&write(1, 0, 32 * MTU));
    let read = WorkRequest {
        opcode: Opcode::Read,
        ..read
    };
    rig.a.memory.fill(0);
    rig.post_raw(0, &[read], &[sge]).unwrap();
    rig.step_until(|rig| rig.a.memory.byte(4 * MTU) == 7);
    rig.a.context.fence_lane(rig.lanes[0].0).unwrap();
    let before = rig.a.memory.bytes(0, 32 * MTU);
    rig.settle();
    assert!(rig.a.memory.bytes(0, 32 * MTU) == before);
    assert_eq!(rig.a.memory.byte(32 * MTU - 1), 0);
    assert_eq!(rig.a.sent(), [(1, Status::Flushed)]);
}

#[test]
fn only_the_connected_peer_gets_through() {
    let mut rig = Rig::new(seeded(15), 0);
    let (good, good_address) = rig.a.context.create_lane(&LANE).unwrap();
    let (bad, _) = rig.a.context.create_lane(&LANE).unwrap();
    let (theirs, their_address) = rig.b.context.create_lane(&LANE).unwrap();
    rig.b
        .context
        .connect_lane(theirs, &good_address, HOST, false)
        .unwrap();
    rig.a
        .context
        .connect_lane(good, &their_address, HOST, true)
        .unwrap();
    rig.a
        .context
        .connect_lane(bad, &their_address, HOST, true)
        .unwrap();
    rig.lanes = vec![(good, theirs), (bad, theirs)];
    rig.post(1, write(1, 0, 64));
    rig.settle();
    assert_eq!(rig.a.sent(), [(1, Status::RetryExceeded)]);
    assert_eq!(rig.b.memory.bytes(0, 64), [0; 64]);
    rig.post(0, write(2, 0, 64));
    rig.settle();
    assert_eq!(rig.a.sent(), [(2, Status::Success)]);
}

#[test]
fn dropping_the_device_and_its_context_makes_its_memory_unreachable() {
    let mut rig = Rig::new(seeded(16), 1);
    rig.post(0, write(1, 0, 32 * MTU));
    rig.step_until(|rig| rig.b.memory.byte(4 * MTU) != 0);
    let Rig { net, mut a, b, .. } = rig;
    let Side {
        context,
        device,
        keys,
        memory,
    } = b;
    drop((device, context));
    let before = memory.bytes(0, SIZE);
    assert!(net.run_until_idle(1_000_000));
    assert!(memory.bytes(0, SIZE) == before);
    assert_eq!(a.sent(), [(1, Status::RetryExceeded)]);
    // A new device of that name is a new device, with other keys.
    let again = net.device("b");
    let mut context = Arc::clone(&again).open_context(16).unwrap();
    context.deregister(keys.mr).unwrap_err();
    // SAFETY: `memory` is dropped after `again`.
    let new = unsafe { again.register(memory.address(), SIZE as u64, Access::ALL) }.unwrap();
    assert_ne!(new.remote, keys.remote);
    drop((again, context));
    drop(memory);
}

#[test]
fn dropping_the_context_ends_its_lanes() {
    let mut rig = Rig::new(seeded(17), 1);
    rig.post(0, write(1, 0, 32 * MTU));
    rig.step_until(|rig| rig.b.memory.byte(4 * MTU) != 0);
    let other = rig.net.device("c").open_context(16).unwrap();
    drop(std::mem::replace(&mut rig.b.context, other));
    let before = rig.b.memory.bytes(0, SIZE);
    rig.settle();
    assert!(rig.b.memory.bytes(0, SIZE) == before);
    assert_eq!(rig.a.sent(), [(1, Status::RetryExceeded)]);
}
