//! A process that is stopped is the trouble of its own pushes only.

use std::time::{Duration, Instant};

use kvpush::endpoint::{PushError, Revocation};

use crate::{
    content::{LARGE_LAYERS, LARGE_PAGES, check, filled, large, poison},
    fixture::{Cache, LONG},
    process::{DRAIN, GRACE, Over, Peer, SLACK, list},
    stopped::{assert_stays_poisoned, assert_taken_back, in_the_middle, start_writer, stream},
};

const SEED: u64 = 21;

/// Another writer pushes to the same reader while the first is stopped, and while it is fenced.
pub(crate) fn of_a_stopped_writer(over: Over) {
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let victim = Cache::poisoned(&decode, &large());
    let destination = Cache::poisoned(&decode, &large());
    let (mut stopped, mut writer) = (start_writer(over), start_writer(over));
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();

    let taken = victim.pool.grant("stopped", &pages, LONG).unwrap();
    let push = stream(&mut stopped, &taken, 2000, &pages);
    in_the_middle(&taken);
    stopped.stop();

    let arrival = destination.pool.grant("beside", &pages, LONG).unwrap();
    let other = stream(&mut writer, &arrival, 0, &pages);
    writer.tell(format!("finish {other} end"));
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    check(&destination, SEED, &pairs, 0..LARGE_LAYERS).expect("every byte");

    poison(&destination);
    let arrival = destination.pool.grant("meanwhile", &pages, LONG).unwrap();
    // In the middle of its layers when the other one is fenced.
    let pause_us = 2 * GRACE.as_micros() as u64 / LARGE_LAYERS as u64;
    let other = stream(&mut writer, &arrival, pause_us, &pages);
    let begun = Instant::now();
    assert_eq!(taken.revoke_blocking(LONG), Some(Revocation::Revoked));
    assert!(begun.elapsed() < GRACE + SLACK);
    poison(&victim);
    stopped.resume();
    writer.tell(format!("finish {other} end"));
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    check(&destination, SEED, &pairs, 0..LARGE_LAYERS).expect("every byte");
    check(&destination, SEED, &pairs[1..], 0..LARGE_LAYERS).expect_err("the checker can fail");
    assert_stays_poisoned(&victim);
    assert_taken_back(&mut stopped, push);
}

/// The same writer pushes to another reader while the first is stopped, and while the push to it is given up.
pub(crate) fn of_a_stopped_reader(over: Over) {
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = filled(&prefill, &large(), SEED);
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let all = list(&pages);
    let (mut stopped, mut reader) = (Peer::start(over, "stopped"), Peer::start(over, "decode"));
    for peer in [&mut stopped, &mut reader] {
        peer.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0"));
    }
    let (_, grant) = stopped.grant(&pages, LONG);
    let stuck = prefill
        .push_blocking(&source.pool, grant, LONG)
        .expect("open");
    stopped.stop();
    for layer in 0..LARGE_LAYERS {
        stuck.layer(layer, &pages).unwrap();
    }
    for round in 0..2 {
        reader.tell("poison");
        let (arrival, grant) = reader.grant(&pages, LONG);
        let push = prefill
            .push_blocking(&source.pool, grant, LONG)
            .expect("open");
        if round == 1 {
            stuck.start_cancel();
        }
        for layer in 0..LARGE_LAYERS {
            push.layer(layer, &pages).unwrap();
            if round == 1 {
                // In the middle of its layers when the other one's lanes are fenced.
                std::thread::sleep(2 * DRAIN / LARGE_LAYERS as u32);
            }
        }
        let begun = Instant::now();
        push.finish_blocking("end", LONG)
            .expect("no hang")
            .expect("complete");
        assert!(begun.elapsed() < Duration::from_secs(20));
        assert_eq!(reader.get::<String>(format!("arrived {arrival}")), "end");
        reader.tell(format!("check {SEED} {all} {all}"));
        if round == 0 {
            assert_eq!(stuck.poll_ended(), None, "nobody has taken it back");
        }
    }
    let wrong = reader.ask(format!("check {} {all} {all}", SEED + 1));
    wrong.expect_err("the checker can fail");
    assert_eq!(stuck.poll_ended(), Some(Err(PushError::Cancelled)));
}
