//! Several endpoints, a simulated fabric and a simulated control network in one thread, under virtual time.
//!
//! Equal seeds give equal runs: [`World::hash`] tells whether two were.

mod lives;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use crossbeam::channel::Receiver;
use parking_lot::Mutex;

use super::{
    super::{AccessEntry, AccessOp, Command, Control, ControlEvent, Core, ExportRecord},
    unfenced::Guarded,
};
use crate::{
    endpoint::{
        Pool, PoolOptions,
        config::Config,
        control::{CloseReason, ConnId},
        drain::DrainShared,
        regions::{Exports, Policy, Region, Registry},
        shared::{AccessShared, EndpointShared, ExportHandle, TailArena},
        wake::WakeHandle,
    },
    fabric::{
        Access, Context, Device,
        sim::{SimConfig, SimNet, rng::Rng},
    },
    kv::{KvLayout, region_lengths},
    memory::{
        HostMemory, Memory,
        testing::{Device as FarDevice, Far},
    },
    protocol::Time,
    wire::{Incarnation, Message, RegionToken, RegionTokenFields},
};

/// Completion-queue entries of each rail.
pub(super) const COMPLETIONS: u32 = 1 << 12;

/// What becomes of a message on its way: whose it is, the message, and what is sent in its place.
pub(super) type Tamper = Box<dyn FnMut(usize, Vec<u8>) -> Vec<Vec<u8>>>;

/// What a core asks of its control connections.
enum Request {
    Connect(ConnId, Vec<String>),
    Send(ConnId, Vec<u8>),
    Close(ConnId),
}

#[derive(Clone, Default)]
struct Requests(Arc<Mutex<Vec<Request>>>);

impl Control for Requests {
    fn connect(&mut self, conn: ConnId, addresses: Vec<String>, _timeout: Duration) {
        self.0.lock().push(Request::Connect(conn, addresses));
    }

    fn send(&mut self, conn: ConnId, message: Vec<u8>) {
        self.0.lock().push(Request::Send(conn, message));
    }

    fn close(&mut self, conn: ConnId) {
        self.0.lock().push(Request::Close(conn));
    }
}

/// One endpoint.
pub(super) struct Node {
    pub(super) core: Core,
    pub(super) shared: Arc<EndpointShared>,
    commands: Receiver<Command>,
    requests: Requests,
    /// For each rail: whether its device refuses to destroy lanes.
    pub(super) unfenceable: Vec<Arc<AtomicBool>>,
    /// For each rail: whether what completes is seen only when a lane is fenced.
    pub(super) late: Vec<Arc<AtomicBool>>,
    /// The device in whose memory its pools are; if none, they are in host memory.
    pub(super) far: Option<Arc<FarDevice>>,
    /// Whether it takes part: a stopped node neither acts nor answers, while its device goes on.
    pub(super) running: bool,
    /// It acts at most this often, in nanoseconds; 0 is whenever there is something to do.
    pub(super) pace: u64,
    /// When it may act again.
    not_before: u64,
    /// Its process is gone, until [`World::restart`].
    pub(super) dead: bool,
    /// How often it has been started before.
    pub(super) life: u8,
    rails: usize,
    inbox: Vec<ControlEvent>,
    /// Whether what has come for it waits, as in a socket.
    held: bool,
}

/// Everything there is.
pub(super) struct World {
    pub(super) net: SimNet,
    pub(super) now: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) random: Random,
    /// Control events on their way: time, a number that keeps the order, whose, what.
    transit: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: BTreeMap<u64, (u8, ControlEvent)>,
    sequence: u64,
    /// Both ends of each connection.
    ends: BTreeMap<(usize, ConnId), (usize, ConnId)>,
    /// Nothing overtakes on one connection.
    latest: BTreeMap<(usize, ConnId), u64>,
    accepted: u64,
    pub(super) tamper: Option<Tamper>,
    /// Longest delay of a control message, in nanoseconds.
    pub(super) control_delay: u64,
    /// Connections whose other end died without a word, by who died.
    half_open: Vec<(usize, usize, ConnId)>,
    /// A hash of all control events.
    log: DefaultHasher,
    config: Config,
    seed: u64,
}

/// The simulation's generator, with the draws that schedules need.
pub(super) struct Random(Rng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(super) fn chance(&mut self, in_thousand: u64) -> bool {
        self.below(1000) < in_thousand
    }
}

impl World {
    pub(super) fn new(seed: u64, count: usize, config: &Config) -> Self {
        Self::with_rails(seed, &vec![1; count], config)
    }

    /// One node with so many rails for each element of `rails`.
    pub(super) fn with_rails(seed: u64, rails: &[usize], config: &Config) -> Self {
        let mut settings = SimConfig::seeded(seed);
        if let (0, Some(windows)) = (seed % 4, &mut settings.caps.windows) {
            // So few that grants go without.
            windows.max = 20;
        }
        Self::on(settings, rails, config)
    }

