//! Going away in good order: nothing new, what runs may finish, the rest is cut, and somebody always learns of it.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use super::world::World;
use crate::{
    RefuseCode,
    endpoint::{
        AccessError, Arrival, ArrivalError, DrainCount, DrainReport, IssueError, PeerError, Pool,
        Push, PushError,
        config::Config,
        core::{AccessOp, Command},
        drain::DrainEntry,
    },
    fabric::Access,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
};

const LONG: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_millis(20);
const TIME: Duration = Duration::from_secs(2);

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

/// A writer (node 0) and a reader (node 1).
struct Pair {
    world: World,
    source: Pool,
    pool: Pool,
    _memory: Vec<Arc<HostMemory>>,
}

impl Pair {
    fn new() -> Self {
        let world = World::new(17, 2, &Config::default());
        let (source, mut memory) = world.nodes[0].pool(&layout(), 1);
        let (pool, other) = world.nodes[1].pool(&layout(), 0);
        memory.extend(other);
        Self {
            world,
            source,
            pool,
            _memory: memory,
        }
    }

    fn run(&mut self, span: Duration) {
        self.world.run(span, |_| {});
    }

    fn open(&mut self, page: u32) -> (Arrival, Push) {
        let arrival = self.pool.grant("x", &[page], LONG).unwrap();
        let push = self.start(&arrival);
        self.run(SOON);
        assert_eq!(push.poll_opened(), Some(Ok(())));
        (arrival, push)
    }

    fn start(&self, arrival: &Arrival) -> Push {
        let shared = &self.world.nodes[0].shared;
        let push = shared.start_push(&self.source, arrival.grant().clone(), None);
        push.unwrap()
    }

    /// As `Endpoint::start_drain` does.
    fn drain(&self, node: usize, timeout: Duration) {
        let endpoint = Arc::clone(&self.world.nodes[node].shared);
        endpoint.drain.begin();
        let shared = Arc::clone(&endpoint);
        shared.command(Command::Drain(DrainEntry::new(timeout, endpoint)));
    }

    fn report(&self, node: usize) -> Option<DrainReport> {
        self.world.nodes[node].shared.drain.report()
    }

    fn is_closed(&self, node: usize) -> bool {
        let closed = self.world.nodes[node].shared.closed.load(Ordering::Relaxed);
        let core = &self.world.nodes[node].core;
        closed && core.sessions.is_empty() && core.lanes.is_empty()
    }
}

fn finish(push: &Push, page: u32) {
    for layer in 0..2 {
        push.layer(layer, &[page]).unwrap();
    }
    push.start_finish("end").unwrap();
}

const ONE_COMPLETED: DrainCount = DrainCount {
    completed: 1,
    ended: 0,
    cut: 0,
};

#[test]
fn what_runs_may_finish() {
    for draining in [0, 1] {
        let mut pair = Pair::new();
        let (arrival, push) = pair.open(1);
        pair.drain(draining, TIME);
        pair.run(TIME / 2);
        assert_eq!(pair.report(draining), None, "it waits");
        finish(&push, 1);
        pair.run(SOON);
        assert!(matches!(push.poll_ended(), Some(Ok(_))));
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
        let report = pair.report(draining).expect("it does not wait for longer");
        let (ran, other) = match draining {
            0 => (report.pushes, report.arrivals),
            _ => (report.arrivals, report.pushes),
        };
        assert_eq!(ran, ONE_COMPLETED);
        assert_eq!(other, DrainCount::default());
        assert!(report.is_clean());
        assert!(report.elapsed >= TIME / 2 && report.elapsed < TIME);
        assert!(pair.is_closed(draining));
    }
}

#[test]
fn what_does_not_finish_is_cut() {
    for draining in [0, 1] {
        let mut pair = Pair::new();
        let (arrival, push) = pair.open(1);
        let (cancelled, other) = pair.open(2);
        push.layer(0, &[1]).unwrap();
        pair.drain(draining, TIME);
        pair.run(SOON);
        other.start_cancel();
        pair.run(TIME - SOON * 2);
        assert_eq!(pair.report(draining), None, "too soon");
        pair.run(SOON * 2);
        let report = pair.report(draining).expect("its time is over");
        let expected = DrainCount {
            completed: 0,
            ended: 1,
            cut: 1,
        };
        let ran = [report.pushes, report.arrivals][draining];
        assert_eq!(ran, expected);
        assert!(!report.is_clean());
        assert_eq!(report.elapsed, TIME);
        assert!(pair.is_closed(draining));
        // Both sides know.
        assert!(matches!(push.poll_ended(), Some(Err(PushError::Peer(_)))));
        let end = arrival.poll_complete();
        assert!(matches!(end, Some(Err(ArrivalError::Peer(_)))), "{end:?}");
        drop(cancelled);
        assert_eq!(pair.pool.granted_pages(), 0);
    }
}

