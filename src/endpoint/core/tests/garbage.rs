//! A peer that sends anything: bytes, messages out of nowhere, and its own messages changed, doubled or left out. It
//! dials and is dialled. No core panics, and what it is not part of goes on.
//!
//! A failing seed is printed and reproduces exactly: `KVPUSH_GARBAGE_SEED=n cargo test --lib garbage`.
//! `KVPUSH_GARBAGE_SESSIONS=n` runs more of them.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use super::world::{Random, World};
use crate::{
    endpoint::{
        Arrival, Pool, Push, config::Config, control::ConnId, core::AccessOp, shared::AccessShared,
    },
    fabric::{Access, FabricKind, LaneAddress, RemoteKey},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    wire::{
        Accept, Cancel, Credits, Digest, Goodbye, GoodbyeCode, GrantId, GrantWindows, Hello,
        HelloAck, HelloReject, Incarnation, LaneAnswer, LaneOffer, LaneWindows, Message, Open,
        OpenRegion, PoolDescriptor, PoolId, RailOffer, Refuse, RefuseCode, RegionAccept,
        RegionDescriptor, RegionKey, RegionRefuse, RegionToken, RejectCode, Revoke, RevokeReason,
        TailTarget, WindowRange,
    },
};

/// The node that sends garbage.
const HOSTILE: usize = 2;
const PAGES: u32 = 64;
const REGION: u64 = 1 << 16;

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(PAGES).unwrap()
}

fn config() -> Config {
    Config {
        send_depth: 16,
        receive_depth: 16,
        max_transfers: 64,
        tail_capacity: 56,
        open_timeout: Duration::from_millis(10),
        drain_timeout: Duration::from_millis(3),
        revoke_grace: Duration::from_millis(2),
        ..Config::default()
    }
}

/// Messages with numbers that mean something, and some that lie at the edges.
struct Speaker {
    random: Random,
    incarnations: Vec<Incarnation>,
}

impl Speaker {
    fn number(&mut self) -> u64 {
        match self.random.below(10) {
            0..=6 => self.random.below(24),
            7 => u64::MAX - self.random.below(300),
            8 => 1 << self.random.below(64),
            _ => self.random.next(),
        }
    }

    fn list<T>(&mut self, most: u64, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.random.below(most + 1);
        (0..count).map(|_| item(self)).collect()
    }

    fn incarnation(&mut self) -> Incarnation {
        let which = self.random.below(self.incarnations.len() as u64 + 1) as usize;
        let known = self.incarnations.get(which).copied();
        known.unwrap_or(Incarnation([self.random.next() as u8; 16]))
    }

    fn lane_address(&mut self) -> LaneAddress {
        let bytes = self.list(LaneAddress::MAX as u64, |s| s.random.next() as u8);
        LaneAddress::new(bytes).unwrap()
    }

    fn key(&mut self) -> RegionKey {
        RegionKey {
            rail: self.random.below(3) as u8,
            address: self.number(),
            extent: match self.random.chance(700) {
                true => 0,
                false => self.number(),
            },
            rkeys: match self.random.chance(700) {
                true => vec![RemoteKey(self.number() as u32)],
                false => self.list(4, |s| RemoteKey(s.number() as u32)),
            },
        }
    }

    fn pool(&mut self) -> PoolDescriptor {
        let mut layout = layout();
        if self.random.chance(500) {
            layout.pages = self.number() as u32;
        }
        let layers = self.random.below(4) as usize;
        layout.layers.truncate(layers);
        let fitting = self.random.chance(700);
        PoolDescriptor {
            pool: PoolId(1 + self.random.below(2) as u32),
            layout,
            regions: self.list(3, |s| RegionDescriptor {
                length: if fitting { REGION } else { s.number() },
                keys: s.list(3, Self::key),
            }),
            distances: self.list(3, |s| s.number() as u8),
        }
    }