    /// The same on a net that is not the default one.
    pub(super) fn on(net: SimConfig, rails: &[usize], config: &Config) -> Self {
        let seed = net.seed;
        Self::over(SimNet::new(net), seed, rails, config)
    }

    /// The same on a net that may have devices of those names already.
    pub(super) fn over(net: SimNet, seed: u64, rails: &[usize], config: &Config) -> Self {
        let nodes = rails
            .iter()
            .enumerate()
            .map(|(index, &rails)| Node::new(&net, index, 0, rails, config, seed))
            .collect();
        Self {
            net,
            now: 0,
            nodes,
            random: Random::new(seed),
            transit: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            ends: BTreeMap::new(),
            latest: BTreeMap::new(),
            accepted: 0,
            tamper: None,
            control_delay: 200_000,
            half_open: Vec::new(),
            log: DefaultHasher::new(),
            config: config.clone(),
            seed,
        }
    }

    /// Memory windows that there are, on any device.
    pub(super) fn windows(&self) -> u32 {
        let devices = self.nodes.iter().flat_map(|node| &node.shared.devices);
        devices
            .map(|device| self.net.windows(&device.info().name))
            .sum()
    }

    /// A hash of all that has happened so far, on the fabric and on control connections: equal for equal runs.
    pub(super) fn hash(&self) -> u64 {
        let mut hasher = self.log.clone();
        hasher.write_u64(self.net.trace_hash());
        hasher.finish()
    }

    /// Gives `bytes` to `node` at its next step, as if the peer at the other end of `conn` had sent them.
    pub(super) fn inject(&mut self, node: usize, conn: ConnId, message: &Message) {
        let bytes = message.encode().unwrap();
        self.nodes[node]
            .inbox
            .push(ControlEvent::Message { conn, bytes });
    }

    /// The connections that `node` is an end of.
    pub(super) fn conns_of(&self, node: usize) -> Vec<ConnId> {
        let ends = self.ends.keys().filter(|(end, _)| *end == node);
        let mut conns: Vec<_> = ends.map(|&(_, conn)| conn).collect();
        conns.sort_unstable_by_key(|conn| conn.0);
        conns
    }

    /// Opens a connection from `node` to `peer` by hand. Its core does not know of it.
    pub(super) fn dial(&mut self, node: usize, conn: ConnId, peer: usize) {
        let address = format!("node-{peer}:7700");
        self.request(node, Request::Connect(conn, vec![address]));
    }

    /// Sends `bytes` from `node` by hand, as they are.
    pub(super) fn send_raw(&mut self, node: usize, conn: ConnId, bytes: Vec<u8>) {
        self.transmit(node, conn, bytes);
    }

