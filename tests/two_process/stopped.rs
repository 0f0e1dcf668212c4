//! Processes that are stopped and go on later: the other side does not wait for them, and what they had in hand does
//! not land when they continue.

use std::time::{Duration, Instant};

use kvpush::{
    Arrival,
    endpoint::{ArrivalError, PushError, Revocation},
};

use crate::{
    content::{self, LARGE_LAYERS, LARGE_PAGES, changed, check, large, poison},
    fixture::{Cache, LONG, Random, seed},
    process::{DRAIN, GRACE, Over, Peer, SLACK, list},
};

const SEED: u64 = 21;

pub(crate) fn start_writer(over: Over) -> Peer {
    let mut writer = Peer::start(over, "prefill");
    writer.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} {SEED}"));
    writer
}

/// Has `writer` open `arrival` and push all of it, layer after layer. Returns the name of the push.
pub(crate) fn stream(writer: &mut Peer, arrival: &Arrival, pause_us: u64, pages: &[u32]) -> usize {
    let push = writer.open(arrival.grant()).expect("open");
    writer.tell(format!("stream {push} {pause_us} {}", list(pages)));
    push
}

/// Waits until some layers have arrived, but not all have.
pub(crate) fn in_the_middle(arrival: &Arrival) {
    arrival
        .layer_blocking(1, LONG)
        .expect("no hang")
        .expect("the second layer");
}

/// Looks at the pool again and again for a second: nothing of a grant that has ended may land.
#[track_caller]
pub(crate) fn assert_stays_poisoned(cache: &Cache) {
    assert_stays_poisoned_for(cache, Duration::from_secs(1));
}

/// The same, for another time.
#[track_caller]
pub(crate) fn assert_stays_poisoned_for(cache: &Cache, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        assert_eq!(changed(cache), 0, "bytes landed after the grant had ended");
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// The end of a push whose grant was taken back behind its back: it was told, or it has lost the peer.
#[track_caller]
pub(crate) fn assert_taken_back(writer: &mut Peer, push: usize) {
    let end = writer
        .ask(format!("pushed {push}"))
        .expect_err("taken back");
    assert!(
        end.starts_with("revoked ") || end.starts_with("peer ") || end.starts_with("expired"),
        "{end}"
    );
}

/// Whatever has happened before, a new grant of the same pages is served by the same processes. Returns how long the
/// pages took.
fn assert_works(writer: &mut Peer, cache: &Cache, random: &mut Random) -> Duration {
    poison(cache);
    let count = LARGE_PAGES as usize;
    let (from, to) = (
        random.distinct(count, LARGE_PAGES),
        random.distinct(count, LARGE_PAGES),
    );
    let arrival = cache
        .pool
        .grant("again", &to, LONG)
        .expect("the pages are free");
    let begun = Instant::now();
    let push = stream(writer, &arrival, 0, &from);
    writer.tell(format!("finish {push} end"));
    let tail = arrival.complete_blocking(LONG).expect("no hang");
    let time = begun.elapsed();
    assert_eq!(tail.expect("complete"), "end");
    let pairs: Vec<_> = from.into_iter().zip(to).collect();
    check(cache, SEED, &pairs, 0..LARGE_LAYERS).expect("every byte");
    poison(cache);
    time
}

/// The writer stops at any moment of a push, and its grant is taken back without it.
pub(crate) fn a_stopped_writer_is_revoked(over: Over) {
    let mut random = Random(seed());
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let mut writer = start_writer(over);
    let pages = random.distinct(LARGE_PAGES as usize, LARGE_PAGES);
    let typical = assert_works(&mut writer, &destination, &mut random).as_micros() as u64;
    let (mut round, mut halfway) = (0, 0);
    // Until it has been in the middle often enough.
    while halfway < 4 {
        round += 1;
        assert!(round < 30, "the writer is never in the middle of its push");
        let arrival = destination.pool.grant("stopped", &pages, LONG).unwrap();
        let pause = random.pick(&[0, 500, 5000]);
        let push = stream(&mut writer, &arrival, pause, &pages);
        let delay = Duration::from_micros(random.below(typical.max(pause * LARGE_LAYERS as u64)));
        std::thread::sleep(delay);
        writer.stop();
        let begun = Instant::now();
        let layers = arrival.complete_layers();
        halfway += u32::from((1..LARGE_LAYERS as u32).contains(&layers));
        let end = arrival.revoke_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        poison(&destination);
        println!("round {round}: {layers} layers after {delay:?}, revoked after {waited:?}");
        assert_eq!(end, Revocation::Revoked);
        assert!(waited < GRACE + SLACK, "{waited:?}");
        assert!(
            waited > GRACE / 2,
            "a stopped writer cannot have agreed: {waited:?}"
        );
        assert_eq!(destination.pool.granted_pages(), 0);
        if random.below(2) == 0 {
            std::thread::sleep(Duration::from_millis(random.below(200)));
            assert_eq!(
                changed(&destination),
                0,
                "bytes landed from a stopped writer"
            );
        }
        writer.resume();
        assert_stays_poisoned(&destination);
        assert_taken_back(&mut writer, push);
        writer.tell("forget");
    }
    assert_works(&mut writer, &destination, &mut random);
}

/// The cases of this file would notice late writes: without a revocation they do land.
pub(crate) fn the_checker_finds_late_writes(over: Over) {
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let mut writer = start_writer(over);
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let arrival = destination.pool.grant("live", &pages, LONG).unwrap();
    stream(&mut writer, &arrival, 40_000, &pages);
    in_the_middle(&arrival);
    writer.stop();
    std::thread::sleep(GRACE);
    poison(&destination);
    writer.resume();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert_stays_poisoned(&destination);
    }));
    assert!(found.is_err(), "the writer was in the middle of its push");
}