    fn hello(&mut self) -> Message {
        Message::Hello(Hello {
            incarnation: self.incarnation(),
            name: "garbage".to_owned(),
            fabric: [
                FabricKind::Sim,
                FabricKind::Tcp,
                FabricKind::Verbs,
                FabricKind::Shm,
            ][self.random.below(3) as usize],
            supported: self.number() as u8,
            rails: self.list(3, |s| RailOffer {
                rail: s.number() as u8,
                speed_bits: s.number(),
                address: String::new(),
            }),
            lanes: self.list(5, |s| LaneOffer {
                rail: s.number() as u8,
                remote_rail: s.number() as u8,
                address: s.lane_address(),
            }),
            keepalive_ms: self.number() as u32,
        })
    }

    fn accept(&mut self) -> Message {
        Message::Accept(Box::new(Accept {
            push: self.number(),
            slot: self.number() as u16,
            remaining_ns: self.number(),
            tail: TailTarget {
                address: self.number(),
                keys: self.list(3, |s| {
                    (s.random.below(3) as u8, RemoteKey(s.number() as u32))
                }),
                capacity: self.number() as u32,
            },
            windows: self.random.chance(300).then(|| GrantWindows {
                ranges: self.list(4, |s| WindowRange {
                    region: s.random.below(3) as u16,
                    offset: s.number(),
                    length: s.number(),
                }),
                lanes: self.list(3, |s| LaneWindows {
                    tail: RemoteKey(s.number() as u32),
                    keys: s.list(4, |s| (s.number(), RemoteKey(s.number() as u32))),
                }),
            }),
            pool: self.random.chance(600).then(|| self.pool()),
            landing: self.random.chance(200).then(|| self.pool()),
        }))
    }

    fn message(&mut self) -> Message {
        let detail = || "garbage".to_owned();
        let push = self.number();
        let refusal = |r: u64| RefuseCode::ALL[r as usize % RefuseCode::ALL.len()];
        match self.random.below(17) {
            0 => self.hello(),
            1 => Message::HelloAck(HelloAck {
                incarnation: self.incarnation(),
                name: detail(),
                lanes: self.list(3, |s| LaneAnswer {
                    rail: s.number() as u8,
                    speed_bits: s.number(),
                    address: s.lane_address(),
                }),
                receives_per_lane: self.number() as u32,
                keepalive_ms: self.number() as u32,
            }),
            2 => Message::HelloReject(HelloReject {
                code: RejectCode::ALL[self.random.below(6) as usize],
                supported: self.number() as u8,
                detail: detail(),
            }),
            3 => Message::Open(Open {
                push,
                grant: GrantId {
                    slot: self.number() as u32,
                    generation: self.number() as u32,
                },
                pool: PoolId(self.number() as u32),
                incarnation: self.incarnation(),
                digest: Digest([self.number() as u8; 16]),
                want_pool: self.random.chance(500),
            }),
            4 | 5 => self.accept(),
            6 => Message::Refuse(Refuse {
                push,
                code: refusal(self.random.next()),
                detail: detail(),
            }),
            7 => Message::Credits(Credits {
                lane: self.number() as u16,
                epoch: self.random.below(3) as u32,
                total: self.number(),
            }),
            8 => Message::Revoke(Revoke {
                push,
                reason: RevokeReason::ALL[self.random.below(4) as usize],
            }),
            9 => Message::Drained { push },
            10 => Message::Cancel(Cancel {
                push,
                code: self.number() as u16,
                detail: detail(),
            }),
            11 => Message::Done { push },
            12 => Message::OpenRegion(OpenRegion {
                request: push,
                region: self.random.below(3) as u32,
                nonce: [1 + self.random.below(2) as u8; 16],
                incarnation: self.incarnation(),
            }),
            13 => Message::RegionAccept(RegionAccept {
                request: push,
                length: if self.random.chance(500) {
                    REGION
                } else {
                    self.number()
                },
                read: true,
                write: true,
                keys: self.list(3, Self::key),
            }),
            14 => Message::RegionRefuse(RegionRefuse {
                request: push,
                code: refusal(self.random.next()),
                detail: detail(),
            }),
            15 => Message::Ping { nonce: push },
            _ if self.random.chance(900) => Message::Pong { nonce: push },
            _ => Message::Goodbye(Goodbye {
                code: GoodbyeCode::ALL[self.random.below(4) as usize],
                detail: detail(),
            }),
        }
    }

