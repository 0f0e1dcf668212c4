//! Everything that is pushed arrives, where it should, and nothing else changes.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use kvpush::{
    Arrival, Endpoint, Grant,
    endpoint::GrantOptions,
    kv::{
        Dtype, HeadRange, KvLayout,
        presets::{Arrangement, HeadOrder, KvShape, Stacking},
        shard::{pairing, shard_heads},
    },
    memory::{HostMemory, Memory},
};

use crate::{
    fixture::{Cache, Fabric, LONG, Random, seed},
    mover,
};

pub(crate) fn shape(layers: u32, heads: HeadRange) -> KvShape {
    KvShape {
        layers,
        tokens_per_page: 16,
        heads,
        head_dim: 32,
        dtype: Dtype::Bf16,
    }
}

pub(crate) fn plain(layers: u32, pages: u32) -> KvLayout {
    shape(layers, HeadRange::new(0, 4))
        .vllm_flash(pages)
        .unwrap()
}

/// Pushes `from` to `arrival` in one piece, with `tail`.
pub(crate) fn push(
    endpoint: &Endpoint,
    source: &Cache,
    arrival: &Arrival,
    from: &[u32],
    tail: &[u8],
) {
    let grant = Grant::decode(&arrival.grant().encode()).unwrap();
    let push = endpoint
        .push_blocking(&source.pool, grant, LONG)
        .expect("open");
    for layer in 0..source.layout.layers.len() {
        push.layer(layer, from).expect("push a layer");
    }
    let report = push
        .finish_blocking(tail.to_vec(), LONG)
        .expect("no hang")
        .expect("finish");
    assert!(report.bytes > 0 && report.writes > 1);
    assert!(endpoint.rails().any(|rail| rail.kind == report.fabric));
}

pub(crate) fn a_push_arrives_whole(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(4, 32);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let (from, to) = ([3, 1, 4, 15, 9, 2, 6], [5, 6, 7, 31, 0, 12, 13]);
    let arrival = destination.pool.grant("request-1", &to, LONG).unwrap();
    assert_eq!(destination.pool.granted_pages(), to.len());
    push(&prefill, &source, &arrival, &from, b"first token");
    let tail = arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    assert_eq!(&tail[..], b"first token");
    let mut expected = Cache::poisoned(&decode, &layout).bytes();
    let pages: Vec<_> = from.into_iter().zip(to).collect();
    mover::copy(
        (&layout, &source.bytes()),
        (&layout, &mut expected),
        &pages,
        HeadRange::new(0, 4),
    );
    mover::assert_same(&destination.bytes(), &expected);
    assert_eq!(
        destination.pool.granted_pages(),
        0,
        "the pages are the caller's again"
    );
}

