//! What is told of failures: counters, the record, what travels with an error, and the log.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::world::World;
use crate::{
    endpoint::{Arrival, ArrivalError, EventKind, Pool, Push, Stats, config::Config},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
};

const LONG: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_millis(20);

/// One event of the log: its level and its fields.
#[derive(Debug)]
struct Line {
    level: Level,
    fields: BTreeMap<&'static str, String>,
}

/// Remembers events.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Line>>>);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line {
            level: *event.metadata().level(),
            fields: BTreeMap::new(),
        };
        event.record(&mut line);
        self.0.lock().push(line);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

impl Log {
    /// The only event with this message, which must have these fields.
    #[track_caller]
    fn check(&self, message: &str, level: Level, fields: &[&str]) {
        let lines = self.0.lock();
        let found: Vec<_> = lines
            .iter()
            .filter(|line| line.fields["message"] == message)
            .collect();
        let [line] = found[..] else {
            panic!("{} events say {message:?}: {lines:#?}", found.len());
        };
        assert_eq!(line.level, level, "{line:?}");
        for field in fields {
            assert!(line.fields.contains_key(field), "no {field}: {line:?}");
        }
    }
}

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(8).unwrap()
}

/// A writer (node 0) and a reader (node 1), and all that they say.
struct Pair {
    world: World,
    source: Pool,
    pool: Pool,
    _memory: Vec<Arc<HostMemory>>,
    log: Log,
}

impl Pair {
    fn new() -> Self {
        let world = World::new(23, 2, &Config::default());
        let (source, mut memory) = world.nodes[0].pool(&layout(), 1);
        let (pool, other) = world.nodes[1].pool(&layout(), 0);
        memory.extend(other);
        Self {
            world,
            source,
            pool,
            _memory: memory,
            log: Log::default(),
        }
    }

    fn run(&mut self, span: Duration) {
        let log = self.log.clone();
        tracing::subscriber::with_default(log, || self.world.run(span, |_| {}));
    }

    fn open(&mut self, page: u32) -> (Arrival, Push) {
        let arrival = self.pool.grant("x", &[page], LONG).unwrap();
        let shared = &self.world.nodes[0].shared;
        let push = shared.start_push(&self.source, arrival.grant().clone(), None);
        let push = push.unwrap();
        self.run(SOON);
        assert_eq!(push.poll_opened(), Some(Ok(())));
        (arrival, push)
    }

    fn stats(&self, node: usize) -> Stats {
        self.world.nodes[node].shared.telemetry.stats()
    }

    fn kinds(&self, node: usize) -> Vec<EventKind> {
        let telemetry = &self.world.nodes[node].shared.telemetry;
        let record = telemetry.recorder.snapshot();
        record.events().iter().map(|event| event.kind).collect()
    }
}

#[test]
fn a_push_is_counted_on_both_sides() {
    let mut pair = Pair::new();
    let (arrival, push) = pair.open(1);
    for layer in 0..2 {
        push.layer(layer, &[1]).unwrap();
    }
    push.start_finish("end").unwrap();
    pair.run(SOON);
    let report = push.poll_ended().unwrap().unwrap();
    assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    assert!(push.trace().is_empty() && arrival.trace().is_empty());

    let (writer, reader) = (pair.stats(0), pair.stats(1));
    let peer = &writer.peers[0];
    assert_eq!((peer.peer.as_str(), peer.sessions), ("node-1", 1));
    assert_eq!(peer.pushes.completed, 1);
    assert_eq!(peer.rails[0].writes, report.writes);
    let bytes = peer.rails[0].bytes;
    assert!(bytes > report.bytes && bytes < report.bytes + 64, "{bytes}");
    assert!(peer.control_bytes_received > 0);
    let peer = &reader.peers[0];
    assert_eq!(peer.peer, "node-0");
    assert!(peer.control_bytes_sent > 0);
    assert_eq!(peer.arrivals.completed, 1);
    assert_eq!(
        peer.rails[0].parts, 3,
        "one block for each layer, and the tail"
    );
    assert_eq!((reader.levels.sessions, reader.levels.arrivals), (1, 0));
    assert_eq!(reader.levels.lanes, 2);
    assert_eq!(
        pair.kinds(0),
        [
            EventKind::SessionDialled,
            EventKind::PushOpening,
            EventKind::SessionReady,
            EventKind::PushOpen,
            EventKind::PushEnded,
        ]
    );
    assert_eq!(
        pair.kinds(1),
        [
            EventKind::GrantIssued,
            EventKind::SessionAccepted,
            EventKind::SessionReady,
            EventKind::ArrivalOpen,
            EventKind::ArrivalEnded,
        ]
    );
    assert!(format!("{writer}").contains("node-1: sessions 1"));
}