    /// Something to say: sometimes not even a message.
    fn bytes(&mut self) -> Vec<u8> {
        if self.random.chance(150) {
            return self.list(200, |s| s.random.next() as u8);
        }
        self.message().encode().unwrap()
    }

    /// What becomes of an honest message. The first session of a peer must come about for the rest to matter.
    fn change(&mut self, mut bytes: Vec<u8>) -> Vec<Vec<u8>> {
        match self.random.below(20) {
            0 => vec![],
            1 => vec![bytes.clone(), bytes],
            2 => vec![bytes, self.bytes()],
            3 => vec![self.bytes(), bytes],
            4..=7 => {
                for _ in 0..=self.random.below(3) {
                    let at = self.random.below(bytes.len() as u64) as usize;
                    bytes[at] =
                        [0, 1, 0x7f, 0xff, self.random.next() as u8][self.random.below(5) as usize];
                }
                vec![bytes]
            }
            _ => vec![bytes],
        }
    }
}

#[derive(Default)]
struct Busy {
    arrivals: Vec<(usize, Arrival)>,
    pushes: Vec<(usize, Push, u32)>,
    opens: Vec<(usize, RegionToken, Arc<AccessShared>)>,
    /// How far it got, to see that garbage was not all there was.
    completed: usize,
    opened_with_hostile: usize,
    moved: usize,
}

impl Busy {
    fn start(&mut self, world: &mut World, pools: &[Pool]) {
        let reader = world.random.below(3) as usize;
        let writer = (reader + 1 + world.random.below(2) as usize) % 3;
        let page = world.random.below(PAGES.into()) as u32;
        let deadline = Duration::from_millis(1 + world.random.below(20));
        let Ok(arrival) = pools[reader].grant("x", &[page], deadline) else {
            return;
        };
        let shared = &world.nodes[writer].shared;
        if let Ok(push) = shared.start_push(&pools[writer], arrival.grant().clone(), None) {
            self.pushes.push((writer + reader, push, page));
        }
        self.arrivals.push((writer + reader, arrival));
    }

    fn proceed(&mut self) {
        for (nodes, push, page) in &self.pushes {
            if push.poll_opened() == Some(Ok(())) && push.layer(0, &[*page]).is_ok() {
                drop(push.layer(1, &[*page]));
                drop(push.start_finish("end"));
                self.opened_with_hostile += usize::from(*nodes != 1);
            }
        }
        self.pushes
            .retain(|(_, push, _)| push.poll_ended().is_none());
        let completed = &mut self.completed;
        self.arrivals.retain(|(_, arrival)| {
            let end = arrival.poll_complete();
            *completed += usize::from(matches!(end, Some(Ok(_))));
            end.is_none()
        });
    }
}

