//! Pools in dmabufs: a page pushed to a buffer at any offset of an exporter's memory lands there and nowhere else.
//!
//! Every case cuts the regions of two random layouts out of one exported buffer each, at random offsets, pushes random
//! pages between them, and compares *all* of the destination's buffer, at the exporter's own end, with a model that
//! copies row by row.
//!
//! Over verbs the same is asked of a device that takes neither dmabufs nor their mappings (soft-RoCE), so that the pages
//! go through host memory, and the reasons are checked.
//!
//! A sealed memory file stands in for a dmabuf everywhere. Real ones come from `/dev/udmabuf` and `/dev/dma_heap`, which
//! few hosts have: those cases are marked as ignored, and `cargo xtask rxe --dmabuf` runs them in a guest whose kernel
//! has both. Random cases print their seed; `KVPUSH_SEED` replays one.

#[allow(
    dead_code,
    reason = "shared with the endpoint suite, which uses all of it"
)]
#[path = "endpoint_suite/fixture.rs"]
mod fixture;
#[path = "endpoint_suite/mover.rs"]
mod mover;

use std::sync::Arc;

use kvpush::{
    Endpoint, Grant, Pool,
    endpoint::{EndpointError, MemoryPath, PathRefusal},
    fabric::FabricKind,
    kv::{
        Dtype, HeadRange, KvLayout,
        presets::{Arrangement, HeadOrder, KvShape, Stacking},
        region_lengths,
    },
    memory::{
        DmabufMemory, HostMemory, Memory, MemoryKind,
        dmabuf::{Udmabuf, heap},
    },
};

use fixture::{Fabric, LONG, POISON, Random, seed};

/// Who makes the memory.
#[derive(Clone, Copy, Debug)]
enum Exporter {
    MemoryFile,
    Udmabuf,
    Heap,
}

/// An exported buffer.
struct Buffer {
    whole: DmabufMemory,
    end: End,
}

/// The exporter's own end.
enum End {
    File(HostMemory),
    Udmabuf(Udmabuf),
    /// A heap has none but another mapping of the file.
    Mapping(DmabufMemory),
}

impl Exporter {
    fn buffer(self, length: u64) -> Buffer {
        match self {
            Self::MemoryFile => {
                let file = HostMemory::memfd("kvpush-dmabuf", length).expect("a memory file");
                let fd = file
                    .fd()
                    .expect("a file")
                    .try_clone_to_owned()
                    .expect("dup");
                Buffer {
                    whole: DmabufMemory::import(fd, 0, length).expect("import"),
                    end: End::File(file),
                }
            }
            Self::Udmabuf => {
                let made = Udmabuf::new(length).expect("a dmabuf of /dev/udmabuf");
                let whole = made.memory().expect("import");
                assert_eq!(whole.exporter(), "udmabuf");
                Buffer {
                    whole,
                    end: End::Udmabuf(made),
                }
            }
            Self::Heap => {
                let whole = heap("system", length).expect("a dmabuf of /dev/dma_heap/system");
                assert_eq!(whole.exporter(), "system");
                let end = End::Mapping(whole.part(0, whole.length()).expect("another mapping"));
                Buffer { whole, end }
            }
        }
    }
}

impl Buffer {
    fn fill(&self, bytes: &[u8]) {
        match &self.end {
            End::File(file) => file.write(0, bytes),
            End::Udmabuf(made) => made.host().write(0, bytes),
            End::Mapping(mapping) => mapping.write(0, bytes),
        }
        .expect("fill");
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.whole.length() as usize];
        match &self.end {
            End::File(file) => file.read(0, &mut bytes),
            End::Udmabuf(made) => made.host().read(0, &mut bytes),
            End::Mapping(mapping) => mapping.read(0, &mut bytes),
        }
        .expect("read");
        bytes
    }
}

/// A pool whose regions are cut out of one exported buffer.
struct Cut {
    pool: Pool,
    layout: KvLayout,
    buffer: Buffer,
    /// Where each region lies.
    places: Vec<(u64, u64)>,
}

