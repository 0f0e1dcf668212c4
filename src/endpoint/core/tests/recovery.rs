//! Lanes that fail in the middle of a push: it completes, byte for byte, and nothing is counted or written twice that
//! must not be.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use super::world::World;
use crate::{
    endpoint::{Arrival, Pool, Push, config::Config},
    fabric::Status,
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
    wire::Message,
};

pub(super) const LAYERS: usize = 4;
pub(super) const PAGES: u32 = 64;
pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn layout() -> KvLayout {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 2),
        head_dim: 64,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(PAGES).unwrap()
}

/// A writer (node 0) and a reader (node 1), with pools of which each source page has bytes of its own.
pub(super) struct Pair {
    pub(super) world: World,
    pub(super) source: Pool,
    pub(super) pool: Pool,
    from: Vec<Arc<HostMemory>>,
    pub(super) to: Vec<Arc<HostMemory>>,
}

impl Pair {
    pub(super) fn new(seed: u64, rails: [usize; 2], config: &Config) -> Self {
        Self::over(World::with_rails(seed, &rails, config))
    }

    pub(super) fn over(world: World) -> Self {
        let layout = layout();
        let (source, from) = world.nodes[0].pool(&layout, 0);
        let (pool, to) = world.nodes[1].pool(&layout, 0xa5);
        for (index, memory) in from.iter().enumerate() {
            let length = crate::memory::Memory::length(&**memory);
            let bytes: Vec<u8> = (0..length)
                .map(|at| (at ^ (at >> 8) ^ (index as u64 * 37)) as u8)
                .collect();
            memory.write(0, &bytes).unwrap();
        }
        Self {
            world,
            source,
            pool,
            from,
            to,
        }
    }

    /// A push of all pages, open.
    pub(super) fn open(&mut self) -> (Arrival, Push) {
        let pages: Vec<u32> = (0..PAGES).collect();
        let arrival = self.pool.grant("x", &pages, 60 * SECOND).unwrap();
        let grant = arrival.grant().clone();
        let shared = &self.world.nodes[0].shared;
        let push = shared.start_push(&self.source, grant, None).unwrap();
        self.run(1);
        assert_eq!(push.poll_opened(), Some(Ok(())));
        (arrival, push)
    }

    /// Has all lanes of a node's rail fail, as by a fault of the device.
    pub(super) fn fail_lanes(&self, node: usize, rail: usize) {
        let device = World::rail_name(node, rail);
        for lane in self.world.net.lanes_of(&device) {
            assert!(self.world.net.fail_lane(&device, lane));
        }
    }

    pub(super) fn push_all(&mut self, push: &Push) {
        let pages: Vec<u32> = (0..PAGES).collect();
        for layer in 0..LAYERS {
            push.layer(layer, &pages).unwrap();
        }
        push.start_finish("end").unwrap();
    }

    pub(super) fn run(&mut self, milliseconds: u64) {
        self.world.run(Duration::from_millis(milliseconds), |_| {});
    }

    pub(super) fn micros(&mut self, microseconds: u64) {
        self.world.run(Duration::from_micros(microseconds), |_| {});
    }

    /// Both ends have completed, and every byte is there.
    pub(super) fn assert_complete(&self, arrival: &Arrival, push: &Push) {
        let end = push.poll_ended();
        let report = match &end {
            Some(Ok(report)) => report,
            other => panic!("the push: {other:?}"),
        };
        let end = arrival.poll_complete();
        assert!(
            matches!(&end, Some(Ok(tail)) if &tail[..] == b"end"),
            "{end:?}"
        );
        self.assert_bytes();
        let bytes: u64 = self
            .from
            .iter()
            .map(|m| crate::memory::Memory::length(&**m))
            .sum();
        assert_eq!(report.bytes, bytes, "bytes are counted once");
        assert_eq!(self.pool.granted_pages(), 0);
    }

    pub(super) fn assert_bytes(&self) {
        for (from, to) in self.from.iter().zip(&self.to) {
            assert!(contents(from) == contents(to), "other bytes");
        }
    }

    /// State and epoch of a node's first lane.
    pub(super) fn first_lane(&self, node: usize) -> (String, u32) {
        let session = self.world.nodes[node].core.sessions.values().next();
        let lane = &session.expect("a session").lanes[0];
        let state = format!("{:?}", lane.state);
        let word = state.split([' ', '(']).next().unwrap_or_default();
        (word.to_owned(), lane.epoch)
    }

    pub(super) fn freeze(&self) -> Vec<Vec<u8>> {
        self.to.iter().map(|memory| contents(memory)).collect()
    }

    /// Changes the destination, as an engine does once it has been told that the pages are there.
    pub(super) fn scribble(&self) {
        for memory in &self.to {
            memory
                .fill(0, crate::memory::Memory::length(&**memory), 0x77)
                .unwrap();
        }
    }

    pub(super) fn epochs(&self, node: usize) -> Vec<u32> {
        let sessions = self.world.nodes[node].core.sessions.values();
        sessions
            .flat_map(|session| session.lanes.iter().map(|lane| lane.epoch))
            .collect()
    }

    pub(super) fn renewals(&self) -> u64 {
        self.world.nodes[0].core.renewals
    }

    pub(super) fn sessions(&self, node: usize) -> usize {
        self.world.nodes[node].core.sessions.len()
    }

