//! One schedule: nodes, pools, transfers between them, and what their users do.

use std::{sync::Arc, time::Duration};

use super::{
    super::world::{Random, World},
    coverage::{Coverage, Seen},
    menu::Menu,
};
use crate::{
    endpoint::{
        Arrival, GrantOptions, Pool, Push, PushError,
        config::{Config, Keepalive},
    },
    fabric::{Capabilities, sim::SimConfig},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
    wire::Grant,
};

pub(super) const LAYERS: usize = 3;
pub(super) const POISON: u8 = 0xa5;
const PAGES: u32 = 32;
const SOURCE_PAGES: u32 = 96;
/// How long pages are watched after an end before they are granted again.
const QUARANTINE: u64 = 3_000_000;

/// One pool of one life of a node.
pub(super) struct Side {
    pub(super) node: usize,
    pub(super) life: u8,
    pub(super) pool: Pool,
    memory: Vec<Arc<HostMemory>>,
    /// Pages that belong to no transfer.
    pub(super) free: Vec<u32>,
    /// Transfers that hold a page: several, if they have different heads of it.
    pub(super) holders: Vec<u8>,
}

impl Side {
    fn new(world: &World, node: usize, pages: u32, fill: u8) -> Self {
        let (pool, memory) = world.nodes[node].pool(&layout(pages), fill);
        Self {
            node,
            life: world.nodes[node].life,
            pool,
            memory,
            free: (0..pages).collect(),
            holders: vec![0; pages as usize],
        }
    }

    fn spans(&self, layers: std::ops::Range<usize>, page: u32, heads: HeadRange) -> Vec<Span> {
        let mut spans = Vec::new();
        for layer in &self.pool.layout().layers[layers] {
            for plane in &layer.planes {
                let at = plane.offset + u64::from(page) * plane.page_stride;
                let region = usize::from(plane.region);
                if plane.heads == heads {
                    let length = plane.page_stride;
                    spans.push(Span { region, at, length });
                    continue;
                }
                for token in 0..u64::from(layer.tokens_per_page) {
                    let first = u64::from(heads.first - plane.heads.first);
                    let at = at + token * plane.token_stride + first * plane.head_stride;
                    let length = u64::from(heads.count) * u64::from(plane.head_bytes);
                    spans.push(Span { region, at, length });
                }
            }
        }
        spans
    }

    /// The bytes of some heads of some pages.
    pub(super) fn bytes(
        &self,
        layers: std::ops::Range<usize>,
        pages: &[u32],
        heads: HeadRange,
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &page in pages {
            for span in self.spans(layers.clone(), page, heads) {
                let at = bytes.len();
                bytes.resize(at + span.length as usize, 0);
                let memory = &self.memory[span.region];
                memory.read(span.at, &mut bytes[at..]).unwrap();
            }
        }
        bytes
    }

    pub(super) fn fill(&self, pages: &[u32], heads: HeadRange, byte: u8) {
        for &page in pages {
            for span in self.spans(0..LAYERS, page, heads) {
                let memory = &self.memory[span.region];
                memory.fill(span.at, span.length, byte).unwrap();
            }
        }
    }
}

struct Span {
    region: usize,
    at: u64,
    length: u64,
}

pub(super) const BOTH: HeadRange = HeadRange::new(0, 2);

fn layout(pages: u32) -> KvLayout {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 2,
        heads: BOTH,
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(pages).unwrap()
}

fn config(random: &mut Random) -> Config {
    let keepalive = Keepalive {
        interval: Duration::from_millis(2),
        timeout: Duration::from_millis(9),
    };
    Config {
        keepalive: random.chance(400).then_some(keepalive),
        send_depth: 1 + random.below(9) as u32,
        receive_depth: 1 + random.below(6) as u32,
        lanes_per_rail: 1 + random.below(3) as u16,
        parts_per_layer: 1 + random.below(5) as u16,
        max_sge: 1 + random.below(4) as u32,
        max_transfers: 64,
        tail_capacity: 56,
        open_timeout: Duration::from_millis(20),
        drain_timeout: Duration::from_millis(5),
        revoke_grace: Duration::from_millis(3),
        ..Config::default()
    }
}

