//! Random schedules of pushes, cancellations, revocations, stops and losses; the invariants hold at every step.
//!
//! A failing seed is printed and reproduces exactly: `KVPUSH_SIM_SEED=n cargo test --lib schedules`.
//! `KVPUSH_SIM_SCHEDULES=n` runs more of them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::world::World;
use crate::{
    endpoint::{
        Arrival, Pool, Push, PushError,
        config::{Config, Protection},
    },
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::{HostMemory, testing::Device},
};

const LAYERS: usize = 3;
const PAGES: u32 = 24;
const POISON: u8 = 0xa5;

fn layout(pages: u32) -> KvLayout {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(pages).unwrap()
}

fn config(random: u64) -> Config {
    Config {
        send_depth: 1 + (random % 7) as u32,
        receive_depth: 1 + (random / 7 % 5) as u32,
        lanes_per_rail: 1 + (random / 35 % 3) as u16,
        parts_per_layer: 1 + (random / 105 % 5) as u16,
        max_sge: 1 + (random / 525 % 4) as u32,
        max_transfers: 64,
        tail_capacity: 56,
        // Little enough that grants wait for it.
        staging_memory: 96 << 10,
        open_timeout: Duration::from_millis(20),
        drain_timeout: Duration::from_millis(5),
        revoke_grace: Duration::from_millis(3),
        protection: [Protection::Region, Protection::Auto, Protection::Window]
            [(random % 3) as usize],
        max_windows: 1 + (random / 3 % 20) as u32,
        ..Config::default()
    }
}

/// One request: a grant, and what its writer has done.
struct Transfer {
    arrival: Arrival,
    push: Option<Push>,
    pages: Vec<u32>,
    byte: u8,
    next_layer: usize,
    finished: bool,
    /// What the pages held when the end was reported.
    frozen: Option<Vec<u8>>,
    pool: usize,
}

struct Side {
    pool: Pool,
    memory: Vec<Arc<HostMemory>>,
}

struct Run {
    seed: u64,
    sources: Vec<Side>,
    destinations: Vec<Side>,
    transfers: Vec<Transfer>,
    /// Pages that are nobody's at the reader.
    free: Vec<Vec<u32>>,
}

fn page_bytes(side: &Side, pages: &[u32]) -> Vec<u8> {
    let layout = side.pool.layout();
    let mut bytes = Vec::new();
    for layer in &layout.layers {
        for plane in &layer.planes {
            for &page in pages {
                let mut row = vec![0; plane.page_stride as usize];
                let at = plane.offset + u64::from(page) * plane.page_stride;
                side.memory[usize::from(plane.region)]
                    .read(at, &mut row)
                    .unwrap();
                bytes.extend(row);
            }
        }
    }
    bytes
}

fn fill_pages(side: &Side, pages: &[u32], byte: u8) {
    for layer in &side.pool.layout().layers {
        for plane in &layer.planes {
            for &page in pages {
                let at = plane.offset + u64::from(page) * plane.page_stride;
                side.memory[usize::from(plane.region)]
                    .fill(at, plane.page_stride, byte)
                    .unwrap();
            }
        }
    }
}

impl Run {
    /// Invariants that hold after every step.
    fn check(&mut self, world: &mut World) {
        let seed = self.seed;
        for transfer in &mut self.transfers {
            let side = &self.destinations[transfer.pool];
            match transfer.arrival.poll_complete() {
                Some(Ok(tail)) if transfer.frozen.is_none() => {
                    assert_eq!(&tail[..], &[transfer.byte], "seed {seed}: tail");
                    let bytes = page_bytes(side, &transfer.pages);
                    assert!(
                        bytes.iter().all(|&byte| byte == transfer.byte),
                        "seed {seed}: completed without all bytes"
                    );
                    assert!(
                        transfer.finished,
                        "seed {seed}: completed before the writer finished"
                    );
                    transfer.frozen = Some(bytes);
                }
                Some(Err(_)) if transfer.frozen.is_none() => {
                    transfer.frozen = Some(page_bytes(side, &transfer.pages));
                }
                Some(_) => {
                    let now = page_bytes(side, &transfer.pages);
                    let same = transfer.frozen.as_ref() == Some(&now);
                    assert!(
                        same,
                        "seed {seed}: a write landed after the end was reported"
                    );
                }
                None => {}
            }
        }
        let stats = world.net.stats();
        assert_eq!(
            stats.cq_overflows, 0,
            "seed {seed}: a completion queue overflowed"
        );
        assert_eq!(
            stats.rnr_waits, 0,
            "seed {seed}: an immediate met no receive"
        );
    }

