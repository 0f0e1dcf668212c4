//! Processes that are stopped in mid-push for less time than their peer is patient: nothing is lost, everything arrives.

use std::time::Duration;

use crate::{
    content::{self, LARGE_LAYERS, LARGE_PAGES, check, large},
    fixture::{Cache, LONG},
    process::{Over, Peer, list},
    stopped::{in_the_middle, start_writer, stream},
};

const SEED: u64 = 21;
const INTERVAL: Duration = Duration::from_millis(200);
/// Far more than the pause, on a busy machine too.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Several intervals of the keep-alive.
const PAUSE: Duration = Duration::from_millis(1500);

pub(crate) fn a_writer_pauses(over: Over) {
    let builder = over.builder("decode").keepalive(INTERVAL, TIMEOUT);
    let decode = builder.bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let mut writer = start_writer(over);
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let arrival = destination.pool.grant("paused", &pages, LONG).unwrap();
    let push = stream(&mut writer, &arrival, 40_000, &pages);
    in_the_middle(&arrival);
    writer.stop();
    std::thread::sleep(PAUSE);
    assert!(arrival.complete_layers() < LARGE_LAYERS as u32, "too late");
    assert_eq!(arrival.poll_complete(), None, "given up too soon");
    writer.resume();
    writer.tell(format!("finish {push} end"));
    let tail = arrival.complete_blocking(LONG).expect("no hang");
    assert_eq!(tail.expect("complete"), "end");
    writer.tell(format!("pushed {push}"));
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    check(&destination, SEED, &pairs, 0..LARGE_LAYERS).expect("every byte");
    check(&destination, SEED + 1, &pairs, 0..LARGE_LAYERS).expect_err("the checker can fail");
}

pub(crate) fn a_reader_pauses(over: Over) {
    let builder = over.builder("prefill").keepalive(INTERVAL, TIMEOUT);
    let prefill = builder.bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let mut reader = Peer::start(over, "decode");
    reader.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0"));
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let (arrival, grant) = reader.grant(&pages, LONG);
    let push = prefill.push_blocking(&source.pool, grant, LONG);
    let push = push.expect("open");
    for layer in 0..LARGE_LAYERS / 2 {
        push.layer(layer, &pages).unwrap();
    }
    reader.stop();
    // The last layer comes after the pause, so the push is always in the middle.
    for layer in LARGE_LAYERS / 2..LARGE_LAYERS - 1 {
        push.layer(layer, &pages).unwrap();
    }
    std::thread::sleep(PAUSE);
    assert_eq!(push.poll_ended(), None, "given up too soon");
    reader.resume();
    push.layer(LARGE_LAYERS - 1, &pages).unwrap();
    push.finish_blocking("end", LONG)
        .expect("no hang")
        .expect("complete");
    assert_eq!(reader.get::<String>(format!("arrived {arrival}")), "end");
    let all = list(&pages);
    reader.tell(format!("check {SEED} {all} {all}"));
    let wrong = reader.ask(format!("check {} {all} {all}", SEED + 1));
    wrong.expect_err("the checker can fail");
}
