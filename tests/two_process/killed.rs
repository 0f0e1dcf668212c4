//! Processes that end in the middle of pushes, and their successors.

use std::time::{Duration, Instant};

use kvpush::endpoint::{ArrivalError, PeerError, PushError};

use crate::{
    content::{self, LARGE_LAYERS, LARGE_PAGES, changed, check, large, poison},
    fixture::{Cache, LONG, Random, seed},
    process::{Over, Peer, SLACK, list},
};

const SEED: u64 = 31;
/// Peers that come and go.
const ROUNDS: usize = 50;
/// Pushes that are active when one goes.
const PUSHES: u32 = 8;
/// Lanes to one: so many that with all that come, more completions are reserved than a queue has entries, unless they
/// are given back.
const LANES: u16 = 8;

pub(crate) fn a_killed_writer(over: Over) {
    let mut random = Random(seed());
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let pool = format!("pool {LARGE_LAYERS} {LARGE_PAGES} {SEED}");
    for _ in 0..3 {
        let mut writer = Peer::start(over, "prefill");
        writer.tell(&pool);
        let arrival = destination.pool.grant("killed", &pages, LONG).unwrap();
        let push = writer.open(arrival.grant()).expect("open");
        writer.tell(format!("stream {push} 1000 {}", list(&pages)));
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        writer.kill();
        let begun = Instant::now();
        let end = arrival.complete_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        poison(&destination);
        match end {
            Err(error @ ArrivalError::Peer(_)) => assert!(error.is_retryable(), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(waited < SLACK, "{waited:?}");
        assert_eq!(destination.pool.granted_pages(), 0);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(changed(&destination), 0, "bytes of a dead writer");
    }
    let mut writer = Peer::start(over, "prefill");
    writer.tell(&pool);
    let arrival = destination.pool.grant("successor", &pages, LONG).unwrap();
    let push = writer.open(arrival.grant()).expect("open");
    writer.tell(format!("stream {push} 0 {}", list(&pages)));
    writer.tell(format!("finish {push} end"));
    let tail = arrival.complete_blocking(LONG).expect("no hang");
    assert_eq!(tail.expect("complete"), "end");
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    check(&destination, SEED, &pairs, 0..LARGE_LAYERS).expect("every byte");
    check(&destination, SEED + 1, &pairs, 0..LARGE_LAYERS).expect_err("the checker can fail");
}

pub(crate) fn a_killed_reader(over: Over) {
    let mut random = Random(seed());
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let pool = format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0");
    let mut reader = Peer::start(over, "decode");
    reader.tell(&pool);
    for _ in 0..3 {
        let (_, unused) = reader.grant(&[0], LONG);
        let (_, grant) = reader.grant(&pages[1..], LONG);
        let push = prefill
            .push_blocking(&source.pool, grant, LONG)
            .expect("open");
        // The last layer comes after the end, so it is always in the middle.
        for layer in 0..LARGE_LAYERS - 1 {
            push.layer(layer, &pages[1..]).unwrap();
        }
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        let address = reader.address;
        reader.kill();
        let begun = Instant::now();
        let end = push.ended_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        match end {
            Err(error @ PushError::Peer(_)) => assert!(error.is_retryable(), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(waited < SLACK, "{waited:?}");
        assert!(matches!(
            push.layer(LARGE_LAYERS - 1, &pages[1..]),
            Err(PushError::Peer(_))
        ));
        // Nobody is there.
        match prefill.push_blocking(&source.pool, unused.clone(), LONG) {
            Err(PushError::Peer(PeerError::Control { .. })) => {}
            other => panic!("{other:?}"),
        }
        // Somebody else is there.
        reader = Peer::restart(over, "decode-again", address);
        reader.tell(&pool);
        reader.grant(&[0], LONG);
        match prefill.push_blocking(&source.pool, unused.clone(), LONG) {
            Err(PushError::Peer(PeerError::Restarted {
                expected, found, ..
            })) => {
                assert_eq!(expected, unused.issuer());
                assert_ne!(expected, found);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(reader.get::<usize>("changed"), 0, "an old grant wrote");
        reader.tell("forget");
    }
    let (arrival, grant) = reader.grant(&pages, LONG);
    let push = prefill
        .push_blocking(&source.pool, grant, LONG)
        .expect("open");
    for layer in 0..LARGE_LAYERS {
        push.layer(layer, &pages).unwrap();
    }
    push.finish_blocking("end", LONG)
        .expect("no hang")
        .expect("complete");
    assert_eq!(reader.get::<String>(format!("arrived {arrival}")), "end");
    let all = list(&pages);
    reader.tell(format!("check {SEED} {all} {all}"));
    let wrong = reader.ask(format!("check {} {all} {all}", SEED + 1));
    wrong.expect_err("the checker can fail");
}

/// Descriptors and threads of `survivor`, once they are no more than `limit`.
fn census(survivor: &mut Peer, limit: Option<(usize, usize)>) -> (usize, usize) {
    let end = Instant::now() + SLACK;
    loop {
        let found: String = survivor.get("census");
        let (descriptors, threads) = found.split_once(',').expect("two numbers");
        let found = (descriptors.parse().unwrap(), threads.parse().unwrap());
        // Connections of the dead are closed when their end is noticed.
        let settled = limit.is_some_and(|limit| found.0 <= limit.0 && found.1 <= limit.1);
        if settled || Instant::now() > end {
            return found;
        }
        if limit.is_none() {
            // The measure itself must be one that has settled.
            std::thread::sleep(Duration::from_millis(300));
            let again: String = survivor.get("census");
            if again == format!("{},{}", found.0, found.1) {
                return found;
            }
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Nothing of the peers that have come and gone is left in `survivor`, which is told to leak afterwards.
#[track_caller]
fn assert_nothing_left(survivor: &mut Peer, before: (usize, usize)) {
    let after = census(survivor, Some(before));
    assert!(
        after.0 <= before.0 && after.1 <= before.1,
        "descriptors and threads: {before:?} before, {after:?} after {ROUNDS} peers"
    );
    // The census can fail.
    survivor.tell("leak");
    let found: String = survivor.get("census");
    assert_eq!(found, format!("{},{}", after.0 + 1, after.1));
}

/// The ways that a process ends: always in the middle, and without a word.
const ENDS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGKILL, libc::SIGABRT, libc::SIGINT];

pub(crate) fn writers_come_and_go(over: Over) {
    let mut random = Random(seed());
    let mut decode = Peer::start_with_lanes(over, "decode", LANES);
    decode.tell("pool 8 64 0");
    let mut before = None;
    for round in 0..ROUNDS {
        let mut prefill = Peer::start_with_lanes(over, "prefill", LANES);
        prefill.tell(format!("pool 8 64 {SEED}"));
        let arrivals: Vec<usize> = (0..PUSHES)
            .map(|push| {
                let pages: Vec<u32> = (push * 8..push * 8 + 8).collect();
                let (arrival, grant) = decode.grant(&pages, LONG);
                let push = prefill.open(&grant).expect("open");
                prefill.tell(format!("stream {push} 300 {}", list(&pages)));
                arrival
            })
            .collect();
        prefill.end_by(random.pick(&ENDS));
        let begun = Instant::now();
        for arrival in arrivals {
            let end = decode
                .ask(format!("arrived {arrival}"))
                .expect_err("no tail was sent");
            assert!(end.starts_with("peer "), "{end}");
        }
        let waited = begun.elapsed();
        assert!(waited < SLACK, "{waited:?}");
        assert_eq!(decode.get::<usize>("granted"), 0);
        decode.tell("forget");
        // What is made once and kept has been made by then.
        if round == 1 {
            before = Some(census(&mut decode, None));
        }
    }
    assert_nothing_left(&mut decode, before.expect("more than two rounds"));
}

pub(crate) fn readers_come_and_go(over: Over) {
    let mut random = Random(seed());
    let mut prefill = Peer::start_with_lanes(over, "prefill", LANES);
    prefill.tell(format!("pool 8 64 {SEED}"));
    let mut before = None;
    for round in 0..ROUNDS {
        let mut decode = Peer::start_with_lanes(over, "decode", LANES);
        decode.tell("pool 8 64 0");
        let pushes: Vec<usize> = (0..PUSHES)
            .map(|push| {
                let pages: Vec<u32> = (push * 8..push * 8 + 8).collect();
                let (_, grant) = decode.grant(&pages, LONG);
                let push = prefill.open(&grant).expect("open");
                prefill.tell(format!("stream {push} 300 {}", list(&pages)));
                push
            })
            .collect();
        decode.end_by(random.pick(&ENDS));
        let begun = Instant::now();
        for push in pushes {
            let end = prefill
                .ask(format!("pushed {push}"))
                .expect_err("no tail was sent");
            assert!(end.starts_with("peer "), "{end}");
        }
        let waited = begun.elapsed();
        assert!(waited < SLACK, "{waited:?}");
        prefill.tell("forget");
        if round == 1 {
            before = Some(census(&mut prefill, None));
        }
    }
    assert_nothing_left(&mut prefill, before.expect("more than two rounds"));
}