impl Cut {
    fn new(endpoint: &Endpoint, exporter: Exporter, layout: KvLayout, random: &mut Random) -> Self {
        let mut end = 0;
        let mut places = Vec::new();
        for length in region_lengths(&layout).expect("regions") {
            // Neighbours now and then, the same page often, far away seldom.
            let gap = match random.below(4) {
                0 => 0,
                1 => random.below(64),
                2 => random.below(4096),
                _ => random.below(20_000),
            };
            places.push((end + gap, length));
            end += gap + length;
        }
        let buffer = exporter.buffer(end + random.below(5000) + 1);
        let parts = places.iter().map(|&(offset, length)| {
            let part = buffer.whole.part(offset, length).expect("a part");
            assert_eq!(part.kind(), MemoryKind::Dmabuf);
            Arc::new(part) as Arc<dyn Memory>
        });
        let pool = endpoint
            .register_pool(layout.clone(), parts.collect())
            .expect("register a pool");
        check_paths(endpoint, &pool);
        Self {
            pool,
            layout,
            buffer,
            places,
        }
    }

    /// The regions within `bytes`, which are those of the buffer.
    fn regions(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let places = self.places.iter();
        places
            .map(|&(offset, length)| bytes[offset as usize..][..length as usize].to_vec())
            .collect()
    }
}

/// Software fabrics map a dmabuf, a NIC may take it; one that takes none gets the bytes through host memory.
fn check_paths(endpoint: &Endpoint, pool: &Pool) {
    for region in pool.paths() {
        assert_eq!(region.rails.len(), endpoint.rails().count());
        for (rail, info) in region.rails.iter().zip(endpoint.rails()) {
            if info.kind != FabricKind::Verbs || info.caps.dmabuf {
                assert_ne!(rail.path, MemoryPath::Staged, "{rail:?}");
                continue;
            }
            assert_eq!((rail.path, rail.extents), (MemoryPath::Staged, 0));
            check_reasons(&rail.refused);
        }
    }
}

/// The reasons of a device that takes no dmabuf, for memory without pages to pin.
fn check_reasons(refused: &[PathRefusal]) {
    let reason = |path| {
        let found = refused.iter().find(|refusal| refusal.path == path);
        found
            .map(|refusal| refusal.reason.as_str())
            .unwrap_or_default()
    };
    assert!(!reason(MemoryPath::Dmabuf).is_empty(), "{refused:?}");
    assert!(
        reason(MemoryPath::PeerMemory).contains("no pages"),
        "{refused:?}"
    );
}

fn random_layout(shape: &KvShape, pages: u32, random: &mut Random) -> KvLayout {
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
    shape
        .layout(pages, arrangement, order, stacking)
        .expect("a layout")
}

fn pages_land_at_any_offset(fabric: &Fabric, exporter: Exporter) {
    let mut random = Random(seed());
    let (prefill, decode) = fabric.pair();
    for round in 0..10u64 {
        let heads = HeadRange::new(random.below(5) as u32, 1 + random.below(4) as u32);
        let shape = KvShape {
            layers: 1 + random.below(4) as u32,
            tokens_per_page: random.pick(&[1, 3, 16]),
            heads,
            head_dim: random.pick(&[8, 24, 64]),
            dtype: random.pick(&[Dtype::F8E4M3, Dtype::Bf16, Dtype::F32]),
        };
        let layout = random_layout(&shape, 20, &mut random);
        let source = Cut::new(&prefill, exporter, layout, &mut random);
        let layout = random_layout(&shape, 24, &mut random);
        let target = Cut::new(&decode, exporter, layout, &mut random);
        let words = 0..source.buffer.whole.length().div_ceil(8);
        let mut sent: Vec<u8> = words.flat_map(|_| random.next().to_le_bytes()).collect();
        sent.truncate(source.buffer.whole.length() as usize);
        source.buffer.fill(&sent);
        let mut expected = vec![POISON; target.buffer.whole.length() as usize];
        target.buffer.fill(&expected);

        let count = 1 + random.below(20) as usize;
        let (from, to) = (random.distinct(count, 20), random.distinct(count, 24));
        let arrival = target.pool.grant("dmabuf", &to, LONG).expect("a grant");
        let grant = Grant::decode(&arrival.grant().encode()).expect("decode");
        let push = prefill
            .push_blocking(&source.pool, grant, LONG)
            .expect("open");
        for layer in 0..source.layout.layers.len() {
            push.layer(layer, &from).expect("push a layer");
        }
        let report = push.finish_blocking("tail", LONG).expect("no hang");
        report.expect("finish");
        arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");

        let pages: Vec<_> = from.into_iter().zip(to).collect();
        let mut regions = target.regions(&expected);
        mover::copy(
            (&source.layout, &source.regions(&sent)),
            (&target.layout, &mut regions),
            &pages,
            heads,
        );
        for (&(offset, _), region) in target.places.iter().zip(regions) {
            expected[offset as usize..][..region.len()].copy_from_slice(&region);
        }
        println!("round {round}: regions at {:?}", target.places);
        mover::assert_same(&[target.buffer.bytes()], &[expected]);
        mover::assert_same(&[source.buffer.bytes()], &[sent]);
    }
}

