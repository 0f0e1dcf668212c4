//! Grants with windows, seen from outside.

use kvpush::endpoint::{GrantKeys, Revocation};

use crate::{
    fixture::{Cache, Fabric, LONG},
    mover,
    transfers::{plain, push},
};

pub(crate) fn a_grant_says_what_its_writer_has(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 256);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    // In one piece, in few, and in so many that one window for each region must do.
    let scattered: Vec<u32> = (0..100).map(|page| page * 2).collect();
    for (pages, wanted) in [
        (vec![4, 5, 6], true),
        (vec![9, 2, 200], true),
        (scattered, false),
    ] {
        let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
        assert_eq!(arrival.keys(), None);
        push(&prefill, &source, &arrival, &pages, b"tail");
        assert_eq!(
            &arrival
                .complete_blocking(LONG)
                .expect("no hang")
                .expect("complete")[..],
            b"tail"
        );
        let Some(GrantKeys::Windows { count, exact }) = arrival.keys() else {
            panic!("{:?}", arrival.keys());
        };
        assert_eq!(exact, wanted, "{count} windows");
        let mut expected = destination.bytes();
        let same: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
        mover::copy(
            (&layout, &source.bytes()),
            (&layout, &mut expected),
            &same,
            kvpush::kv::HeadRange::new(0, 4),
        );
        mover::assert_same(&destination.bytes(), &expected);
    }
}

/// Taken back in the middle, again and again, while another grant of the same session stays open all the time.
pub(crate) fn a_taken_grant_leaves_the_others(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(4, 64);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let kept_pages: Vec<u32> = (32..64).collect();
    let kept = destination.pool.grant("kept", &kept_pages, LONG).unwrap();
    let other = prefill
        .push_blocking(&source.pool, kept.grant().clone(), LONG)
        .unwrap();
    let pages: Vec<u32> = (0..32).collect();
    for layer in 0..4 {
        other.layer(layer, &kept_pages).unwrap();
        let arrival = destination.pool.grant("taken", &pages, LONG).unwrap();
        let push = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .unwrap();
        push.layer(0, &pages).unwrap();
        assert_eq!(arrival.revoke_blocking(LONG), Some(Revocation::Revoked));
        assert!(push.ended_blocking(LONG).expect("no hang").is_err());
    }
    let report = other.finish_blocking("end", LONG).expect("no hang");
    report.expect("the other push goes on");
    kept.complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
}

/// More grants, one after the other, than a leak of their windows would allow on any fabric in software, and than
/// one window can be bound on a device before another takes its place.
pub(crate) fn windows_do_not_run_out(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(1, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    for round in 0..600u32 {
        let pages = [round % 8];
        let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
        let push = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .expect("open");
        push.layer(0, &pages).unwrap();
        let end = push.finish_blocking("", LONG).expect("no hang");
        end.expect("finish");
        arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");
    }
    mover::assert_same(&destination.bytes(), &source.bytes());
}
