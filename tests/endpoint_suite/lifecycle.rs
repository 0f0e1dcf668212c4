//! How grants and pushes end: once, in time, on both sides, and with nothing left behind.

use std::time::{Duration, Instant};

use kvpush::{
    RefuseCode, RevokeReason,
    endpoint::{ArrivalError, PeerError, PushError, Revocation},
};

use crate::{
    fixture::{Cache, Fabric, LONG, POISON, eventually},
    mover,
    transfers::{plain, push},
};

pub(crate) fn revoked_before_it_is_opened(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    assert_eq!(arrival.revoke_blocking(LONG), Some(Revocation::Revoked));
    assert_eq!(
        arrival.revoke_blocking(LONG),
        Some(Revocation::Revoked),
        "again is the same"
    );
    assert_eq!(destination.pool.granted_pages(), 0);
    match prefill.push_blocking(&source.pool, arrival.grant().clone(), LONG) {
        Err(PushError::Refused {
            code: RefuseCode::StaleGeneration,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    assert!(
        destination
            .bytes()
            .iter()
            .flatten()
            .all(|&byte| byte == POISON)
    );
}

/// A writer in the middle of a push loses its grant: after `revoke` has returned not a byte changes.
pub(crate) fn revoked_in_the_middle(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(8, 256);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let pages: Vec<u32> = (0..256).collect();
    for round in 0..5 {
        let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
        let push = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .unwrap();
        for layer in 0..8 {
            push.layer(layer, &pages).unwrap();
        }
        if round > 0 {
            std::thread::sleep(Duration::from_micros(200 * round));
        }
        // The tail is never sent, so it cannot have completed.
        assert_eq!(arrival.revoke_blocking(LONG), Some(Revocation::Revoked));
        for memory in &destination.memory {
            memory.fill(0, memory_length(memory), POISON).unwrap();
        }
        let end = push.ended_blocking(LONG).expect("no hang");
        assert_eq!(
            end.unwrap_err(),
            PushError::Revoked(RevokeReason::Requested)
        );
        std::thread::sleep(Duration::from_millis(20));
        let changed = destination
            .bytes()
            .iter()
            .flatten()
            .filter(|&&byte| byte != POISON)
            .count();
        assert_eq!(changed, 0, "bytes landed after the revocation");
    }
    // The session survives a cooperative revocation.
    let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
    push_all(&prefill, &source, &arrival, &pages);
    mover::assert_same(&destination.bytes(), &source.bytes());
}

fn memory_length(memory: &kvpush::memory::HostMemory) -> u64 {
    kvpush::memory::Memory::length(memory)
}

fn push_all(prefill: &kvpush::Endpoint, source: &Cache, arrival: &kvpush::Arrival, pages: &[u32]) {
    push(prefill, source, arrival, pages, b"");
    arrival.complete_blocking(LONG).unwrap().unwrap();
}

pub(crate) fn expired_in_the_middle(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let deadline = Duration::from_millis(400);
    let unopened = destination
        .pool
        .grant("x", &[5], Duration::from_millis(30))
        .unwrap();
    let arrival = destination.pool.grant("x", &[1, 2], deadline).unwrap();
    let begun = Instant::now();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    push.layer(0, &[1, 2]).unwrap();
    arrival.layer_blocking(0, LONG).unwrap().unwrap();
    match arrival.complete_blocking(LONG).expect("no hang") {
        Err(ArrivalError::Expired { missing, parts }) => assert!(missing > 0 && missing < parts),
        other => panic!("{other:?}"),
    }
    assert!(
        begun.elapsed() >= deadline - Duration::from_millis(50),
        "not before its time"
    );
    assert!(
        arrival.poll_layer(0).unwrap().is_ok(),
        "a layer that was there stays there"
    );
    assert!(matches!(
        push.ended_blocking(LONG).expect("no hang"),
        Err(PushError::Expired | PushError::Revoked(RevokeReason::Expired))
    ));
    assert!(matches!(
        push.layer(1, &[1, 2]),
        Err(PushError::Expired | PushError::Revoked(_))
    ));
    assert!(matches!(
        unopened.poll_complete(),
        Some(Err(ArrivalError::Expired { .. }))
    ));
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn cancelled_by_the_writer(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    push.layer(0, &[1, 2]).unwrap();
    push.start_cancel();
    assert_eq!(
        push.ended_blocking(LONG).expect("no hang"),
        Err(PushError::Cancelled)
    );
    match arrival.complete_blocking(LONG).expect("no hang") {
        Err(ArrivalError::Abandoned { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn dropped_by_the_writer(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    drop(
        prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .unwrap(),
    );
    assert!(matches!(
        arrival.complete_blocking(LONG).expect("no hang"),
        Err(ArrivalError::Abandoned { .. })
    ));
}

pub(crate) fn dropped_by_the_reader(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    drop(arrival);
    assert!(matches!(
        push.ended_blocking(LONG).expect("no hang"),
        Err(PushError::Revoked(_))
    ));
    eventually("the pages come back", || {
        destination.pool.granted_pages() == 0
    });
}

/// A reader that comes back under the same address is another incarnation: its predecessor's grants are refused.
pub(crate) fn a_restarted_reader_refuses_old_grants(fabric: &Fabric) {
    let (prefill, decode) = (fabric.endpoint("prefill"), fabric.alone("decode"));
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let first = Cache::poisoned(&decode, &layout);
    let arrival = first.pool.grant("x", &[1, 2], LONG).unwrap();
    let old = arrival.grant().clone();
    push_all(&prefill, &source, &arrival, &[1, 2]);
    let address = decode.local_address();
    drop((first, arrival));
    decode.shutdown();
    drop(decode);

    let again = fabric
        .builder("decode-again")
        .bind(address)
        .expect("the same address");
    let destination = Cache::poisoned(&again, &layout);
    let mut refused = None;
    eventually("the restart is noticed", || {
        match prefill.push_blocking(&source.pool, old.clone(), LONG) {
            Err(PushError::Peer(PeerError::Restarted {
                found, expected, ..
            })) => refused = Some((found, expected)),
            // The writer may not yet have heard that its session with the first one has ended.
            Err(PushError::Peer(error)) => assert!(error.is_retryable(), "{error}"),
            other => panic!("{other:?}"),
        }
        refused.is_some()
    });
    let (found, expected) = refused.unwrap();
    assert_eq!(found, again.incarnation());
    assert_ne!(found, expected);
    assert!(
        destination
            .bytes()
            .iter()
            .flatten()
            .all(|&byte| byte == POISON)
    );
    let arrival = destination.pool.grant("y", &[1, 2], LONG).unwrap();
    push_all(&prefill, &source, &arrival, &[1, 2]);
}

pub(crate) fn a_lost_writer_ends_the_arrival(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    push.layer(0, &[1, 2]).unwrap();
    prefill.shutdown();
    assert!(matches!(
        push.poll_ended(),
        Some(Err(PushError::Peer(PeerError::Closed)))
    ));
    assert!(matches!(
        arrival.complete_blocking(LONG).expect("no hang"),
        Err(ArrivalError::Peer(_) | ArrivalError::Abandoned { .. })
    ));
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn a_lost_reader_ends_the_push(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    decode.shutdown();
    assert!(matches!(
        arrival.poll_complete(),
        Some(Err(ArrivalError::Peer(PeerError::Closed)))
    ));
    assert!(matches!(
        push.ended_blocking(LONG).expect("no hang"),
        Err(PushError::Peer(_))
    ));
    assert!(matches!(push.layer(0, &[1, 2]), Err(PushError::Peer(_))));
}

pub(crate) fn shutdown_answers_everyone(fabric: &Fabric) {
    let decode = fabric.endpoint("decode");
    let layout = plain(2, 8);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| arrival.complete_blocking(LONG));
        std::thread::sleep(Duration::from_millis(20));
        decode.shutdown();
        let end = waiting.join().unwrap().expect("no hang");
        assert_eq!(end, Err(ArrivalError::Peer(PeerError::Closed)));
    });
    assert!(destination.pool.grant("x", &[3], LONG).is_err());
    assert!(matches!(
        arrival.revoke_blocking(LONG),
        Some(Revocation::Ended(_))
    ));
}

/// Peers come and go: no thread, descriptor or registration stays.
pub(crate) fn nothing_is_left_behind(fabric: &Fabric) {
    let decode = fabric.endpoint("decode");
    let layout = plain(2, 8);
    let destination = Cache::poisoned(&decode, &layout);
    let round = || {
        let prefill = fabric.endpoint("prefill");
        let source = Cache::filled(&prefill, &layout, 1);
        let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
        push_all(&prefill, &source, &arrival, &[1, 2]);
    };
    round();
    let of_this_test = |name: &str| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|found| found.trim() == name).count()
    };
    // Other tests run beside this one, so only growth with the number of rounds says anything.
    for _ in 0..30 {
        round();
    }
    let threads = of_this_test("kvpush-driver");
    assert!(
        threads < 30,
        "{threads} driver threads after 30 endpoints have come and gone"
    );
}
