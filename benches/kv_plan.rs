//! Planning speed. One element is one page of one layer; the target is 50 ns for a page that merges with nothing.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvpush::kv::models::{DEEPSEEK_R1, LLAMA_3_1_70B};
use kvpush::kv::presets::{HeadOrder, KvShape};
use kvpush::kv::shard::shard_heads;
use kvpush::kv::{HeadRange, KvLayout, Plan, PlanLimits, Planner};

const PAGES: u32 = 100_000;
const POOL: u32 = 2 * PAGES;
const LIMITS: PlanLimits = PlanLimits {
    max_sge: 30,
    max_write: 1 << 30,
};

fn shard(tp: u32, rank: u32) -> KvShape {
    LLAMA_3_1_70B
        .shard(16, tp, rank)
        .expect("a shard of the preset")
}

/// Every second page, in an order far from ascending.
fn scattered() -> Vec<u32> {
    (0..PAGES).map(|i| (i * 7919) % PAGES * 2).collect()
}

fn ascending() -> Vec<u32> {
    (0..PAGES).collect()
}

fn plan(c: &mut Criterion) {
    let whole = shard(1, 0);
    let flash = whole.vllm_flash(POOL).expect("a layout");
    let interleaved = whole
        .vllm_flashinfer(POOL, HeadOrder::TokenMajor)
        .expect("a layout");
    let latent = DEEPSEEK_R1
        .shard(64, 1, 0)
        .expect("a shard")
        .mla(POOL)
        .expect("a layout");
    let half = shard(2, 1).vllm_flash(POOL).expect("a layout");
    let half_heads = shard_heads(8, 2, 1).expect("a shard");

    let mut group = c.benchmark_group("plan 100,000 pages");
    group.throughput(Throughput::Elements(u64::from(PAGES)));
    let mut case =
        |name, from: &KvLayout, to: &KvLayout, heads: HeadRange, pages: (Vec<u32>, Vec<u32>)| {
            let planner = Planner::new(from, to, heads, LIMITS).expect("matching layouts");
            let mut out = Plan::default();
            group.bench_function(name, |b| {
                b.iter(|| {
                    out.clear();
                    planner
                        .plan(1, black_box(&pages.0), black_box(&pages.1), &mut out)
                        .expect("a plan");
                    black_box(&out);
                });
            });
            println!(
                "{name}: {} writes, {} runs",
                out.writes.len(),
                out.sources.len()
            );
        };
    let heads = whole.heads;
    let one = HeadRange::new(0, 1);
    case(
        "unmerged, latent",
        &latent,
        &latent,
        one,
        (scattered(), scattered()),
    );
    case(
        "unmerged, K/V interleaved",
        &interleaved,
        &interleaved,
        heads,
        (scattered(), scattered()),
    );
    case(
        "unmerged, K and V apart",
        &flash,
        &flash,
        heads,
        (scattered(), scattered()),
    );
    case(
        "merged at both ends",
        &flash,
        &flash,
        heads,
        (ascending(), ascending()),
    );
    case(
        "gathered from scattered pages",
        &flash,
        &flash,
        heads,
        (scattered(), ascending()),
    );
    case(
        "TP 1 to 2, 32 runs a page",
        &flash,
        &half,
        half_heads,
        (scattered(), scattered()),
    );
    group.finish();

    c.bench_function("compile 80 layers", |b| {
        b.iter(|| Planner::new(black_box(&flash), black_box(&half), half_heads, LIMITS));
    });
}

criterion_group!(benches, plan);
criterion_main!(benches);