    /// One round: every node acts once. Returns whether any did something.
    pub(super) fn round(&mut self) -> bool {
        let mut active = false;
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            if !node.running || node.dead || node.not_before > self.now {
                continue;
            }
            node.not_before = self.now + node.pace;
            let mut events = match node.held {
                true => Vec::new(),
                false => std::mem::take(&mut node.inbox),
            };
            let mut commands = node.commands.try_iter().collect();
            active |= node.core.step(Time(self.now), &mut commands, &mut events);
            let requests = std::mem::take(&mut *node.requests.0.lock());
            active |= !requests.is_empty();
            for request in requests {
                self.request(index, request);
            }
        }
        active
    }

    /// Lets `span` of virtual time pass, with everything that happens in it.
    pub(super) fn run(&mut self, span: Duration, mut check: impl FnMut(&mut Self)) {
        let end = self.now + span.as_nanos() as u64;
        loop {
            while self.round() {
                check(self);
            }
            let awake = self.nodes.iter().filter(|node| node.running && !node.dead);
            let next = awake
                .filter_map(|node| match node.not_before > self.now {
                    true => Some(node.not_before),
                    false => node.core.next_deadline().map(|time| time.0),
                })
                .chain(self.net.next_event())
                .chain(self.transit.peek().map(|Reverse((time, ..))| *time))
                .min();
            match next {
                Some(time) if time <= end => self.advance(time.max(self.now + 1)),
                _ => {
                    self.advance(end);
                    check(self);
                    return;
                }
            }
            check(self);
        }
    }

    fn advance(&mut self, time: u64) {
        self.now = self.now.max(time);
        self.net.advance_to(self.now);
        while self
            .transit
            .peek()
            .is_some_and(|Reverse((due, ..))| *due <= self.now)
        {
            let Some(Reverse((_, sequence, node))) = self.transit.pop() else {
                return;
            };
            let node = &mut self.nodes[node];
            if let Some((life, event)) = self.events.remove(&sequence)
                && life == node.life
                && !node.dead
            {
                node.inbox.push(event);
            }
        }
    }

    /// Cuts all control connections of `node`, as if its process had died.
    pub(super) fn cut(&mut self, node: usize) {
        let conns: Vec<_> = self
            .ends
            .keys()
            .filter(|(n, _)| *n == node)
            .copied()
            .collect();
        for (node, conn) in conns {
            if let Some((peer, peer_conn)) = self.ends.remove(&(node, conn)) {
                self.ends.remove(&(peer, peer_conn));
                for (node, conn) in [(node, conn), (peer, peer_conn)] {
                    let reason = CloseReason::PeerClosed;
                    self.deliver(node, conn, ControlEvent::Closed { conn, reason });
                }
            }
        }
    }

    fn request(&mut self, node: usize, request: Request) {
        match request {
            Request::Connect(conn, addresses) => {
                let peer: Option<usize> = addresses.first().and_then(|address| {
                    let index = address.strip_prefix("node-")?.split(':').next()?;
                    index
                        .parse::<usize>()
                        .ok()
                        .filter(|&peer| peer < self.nodes.len())
                });
                let Some(peer) = peer else {
                    let reason = CloseReason::Dial {
                        attempts: Vec::new(),
                    };
                    self.deliver(node, conn, ControlEvent::Closed { conn, reason });
                    return;
                };
                if self.nodes[peer].dead {
                    // Nobody answers. The core's own deadlines must see to it.
                    return;
                }
                self.accepted += 1;
                let other = ConnId(1 << 63 | self.accepted);
                self.ends.insert((node, conn), (peer, other));
                self.ends.insert((peer, other), (node, conn));
                let (here, there) = (address(node), address(peer));
                self.deliver(
                    peer,
                    other,
                    ControlEvent::Accepted {
                        conn: other,
                        peer: here,
                    },
                );
                self.deliver(node, conn, ControlEvent::Connected { conn, peer: there });
            }
            Request::Send(conn, bytes) => {
                let messages = match &mut self.tamper {
                    Some(tamper) => tamper(node, bytes),
                    None => vec![bytes],
                };
                for bytes in messages {
                    self.transmit(node, conn, bytes);
                }
            }
            Request::Close(conn) => {
                if let Some((peer, other)) = self.ends.remove(&(node, conn)) {
                    self.ends.remove(&(peer, other));
                    let reason = CloseReason::PeerClosed;
                    self.deliver(
                        peer,
                        other,
                        ControlEvent::Closed {
                            conn: other,
                            reason,
                        },
                    );
                }
            }
        }
    }

    fn transmit(&mut self, node: usize, conn: ConnId, bytes: Vec<u8>) {
        if let Some(&(peer, conn)) = self.ends.get(&(node, conn)) {
            self.deliver(peer, conn, ControlEvent::Message { conn, bytes });
        }
    }

    /// Sends `event` on its way to one end of a connection, behind what was sent there before.
    fn deliver(&mut self, node: usize, conn: ConnId, event: ControlEvent) {
        let delay = 1_000 + self.random.below(self.control_delay);
        let latest = self.latest.entry((node, conn)).or_default();
        *latest = (self.now + delay).max(*latest + 1);
        self.sequence += 1;
        self.transit.push(Reverse((*latest, self.sequence, node)));
        let (what, first) = match &event {
            ControlEvent::Accepted { .. } => (0, 0),
            ControlEvent::Connected { .. } => (1, 0),
            // The rest may hold addresses in memory, which differ from run to run, and so does the length.
            ControlEvent::Message { bytes, .. } => (2, bytes.first().copied().unwrap_or_default()),
            ControlEvent::Closed { .. } => (3, 0),
        };
        (*latest, node, conn.0, what, first).hash(&mut self.log);
        let life = self.nodes[node].life;
        self.events.insert(self.sequence, (life, event));
    }
}

fn address(node: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, node as u8 + 1)), 7700)
}