fn network(seed: u64, random: &mut Random) -> SimConfig {
    let default = SimConfig::seeded(seed);
    let slowest = [2_000, 8_000, 200_000][random.below(3) as usize];
    SimConfig {
        latency: 1_000..=slowest,
        timeout: [500_000, 500_000, 3_000_000][random.below(3) as usize],
        retry_count: [1, 3, 7][random.below(3) as usize],
        caps: Capabilities {
            mtu: [64, 256, 4096][random.below(3) as usize],
            ..default.caps
        },
        // Only its hash is of interest.
        trace_capacity: 16,
        ..default
    }
}

/// One request: a grant, and what has become of it.
pub(super) struct Transfer {
    pub(super) grant: Grant,
    pub(super) arrival: Option<Arrival>,
    pub(super) push: Option<Push>,
    /// The sides, by their index.
    pub(super) destination: usize,
    pub(super) source: usize,
    pub(super) pages: Vec<u32>,
    pub(super) heads: HeadRange,
    pub(super) own: Vec<u32>,
    pub(super) byte: u8,
    /// What is still to be handed over: layer, first position, one past the last.
    todo: Vec<(usize, usize, usize)>,
    pub(super) finished: bool,
    lazy: bool,
    pub(super) started: u64,
    pub(super) deadline: Duration,
    pub(super) arrival_end: Option<Seen>,
    pub(super) push_end: Option<Seen>,
    /// What the pages held when the end was reported.
    pub(super) frozen: Option<Vec<u8>>,
    frozen_at: u64,
    pub(super) layers_seen: u32,
    /// The reader dropped its handle, so its end is not known.
    pub(super) dropped: bool,
    released: bool,
    own_released: bool,
    /// A fence was refused: the pages are in doubt for good.
    pub(super) in_doubt: bool,
}

impl Transfer {
    /// Whether both of its ends are known.
    pub(super) fn is_over(&self) -> bool {
        let arrival = self.dropped || self.arrival_end.is_some();
        arrival && (self.push.is_none() || self.push_end.is_some())
    }

    /// Whether its pages may be somebody else's by now.
    pub(super) fn released(&self) -> bool {
        self.released
    }
}

/// A push with a grant that is not its own.
pub(super) struct Stray {
    pub(super) push: Push,
    pub(super) source: usize,
    /// The grant had ended before, so it must never open.
    pub(super) stale: bool,
}

/// See the module's documentation.
pub(super) struct Run {
    pub(super) world: World,
    pub(super) users: Users,
}

/// Who uses the nodes, and what they know.
pub(super) struct Users {
    pub(super) seed: u64,
    pub(super) menu: Menu,
    pub(super) coverage: Coverage,
    /// All pools there have been.
    pub(super) sides: Vec<Side>,
    /// The present ones of each node: source, destination.
    pub(super) current: Vec<(usize, usize)>,
    pub(super) transfers: Vec<Transfer>,
    pub(super) strays: Vec<Stray>,
    /// Until when a node may be late, because it did not run.
    pub(super) late_until: Vec<u64>,
    /// Pairs of rails that are cut.
    pub(super) links_down: Vec<(String, String)>,
    /// Rails whose port is down.
    pub(super) ports_down: Vec<String>,
    /// Rails whose acknowledgements are lost.
    pub(super) mute: Vec<String>,
    /// Bytes placed when memory was last looked at.
    pub(super) looked_at: Option<u64>,
}