    fn act(&mut self, world: &mut World) {
        match world.random.below(10) {
            0 | 1 => self.start(world),
            2..=7 => self.proceed(world),
            8 => {
                let index = world.random.below(self.transfers.len().max(1) as u64) as usize;
                if let Some(transfer) = self.transfers.get(index) {
                    if world.random.chance(500) {
                        transfer.arrival.start_revoke();
                    } else if let Some(push) = &transfer.push {
                        push.start_cancel();
                    }
                }
            }
            _ => {
                let node = world.random.below(world.nodes.len() as u64) as usize;
                match world.random.below(9) {
                    0 => world.nodes[node].running = false,
                    1 => world.cut(node),
                    2 => world.net.set_loss(0.02),
                    3 => world.net.set_loss(0.0),
                    _ => world.nodes[node].running = true,
                }
            }
        }
    }

    fn start(&mut self, world: &mut World) {
        let nodes = world.nodes.len() as u64;
        let reader = world.random.below(nodes) as usize;
        let writer = (reader + 1 + world.random.below(nodes - 1) as usize) % nodes as usize;
        let count = 1 + world.random.below(6) as usize;
        if self.free[reader].len() < count {
            return;
        }
        let pages: Vec<u32> = (0..count)
            .map(|_| {
                let at = world.random.below(self.free[reader].len() as u64) as usize;
                self.free[reader].swap_remove(at)
            })
            .collect();
        let byte = 1 + (self.transfers.len() % 150) as u8;
        fill_pages(&self.destinations[reader], &pages, POISON);
        let deadline = Duration::from_micros(500 + world.random.below(40_000));
        let pool = &self.destinations[reader].pool;
        let arrival = pool.grant(vec![byte], &pages, deadline).unwrap();
        let source = &self.sources[writer];
        // Each transfer uses source pages of its own number, all filled with its byte.
        let own: Vec<u32> = self.source_pages(&pages, byte);
        fill_pages(source, &own, byte);
        let push = world.random.chance(950).then(|| {
            let grant = arrival.grant().clone();
            world.nodes[writer]
                .shared
                .start_push(&source.pool, grant, None)
                .unwrap()
        });
        self.transfers.push(Transfer {
            arrival,
            push,
            pages,
            byte,
            next_layer: 0,
            finished: false,
            frozen: None,
            pool: reader,
        });
    }

    fn source_pages(&self, pages: &[u32], byte: u8) -> Vec<u32> {
        (0..pages.len() as u32)
            .map(|i| u32::from(byte) * 8 + i)
            .collect()
    }

    fn proceed(&mut self, world: &mut World) {
        let open: Vec<usize> = (0..self.transfers.len())
            .filter(|&i| {
                let transfer = &self.transfers[i];
                !transfer.finished
                    && transfer
                        .push
                        .as_ref()
                        .is_some_and(|p| p.poll_opened() == Some(Ok(())))
            })
            .collect();
        if open.is_empty() {
            return;
        }
        let index = open[world.random.below(open.len() as u64) as usize];
        let own = self.source_pages(&self.transfers[index].pages, self.transfers[index].byte);
        let transfer = &mut self.transfers[index];
        let Some(push) = &transfer.push else { return };
        if transfer.next_layer < LAYERS {
            let result = if world.random.chance(300) && own.len() > 1 {
                let cut = 1 + world.random.below(own.len() as u64 - 1) as usize;
                push.layer_from(transfer.next_layer, cut, &own[cut..])
                    .and_then(|()| push.layer_from(transfer.next_layer, 0, &own[..cut]))
            } else {
                push.layer(transfer.next_layer, &own)
            };
            transfer.next_layer += 1;
            if let Err(error) = result {
                assert!(
                    !matches!(error, PushError::Input(_)),
                    "seed {}: {error}",
                    self.seed
                );
                transfer.finished = true;
            }
        } else {
            transfer.finished = true;
            drop(push.start_finish(vec![transfer.byte]));
        }
    }

    /// Everything has ended, and the reader's pages are its own.
    fn settle(&mut self, world: &mut World) {
        let seed = self.seed;
        for node in &mut world.nodes {
            node.running = true;
        }
        world.net.set_loss(0.0);
        world.run(Duration::from_millis(200), |world| self.check(world));
        for transfer in &self.transfers {
            assert!(
                transfer.arrival.poll_complete().is_some(),
                "seed {seed}: an arrival outlives its deadline: {:?}",
                transfer.arrival
            );
            if let Some(push) = &transfer.push {
                assert!(
                    push.poll_ended().is_some(),
                    "seed {seed}: a push outlives its deadline: {push:?}"
                );
            }
        }
        for side in &self.destinations {
            assert_eq!(
                side.pool.granted_pages(),
                0,
                "seed {seed}: pages stay reserved"
            );
        }
        assert_eq!(
            world.windows(),
            0,
            "seed {seed}: windows of grants that have ended"
        );
    }
}