pub(crate) fn layers_become_ready_one_by_one(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(5, 16);
    let source = Cache::filled(&prefill, &layout, 2);
    let destination = Cache::poisoned(&decode, &layout);
    let pages: Vec<u32> = (0..16).collect();
    let pairs: Vec<_> = pages.iter().map(|&page| (page, page)).collect();
    let arrival = destination.pool.grant("layers", &pages, LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    let mut expected = destination.bytes();
    for layer in [2, 0, 4, 1, 3] {
        assert_eq!(
            arrival.poll_layer(layer),
            None,
            "layer {layer} has not been pushed"
        );
        push.layer(layer, &pages).unwrap();
        arrival
            .layer_blocking(layer, LONG)
            .expect("no hang")
            .expect("ready");
        let heads = HeadRange::new(0, 4);
        let from = source.bytes();
        mover::copy_layer(
            (&layout, &from),
            (&layout, &mut expected),
            layer,
            &pairs,
            heads,
        );
        mover::assert_same(&destination.bytes(), &expected);
    }
    assert_eq!(arrival.complete_layers(), 5);
    assert_eq!(arrival.poll_complete(), None, "the tail is missing");
    push.finish_blocking(Vec::new(), LONG).unwrap().unwrap();
    assert!(arrival.complete_blocking(LONG).unwrap().unwrap().is_empty());
}

pub(crate) fn chunks_arrive_in_any_order(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(3, 40);
    let source = Cache::filled(&prefill, &layout, 3);
    let destination = Cache::poisoned(&decode, &layout);
    let mut random = Random(seed());
    let (from, to) = (random.distinct(33, 40), random.distinct(33, 40));
    let arrival = destination.pool.grant("chunks", &to, LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .unwrap();
    let mut chunks: Vec<(usize, usize, usize)> = (0..3)
        .flat_map(|layer| [(0, 1), (1, 7), (8, 8), (16, 16), (32, 1)].map(|(a, n)| (layer, a, n)))
        .collect();
    while !chunks.is_empty() {
        let (layer, first, count) = chunks.swap_remove(random.below(chunks.len() as u64) as usize);
        push.layer_from(layer, first, &from[first..first + count])
            .unwrap();
    }
    push.finish_blocking(&b"t"[..], LONG).unwrap().unwrap();
    arrival.complete_blocking(LONG).unwrap().unwrap();
    let mut expected = Cache::poisoned(&decode, &layout).bytes();
    let pages: Vec<_> = from.into_iter().zip(to).collect();
    mover::copy(
        (&layout, &source.bytes()),
        (&layout, &mut expected),
        &pages,
        HeadRange::new(0, 4),
    );
    mover::assert_same(&destination.bytes(), &expected);
}

pub(crate) fn random_layouts_arrive_exactly(fabric: &Fabric) {
    let mut random = Random(seed());
    let (prefill, decode) = fabric.pair();
    for round in 0..12 {
        let heads = HeadRange::new(random.below(5) as u32, 1 + random.below(4) as u32);
        let shape = KvShape {
            layers: 1 + random.below(5) as u32,
            tokens_per_page: random.pick(&[1, 3, 16, 64]),
            heads,
            head_dim: random.pick(&[8, 24, 64]),
            dtype: random.pick(&[Dtype::F8E4M3, Dtype::Bf16, Dtype::F32]),
        };
        let mut layout = |pages| {
            let arrangement = random.pick(&[
                Arrangement::KeysThenValues,
                Arrangement::Separate,
                Arrangement::Interleaved,
            ]);
            let order = random.pick(&[HeadOrder::TokenMajor, HeadOrder::HeadMajor]);
            let stacking = random.pick(&[
                Stacking::RegionPerLayer,
                Stacking::LayerMajor,
                Stacking::PageMajor,
            ]);
            shape.layout(pages, arrangement, order, stacking).unwrap()
        };
        let (source_layout, layout) = (layout(20), layout(24));
        let count = 1 + random.below(20) as usize;
        let (from, to) = (random.distinct(count, 20), random.distinct(count, 24));
        let source = Cache::filled(&prefill, &source_layout, round);
        let destination = Cache::poisoned(&decode, &layout);
        let arrival = destination.pool.grant("random", &to, LONG).unwrap();
        push(&prefill, &source, &arrival, &from, &round.to_le_bytes());
        let tail = arrival.complete_blocking(LONG).unwrap().unwrap();
        assert_eq!(&tail[..], &round.to_le_bytes());
        let mut expected = Cache::poisoned(&decode, &layout).bytes();
        let pages: Vec<_> = from.into_iter().zip(to).collect();
        mover::copy(
            (&source_layout, &source.bytes()),
            (&layout, &mut expected),
            &pages,
            heads,
        );
        mover::assert_same(&destination.bytes(), &expected);
    }
}

/// Ranks as endpoints of their own: every destination rank gets each of its heads from exactly one source rank.
fn reshard(fabric: &Fabric, kv_heads: u32, source_tp: u32, destination_tp: u32) {
    let layout_of = |tp, rank, pages, order| {
        let shape = shape(3, shard_heads(kv_heads, tp, rank).unwrap());
        shape
            .layout(
                pages,
                Arrangement::KeysThenValues,
                order,
                Stacking::RegionPerLayer,
            )
            .unwrap()
    };
    let (from, to) = ([0, 3, 5, 6], [7, 2, 1, 0]);
    // The whole model's cache, of which every source rank holds its heads: what rank a cell comes from is visible.
    let sources: Vec<_> = (0..source_tp)
        .map(|rank| {
            let endpoint = fabric.endpoint(&format!("prefill-{rank}"));
            let layout = layout_of(source_tp, rank, 8, HeadOrder::TokenMajor);
            let cache = Cache::filled(&endpoint, &layout, 100 + u64::from(rank));
            (endpoint, cache)
        })
        .collect();
    let pairs = pairing(kv_heads, source_tp, destination_tp).unwrap();
    for rank in 0..destination_tp {
        let decode = fabric.endpoint(&format!("decode-{rank}"));
        let layout = layout_of(destination_tp, rank, 10, HeadOrder::HeadMajor);
        let destination = Cache::poisoned(&decode, &layout);
        let mut expected = destination.bytes();
        let mine: Vec<_> = pairs
            .iter()
            .filter(|pair| pair.destination_rank == rank)
            .collect();
        let arrivals: Vec<_> = mine
            .iter()
            .map(|pair| {
                let options = GrantOptions::new("tp", LONG).heads(pair.heads);
                destination
                    .pool
                    .grant_with(&to, options)
                    .expect("other heads of the same pages")
            })
            .collect();
        for (pair, arrival) in mine.iter().zip(&arrivals) {
            let (endpoint, source) = &sources[pair.source_rank as usize];
            push(endpoint, source, arrival, &from, b"");
            let pages: Vec<_> = from.into_iter().zip(to).collect();
            mover::copy(
                (&source.layout, &source.bytes()),
                (&layout, &mut expected),
                &pages,
                pair.heads,
            );
        }
        for arrival in &arrivals {
            arrival.complete_blocking(LONG).unwrap().unwrap();
        }
        mover::assert_same(&destination.bytes(), &expected);
    }
}

pub(crate) fn shards_of_other_degrees_get_their_heads(fabric: &Fabric) {
    reshard(fabric, 8, 4, 2);
    reshard(fabric, 8, 2, 4);
    // More ranks than heads: heads are replicated.
    reshard(fabric, 2, 4, 1);
    reshard(fabric, 2, 1, 4);
}

pub(crate) fn a_latent_cache_arrives(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let shape = KvShape {
        layers: 6,
        tokens_per_page: 64,
        heads: HeadRange::new(0, 1),
        head_dim: 576,
        dtype: Dtype::F8E4M3,
    };
    let layout = shape.mla(12).unwrap();
    let source = Cache::filled(&prefill, &layout, 4);
    let destination = Cache::poisoned(&decode, &layout);
    let (from, to) = ([11, 0, 5], [1, 2, 3]);
    let arrival = destination.pool.grant("mla", &to, LONG).unwrap();
    push(&prefill, &source, &arrival, &from, b"");
    arrival.complete_blocking(LONG).unwrap().unwrap();
    let mut expected = Cache::poisoned(&decode, &layout).bytes();
    let pages: Vec<_> = from.into_iter().zip(to).collect();
    mover::copy(
        (&layout, &source.bytes()),
        (&layout, &mut expected),
        &pages,
        HeadRange::new(0, 1),
    );
    mover::assert_same(&destination.bytes(), &expected);
}

/// Far more immediates and writes than receives, send-queue slots and gather elements: back-pressure, not errors.
pub(crate) fn more_parts_than_receives(fabric: &Fabric) {
    let build = |name| {
        let builder = fabric
            .builder(name)
            .queue_depths(4, 4)
            .max_sge(2)
            .parts_per_layer(8);
        builder.max_write(4096).bind("127.0.0.1:0").unwrap()
    };
    let (prefill, decode) = (build("prefill"), build("decode"));
    let layout = plain(24, 64);
    let source = Cache::filled(&prefill, &layout, 5);
    let destination = Cache::poisoned(&decode, &layout);
    let from: Vec<u32> = (0..64).rev().collect();
    let to: Vec<u32> = (0..64).map(|page| page * 5 % 64).collect();
    let arrival = destination.pool.grant("parts", &to, LONG).unwrap();
    push(&prefill, &source, &arrival, &from, b"end");
    arrival.complete_blocking(LONG).unwrap().unwrap();
    let mut expected = Cache::poisoned(&decode, &layout).bytes();
    let pages: Vec<_> = from.into_iter().zip(to).collect();
    mover::copy(
        (&layout, &source.bytes()),
        (&layout, &mut expected),
        &pages,
        HeadRange::new(0, 4),
    );
    mover::assert_same(&destination.bytes(), &expected);
}

pub(crate) fn many_pushes_at_once(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(3, 128);
    let source = Cache::filled(&prefill, &layout, 6);
    let destination = Cache::poisoned(&decode, &layout);
    thread::scope(|scope| {
        for request in 0..16u32 {
            let (prefill, source, destination) = (&prefill, &source, &destination);
            scope.spawn(move || {
                let pages: Vec<u32> = (0..8).map(|i| i * 16 + request).collect();
                let name = request.to_le_bytes().to_vec();
                let arrival = destination.pool.grant(name.clone(), &pages, LONG).unwrap();
                push(prefill, source, &arrival, &pages, &name);
                assert_eq!(arrival.complete_blocking(LONG).unwrap().unwrap(), name);
            });
        }
    });
    mover::assert_same(&destination.bytes(), &source.bytes());
}

pub(crate) fn both_ways_at_once(fabric: &Fabric) {
    let (a, b) = (fabric.endpoint("a"), fabric.endpoint("b"));
    let layout = plain(2, 16);
    let pages: Vec<u32> = (0..16).collect();
    thread::scope(|scope| {
        for (seed, from, to) in [(7, &a, &b), (8, &b, &a)] {
            let (layout, pages) = (&layout, &pages);
            scope.spawn(move || {
                let source = Cache::filled(from, layout, seed);
                let destination = Cache::poisoned(to, layout);
                for _ in 0..10 {
                    let arrival = destination.pool.grant("x", pages, LONG).unwrap();
                    push(from, &source, &arrival, pages, b"");
                    arrival.complete_blocking(LONG).unwrap().unwrap();
                }
                mover::assert_same(&destination.bytes(), &source.bytes());
            });
        }
    });
}

/// Runs a future on this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
        thread::park_timeout(LONG);
    }
}