impl Run {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5eed_0f5c_4ed0_1e55);
        let config = config(&mut random);
        let menu = Menu::draw(&mut random);
        let nodes = 2 + random.below(3) as usize;
        let several = random.chance(400);
        let rails: Vec<usize> = (0..nodes)
            .map(|_| {
                if several {
                    1 + random.below(3) as usize
                } else {
                    1
                }
            })
            .collect();
        let world = World::on(network(seed, &mut random), &rails, &config);
        let mut users = Users {
            seed,
            menu,
            coverage: Coverage::default(),
            sides: Vec::new(),
            current: Vec::new(),
            transfers: Vec::new(),
            strays: Vec::new(),
            late_until: vec![0; nodes],
            links_down: Vec::new(),
            ports_down: Vec::new(),
            mute: Vec::new(),
            looked_at: None,
        };
        if several {
            users.coverage.saw(Seen::SeveralRails);
        }
        for node in 0..nodes {
            let current = users.new_sides(&world, node);
            users.current.push(current);
        }
        Self { world, users }
    }

    /// The whole schedule.
    pub(super) fn go(&mut self) {
        let world = &mut self.world;
        let actions = 40 + world.random.below(100);
        let (rate, pause) = (self.users.menu.rate, 50 + world.random.below(600));
        for _ in 0..actions {
            let (world, users) = (&mut self.world, &mut self.users);
            if world.random.chance(rate) {
                users.inject(world);
            } else if world.random.chance(250) {
                users.start(world);
            } else {
                users.proceed(world);
            }
            let span = world.random.below(pause);
            self.pass(Duration::from_micros(span));
            self.users.reclaim(&self.world);
        }
        self.settle();
    }

    /// Lets time pass, and checks at every step.
    fn pass(&mut self, span: Duration) {
        let users = &mut self.users;
        let mut steps = 0u64;
        self.world.run(span, |world| {
            steps += 1;
            let seed = users.seed;
            assert!(steps < 2_000_000, "seed {seed}: it never comes to rest");
            users.check(world, false);
        });
        self.users.check(&self.world, true);
    }

    /// Everything comes to its end, and the reader's pages are its own.
    fn settle(&mut self) {
        let (world, users) = (&mut self.world, &mut self.users);
        for node in 0..world.nodes.len() {
            if world.nodes[node].dead {
                users.revive(world, node);
            }
        }
        users.heal(world);
        self.pass(Duration::from_millis(150));
        self.users.check_all_ended(&self.world);
    }
}

impl Users {
    /// The pools of a node that has just started.
    pub(super) fn new_sides(&mut self, world: &World, node: usize) -> (usize, usize) {
        let at = self.sides.len();
        self.sides.push(Side::new(world, node, SOURCE_PAGES, 0));
        self.sides.push(Side::new(world, node, PAGES, POISON));
        (at, at + 1)
    }

    /// Whether the process that a side belongs to lives.
    pub(super) fn lives(&self, world: &World, side: usize) -> bool {
        let side = &self.sides[side];
        let node = &world.nodes[side.node];
        !node.dead && node.life == side.life
    }

    /// Whether a user of that side can do anything: a stopped process is stopped as a whole.
    pub(super) fn acts(&self, world: &World, side: usize) -> bool {
        self.lives(world, side) && world.nodes[self.sides[side].node].running
    }

    fn start(&mut self, world: &mut World) {
        let nodes = world.nodes.len() as u64;
        let reader = world.random.below(nodes) as usize;
        let (_, destination) = self.current[reader];
        let count = 1 + world.random.below(6) as usize;
        if !self.acts(world, destination) || self.sides[destination].free.len() < count {
            return;
        }
        let pages: Vec<u32> = (0..count)
            .map(|_| {
                let free = &mut self.sides[destination].free;
                let at = world.random.below(free.len() as u64) as usize;
                free.swap_remove(at)
            })
            .collect();
        let deadline = Duration::from_micros(500 + world.random.below(40_000));
        let heads = if world.random.chance(200) {
            self.coverage.saw(Seen::FanIn);
            vec![HeadRange::new(0, 1), HeadRange::new(1, 1)]
        } else {
            vec![BOTH]
        };
        for heads in heads {
            for &page in &pages {
                self.sides[destination].holders[page as usize] += 1;
            }
            self.grant(world, reader, destination, &pages, heads, deadline);
        }
    }

    fn grant(
        &mut self,
        world: &mut World,
        reader: usize,
        destination: usize,
        pages: &[u32],
        heads: HeadRange,
        deadline: Duration,
    ) {
        let nodes = world.nodes.len() as u64;
        let other = 1 + world.random.below(nodes - 1) as usize;
        let writer = (reader + other) % nodes as usize;
        let byte = 1 + (self.transfers.len() % 150) as u8;
        let options = GrantOptions::new(vec![byte], deadline).heads(heads);
        let arrival = self.sides[destination].pool.grant_with(pages, options);
        let arrival = arrival.unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
        let (source, _) = self.current[writer];
        let mut own = Vec::new();
        if self.sides[source].free.len() >= pages.len() {
            let free = &mut self.sides[source].free;
            own = free.split_off(free.len() - pages.len());
            self.sides[source].fill(&own, BOTH, byte);
        }
        let starts = !own.is_empty() && self.acts(world, source) && world.random.chance(960);
        let push = starts.then(|| {
            let grant = arrival.grant().clone();
            let pool = &self.sides[source].pool;
            let shared = &world.nodes[writer].shared;
            shared.start_push(pool, grant, None).unwrap()
        });
        let todo = Self::cut(world, pages.len());
        self.transfers.push(Transfer {
            grant: arrival.grant().clone(),
            arrival: Some(arrival),
            push,
            destination,
            source,
            pages: pages.to_vec(),
            heads,
            own,
            byte,
            todo,
            finished: false,
            lazy: world.random.chance(60),
            started: world.now,
            deadline,
            arrival_end: None,
            push_end: None,
            frozen: None,
            frozen_at: 0,
            layers_seen: 0,
            dropped: false,
            released: false,
            own_released: false,
            in_doubt: false,
        });
    }