    /// Every lane works, on both sides.
    pub(super) fn assert_recovered(&self) {
        for node in 0..2 {
            let core = &self.world.nodes[node].core;
            for session in core.sessions.values() {
                for lane in &session.lanes {
                    assert!(lane.works(&core.rails), "{node}: {:?}", lane.state);
                }
            }
        }
        let reserved = |node: usize| -> u32 {
            let core = &self.world.nodes[node].core;
            let lanes = core.sessions.values().flat_map(|session| &session.lanes);
            lanes.map(|lane| lane.reserved).sum()
        };
        for node in 0..2 {
            let core = &self.world.nodes[node].core;
            let rails = core.rails.iter().filter(|rail| !rail.dead);
            let free: u32 = rails.clone().map(|rail| rail.completions_free).sum();
            let all = rails.count() as u32 * super::world::COMPLETIONS;
            assert_eq!(free + reserved(node), all, "completions leak");
        }
    }
}

pub(super) fn contents(memory: &HostMemory) -> Vec<u8> {
    let mut bytes = vec![0; crate::memory::Memory::length(memory) as usize];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

pub(super) fn config() -> Config {
    Config {
        send_depth: 8,
        receive_depth: 8,
        ..Config::default()
    }
}

pub(super) fn one_lane() -> Config {
    Config {
        lanes_per_rail: 1,
        ..config()
    }
}

/// Keeps all messages, with the node that sent them.
pub(super) fn log_messages(world: &mut World) -> Rc<RefCell<Vec<(usize, Message)>>> {
    let log = Rc::new(RefCell::new(Vec::new()));
    let kept = Rc::clone(&log);
    world.tamper = Some(Box::new(move |from, bytes| {
        let message = Message::decode(&bytes).unwrap();
        kept.borrow_mut().push((from, message));
        vec![bytes]
    }));
    log
}

/// Counts messages of one name as they pass.
pub(super) fn count_messages(world: &mut World, name: &'static str) -> Rc<Cell<usize>> {
    let seen = Rc::new(Cell::new(0));
    let count = Rc::clone(&seen);
    world.tamper = Some(Box::new(move |_, bytes| {
        if Message::decode(&bytes).unwrap().name() == name {
            count.set(count.get() + 1);
        }
        vec![bytes]
    }));
    seen
}

/// At any moment of a push, at either end.
#[test]
fn a_push_survives_the_loss_of_a_lane() {
    let mut replays = 0;
    for rails in [[1, 1], [2, 2], [2, 1]] {
        for node in 0..2 {
            for step in 0..12 {
                let mut pair = Pair::new(step, rails, &config());
                let (arrival, push) = pair.open();
                pair.push_all(&push);
                pair.micros(step * 7);
                let device = format!("sim{node}-0");
                let lanes = pair.world.net.lanes_of(&device);
                assert!(pair.world.net.fail_lane(&device, lanes[0]));
                pair.run(100);
                pair.assert_complete(&arrival, &push);
                pair.assert_recovered();
                assert_eq!((pair.sessions(0), pair.sessions(1)), (1, 1));
                replays += usize::from(pair.renewals() > 0);
            }
        }
    }
    assert!(replays > 20, "hardly any lane was lost in time: {replays}");
}

/// At every request, whatever it carries.
#[test]
fn a_push_survives_an_error_of_any_request() {
    let mut hit = 0;
    for request in 0..24 {
        let mut pair = Pair::new(request, [1, 1], &config());
        let (arrival, push) = pair.open();
        pair.world
            .net
            .fail_at_request("sim0-0", request, Status::RetryExceeded);
        pair.push_all(&push);
        pair.run(100);
        pair.assert_complete(&arrival, &push);
        hit += usize::from(pair.renewals() == 1);
    }
    assert!(hit > 8, "{hit}");
}

/// The reader has counted a part and the writer has not heard so when the lane fails. The reader's engine uses the pages
/// at once. Nothing may be written to them again.
#[test]
fn what_was_counted_is_not_sent_again() {
    for rails in [[1, 1], [2, 2]] {
        let mut pair = Pair::new(5, rails, &config());
        let (arrival, push) = pair.open();
        let pages: Vec<u32> = (0..PAGES).collect();
        for layer in 0..LAYERS - 1 {
            push.layer(layer, &pages).unwrap();
        }
        pair.run(5);
        let fenced = count_messages(&mut pair.world, "LaneFenced");
        for rail in 0..rails[1] {
            let device = format!("sim1-{rail}");
            pair.world.net.lose_answers(&device, true);
        }
        push.layer(LAYERS - 1, &pages).unwrap();
        push.start_finish("end").unwrap();
        pair.run(1);
        let end = arrival.poll_complete();
        assert!(matches!(end, Some(Ok(_))), "{end:?}");
        assert_eq!(push.poll_ended(), None, "it has not heard");
        pair.assert_bytes();
        pair.scribble();
        let frozen = pair.freeze();
        pair.run(50);
        assert!(fenced.get() > 0, "no lane has failed");
        for rail in 0..rails[1] {
            let device = format!("sim1-{rail}");
            pair.world.net.lose_answers(&device, false);
        }
        pair.run(3000);
        assert!(matches!(push.poll_ended(), Some(Ok(_))));
        assert_eq!(pair.freeze(), frozen, "written after it was counted");
        assert!(pair.epochs(0).iter().any(|&epoch| epoch > 0));
    }
}