#[test]
fn nothing_new_begins() {
    let mut pair = Pair::new();
    let (_arrival, push) = pair.open(1);
    let unopened = pair.pool.grant("x", &[2], LONG).unwrap();
    let late = pair.pool.grant("x", &[3], LONG).unwrap();
    let (_export, token, _bytes) = pair.world.nodes[1].export(1 << 12, Access::ALL);
    pair.run(SOON);
    pair.drain(1, TIME);
    pair.run(SOON);
    for arrival in [&unopened, &late] {
        let end = arrival.poll_complete();
        assert_eq!(end, Some(Err(ArrivalError::Peer(PeerError::Draining))));
    }
    // Here.
    let grant = pair.pool.grant("x", &[4], LONG);
    assert_eq!(grant.err(), Some(IssueError::Draining));
    let shared = &pair.world.nodes[1].shared;
    let begun = shared.start_push(&pair.pool, push.grant().clone(), None);
    assert_eq!(begun.err(), Some(PushError::Peer(PeerError::Draining)));
    // At a peer's request.
    let refused = pair.start(&late);
    let access = pair.world.nodes[0].access(&token, AccessOp::Open);
    pair.run(SOON);
    let end = refused.poll_ended();
    assert!(
        matches!(
            end,
            Some(Err(PushError::Refused {
                code: RefuseCode::Draining,
                ..
            }))
        ),
        "{end:?}"
    );
    let end = access.signal.look(Clone::clone);
    assert!(
        matches!(
            end,
            Some(Err(AccessError::Refused {
                code: RefuseCode::Draining,
                ..
            }))
        ),
        "{end:?}"
    );
    // What ran still does.
    finish(&push, 1);
    pair.run(SOON);
    let report = pair.report(1).expect("drained");
    assert_eq!((report.arrivals, report.unopened), (ONE_COMPLETED, 2));
}

/// A peer without a session gets none.
#[test]
fn no_session_is_made() {
    let mut pair = Pair::new();
    let world = &mut pair.world;
    let blocker = pair.pool.grant("x", &[1], LONG).unwrap();
    world.run(SOON, |_| {});
    // Something has to run, or the drain would be over at once.
    let push = {
        let shared = &world.nodes[0].shared;
        shared.start_push(&pair.source, blocker.grant().clone(), None)
    };
    let push = push.unwrap();
    world.run(SOON, |_| {});
    assert_eq!(push.poll_opened(), Some(Ok(())));
    pair.drain(1, TIME);
    pair.run(SOON);
    let address = vec!["node-1:7700".to_owned()];
    let before = pair.world.nodes[0].core.sessions.len();
    pair.world.nodes[0].core.dial(None, &address, TIME);
    pair.run(SOON);
    assert_eq!(pair.world.nodes[0].core.sessions.len(), before, "refused");
    assert_eq!(pair.report(1), None, "the drain goes on");
}

#[test]
fn a_second_drain_can_only_shorten_the_first() {
    let mut pair = Pair::new();
    let (_arrival, _push) = pair.open(1);
    pair.drain(1, TIME);
    pair.drain(1, TIME * 4);
    pair.run(TIME / 4);
    pair.drain(1, TIME / 4);
    pair.run(TIME / 4 - SOON);
    assert_eq!(pair.report(1), None);
    pair.run(SOON * 2);
    let report = pair.report(1).expect("the shortest counts");
    assert_eq!(report.elapsed, TIME / 2);
}

#[test]
fn an_idle_endpoint_is_drained_at_once() {
    let mut pair = Pair::new();
    pair.drain(0, TIME);
    pair.run(Duration::from_micros(10));
    assert_eq!(pair.report(0), Some(DrainReport::default()));
    assert!(pair.is_closed(0));
    // Again, when there is nobody left to ask.
    pair.drain(0, TIME);
    assert_eq!(pair.report(0), Some(DrainReport::default()));
}

/// Calls that had passed the check when the drain began.
#[test]
fn what_was_on_its_way_is_refused() {
    let mut pair = Pair::new();
    let (_arrival, _push) = pair.open(1);
    let (writer, reader) = (0, 1);
    for node in [writer, reader] {
        let endpoint = Arc::clone(&pair.world.nodes[node].shared);
        let shared = Arc::clone(&endpoint);
        // The flag comes too late.
        shared.command(Command::Drain(DrainEntry::new(TIME, endpoint)));
    }
    let late = pair.pool.grant("x", &[2], LONG).unwrap();
    let push = pair.start(&late);
    pair.run(SOON);
    let end = late.poll_complete();
    assert_eq!(end, Some(Err(ArrivalError::Peer(PeerError::Draining))));
    let end = push.poll_ended();
    assert_eq!(end, Some(Err(PushError::Peer(PeerError::Draining))));
    assert_eq!(pair.pool.granted_pages(), 1, "that of the push that runs");
}
