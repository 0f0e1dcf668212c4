//! Names, limits and the ring.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use super::{
    Event, EventKind, Recorder, Telemetry,
    meters::Outcome,
    recorder::{EVENTS, TAIL},
};

fn event(number: u64) -> Event {
    let mut event = Event::new(EventKind::PushOpen, Duration::from_nanos(number));
    event.push = number;
    event.session = number % 2;
    event
}

#[test]
fn the_ring_keeps_the_last_events_in_order() {
    let recorder = Recorder::new();
    let record = recorder.snapshot();
    assert!(record.events().is_empty() && record.forgotten() == 0);
    let mut count = 0;
    for until in [1, EVENTS - 1, EVENTS, EVENTS + 1, 3 * EVENTS + 7] {
        while count < until {
            recorder.record(event(count as u64));
            count += 1;
        }
        let record = recorder.snapshot();
        let first = count.saturating_sub(EVENTS);
        let numbers: Vec<u64> = record.events().iter().map(|event| event.push).collect();
        let expected: Vec<u64> = (first as u64..count as u64).collect();
        assert_eq!(numbers, expected, "after {count}");
        assert_eq!(record.forgotten(), first as u64);
        let lines = record.to_string().lines().count();
        assert_eq!(lines, expected.len() + usize::from(first > 0));
    }
}

#[test]
fn a_tail_is_short_and_of_one_session() {
    let recorder = Recorder::new();
    (0..100).for_each(|number| recorder.record(event(number)));
    let tail = recorder.tail(|event| event.session == 1);
    assert_eq!(tail.len(), TAIL);
    assert!(tail.iter().all(|event| event.session == 1));
    assert_eq!(tail.last().map(|event| event.push), Some(99));
    assert!(tail.windows(2).all(|pair| pair[0].push + 2 == pair[1].push));
}

#[test]
fn peers_with_a_label_are_bounded() {
    let telemetry = Telemetry::new(vec!["sim0:1".to_owned()], 3);
    for peer in 0..100 {
        let meters = telemetry.peer(&format!("peer-{peer}"));
        meters.push_ended(Outcome::Completed, Duration::ZERO);
    }
    telemetry
        .peer("peer-1")
        .push_ended(Outcome::Expired, Duration::ZERO);
    let stats = telemetry.stats();
    let names: Vec<&str> = stats.peers.iter().map(|peer| peer.peer.as_str()).collect();
    assert_eq!(names, ["others", "peer-0", "peer-1", "peer-2", "unreached"]);
    assert_eq!(stats.peers[0].pushes.completed, 97);
    let one = &stats.peers[2].pushes;
    assert_eq!((one.completed, one.expired), (1, 1));
    // All together.
    let telemetry = Telemetry::new(Vec::new(), 0);
    for peer in ["a", "b", ""] {
        telemetry.peer(peer).sessions.add(1);
    }
    let stats = telemetry.stats();
    assert_eq!(stats.peers.len(), 2);
    assert_eq!(
        (stats.peers[0].peer.as_str(), stats.peers[0].sessions),
        ("others", 3)
    );
}

/// Every metric of the sources is in `docs/metrics.md`, and the other way round.
#[test]
fn every_metric_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    let mut folders = vec![root.join("src/endpoint")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("telemetry/tests.rs") {
                sources.push(fs::read_to_string(path).unwrap());
            }
        }
    }
    let names = |text: &str, quote: char| -> BTreeSet<String> {
        text.split(quote)
            .filter(|word| {
                word.strip_prefix("kvpush_").is_some_and(|rest| {
                    !rest.is_empty() && rest.chars().all(|c| c.is_ascii_lowercase() || c == '_')
                })
            })
            .map(str::to_owned)
            .collect()
    };
    let used: BTreeSet<String> = sources.iter().flat_map(|text| names(text, '"')).collect();
    let text = fs::read_to_string(root.join("docs/metrics.md")).unwrap();
    assert_eq!(used, names(&text, '`'));
    assert!(used.len() > 20, "{used:?}");
}
