//! What the layers below the endpoint cost, one by one: a grant's encoding, posting and polling over the double of
//! libibverbs, and the counting of parts. Planning is in `kv_plan.rs`, the whole path in `verbs_null.rs`.

use std::{hint::black_box, sync::Arc, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvpush::{
    Auth, Endpoint, Grant,
    fabric::sim::SimNet,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{HostMemory, Memory},
};

#[path = "rig/lanes.rs"]
mod lanes;
#[allow(
    dead_code,
    unused_imports,
    reason = "the library's own file, which nothing else names"
)]
#[path = "../src/protocol/parts.rs"]
mod parts;
#[path = "../tests/verbs_double/loader.rs"]
mod verbs_double;

const PAGES: u32 = 100_000;

/// A grant of 100,000 pages, of which no two are neighbours.
fn grant() -> Grant {
    let endpoint = Endpoint::builder()
        .auth(Auth::psk([1; 32]))
        .fabrics([])
        .device(SimNet::free_running(1).device("decode"))
        .bind("127.0.0.1:0")
        .expect("an endpoint");
    let shape = KvShape {
        layers: 1,
        tokens_per_page: 1,
        heads: HeadRange::new(0, 1),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    let layout = shape.mla(3 * PAGES).expect("a layout");
    let memory = region_lengths(&layout)
        .expect("lengths")
        .into_iter()
        .map(|n| Arc::new(HostMemory::new(n).expect("memory")) as Arc<dyn Memory>);
    let pool = endpoint
        .register_pool(layout, memory.collect())
        .expect("a pool");
    let pages: Vec<u32> = (0..PAGES).map(|i| (i * 7919) % PAGES * 3).collect();
    let arrival = pool
        .grant("x", &pages, Duration::from_secs(60))
        .expect("a grant");
    arrival.grant().clone()
}

fn encode(c: &mut Criterion) {
    let grant = grant();
    let mut group = c.benchmark_group("encode, pages of a grant");
    group.throughput(Throughput::Elements(PAGES.into()));
    group.bench_function("encode", |b| b.iter(|| black_box(&grant).encode()));
    let bytes = grant.encode();
    group.bench_function("decode", |b| b.iter(|| Grant::decode(black_box(&bytes))));
}

fn post(c: &mut Criterion) {
    verbs_double::load();
    let mut lanes = lanes::Lanes::new();
    let mut group = c.benchmark_group("verbs over the double, requests");
    group.throughput(Throughput::Elements(lanes::BATCH.into()));
    group.bench_function("post, and poll their completion", |b| {
        b.iter(|| lanes.writes())
    });
    let name = "post with immediates, and poll and replenish their receives";
    group.bench_function(name, |b| b.iter(|| lanes.arrivals()));
}

fn arrival(c: &mut Criterion) {
    let blocks = parts::Blocks::new(80, 1 << 16, 1 << 10).expect("parts");
    let mut group = c.benchmark_group("arrival, parts");
    group.throughput(Throughput::Elements(blocks.parts().into()));
    group.bench_function("count", |b| {
        b.iter_batched_ref(
            || parts::PartMap::new(blocks),
            |map| {
                for part in 0..blocks.parts() {
                    black_box(map.arrive(black_box(part)));
                }
            },
            criterion::BatchSize::LargeInput,
        );
    });
}

criterion_group!(benches, encode, post, arrival);
criterion_main!(benches);