pub(crate) fn futures_of_any_runtime(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 9);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("future", &[1, 2], LONG).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            block_on(async {
                arrival.layer(1).await.unwrap();
                arrival.layer(0).await.unwrap();
                arrival.complete().await.unwrap()
            })
        });
        block_on(async {
            let push = prefill
                .push(&source.pool, arrival.grant().clone())
                .await
                .unwrap();
            push.layer(0, &[3, 4]).unwrap();
            push.layer(1, &[3, 4]).unwrap();
            push.finish("tail").await.unwrap();
        });
        assert_eq!(reader.join().unwrap(), "tail");
    });
}

pub(crate) fn a_session_made_ahead_is_used(fabric: &Fabric) {
    let (prefill, decode) = (fabric.endpoint("prefill"), fabric.alone("decode"));
    let address = decode.local_address().to_string();
    assert_eq!(prefill.connect_blocking(&address), Ok(decode.incarnation()));
    assert_eq!(
        prefill.connect_blocking(&address),
        Ok(decode.incarnation()),
        "again is no harm"
    );
    assert_eq!(
        block_on(prefill.connect(&address)),
        Ok(decode.incarnation())
    );
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let arrival = destination.pool.grant("x", &[1, 2], LONG).unwrap();
    push(&prefill, &source, &arrival, &[1, 2], b"");
    arrival.complete_blocking(LONG).unwrap().unwrap();

    assert!(
        prefill
            .connect_blocking(&prefill.local_address().to_string())
            .is_err(),
        "itself"
    );
    decode.shutdown();
    assert!(prefill.connect_blocking(&address).is_err(), "nobody there");
}

