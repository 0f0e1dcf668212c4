//! Pushes from process to process: every byte, and each layer as soon as it is there.

use std::time::Duration;

use crate::{
    content::{self, check, layout},
    fixture::{Cache, LONG, Random, seed},
    process::{Over, Peer, list},
};

const SEED: u64 = 11;

pub(crate) fn requests_arrive_whole(over: Over) {
    let mut random = Random(seed());
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &layout(6, 64));
    let mut prefill = Peer::start(over, "prefill");
    prefill.tell(format!("pool 6 64 {SEED}"));
    for round in 0..6 {
        content::poison(&destination);
        // Three requests at once, of disjoint pages.
        let (from, to) = (random.distinct(48, 64), random.distinct(48, 64));
        let requests: Vec<_> = (0..3)
            .map(|request| {
                let (from, to) = (&from[request * 16..][..16], &to[request * 16..][..16]);
                let arrival = destination.pool.grant("request", to, LONG).unwrap();
                let push = prefill.open(arrival.grant()).expect("open");
                prefill.tell(format!("stream {push} 0 {}", list(from)));
                (arrival, push)
            })
            .collect();
        for (arrival, push) in &requests {
            prefill.tell(format!("finish {push} tail-{round}-{push}"));
            let tail = arrival
                .complete_blocking(LONG)
                .expect("no hang")
                .expect("complete");
            assert_eq!(tail, format!("tail-{round}-{push}"));
            let bytes: u64 = prefill.get(format!("pushed {push}"));
            assert_eq!(bytes, 16 * 6 * 8192);
        }
        let pairs: Vec<_> = from.iter().copied().zip(to.iter().copied()).collect();
        check(&destination, SEED, &pairs, 0..6).expect("all pages, and nothing else");
        // The checker can fail.
        check(&destination, SEED + 1, &pairs, 0..6).expect_err("other content");
        check(&destination, SEED, &pairs[1..], 0..6).expect_err("one page less");
    }
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn layers_are_ready_before_the_writer_has_finished(over: Over) {
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &layout(5, 16));
    let mut prefill = Peer::start(over, "prefill");
    prefill.tell(format!("pool 5 16 {SEED}"));
    let pages: Vec<u32> = (0..16).collect();
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    let arrival = destination.pool.grant("layers", &pages, LONG).unwrap();
    let push = prefill.open(arrival.grant()).expect("open");
    let order = [3, 0, 4, 1, 2];
    for (done, layer) in order.into_iter().enumerate() {
        assert_eq!(arrival.poll_layer(layer), None, "not pushed yet");
        prefill.tell(format!("layer {push} {layer} {}", list(&pages)));
        let ready = arrival.layer_blocking(layer, LONG).expect("no hang");
        assert_eq!(ready, Ok(()));
        check(&destination, SEED, &pairs, order[..=done].iter().copied())
            .expect("the layers that are ready, and no others");
        assert_eq!(arrival.complete_layers() as usize, done + 1);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(arrival.poll_complete(), None, "the tail is missing");
    prefill.tell(format!("finish {push} end"));
    assert_eq!(arrival.complete_blocking(LONG).unwrap().unwrap(), "end");
}