    /// How a transfer hands over its pages: layer by layer or not, whole or in pieces.
    fn cut(world: &mut World, pages: usize) -> Vec<(usize, usize, usize)> {
        let mut todo = Vec::new();
        for layer in 0..LAYERS {
            let at = 1 + world.random.below(pages as u64) as usize;
            if at < pages && world.random.chance(300) {
                todo.push((layer, at, pages));
                todo.push((layer, 0, at));
            } else {
                todo.push((layer, 0, pages));
            }
        }
        if world.random.chance(300) {
            for left in (1..todo.len()).rev() {
                todo.swap(left, world.random.below(left as u64 + 1) as usize);
            }
        }
        // Taken from the end.
        todo.reverse();
        todo
    }

    fn proceed(&mut self, world: &mut World) {
        let open: Vec<usize> = (0..self.transfers.len())
            .filter(|&index| {
                let transfer = &self.transfers[index];
                let ready = |push: &Push| push.poll_opened() == Some(Ok(()));
                let rests = transfer.finished || (transfer.lazy && transfer.todo.is_empty());
                !rests
                    && self.acts(world, transfer.source)
                    && transfer.push.as_ref().is_some_and(ready)
            })
            .collect();
        if open.is_empty() {
            return;
        }
        let index = open[world.random.below(open.len() as u64) as usize];
        let transfer = &mut self.transfers[index];
        let Some(push) = &transfer.push else { return };
        let result = match transfer.todo.pop() {
            Some((layer, from, to)) => push.layer_from(layer, from, &transfer.own[from..to]),
            None => {
                transfer.finished = true;
                push.start_finish(vec![transfer.byte])
            }
        };
        if let Err(error) = result {
            let seed = self.seed;
            let wrong = matches!(error, PushError::Input(_));
            assert!(!wrong, "seed {seed}: {error}");
            transfer.finished = true;
        }
    }

    /// Pages whose transfers have ended a while ago can be granted again.
    fn reclaim(&mut self, world: &World) {
        let now = world.now;
        let mut freed = 0;
        for transfer in &mut self.transfers {
            let over = transfer.push.is_none()
                || transfer
                    .push_end
                    .is_some_and(|end| end != Seen::PushUnfenced);
            if over && !transfer.own_released {
                transfer.own_released = true;
                self.sides[transfer.source].free.append(&mut transfer.own);
            }
            let ended = transfer.frozen.is_some() && now > transfer.frozen_at + QUARANTINE;
            if !ended || transfer.released || transfer.in_doubt {
                continue;
            }
            transfer.released = true;
            let side = &mut self.sides[transfer.destination];
            side.fill(&transfer.pages, transfer.heads, POISON);
            for &page in &transfer.pages {
                side.holders[page as usize] -= 1;
                if side.holders[page as usize] == 0 {
                    side.free.push(page);
                    freed += 1;
                }
            }
        }
        if freed > 0 {
            self.coverage.saw(Seen::Reused);
            self.looked_at = None;
        }
    }

    pub(super) fn freeze(&mut self, world: &World, index: usize) {
        let transfer = &mut self.transfers[index];
        let side = &self.sides[transfer.destination];
        transfer.frozen = Some(side.bytes(0..LAYERS, &transfer.pages, transfer.heads));
        transfer.frozen_at = world.now;
    }

    /// Whether its pages are watched: its end has been told, and nobody else has them yet.
    pub(super) fn is_watched(&self, index: usize) -> bool {
        let transfer = &self.transfers[index];
        transfer.frozen.is_some() && !transfer.released
    }
}