/// Both ends in memory files, which other processes can map: what arrives is what the file shows.
pub(crate) fn memory_files_are_pushed(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let pool = |endpoint: &Endpoint, name: &str| {
        let memory: Vec<_> = kvpush::kv::region_lengths(&layout)
            .unwrap()
            .into_iter()
            .map(|length| Arc::new(HostMemory::memfd(name, length).unwrap()))
            .collect();
        let shared = memory
            .iter()
            .map(|memory| Arc::clone(memory) as Arc<dyn Memory>)
            .collect();
        (
            endpoint.register_pool(layout.clone(), shared).unwrap(),
            memory,
        )
    };
    let (source, from) = pool(&prefill, "source");
    let (destination, to) = pool(&decode, "destination");
    for (i, memory) in from.iter().enumerate() {
        memory.fill(0, memory.length(), 0x40 + i as u8).unwrap();
    }
    let pages: Vec<u32> = (0..8).collect();
    let arrival = destination.grant("memfd", &pages, LONG).unwrap();
    let push = prefill
        .push_blocking(&source, arrival.grant().clone(), LONG)
        .unwrap();
    push.layer(0, &pages).unwrap();
    push.layer(1, &pages).unwrap();
    push.finish_blocking("", LONG).unwrap().unwrap();
    arrival.complete_blocking(LONG).unwrap().unwrap();
    for (i, memory) in to.iter().enumerate() {
        let file = std::fs::File::from(memory.fd().unwrap().try_clone_to_owned().unwrap());
        let mut bytes = vec![0; memory.length() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(
            bytes.iter().all(|&byte| byte == 0x40 + i as u8),
            "region {i}"
        );
    }
}
