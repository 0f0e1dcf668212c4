//! The hot path does not allocate for each page. Alone in its process, because it counts the allocations of all threads:
//! the caller's, both drivers' and both control threads'. Over TCP, and over verbs by the double of libibverbs.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kvpush::{
    Auth, Endpoint, Pool,
    fabric::FabricKind,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{HostMemory, Memory},
};

#[path = "verbs_double/loader.rs"]
mod loader;

const LONG: Duration = Duration::from_secs(60);
const LAYERS: usize = 4;
const PAGES: u32 = 8192;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is the system allocator's; only a counter is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn pool(endpoint: &Endpoint) -> Pool {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 1,
        heads: HeadRange::new(0, 1),
        head_dim: 128,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(PAGES).unwrap();
    let memory = region_lengths(&layout).unwrap().into_iter();
    let memory = memory
        .map(|n| Arc::new(HostMemory::new(n).unwrap()) as Arc<dyn Memory>)
        .collect();
    endpoint.register_pool(layout, memory).unwrap()
}

/// Allocations of everyone while `count` pages that cannot be merged are pushed.
fn allocations(prefill: &Endpoint, source: &Pool, destination: &Pool, count: u32) -> u64 {
    // Every other page backwards: no two are neighbours in both lists.
    let to: Vec<u32> = (0..count).map(|i| (count - 1 - i) * 2 % PAGES).collect();
    let from: Vec<u32> = (0..count).collect();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let arrival = destination.grant("x", &to, LONG).unwrap();
    let push = prefill
        .push_blocking(source, arrival.grant().clone(), LONG)
        .unwrap();
    for layer in 0..LAYERS {
        push.layer(layer, &from).unwrap();
    }
    let report = push.finish_blocking("", LONG).unwrap().unwrap();
    arrival.complete_blocking(LONG).unwrap().unwrap();
    assert!(
        report.writes > u64::from(count) * LAYERS as u64,
        "pages were merged: {report:?}"
    );
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn allocations_do_not_grow_with_pages() {
    do_not_grow(FabricKind::Tcp);
    loader::load();
    do_not_grow(FabricKind::Verbs);
}

fn do_not_grow(fabric: FabricKind) {
    let endpoint = |name| {
        let builder = Endpoint::builder().name(name).auth(Auth::psk([1; 32]));
        builder.fabrics([fabric]).bind("127.0.0.1:0").unwrap()
    };
    let (prefill, decode) = (endpoint("prefill"), endpoint("decode"));
    let (source, destination) = (pool(&prefill), pool(&decode));
    // Buffers reach their sizes.
    for _ in 0..3 {
        allocations(&prefill, &source, &destination, PAGES / 2);
    }
    let few = allocations(&prefill, &source, &destination, 64);
    let many = allocations(&prefill, &source, &destination, PAGES / 2);
    println!(
        "{fabric}: {few} allocations for 64 pages of {LAYERS} layers, {many} for {}",
        PAGES / 2
    );
    assert!(
        many < few + 200,
        "{fabric}: {few} allocations for 64 pages, {many} for {}: that grows with pages",
        PAGES / 2
    );
    // The counter counts.
    assert!(few > 10);
}
