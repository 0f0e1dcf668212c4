//! Peers that fall silent, and peers that only look like it.

use std::{cell::RefCell, rc::Rc, time::Duration};

use super::world::World;
use crate::{
    endpoint::{
        Arrival, ArrivalError, PeerError, Pool, Push, PushError,
        config::{Config, Keepalive},
        control::ConnId,
    },
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
    wire::Message,
};

const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(7);
/// Longer than any test: deadlines of grants must not be what ends a wait.
const LONG: Duration = Duration::from_secs(600);
/// For messages in transit.
const SOON: Duration = Duration::from_millis(20);

fn config() -> Config {
    Config {
        keepalive: Some(Keepalive {
            interval: INTERVAL,
            timeout: TIMEOUT,
        }),
        ..Config::default()
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

/// A writer (node 0) and a reader (node 1).
struct Pair {
    world: World,
    source: Pool,
    pool: Pool,
    _memory: Vec<std::sync::Arc<HostMemory>>,
    /// `Ping`s sent so far by each node.
    pings: Rc<RefCell<[u32; 2]>>,
}

impl Pair {
    fn new(config: &Config) -> Self {
        let mut world = World::new(11, 2, config);
        let (source, mut memory) = world.nodes[0].pool(&layout(), 1);
        let (pool, other) = world.nodes[1].pool(&layout(), 0);
        memory.extend(other);
        let pings = Rc::new(RefCell::new([0; 2]));
        let count = Rc::clone(&pings);
        world.tamper = Some(Box::new(move |node, bytes| {
            if matches!(Message::decode(&bytes), Ok(Message::Ping { .. })) {
                count.borrow_mut()[node] += 1;
            }
            vec![bytes]
        }));
        Self {
            world,
            source,
            pool,
            _memory: memory,
            pings,
        }
    }

    fn run(&mut self, span: Duration) {
        self.world.run(span, |_| {});
    }

    /// Opens a push.
    fn open(&mut self, page: u32) -> (Arrival, Push) {
        let arrival = self.pool.grant("x", &[page], LONG).unwrap();
        let shared = &self.world.nodes[0].shared;
        let push = shared.start_push(&self.source, arrival.grant().clone(), None);
        let push = push.unwrap();
        self.run(SOON);
        assert_eq!(push.poll_opened(), Some(Ok(())));
        (arrival, push)
    }

    /// A whole push, after which the session is idle.
    fn transfer(&mut self) {
        let (arrival, push) = self.open(3);
        for layer in 0..2 {
            push.layer(layer, &[3]).unwrap();
        }
        push.start_finish("end").unwrap();
        self.run(SOON);
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    }

    fn sessions(&self) -> [usize; 2] {
        [0, 1].map(|node| self.world.nodes[node].core.sessions.len())
    }

    fn lanes(&self) -> [usize; 2] {
        [0, 1].map(|node| self.world.nodes[node].core.lanes.len())
    }
}

fn is_silence(error: &PeerError) -> bool {
    matches!(error, PeerError::Silent { waited, .. } if *waited == TIMEOUT)
}

#[test]
fn an_idle_peer_that_falls_silent_is_given_up() {
    for silent in [0, 1] {
        let mut pair = Pair::new(&config());
        pair.transfer();
        pair.world.nodes[silent].running = false;
        pair.run(TIMEOUT - SOON * 2);
        assert_eq!(pair.sessions(), [1, 1], "too soon");
        pair.run(SOON * 4);
        let left = pair.sessions()[1 - silent];
        assert_eq!(left, 0, "node {} waits for ever", 1 - silent);
        assert_eq!(pair.lanes()[1 - silent], 0, "its lanes are not fenced");
        // It learns of it when it goes on, and a new session is made.
        pair.world.nodes[silent].running = true;
        pair.run(SOON);
        assert_eq!(pair.sessions(), [0, 0]);
        pair.transfer();
    }
}

#[test]
fn what_runs_ends_with_its_peer() {
    for silent in [0, 1] {
        let mut pair = Pair::new(&config());
        let (arrival, push) = pair.open(1);
        push.layer(0, &[1]).unwrap();
        pair.run(SOON);
        pair.world.nodes[silent].running = false;
        pair.run(TIMEOUT + SOON * 2);
        if silent == 0 {
            let end = arrival.poll_complete().expect("the arrival has ended");
            assert!(
                matches!(&end, Err(ArrivalError::Peer(error)) if is_silence(error)),
                "{end:?}"
            );
            assert_eq!(pair.pool.granted_pages(), 0);
        } else {
            let end = push.poll_ended().expect("the push has ended");
            assert!(
                matches!(&end, Err(PushError::Peer(error)) if is_silence(error)),
                "{end:?}"
            );
        }
        assert_eq!(pair.lanes()[1 - silent], 0);
    }
}

/// What was asked for before is what is reported: a grant that was being taken back was revoked, whatever became of its
/// writer.
#[test]
fn a_writer_falls_silent_while_its_grant_is_taken_back() {
    let config = Config {
        revoke_grace: LONG,
        ..config()
    };
    let mut pair = Pair::new(&config);
    let (arrival, _push) = pair.open(1);
    pair.world.nodes[0].running = false;
    arrival.start_revoke();
    pair.run(TIMEOUT - SOON * 4);
    assert_eq!(arrival.poll_complete(), None, "it still drains");
    pair.run(SOON * 6);
    assert_eq!(arrival.poll_complete(), Some(Err(ArrivalError::Revoked)));
    assert_eq!(pair.sessions()[1], 0);
    assert_eq!(pair.lanes()[1], 0);
}

/// An idle session costs one question and one answer in each interval, whichever side it is seen from.
#[test]
fn pings_do_not_storm() {
    let mut pair = Pair::new(&config());
    pair.transfer();
    pair.run(INTERVAL * 50);
    assert_eq!(pair.sessions(), [1, 1], "both are alive");
    let [writer, reader] = *pair.pings.borrow();
    assert!((48..=51).contains(&writer), "{writer} questions");
    assert_eq!(reader, 0, "what the writer asks is a sign of life");
    for node in 0..2 {
        let timers = format!("{:?}", pair.world.nodes[node].core.timers);
        assert_eq!(timers.matches("Alive(").count(), 1, "{timers}");
    }
    // A session on which messages come and go asks nothing.
    let before = *pair.pings.borrow();
    for _ in 0..100 {
        pair.transfer();
        pair.run(INTERVAL / 4);
    }
    assert_eq!(*pair.pings.borrow(), before);
}

/// The peer answers, but late: each time just before it would be given up.
#[test]
fn a_slow_peer_is_not_given_up() {
    for slow in [0, 1] {
        let mut pair = Pair::new(&config());
        pair.transfer();
        for _ in 0..10 {
            pair.world.nodes[slow].running = false;
            pair.run(TIMEOUT - SOON * 2);
            pair.world.nodes[slow].running = true;
            pair.run(SOON);
            assert_eq!(pair.sessions(), [1, 1], "node {slow} was alive");
        }
        pair.transfer();
    }
}

/// A process that was stopped for long itself does not blame its peers, whose answers lie in its sockets.
#[test]
fn a_process_that_was_stopped_does_not_blame_its_peers() {
    for stopped in [0, 1] {
        // Only the stopped side watches, so that the other does not give it up meanwhile.
        let mut pair = Pair::new(&config());
        let patient = Config {
            keepalive: None,
            ..config()
        };
        pair.world.nodes[1 - stopped].core.config = std::sync::Arc::new(patient);
        pair.transfer();
        pair.run(INTERVAL + SOON);
        pair.world.nodes[stopped].running = false;
        pair.run(TIMEOUT * 10);
        pair.world.nodes[stopped].hold_events(true);
        pair.world.nodes[stopped].running = true;
        // Its driver runs before its control thread has read anything.
        pair.world.round();
        assert_eq!(pair.sessions(), [1, 1]);
        pair.world.nodes[stopped].hold_events(false);
        pair.run(SOON);
        assert_eq!(pair.sessions(), [1, 1]);
        pair.transfer();
        // A peer that is really gone is found out nevertheless.
        pair.world.nodes[1 - stopped].running = false;
        pair.run(TIMEOUT * 2);
        assert_eq!(pair.sessions()[stopped], 0);
    }
}

/// One side wants to know, the other does not: it answers, and is never given up.
#[test]
fn a_peer_without_keepalive_answers() {
    let mut pair = Pair::new(&Config {
        keepalive: None,
        ..config()
    });
    pair.transfer();
    pair.run(TIMEOUT * 10);
    assert_eq!(*pair.pings.borrow(), [0, 0], "nobody asks");
    pair.world.nodes[0].running = false;
    pair.run(TIMEOUT * 10);
    assert_eq!(pair.sessions(), [1, 1], "and nobody is given up");

    for watching in [0, 1] {
        let mut pair = Pair::new(&config());
        let silent = Config {
            keepalive: None,
            ..config()
        };
        pair.world.nodes[1 - watching].core.config = std::sync::Arc::new(silent);
        pair.transfer();
        pair.run(TIMEOUT * 10);
        assert_eq!(pair.sessions(), [1, 1]);
        pair.transfer();
    }
}

/// A peer that has authenticated itself and offers no lanes does not stay, whether it says nothing or the wrong thing.
#[test]
fn a_session_must_be_made_in_time() {
    let config = Config {
        open_timeout: Duration::from_secs(3),
        keepalive: None,
        ..Config::default()
    };
    for ping in [false, true] {
        let mut world = World::new(1, 2, &config);
        let conn = ConnId(4711);
        world.dial(0, conn, 1);
        world.run(Duration::from_secs(2), |_| {});
        if ping {
            let bytes = Message::Ping { nonce: 1 }.encode().unwrap();
            world.send_raw(0, conn, bytes);
        }
        world.run(Duration::from_millis(900), |_| {});
        assert_eq!(world.nodes[1].core.sessions.len(), 1, "too soon");
        world.run(Duration::from_millis(200), |_| {});
        assert_eq!(world.nodes[1].core.sessions.len(), 0, "it stays");
    }
}