impl Node {
    fn new(net: &SimNet, index: usize, life: u8, rails: usize, config: &Config, seed: u64) -> Self {
        let devices: Vec<Arc<dyn Device>> = (0..rails)
            .map(|rail| net.device(&World::rail_name(index, rail)) as Arc<dyn Device>)
            .collect();
        let config = Arc::new(Config {
            name: format!("node-{index}"),
            ..config.clone()
        });
        let (slots, capacity) = (config.max_transfers, config.tail_capacity);
        let memory = Arc::new(HostMemory::new(TailArena::length(slots, capacity)).unwrap());
        let shared_memory = Arc::clone(&memory) as Arc<dyn Memory>;
        let region = Region::register(
            shared_memory,
            Access::REMOTE_WRITE,
            &devices,
            &Policy::default(),
        );
        let region = region.unwrap();
        let tails = Arc::new(TailArena::new(memory, region, slots, capacity));
        let mut name = [0; 16];
        name[..8].copy_from_slice(&seed.to_le_bytes());
        name[8] = index as u8 + 1;
        name[9] = life;
        let incarnation = Incarnation(name);
        let (commands, inbox) = crossbeam::channel::unbounded();
        let depth = COMPLETIONS;
        let unfenceable: Vec<_> = (0..rails)
            .map(|_| Arc::new(AtomicBool::new(false)))
            .collect();
        let late: Vec<_> = (0..rails)
            .map(|_| Arc::new(AtomicBool::new(false)))
            .collect();
        let flags = unfenceable.iter().zip(&late);
        let open = devices.iter().zip(flags).map(|(device, (refuses, late))| {
            let context = Arc::clone(device).open_context(depth).unwrap();
            let context = Guarded::new(context, Arc::clone(refuses), Arc::clone(late));
            let context: Box<dyn Context> = Box::new(context);
            (Arc::clone(device), context, depth)
        });
        let open = open.collect();
        let requests = Requests::default();
        let core = Core::new(
            Arc::clone(&config),
            incarnation,
            open,
            Box::new(requests.clone()),
            Arc::clone(&tails),
        );
        let shared = Arc::new(EndpointShared {
            topology: OnceLock::new(),
            config,
            incarnation,
            addresses: vec![format!("node-{index}:7700")],
            devices,
            tails,
            registry: Arc::new(Registry::default()),
            plans: Arc::default(),
            staging: Mutex::default(),
            closed: AtomicBool::new(false),
            drain: DrainShared::new(),
            telemetry: core.telemetry(),
            next_pool: AtomicU32::new(1),
            next_export: AtomicU32::new(1),
            next_push: AtomicU64::new(1),
            commands,
            wake: WakeHandle::new().unwrap(),
        });
        Self {
            core,
            shared,
            commands: inbox,
            requests,
            unfenceable,
            late,
            far: None,
            running: true,
            pace: 0,
            not_before: 0,
            dead: false,
            life,
            rails,
            inbox: Vec::new(),
            held: false,
        }
    }

    /// A pool in one region for each layer, all bytes `fill`.
    pub(super) fn pool(&self, layout: &KvLayout, fill: u8) -> (Pool, Vec<Arc<HostMemory>>) {
        let memory: Vec<_> = region_lengths(layout)
            .unwrap()
            .into_iter()
            .map(|length| {
                let memory = Arc::new(HostMemory::new(length).unwrap());
                memory.fill(0, length, fill).unwrap();
                memory
            })
            .collect();
        let shared = memory
            .iter()
            .map(|memory| match &self.far {
                Some(device) => {
                    Arc::new(Far::new(Arc::clone(memory), Arc::clone(device))) as Arc<dyn Memory>
                }
                None => Arc::clone(memory) as Arc<dyn Memory>,
            })
            .collect();
        (
            self.shared
                .register_pool(layout.clone(), shared, PoolOptions::default())
                .unwrap(),
            memory,
        )
    }

    /// An exported region of `length` bytes.
    pub(super) fn export(
        &self,
        length: u64,
        access: Access,
    ) -> (Arc<ExportHandle>, RegionToken, Arc<HostMemory>) {
        let memory = Arc::new(HostMemory::new(length).unwrap());
        let endpoint = Arc::clone(&self.shared);
        let region = endpoint
            .register(
                Arc::clone(&memory) as Arc<dyn Memory>,
                access,
                &mut Exports::default(),
            )
            .unwrap();
        let id = endpoint.next_export.fetch_add(1, Ordering::Relaxed);
        let nonce = [id as u8; 16];
        let token = RegionToken::new(RegionTokenFields {
            issuer: endpoint.incarnation,
            addresses: endpoint.addresses.clone(),
            region: id,
            nonce,
            length: region.length(),
            read: access.remote_read,
            write: access.remote_write,
        });
        let record = Arc::new(ExportRecord { id, nonce, region });
        assert!(endpoint.command(Command::AddExport(Arc::clone(&record))));
        let handle = Arc::new(ExportHandle { record, endpoint });
        (handle, token.unwrap(), memory)
    }

    /// Begins a one-sided access.
    pub(super) fn access(&self, token: &RegionToken, op: AccessOp) -> Arc<AccessShared> {
        let shared = Arc::new(AccessShared::new());
        let timeout = Duration::from_millis(50);
        let entry = AccessEntry::new(token.clone(), op, Arc::clone(&shared), timeout);
        assert!(self.shared.command(Command::Access(Box::new(entry))));
        shared
    }

    /// Keeps what comes over control connections from the node, or no longer does.
    pub(super) fn hold_events(&mut self, held: bool) {
        self.held = held;
    }

    /// Timers of grants that have not come due.
    pub(super) fn arrival_timers(&self) -> usize {
        format!("{:?}", self.core.timers)
            .matches("Arrival(")
            .count()
    }
}
