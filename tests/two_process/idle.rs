//! Peers that stop while nothing moves: nobody waits for a message of theirs, and nothing of them is to be awaited
//! before a deadline that is far away. Only their silence gives them away.

use std::time::{Duration, Instant};

use kvpush::endpoint::{ArrivalError, PeerError, PushError};

use crate::{
    content,
    fixture::{Cache, LONG},
    process::{Over, Peer, SLACK},
};

const INTERVAL: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_secs(1);

/// An arrival is open and nothing is being pushed when its writer stops.
pub(crate) fn an_idle_writer_stops(over: Over) {
    let builder = over.builder("decode").keepalive(INTERVAL, TIMEOUT);
    let decode = builder.bind("127.0.0.1:0").unwrap();
    let destination = Cache::poisoned(&decode, &content::layout(4, 64));
    let mut writer = Peer::start(over, "prefill");
    writer.tell("pool 4 64 61");
    let arrival = destination.pool.grant("idle", &[1, 2], LONG).unwrap();
    let push = writer.open(arrival.grant()).expect("open");
    std::thread::sleep(TIMEOUT * 2);
    assert_eq!(arrival.poll_complete(), None, "an idle writer is alive");
    writer.stop();
    let begun = Instant::now();
    let end = arrival.complete_blocking(LONG).expect("no hang");
    let waited = begun.elapsed();
    assert!(
        matches!(end, Err(ArrivalError::Peer(PeerError::Silent { .. }))),
        "{end:?}"
    );
    assert!(waited < TIMEOUT + SLACK, "{waited:?}");
    assert!(waited > TIMEOUT / 2, "too soon: {waited:?}");
    assert_eq!(destination.pool.granted_pages(), 0);
    writer.resume();
    let end = writer.ask(format!("pushed {push}")).expect_err("given up");
    assert!(end.starts_with("peer "), "{end}");
    // It is as good as before.
    let arrival = destination.pool.grant("again", &[1, 2], LONG).unwrap();
    let push = writer.open(arrival.grant()).expect("open");
    writer.tell(format!("whole {push} 1,2"));
    let end = arrival.complete_blocking(LONG).expect("no hang");
    assert_eq!(end.expect("complete"), "end");
}

/// A push is open and has nothing to do when its reader stops.
pub(crate) fn an_idle_reader_stops(over: Over) {
    let builder = over.builder("prefill").keepalive(INTERVAL, TIMEOUT);
    let prefill = builder.bind("127.0.0.1:0").unwrap();
    let source = content::filled(&prefill, &content::layout(4, 64), 62);
    let mut reader = Peer::start(over, "decode");
    reader.tell("pool 4 64 0");
    let (arrival, grant) = reader.grant(&[1, 2], LONG);
    let push = prefill.push_blocking(&source.pool, grant, LONG).unwrap();
    std::thread::sleep(TIMEOUT * 2);
    assert_eq!(push.poll_ended(), None, "an idle reader is alive");
    reader.stop();
    let begun = Instant::now();
    let end = push.ended_blocking(LONG).expect("no hang");
    let waited = begun.elapsed();
    assert!(
        matches!(end, Err(PushError::Peer(PeerError::Silent { .. }))),
        "{end:?}"
    );
    assert!(waited < TIMEOUT + SLACK, "{waited:?}");
    assert!(waited > TIMEOUT / 2, "too soon: {waited:?}");
    reader.resume();
    let end = reader.ask(format!("arrived {arrival}")).expect_err("ended");
    assert!(end.starts_with("peer "), "{end}");
    assert_eq!(reader.get::<usize>("granted"), 0);
}