/// The cases of one fabric.
macro_rules! cases {
    ($fabric:ident: $($name:ident $exporter:ident $(#[$attribute:meta])?),* $(,)?) => {
        mod $fabric {
            $(
                #[test]
                $(#[$attribute])?
                fn $name() {
                    let fabric = crate::Fabric::$fabric();
                    crate::pages_land_at_any_offset(&fabric, crate::Exporter::$exporter);
                }
            )*
        }
    };
}

cases!(sim:
    memory_files MemoryFile,
    udmabufs Udmabuf #[ignore = "needs /dev/udmabuf: cargo xtask rxe --dmabuf"],
    heap_buffers Heap #[ignore = "needs /dev/dma_heap: cargo xtask rxe --dmabuf"],
);
cases!(tcp:
    memory_files MemoryFile,
    udmabufs Udmabuf #[ignore = "needs /dev/udmabuf: cargo xtask rxe --dmabuf"],
    heap_buffers Heap #[ignore = "needs /dev/dma_heap: cargo xtask rxe --dmabuf"],
);
cases!(verbs:
    udmabufs Udmabuf #[ignore = "needs an RDMA device and /dev/udmabuf: cargo xtask rxe --dmabuf"],
    heap_buffers Heap #[ignore = "needs an RDMA device and /dev/dma_heap: cargo xtask rxe --dmabuf"],
);

/// Soft-RoCE registers no dmabuf, and a mapping of one has no pages to pin. What is next in line takes over, and each
/// better path has left its reason; where nothing is left, the error has all of them.
#[test]
#[ignore = "needs an RDMA device and /dev/udmabuf: cargo xtask rxe --dmabuf"]
fn verbs_goes_on_to_the_next_path_and_says_why() {
    let fabric = Fabric::verbs();
    let endpoint = fabric.endpoint("refused");
    let has_dmabufs = endpoint.rails().any(|rail| rail.caps.dmabuf);
    assert!(
        !has_dmabufs,
        "this device takes dmabufs: another test is wanted for it"
    );
    for exporter in [Exporter::Udmabuf, Exporter::Heap] {
        let memory = exporter.buffer(64 << 10).whole;
        let registered = endpoint.register(Arc::new(memory), kvpush::fabric::Access::ALL);
        let refused = match registered {
            Ok(region) => {
                let paths = region.paths();
                assert!(!paths.rails.is_empty());
                for rail in &paths.rails {
                    assert_eq!(rail.path, MemoryPath::Staged, "{rail:?}");
                    assert_eq!(rail.extents, 0);
                }
                paths.rails[0].refused.clone()
            }
            Err(EndpointError::Unreachable { refused, .. }) => refused,
            Err(error) => panic!("{exporter:?}: {error}"),
        };
        println!("{exporter:?}: {refused:?}");
        check_reasons(&refused);
    }
}

#[test]
#[ignore = "needs /dev/udmabuf: cargo xtask rxe --dmabuf"]
fn what_udmabuf_exports_outlives_it() {
    let made = Udmabuf::new(3 * 4096 - 7).expect("a dmabuf");
    let memory = made.memory().expect("import");
    assert_eq!(memory.length(), 3 * 4096, "whole pages");
    made.host().write(5000, b"before").expect("write");
    drop(made);
    let mut bytes = [0; 6];
    memory.read(5000, &mut bytes).expect("read");
    assert_eq!(&bytes, b"before");
    let beyond = Udmabuf::new(1 << 40)
        .expect_err("more than the device allows")
        .to_string();
    assert!(
        beyond.contains("UDMABUF_CREATE") && beyond.contains("size_limit_mb"),
        "{beyond}"
    );
    let beyond = DmabufMemory::import(memory.fd().try_clone_to_owned().expect("dup"), 4096, 8193);
    assert!(beyond.is_err());
}
