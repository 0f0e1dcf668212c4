//! What a page costs on the verbs path: from `push.layer` to its completion, over the double of libibverbs
//! (`tests/verbs-double`), whose device completes everything at once and moves nothing.
//!
//! A page is 4 KiB, in a place of its own at both ends, so that no two merge: one write each. All of the library runs
//! as over a device: planner, lanes, credits, ledgers, work requests, completions, immediates, the control connection.
//!
//! ```console
//! $ cargo bench --bench verbs_null                     # a table of times
//! $ cargo bench --bench verbs_null -- peers            # one reader with 1, 8 and 64 writers
//! $ cargo bench --bench verbs_null -- push 10000 3     # 3 pushes of 10,000 pages, for a profiler; also `prepared`
//! ```

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use kvpush::{
    Auth, Endpoint, Pool,
    endpoint::Polling,
    fabric::FabricKind,
    kv::{Dtype, HeadRange, Plan, PlanLimits, Planner, presets::KvShape, region_lengths},
    memory::{HostMemory, Memory},
};

#[path = "rig/lanes.rs"]
mod lanes;
#[path = "../tests/verbs_double/loader.rs"]
mod verbs_double;

const LONG: Duration = Duration::from_secs(60);
const LAYERS: usize = 16;
const MOST: u32 = 100_000;

/// One plane of 16 tokens of 128 values: 4 KiB.
fn shape() -> KvShape {
    KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 1),
        head_dim: 128,
        dtype: Dtype::Bf16,
    }
}

fn endpoint(name: &str, polling: Polling) -> Endpoint {
    let builder = Endpoint::builder().name(name).auth(Auth::psk([1; 32]));
    builder
        .fabrics([FabricKind::Verbs])
        .polling(polling)
        .bind("127.0.0.1:0")
        .expect("an endpoint over the double")
}

fn pool(endpoint: &Endpoint, pages: u32) -> Pool {
    let layout = shape().mla(pages).expect("a layout");
    let lengths = region_lengths(&layout).expect("lengths").into_iter();
    let memory = lengths
        .map(|n| Arc::new(HostMemory::new(n).expect("address space")) as Arc<dyn Memory>)
        .collect();
    endpoint.register_pool(layout, memory).expect("a pool")
}

/// A writer and a reader.
struct Pair {
    prefill: Endpoint,
    source: Pool,
    _decode: Endpoint,
    destination: Pool,
}

impl Pair {
    fn new(most: u32, polling: Polling) -> Self {
        let (prefill, decode) = (endpoint("prefill", polling), endpoint("decode", polling));
        let (source, destination) = (pool(&prefill, most), pool(&decode, 2 * most));
        Self {
            prefill,
            source,
            _decode: decode,
            destination,
        }
    }

    /// Pushes once, and says how long all layers took from the first call to the last acknowledgement.
    fn push(&self, pages: &Pages, way: Way) -> Duration {
        let arrival = self
            .destination
            .grant("x", &pages.to, LONG)
            .expect("a grant");
        let grant = arrival.grant().clone();
        let push = self.prefill.push_blocking(&self.source, grant, LONG);
        let push = push.expect("a push");
        let begin = Instant::now();
        match way {
            Way::Layer => {
                for layer in 0..LAYERS {
                    push.layer(layer, &pages.from[layer % 2]).expect("a layer");
                }
            }
            Way::Prepared => {
                let prepared = push.prepare(0, &pages.from[0]).expect("pages");
                for layer in 0..LAYERS {
                    push.layer_prepared(layer, &prepared).expect("a layer");
                }
            }
        }
        let report = push
            .finish_blocking("", LONG)
            .expect("in time")
            .expect("all of it");
        let took = begin.elapsed();
        let all = pages.to.len() as u64 * LAYERS as u64;
        assert_eq!(report.writes, all + 1, "pages were merged or cut");
        arrival
            .complete_blocking(LONG)
            .expect("in time")
            .expect("all of it");
        took
    }
}

/// How layers are handed over.
#[derive(Clone, Copy)]
enum Way {
    /// Every layer with another list than the one before, so that each is checked and planned.
    Layer,
    Prepared,
}

/// Pages of which no two are neighbours at the destination.
struct Pages {
    /// Two lists; for a single page they are the same.
    from: [Vec<u32>; 2],
    to: Vec<u32>,
}

