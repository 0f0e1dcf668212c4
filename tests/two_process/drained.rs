//! Processes that go away in good order, as on a rolling update.

use std::time::{Duration, Instant};

use kvpush::endpoint::{ArrivalError, PushError};

use crate::{
    content::{self, LARGE_LAYERS, LARGE_PAGES, check, large},
    fixture::{Cache, LONG},
    process::{Over, Peer, SLACK, list},
};

const SEED: u64 = 71;

/// A reader is asked to go while a push streams into it: it goes when it has everything.
pub(crate) fn a_reader_goes_after_its_pushes(over: Over) {
    let prefill = over.builder("prefill").bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &large(), SEED);
    let mut reader = Peer::start(over, "decode");
    reader.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} 0"));
    let pages: Vec<u32> = (0..LARGE_PAGES / 2).collect();
    let (_, grant) = reader.grant(&pages, LONG);
    let (_, other) = reader.grant(&[LARGE_PAGES - 1], LONG);
    let push = prefill
        .push_blocking(&source.pool, grant, LONG)
        .expect("open");
    push.layer(0, &pages).unwrap();
    reader.send("drain 60000");
    // Whatever comes from now on is refused, by whichever of the two is there to do so.
    std::thread::sleep(Duration::from_millis(300));
    match prefill.push_blocking(&source.pool, other, LONG) {
        Err(PushError::Refused { code, .. }) => assert_eq!(code, kvpush::RefuseCode::Draining),
        other => panic!("{other:?}"),
    }
    for layer in 1..LARGE_LAYERS {
        push.layer(layer, &pages).unwrap();
    }
    push.start_finish("end").unwrap();
    let end = push.ended_blocking(LONG).expect("no hang");
    // completed ended cut unopened
    assert_eq!(reader.answer().expect("drained"), "1 0 0 1");
    assert!(
        matches!(end, Ok(_) | Err(PushError::Peer(_))),
        "the last acknowledgement may be overtaken, nothing else: {end:?}"
    );
    let all = list(&pages);
    reader.tell(format!("check {SEED} {all} {all}"));
}

/// A writer is asked to go, and its push does not finish in time: both sides know, and nothing lands later.
pub(crate) fn a_writer_goes_in_the_middle(over: Over) {
    let decode = over.builder("decode").bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &large());
    let mut writer = Peer::start(over, "prefill");
    writer.tell(format!("pool {LARGE_LAYERS} {LARGE_PAGES} {SEED}"));
    let pages: Vec<u32> = (0..LARGE_PAGES).collect();
    let arrival = destination.pool.grant("x", &pages, LONG).unwrap();
    let push = writer.open(arrival.grant()).expect("open");
    writer.tell(format!("layer {push} 0 {}", list(&pages)));
    arrival
        .layer_blocking(0, LONG)
        .expect("no hang")
        .expect("the first layer");
    let begun = Instant::now();
    assert_eq!(writer.ask("drain 500").expect("drained"), "0 0 1 0");
    let end = arrival.complete_blocking(LONG).expect("no hang");
    let waited = begun.elapsed();
    assert!(
        matches!(
            end,
            Err(ArrivalError::Peer(_) | ArrivalError::Abandoned { .. })
        ),
        "{end:?}"
    );
    assert!(waited < Duration::from_millis(500) + SLACK, "{waited:?}");
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    check(&destination, SEED, &pairs, 0..1).expect("what had arrived stays");
    assert_eq!(destination.pool.granted_pages(), 0);
}