#[test]
fn a_refused_grant_is_told() {
    let mut pair = Pair::new();
    let arrival = pair.pool.grant("x", &[1], LONG).unwrap();
    arrival.start_revoke();
    pair.run(SOON);
    let shared = &pair.world.nodes[0].shared;
    let push = shared.start_push(&pair.source, arrival.grant().clone(), None);
    let push = push.unwrap();
    pair.run(SOON);
    assert!(push.poll_ended().is_some_and(|end| end.is_err()));
    let fields = ["peer", "slot", "generation", "code", "detail"];
    pair.log.check("grant refused", Level::INFO, &fields);
    pair.log
        .check("push failed", Level::INFO, &["push", "error", "elapsed"]);
    assert_eq!(pair.stats(1).refused, 1);
    let stats = pair.stats(0);
    let refused: u64 = stats.peers.iter().map(|peer| peer.pushes.refused).sum();
    assert_eq!(refused, 1);
    assert!(pair.kinds(1).contains(&EventKind::GrantRefused));
    let trace = push.trace();
    assert_eq!(
        trace.last().map(|event| event.kind),
        Some(EventKind::PushEnded)
    );
}

#[test]
fn a_forced_fence_is_told() {
    let mut pair = Pair::new();
    let (arrival, push) = pair.open(1);
    push.layer(0, &[1]).unwrap();
    pair.run(SOON);
    pair.world.nodes[0].running = false;
    arrival.start_revoke();
    pair.run(Duration::from_secs(2));
    assert_eq!(arrival.poll_complete(), Some(Err(ArrivalError::Revoked)));
    let fields = ["peer", "push", "slot", "generation", "trace"];
    let message = "fence forced: the peer does not answer";
    pair.log.check(message, Level::WARN, &fields);
    let fields = ["peer", "error", "arrivals", "trace"];
    pair.log.check("session failed", Level::WARN, &fields);
    let peer = &pair.stats(1).peers[0];
    assert_eq!((peer.revokes_forced, peer.revokes_cooperative), (1, 0));
    assert_eq!((peer.arrivals.revoked, peer.sessions_failed), (1, 1));
    let kinds: Vec<_> = arrival.trace().iter().map(|event| event.kind).collect();
    for kind in [
        EventKind::ArrivalOpen,
        EventKind::ArrivalRevoking,
        EventKind::FenceForced,
        EventKind::ArrivalEnded,
    ] {
        assert!(kinds.contains(&kind), "no {kind:?}: {kinds:?}");
    }
}

#[test]
fn a_cooperative_revocation_is_no_failure() {
    let mut pair = Pair::new();
    let (arrival, _push) = pair.open(1);
    arrival.start_revoke();
    pair.run(SOON);
    assert_eq!(arrival.poll_complete(), Some(Err(ArrivalError::Revoked)));
    let peer = &pair.stats(1).peers[0];
    assert_eq!((peer.revokes_forced, peer.revokes_cooperative), (0, 1));
    assert_eq!(peer.sessions_failed, 0);
    assert!(!pair.kinds(1).contains(&EventKind::FenceForced));
}