impl Pages {
    fn new(count: u32) -> Self {
        Self {
            from: [(0..count).collect(), (0..count).rev().collect()],
            // Far from both orders.
            to: (0..count).map(|i| (i * 7919) % count * 2).collect(),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn times() {
    let double = verbs_double::load();
    let pair = Pair::new(MOST, Polling::Busy);
    println!("{LAYERS} layers; ns per page, median of the rounds\n");
    println!(
        "| pages of a layer | each layer planned | prepared | writes per doorbell | writes per completion |"
    );
    println!("|---|---|---|---|---|");
    for count in [1, 10, 100, 1000, 10_000, 100_000] {
        let pages = Pages::new(count);
        let rounds = (200_000 / count).clamp(7, 501);
        pair.push(&pages, Way::Layer);
        let before = (double.posted(), double.doorbells(), double.completions());
        let per_page = |took: Duration| took.as_nanos() as f64 / f64::from(count) / LAYERS as f64;
        let took = |way| {
            median(
                (0..rounds)
                    .map(|_| per_page(pair.push(&pages, way)))
                    .collect(),
            )
        };
        let (planned, prepared) = (took(Way::Layer), took(Way::Prepared));
        let posted = (double.posted() - before.0) as f64;
        println!(
            "| {count} | {planned:.0} | {prepared:.0} | {:.1} | {:.1} |",
            posted / (double.doorbells() - before.1) as f64,
            posted / (double.completions() - before.2) as f64
        );
    }
}

/// One reader, and writers that each push the same, one after the other.
fn peers() {
    verbs_double::load();
    const PAGES: u32 = 1000;
    let polling = Polling::Adaptive(Duration::from_micros(50));
    println!("one reader; ns per page of a push of {LAYERS} layers of {PAGES} pages, median\n");
    println!("| writers with a session | ns per page |");
    println!("|---|---|");
    let pages = Pages::new(PAGES);
    let decode = endpoint("decode", polling);
    let destination = pool(&decode, 2 * PAGES);
    let mut writers: Vec<(Endpoint, Pool)> = Vec::new();
    for count in [1, 8, 64] {
        while writers.len() < count {
            let prefill = endpoint(&format!("prefill {}", writers.len()), polling);
            let source = pool(&prefill, PAGES);
            writers.push((prefill, source));
        }
        let mut took = Vec::new();
        for round in 0..400 {
            let (prefill, source) = &writers[round % count];
            let arrival = destination.grant("x", &pages.to, LONG).expect("a grant");
            let push = prefill.push_blocking(source, arrival.grant().clone(), LONG);
            let push = push.expect("a push");
            let begin = Instant::now();
            for layer in 0..LAYERS {
                push.layer(layer, &pages.from[layer % 2]).expect("a layer");
            }
            push.finish_blocking("", LONG)
                .expect("in time")
                .expect("all of it");
            let all = f64::from(PAGES) * LAYERS as f64;
            if round >= count {
                took.push(begin.elapsed().as_nanos() as f64 / all);
            }
            arrival
                .complete_blocking(LONG)
                .expect("in time")
                .expect("all of it");
        }
        println!("| {count} | {:.0} |", median(took));
    }
}

/// `rounds` pushes of `count` pages, and nothing else. Each layer has a list of its own unless they are prepared.
fn pushes(count: u32, rounds: u32, prepared: bool) {
    verbs_double::load();
    // Sleeps at once: an idle thread must not count.
    let pair = Pair::new(count, Polling::Adaptive(Duration::ZERO));
    let pages = Pages::new(count);
    for _ in 0..rounds {
        pair.push(&pages, if prepared { Way::Prepared } else { Way::Layer });
    }
}

/// `rounds` plans of `count` pages, and nothing else.
fn plans(count: u32, rounds: u32) {
    let layout = |pages| shape().mla(pages).expect("a layout");
    let limits = PlanLimits {
        max_sge: 16,
        max_write: 1 << 28,
    };
    let (source, destination) = (layout(count), layout(2 * count));
    let planner = Planner::new(&source, &destination, HeadRange::new(0, 1), limits);
    let planner = planner.expect("matching layouts");
    let pages = Pages::new(count);
    let mut plan = Plan::default();
    for round in 0..rounds {
        plan.clear();
        planner
            .plan(round % LAYERS as u32, &pages.from[0], &pages.to, &mut plan)
            .expect("a plan");
        black_box(&plan);
    }
}

/// `rounds` batches posted to the fabric and polled, and nothing else; the same with immediates if `arrive`.
fn posts(arrive: bool, rounds: u32) {
    verbs_double::load();
    let mut lanes = lanes::Lanes::new();
    for _ in 0..rounds {
        match arrive {
            true => lanes.arrivals(),
            false => lanes.writes(),
        }
    }
}

fn main() {
    // cargo adds `--bench`.
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let number = |index: usize| -> u32 {
        let word = words
            .get(index)
            .expect("how many pages, and how many rounds");
        word.parse().expect("a number")
    };
    match words.first().map(String::as_str) {
        None => times(),
        Some("peers") => peers(),
        Some("push") => pushes(number(1), number(2), false),
        Some("prepared") => pushes(number(1), number(2), true),
        Some("plan") => plans(number(1), number(2)),
        Some("post") => posts(false, number(1)),
        Some("arrive") => posts(true, number(1)),
        // `cargo test --benches` wants to see that it runs.
        Some("--test") => pushes(10, 1, true),
        Some(word) => panic!("peers, push, plan, or nothing; not {word}"),
    }
}
