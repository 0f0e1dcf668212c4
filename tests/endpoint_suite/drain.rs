//! Endpoints that go away in good order, and sessions that are ended by hand.

use std::{
    thread,
    time::{Duration, Instant},
};

use kvpush::endpoint::{
    ArrivalError, DrainReport, IssueError, PeerError, PushError, telemetry::EventKind,
};

use crate::{
    fixture::{Cache, Fabric, LONG, soon},
    mover,
    transfers::{plain, push},
};

/// Either side drains in the middle of a push, which finishes in time.
pub(crate) fn a_drain_lets_pushes_finish(fabric: &Fabric) {
    for reader_drains in [false, true] {
        let (prefill, decode) = fabric.pair();
        let layout = plain(4, 16);
        let source = Cache::filled(&prefill, &layout, 1);
        let destination = Cache::poisoned(&decode, &layout);
        let pages: Vec<u32> = (0..16).collect();
        let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
        let unopened = Cache::poisoned(&decode, &layout);
        let unopened = unopened.pool.grant("y", &[1], LONG).unwrap();
        let push = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .unwrap();
        push.layer(0, &pages).unwrap();
        let draining = if reader_drains { &decode } else { &prefill };
        // Not left to the thread that waits: a grant issued until it gets there would count as an unopened one.
        draining.start_drain(LONG);
        // What ends before the driver hears of it is not the drain's.
        soon("the driver drains", || {
            let record = draining.flight_record();
            let mut events = record.events().iter();
            events.any(|event| event.kind == EventKind::Draining)
        });
        let report = thread::scope(|scope| {
            let drained = scope.spawn(|| draining.drain_blocking(LONG));
            let of = if reader_drains { &destination } else { &source };
            let refused = of.pool.grant("z", &[1], LONG).err();
            assert_eq!(refused, Some(IssueError::Draining));
            let other = match reader_drains {
                true => decode.start_push(&destination.pool, arrival.grant().clone(), None),
                false => prefill.start_push(&source.pool, arrival.grant().clone(), None),
            };
            assert_eq!(other.err(), Some(PushError::Peer(PeerError::Draining)));
            assert_eq!(draining.poll_drain(), None, "a push runs");
            for layer in 1..4 {
                push.layer(layer, &pages).unwrap();
            }
            push.start_finish("end").unwrap();
            let tail = arrival.complete_blocking(LONG).expect("no hang");
            assert_eq!(tail.expect("complete"), "end");
            // Its own end may be overtaken by the shut-down of a reader that has everything.
            let end = push.ended_blocking(LONG).expect("no hang");
            assert!(end.is_ok() || reader_drains, "{end:?}");
            drained.join().expect("no panic")
        });
        assert!(report.is_clean(), "{report:?}");
        let ran = if reader_drains {
            report.arrivals
        } else {
            report.pushes
        };
        assert_eq!((ran.completed, ran.ended, ran.cut), (1, 0, 0));
        assert_eq!(report.unopened, u64::from(reader_drains));
        assert_eq!(draining.poll_drain(), Some(report));
        mover::assert_same(&destination.bytes(), &source.bytes());
        if reader_drains {
            let end = unopened.poll_complete();
            assert_eq!(end, Some(Err(ArrivalError::Peer(PeerError::Draining))));
        }
        assert_eq!(draining.drain_blocking(LONG), report, "again is the same");
    }
}

/// What does not finish in time is cut, and whoever waits learns of it.
pub(crate) fn a_drain_cuts_what_does_not_finish(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    let time = Duration::from_millis(200);
    let begun = Instant::now();
    let report = decode.drain_blocking(time);
    assert!(begun.elapsed() >= time);
    assert_eq!(report.arrivals.cut, 1);
    assert!(!report.is_clean());
    assert!(matches!(
        arrival.poll_complete(),
        Some(Err(ArrivalError::Peer(_)))
    ));
    let end = push.ended_blocking(LONG).expect("no hang");
    assert!(matches!(end, Err(PushError::Peer(_))), "{end:?}");
    // One that has been shut down has nothing to drain.
    prefill.shutdown();
    assert_eq!(prefill.drain_blocking(LONG), DrainReport::default());
}

/// Either side ends the session; what ran ends, and the next push makes a new one.
pub(crate) fn a_peer_is_disconnected(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    for reader_ends in [false, true] {
        let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
        let running = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .unwrap();
        match reader_ends {
            true => decode.disconnect(prefill.incarnation()),
            false => prefill.disconnect(decode.incarnation()),
        }
        let pushed = running.ended_blocking(LONG).expect("no hang");
        let arrived = arrival.complete_blocking(LONG).expect("no hang");
        let (Err(PushError::Peer(pushed)), Err(ArrivalError::Peer(arrived))) = (pushed, arrived)
        else {
            panic!("it has ended well");
        };
        let ours = [pushed, arrived].into_iter().nth(usize::from(reader_ends));
        assert!(
            matches!(ours, Some(PeerError::Disconnected { .. })),
            "{ours:?}"
        );
        let arrival = destination.pool.grant("y", &[1, 2], LONG).unwrap();
        push(&prefill, &source, &arrival, &[1, 2], b"again");
        assert_eq!(arrival.complete_blocking(LONG).unwrap().unwrap(), "again");
    }
}