/// The writer stops, and the grant's deadline passes.
pub(crate) fn a_stopped_writer_expires(over: Over) {
    let mut random = Random(seed());
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let mut writer = start_writer(over);
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let deadline = Duration::from_millis(2500);
    // Layers take long enough that the writer is never done before its deadline.
    let pause_us = 2 * deadline.as_micros() as u64 / LARGE_LAYERS as u64;
    for _ in 0..2 {
        let granted = Instant::now();
        let arrival = destination.pool.grant("late", &pages, deadline).unwrap();
        let push = stream(&mut writer, &arrival, pause_us, &pages);
        let until = granted + Duration::from_millis(200 + random.below(1800));
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        writer.stop();
        let end = arrival.complete_blocking(LONG).expect("no hang");
        let ended = granted.elapsed();
        poison(&destination);
        match end {
            Err(ArrivalError::Expired { missing, parts }) => {
                assert!(missing > 0 && missing <= parts);
            }
            other => panic!("{other:?}"),
        }
        assert!(ended >= deadline, "{ended:?} is before its time");
        assert!(ended < deadline + GRACE + SLACK, "{ended:?}");
        assert_eq!(destination.pool.granted_pages(), 0);
        writer.resume();
        assert_stays_poisoned(&destination);
        assert_taken_back(&mut writer, push);
        writer.tell("forget");
    }
    assert_works(&mut writer, &destination, &mut random);
}

/// The reader stops: the writer's deadline ends the push, and when the reader goes on its arrival has ended too.
pub(crate) fn a_stopped_reader_expires(over: Over) {
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let mut reader = Peer::start(over, "decode");
    reader.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0"));
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let deadline = Duration::from_millis(1500);
    for _ in 0..2 {
        let granted = Instant::now();
        let (arrival, grant) = reader.grant(&pages, deadline);
        let push = prefill
            .push_blocking(&source.pool, grant, LONG)
            .expect("open");
        push.layer(0, &pages).unwrap();
        reader.stop();
        // An RDMA device places writes whether its process runs or not, so there something has to be missing.
        let whole = matches!(over, Over::Tcp | Over::Shm);
        for layer in 1..LARGE_LAYERS - usize::from(!whole) {
            push.layer(layer, &pages).unwrap();
        }
        if whole {
            push.start_finish("end").unwrap();
        }
        let end = push.ended_blocking(LONG).expect("no hang");
        let ended = granted.elapsed();
        assert_eq!(end, Err(PushError::Expired));
        assert!(ended >= deadline / 2, "{ended:?} is before its time");
        assert!(ended < deadline + DRAIN + SLACK, "{ended:?}");
        // Nothing of the push is in flight: the source may change.
        poison(&source);
        reader.resume();
        let resumed = Instant::now();
        let end = reader
            .ask(format!("arrived {arrival}"))
            .expect_err("it cannot be whole");
        assert!(
            end.starts_with("expired: ") || end.starts_with("peer "),
            "{end}"
        );
        let late = resumed.elapsed();
        assert!(late < GRACE + SLACK, "{late:?} after it went on");
        assert_eq!(reader.get::<usize>("granted"), 0);
        let fresh = content::filled(&prefill, &large(), SEED);
        for (to, from) in source.memory.iter().zip(fresh.bytes()) {
            to.write(0, &from).unwrap();
        }
    }
    reader.tell("poison");
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

/// The reader stops: neither a cancellation nor the opening of another push waits for it.
pub(crate) fn a_stopped_reader_is_cancelled(over: Over) {
    let opening = Duration::from_millis(800);
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let mut reader = Peer::start(over, "decode");
    reader.tell(format!("pool {LARGE_LAYERS} {} 0", LARGE_PAGES * 2));
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let others: Vec<u32> = pages.iter().map(|page| page + LARGE_PAGES).collect();
    let (arrival, grant) = reader.grant(&pages, LONG);
    let (other, second) = reader.grant(&others, LONG);
    let push = prefill
        .push_blocking(&source.pool, grant, LONG)
        .expect("open");
    reader.stop();
    for layer in 0..LARGE_LAYERS {
        push.layer(layer, &pages).unwrap();
    }
    // Over the session there is; later, when that is lost, over a new one.
    for _ in 0..2 {
        let begun = Instant::now();
        let opened = prefill.push_blocking(&source.pool, second.clone(), opening);
        let waited = begun.elapsed();
        assert!(
            matches!(opened, Err(PushError::Expired | PushError::Peer(_))),
            "{opened:?}"
        );
        assert!(waited < opening + SLACK, "{waited:?}");
        push.start_cancel();
        let begun = Instant::now();
        let end = push.ended_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        assert_eq!(end, Err(PushError::Cancelled));
        assert!(waited < DRAIN + SLACK, "{waited:?}");
    }
    reader.resume();
    let end = reader
        .ask(format!("arrived {arrival}"))
        .expect_err("cancelled");
    assert!(
        end.starts_with("abandoned: ") || end.starts_with("peer "),
        "{end}"
    );
    // The openings that nobody waits for any more have either never reached it or been taken back.
    match reader.ask(format!("revoke {other}")) {
        Ok(end) => assert_eq!(end, "revoked"),
        Err(end) => assert!(
            end.starts_with("abandoned: ") || end.starts_with("peer "),
            "{end}"
        ),
    }
    assert_eq!(reader.get::<usize>("granted"), 0);
}