fn session(seed: u64) -> Busy {
    let mut world = World::with_rails(seed, &[2, 1, 2], &config());
    let layout = layout();
    let (pools, _memory): (Vec<_>, Vec<_>) = world.nodes.iter().map(|n| n.pool(&layout, 0)).unzip();
    let exports: Vec<_> = world
        .nodes
        .iter()
        .map(|node| node.export(REGION, Access::ALL))
        .collect();
    let incarnations = world.nodes.iter().map(|n| n.shared.incarnation).collect();
    let speaker = Rc::new(RefCell::new(Speaker {
        random: Random::new(!seed),
        incarnations,
    }));
    let tampering = Rc::clone(&speaker);
    world.tamper = Some(Box::new(move |from, bytes| match from {
        HOSTILE => tampering.borrow_mut().change(bytes),
        _ => vec![bytes],
    }));
    let mut busy = Busy::default();
    let mut dialled = 0;
    for _ in 0..400 {
        match world.random.below(20) {
            0..=5 => busy.start(&mut world, &pools),
            6..=9 => {
                let node = world.random.below(3) as usize;
                let owner = (node + 1 + world.random.below(2) as usize) % 3;
                let token = exports[owner].1.clone();
                let open = world.nodes[node].access(&token, AccessOp::Open);
                busy.opens.push((node, token, open));
            }
            10 => {
                // A connection that only we know.
                dialled += 1;
                let conn = ConnId(1 << 62 | dialled);
                let peer = world.random.below(2) as usize;
                world.dial(HOSTILE, conn, peer);
                let hello = speaker.borrow_mut().hello().encode().unwrap();
                world.send_raw(HOSTILE, conn, hello);
            }
            11..=14 => {
                let conns = world.conns_of(HOSTILE);
                if !conns.is_empty() {
                    let conn = conns[world.random.below(conns.len() as u64) as usize];
                    let bytes = speaker.borrow_mut().bytes();
                    world.send_raw(HOSTILE, conn, bytes);
                }
            }
            15 if world.random.chance(200) => world.cut(HOSTILE),
            16 => world.nodes[HOSTILE].running ^= true,
            _ => {}
        }
        let span = Duration::from_micros(world.random.below(500));
        world.run(span, |_| {});
        busy.proceed();
        for (node, token, open) in std::mem::take(&mut busy.opens) {
            let Some(end) = open.signal.look(Clone::clone) else {
                busy.opens.push((node, token, open));
                continue;
            };
            let keys = open.keys.look(Clone::clone);
            let (Ok(()), Some(remote)) = (end, keys) else {
                continue;
            };
            busy.moved += 1;
            let op = AccessOp::Move {
                read: world.random.chance(500),
                local: Arc::clone(&exports[node].0),
                local_offset: 0,
                remote,
                remote_offset: 0,
                length: REGION,
            };
            drop(world.nodes[node].access(&token, op));
        }
    }

    // Everything ends by its deadline, and what the other two have with each other works.
    world.tamper = None;
    world.nodes[HOSTILE].running = true;
    world.cut(HOSTILE);
    world.run(Duration::from_millis(300), |_| {});
    busy.proceed();
    assert!(busy.arrivals.is_empty(), "arrivals outlive their deadlines");
    assert!(busy.pushes.is_empty(), "pushes outlive their deadlines");
    for pool in &pools {
        assert_eq!(pool.granted_pages(), 0, "pages stay reserved");
    }
    for node in &world.nodes[..HOSTILE] {
        assert!(node.core.rails.iter().all(|rail| !rail.dead));
    }
    assert_eq!(world.net.stats().cq_overflows, 0);
    for (writer, reader) in [(0, 1), (1, 0)] {
        let deadline = Duration::from_millis(100);
        let arrival = pools[reader].grant("x", &[1], deadline).unwrap();
        let shared = &world.nodes[writer].shared;
        let push = shared.start_push(&pools[writer], arrival.grant().clone(), None);
        let push = push.unwrap();
        world.run(Duration::from_millis(9), |_| {});
        push.layer(0, &[1]).unwrap();
        push.layer(1, &[1]).unwrap();
        push.start_finish("end").unwrap();
        world.run(Duration::from_millis(20), |_| {});
        assert_eq!(arrival.poll_complete().unwrap().unwrap(), "end");
    }
    busy
}

#[test]
fn garbage_does_not_bring_a_core_down() {
    let count: u64 = std::env::var("KVPUSH_GARBAGE_SESSIONS").map_or(40, |n| n.parse().unwrap());
    let only: Option<u64> = std::env::var("KVPUSH_GARBAGE_SEED")
        .ok()
        .map(|seed| seed.parse().unwrap());
    let seeds = match only {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    };
    let (mut completed, mut opened, mut moved) = (0, 0, 0);
    for seed in seeds {
        let result = std::panic::catch_unwind(|| session(seed));
        let busy = result.unwrap_or_else(|panic| {
            eprintln!("reproduce with KVPUSH_GARBAGE_SEED={seed}");
            std::panic::resume_unwind(panic)
        });
        completed += busy.completed;
        opened += busy.opened_with_hostile;
        moved += busy.moved;
    }
    println!(
        "{completed} transfers completed, {opened} opened with the hostile peer, {moved} moved"
    );
    if only.is_none() {
        assert!(completed > 0 && opened > 0 && moved > 0);
    }
}