/// A device that does not end a queue pair: the loudest there is.
#[test]
fn a_failed_fence_is_told() {
    let mut pair = Pair::new();
    let (arrival, _push) = pair.open(1);
    pair.world.nodes[1].unfenceable[0].store(true, Ordering::Relaxed);
    pair.world.cut(0);
    pair.run(SOON);
    let end = arrival.poll_complete();
    assert!(
        matches!(end, Some(Err(ArrivalError::Unfenced(_)))),
        "{end:?}"
    );
    let fields = ["peer", "slot", "generation", "error", "trace"];
    pair.log.check("arrival unfenced", Level::ERROR, &fields);
    let stats = pair.stats(1);
    assert_eq!(stats.peers[0].arrivals.unfenced, 1);
    assert_eq!(stats.unfenced, 2, "each lane");
    let kinds: Vec<_> = arrival.trace().iter().map(|event| event.kind).collect();
    assert!(
        kinds.contains(&EventKind::FenceFailed) || pair.kinds(1).contains(&EventKind::FenceFailed)
    );
}

#[test]
fn a_silent_peer_is_told() {
    let mut pair = Pair::new();
    let (arrival, _push) = pair.open(1);
    pair.world.nodes[0].running = false;
    pair.run(Duration::from_secs(20));
    assert!(matches!(arrival.poll_complete(), Some(Err(_))));
    assert_eq!(pair.stats(1).peers[0].keepalive_timeouts, 1);
    let kinds: Vec<_> = arrival.trace().iter().map(|event| event.kind).collect();
    assert!(kinds.contains(&EventKind::PeerSilent), "{kinds:?}");
}

/// Events of transfers only, so that their number does not grow with pages or requests.
#[test]
fn events_do_not_grow_with_what_is_moved() {
    let mut pair = Pair::new();
    let mut events = Vec::new();
    for pages in [1..2, 1..8] {
        let pages: Vec<u32> = pages.collect();
        let before = pair.kinds(0).len() + pair.kinds(1).len();
        let arrival = pair.pool.grant("x", &pages, LONG).unwrap();
        let shared = &pair.world.nodes[0].shared;
        let push = shared.start_push(&pair.source, arrival.grant().clone(), None);
        let push = push.unwrap();
        pair.run(SOON);
        for layer in 0..2 {
            push.layer(layer, &pages).unwrap();
        }
        push.start_finish("").unwrap();
        pair.run(SOON);
        arrival.poll_complete().unwrap().unwrap();
        events.push(pair.kinds(0).len() + pair.kinds(1).len() - before);
    }
    // The first made the session, too: three events.
    assert_eq!(events[0] - 4, events[1], "{events:?}");
}

/// A lane fails in the middle of a push: the log says which and why, and the counters that it was made again.
#[test]
fn a_failed_lane_is_told() {
    let mut pair = Pair::new();
    let (arrival, push) = pair.open(1);
    let core = &pair.world.nodes[0].core;
    let (_, lane) = *core.lanes.keys().next().expect("a lane");
    assert!(pair.world.net.fail_lane("sim0-0", lane));
    for layer in 0..2 {
        push.layer(layer, &[1]).unwrap();
    }
    push.start_finish("end").unwrap();
    pair.run(Duration::from_secs(5));
    assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    let rail = &pair.stats(0).peers[0].rails[0];
    assert_eq!((rail.lane_failures, rail.lane_renewals), (1, 1), "{rail:?}");
    let kinds = pair.kinds(0);
    for kind in [EventKind::LaneDown, EventKind::LaneRenewed] {
        assert!(kinds.contains(&kind), "no {kind:?}: {kinds:?}");
    }
    let lines = pair.log.0.lock();
    let failed: Vec<_> = lines
        .iter()
        .filter(|line| line.fields["message"] == "lane failed")
        .collect();
    assert!(
        failed.iter().any(|line| line.fields.contains_key("lane")),
        "{lines:#?}"
    );
}
