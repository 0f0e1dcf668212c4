//! Processes that stop or end while a grant is being opened, at any step of the handshakes.

use std::time::{Duration, Instant};

use kvpush::endpoint::{PushError, Revocation};

use crate::{
    content::{check, filled, layout, poison},
    fixture::{Cache, LONG, Random, seed},
    process::{GRACE, Over, Peer, SLACK, encode, list},
    stopped::assert_stays_poisoned_for,
};

const SEED: u64 = 51;

/// Whether the writer had been told where to write or not, it does not write once the grant has been taken back.
pub(crate) fn a_writer_stops_while_it_opens(over: Over) {
    let mut random = Random(seed());
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &layout(4, 64));
    let pages: Vec<u32> = (0..64).collect();
    let start = || {
        let mut writer = Peer::start(over, "prefill");
        writer.tell(format!("pool 4 64 {SEED}"));
        writer
    };
    let mut writer = start();
    let (mut cooperative, mut silent) = (0, 0);
    for round in 0..20 {
        if round % 3 == 0 {
            writer = start();
        }
        let arrival = destination.pool.grant("opening", &pages, LONG).unwrap();
        writer.send(format!("open {}", encode(arrival.grant())));
        std::thread::sleep(Duration::from_micros(random.below(4000)));
        writer.stop();
        let begun = Instant::now();
        let end = arrival.revoke_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        poison(&destination);
        assert_eq!(end, Revocation::Revoked);
        assert!(waited < GRACE + SLACK, "{waited:?}");
        *(if waited < GRACE / 2 {
            &mut cooperative
        } else {
            &mut silent
        }) += 1;
        assert_eq!(destination.pool.granted_pages(), 0);
        writer.resume();
        match writer.answer() {
            Ok(push) => {
                writer.tell(format!("stream {push} 0 {}", list(&pages)));
                let end = writer
                    .ask(format!("pushed {push}"))
                    .expect_err("taken back");
                assert!(
                    end.starts_with("revoked ") || end.starts_with("peer "),
                    "{end}"
                );
            }
            Err(end) => assert!(
                end.starts_with("refused StaleGeneration: ")
                    || end.starts_with("revoked ")
                    || end.starts_with("peer "),
                "{end}"
            ),
        }
        assert_stays_poisoned_for(&destination, Duration::from_millis(100));
    }
    println!("{cooperative} had not been opened, {silent} had");
    let arrival = destination.pool.grant("again", &pages, LONG).unwrap();
    let push = writer.open(arrival.grant()).expect("open");
    writer.tell(format!("stream {push} 0 {}", list(&pages)));
    writer.tell(format!("finish {push} end"));
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    check(&destination, SEED, &pairs, 0..4).expect("every byte");
    check(&destination, SEED, &pairs, 0..3).expect_err("the checker can fail");
}

pub(crate) fn a_reader_dies_while_it_is_asked(over: Over) {
    let mut random = Random(seed());
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = filled(&prefill, &layout(4, 64), SEED);
    for round in 0..12 {
        let mut reader = Peer::start(over, "decode");
        reader.tell("pool 4 64 0");
        let (_, grant) = reader.grant(&[1, 2, 3], LONG);
        let stopped = round % 3 == 0;
        if stopped {
            reader.stop();
        }
        let push = prefill.start_push(&source.pool, grant, Some(LONG)).unwrap();
        std::thread::sleep(Duration::from_micros(random.below(4000)));
        reader.kill();
        let begun = Instant::now();
        let end = push.ended_blocking(LONG).expect("no hang");
        let waited = begun.elapsed();
        match end {
            Err(error @ PushError::Peer(_)) => assert!(error.is_retryable(), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(waited < SLACK, "{waited:?}");
    }
}