/// Runs one schedule. Returns how many transfers completed, and how many ended otherwise.
fn schedule(seed: u64) -> (usize, usize) {
    let mut world = World::new(seed, 3, &config(seed));
    // Some have their pools in memory that no rail reaches.
    for (index, node) in world.nodes.iter_mut().enumerate() {
        if seed >> index & 3 == 3 {
            let device = Device::default();
            device.delay.store(seed % 17, Ordering::Relaxed);
            node.far = Some(Arc::new(device));
        }
    }
    // Room for every transfer's own pages.
    let (source_layout, layout) = (layout(8 * 152), layout(PAGES));
    let side = |(pool, memory)| Side { pool, memory };
    let mut run = Run {
        seed,
        sources: world
            .nodes
            .iter()
            .map(|n| side(n.pool(&source_layout, 0)))
            .collect(),
        destinations: world
            .nodes
            .iter()
            .map(|n| side(n.pool(&layout, POISON)))
            .collect(),
        transfers: Vec::new(),
        free: vec![(0..PAGES).collect(); 3],
    };
    for _ in 0..100 {
        run.act(&mut world);
        let span = Duration::from_micros(world.random.below(400));
        world.run(span, |world| run.check(world));
    }
    run.settle(&mut world);
    let completed = run
        .transfers
        .iter()
        .filter(|t| matches!(t.arrival.poll_complete(), Some(Ok(_))))
        .count();
    // A writer that reports completion has seen every acknowledgement, so unless the reader had taken the grant back
    // before the last part was counted, the reader has completed too.
    for transfer in &run.transfers {
        // What has landed need not have been copied on when the grant was taken back.
        let is_far = world.nodes[transfer.pool].far.is_some();
        let is_complete = matches!(transfer.arrival.poll_complete(), Some(Ok(_)));
        let ended = transfer.push.as_ref().map(Push::poll_ended);
        if let (Some(Some(Ok(_))), true) = (ended, is_complete || !is_far) {
            let whole = page_bytes(&run.destinations[transfer.pool], &transfer.pages);
            assert!(
                whole.iter().all(|&byte| byte == transfer.byte),
                "seed {seed}: the writer reported completion before everything was placed"
            );
        }
    }
    (completed, run.transfers.len() - completed)
}

#[test]
fn invariants_hold_under_random_schedules() {
    let count: u64 = std::env::var("KVPUSH_SIM_SCHEDULES").map_or(200, |n| n.parse().unwrap());
    let first: Option<u64> = std::env::var("KVPUSH_SIM_SEED")
        .ok()
        .map(|seed| seed.parse().unwrap());
    let seeds = match first {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    };
    let (mut completed, mut ended) = (0, 0);
    for seed in seeds.clone() {
        let result = std::panic::catch_unwind(|| schedule(seed));
        let (c, e) = result.unwrap_or_else(|panic| {
            eprintln!("reproduce with KVPUSH_SIM_SEED={seed}");
            std::panic::resume_unwind(panic)
        });
        completed += c;
        ended += e;
    }
    println!("{count} schedules: {completed} transfers completed, {ended} ended otherwise");
    if first.is_none() {
        assert!(
            completed > 0 && ended > 0,
            "the schedules try neither success nor failure"
        );
    }
}

/// The checker can fail: a byte that changes after an end has been reported is noticed.
#[test]
#[should_panic(expected = "a write landed after the end was reported")]
fn a_late_write_is_noticed() {
    let mut world = World::new(1, 3, &config(1));
    let layout = layout(PAGES);
    let side = |(pool, memory)| Side { pool, memory };
    let nodes = &world.nodes;
    let mut run = Run {
        seed: 1,
        sources: nodes.iter().map(|n| side(n.pool(&layout, 0))).collect(),
        destinations: nodes
            .iter()
            .map(|n| side(n.pool(&layout, POISON)))
            .collect(),
        transfers: Vec::new(),
        free: vec![(0..PAGES).collect(); 3],
    };
    let arrival = run.destinations[0]
        .pool
        .grant("late", &[3], Duration::from_millis(1))
        .unwrap();
    run.transfers.push(Transfer {
        arrival,
        push: None,
        pages: vec![3],
        byte: 1,
        next_layer: 0,
        finished: false,
        frozen: None,
        pool: 0,
    });
    world.run(Duration::from_millis(2), |world| run.check(world));
    assert!(run.transfers[0].frozen.is_some(), "the grant has expired");
    fill_pages(&run.destinations[0], &[3], 1);
    run.check(&mut world);
}
