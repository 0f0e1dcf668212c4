//! Registered memory: regions in several registrations, many regions, shared ones, and their ends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvpush::{
    Pool,
    endpoint::{Builder, MemoryPath},
    fabric::Access,
    kv::HeadRange,
    memory::{HostMemory, Memory},
};

use crate::{
    fixture::{Cache, Fabric, LONG, Random, seed, soon},
    mover,
    transfers::{plain, push, shape},
};

const HEADS: HeadRange = HeadRange { first: 0, count: 4 };

fn bind(builder: Builder) -> kvpush::Endpoint {
    builder.bind("127.0.0.1:0").expect("start an endpoint")
}

/// Closes a pool that nobody uses. The driver may still be about to let go of the last user.
fn close(mut pool: Pool) {
    let start = Instant::now();
    while let Err(in_use) = pool.close() {
        assert!(start.elapsed() < LONG, "{in_use}");
        pool = in_use.pool;
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn cut_regions_arrive_exactly(fabric: &Fabric) {
    let mut random = Random(seed());
    for round in 0..12 {
        // Now one side is cut, now the other, now both, by sizes that have nothing to do with pages.
        let mut side = |name: &str, cut: bool| {
            let mut builder = fabric.builder(name).max_sge(random.pick(&[1, 2, 3, 16]));
            if cut {
                builder = builder.max_registration(4096 + random.below(40_000));
            }
            bind(builder.max_write(random.pick(&[3_000, 70_000, 1 << 28])))
        };
        let (prefill, decode) = (
            side("prefill", round % 3 != 1),
            side("decode", round % 3 != 2),
        );
        let layout = plain(3, 24);
        let source = Cache::filled(&prefill, &layout, round);
        let destination = Cache::poisoned(&decode, &layout);
        for (cache, cut) in [(&source, round % 3 != 1), (&destination, round % 3 != 2)] {
            let paths = cache.pool.paths();
            let extents = |region: &kvpush::endpoint::RegionPaths| region.rails[0].extents;
            assert_eq!(
                paths.iter().any(|region| extents(region) > 1),
                cut,
                "{paths:?}"
            );
            let plainly =
                |region: &kvpush::endpoint::RegionPaths| region.rails[0].path == MemoryPath::Plain;
            assert!(paths.iter().all(plainly));
        }
        let count = 1 + random.below(23) as usize;
        let mut to = random.distinct(count, 24);
        let mut from = random.distinct(count, 24);
        if round % 2 == 0 {
            // Long writes, which cross many ends.
            to.sort_unstable();
            from.sort_unstable();
        }
        let mut expected = destination.bytes();
        let pairs: Vec<_> = from.iter().copied().zip(to.iter().copied()).collect();
        mover::copy(
            (&layout, &source.bytes()),
            (&layout, &mut expected),
            &pairs,
            HEADS,
        );
        let arrival = destination.pool.grant("cut", &to, LONG).unwrap();
        push(&prefill, &source, &arrival, &from, b"tail");
        let tail = arrival.complete_blocking(LONG).expect("no hang");
        assert_eq!(&tail.expect("complete")[..], b"tail");
        mover::assert_same(&destination.bytes(), &expected);
    }
}

pub(crate) fn cut_regions_are_read_and_written(fabric: &Fabric) {
    let mut random = Random(seed());
    let cut = |name: &str, bytes| bind(fabric.builder(name).max_registration(bytes));
    let (reader, owner) = (cut("reader", 12_345), cut("owner", 20_000));
    const SIZE: u64 = 300_000;
    let make = |random: &mut Random| {
        let memory = Arc::new(HostMemory::new(SIZE).unwrap());
        let bytes: Vec<u8> = (0..SIZE).map(|_| random.next() as u8).collect();
        memory.write(0, &bytes).unwrap();
        (memory, bytes)
    };
    let (theirs, mut their_bytes) = make(&mut random);
    let (ours, mut our_bytes) = make(&mut random);
    let exported = owner
        .register(Arc::clone(&theirs) as Arc<dyn Memory>, Access::ALL)
        .unwrap();
    assert!(exported.paths().rails[0].extents > 10);
    let local = reader
        .register(Arc::clone(&ours) as Arc<dyn Memory>, Access::LOCAL)
        .unwrap();
    let remote = reader
        .open_region_blocking(exported.token().clone())
        .unwrap();
    for _ in 0..20 {
        let length = 1 + random.below(100_000);
        let there = random.below(SIZE - length);
        let here = random.below(SIZE - length);
        let (t, h, n) = (there as usize, here as usize, length as usize);
        if random.below(2) == 0 {
            let read = remote.read_blocking(there, &local, here, length, LONG);
            read.expect("read");
            our_bytes[h..h + n].copy_from_slice(&their_bytes[t..t + n]);
        } else {
            let write = remote.write_blocking(there, &local, here, length, LONG);
            write.expect("write");
            their_bytes[t..t + n].copy_from_slice(&our_bytes[h..h + n]);
        }
    }
    for (memory, expected) in [(&ours, &our_bytes), (&theirs, &their_bytes)] {
        let mut found = vec![0; SIZE as usize];
        memory.read(0, &mut found).unwrap();
        assert!(found == *expected);
    }
}

pub(crate) fn a_pool_of_hundreds_of_regions(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = shape(400, HEADS).vllm_flash(4).unwrap();
    let source = Cache::filled(&prefill, &layout, 5);
    let destination = Cache::poisoned(&decode, &layout);
    assert!(
        source.memory.len() >= 400,
        "{} regions",
        source.memory.len()
    );
    assert_eq!(prefill.registrations(), source.memory.len());
    for (index, memory) in source.memory.iter().enumerate() {
        let last = memory.address() + memory.length() - 1;
        let offset = memory.length() - 1;
        assert_eq!(source.pool.locate(last), Some((index, offset)));
        let located = prefill.locate(last).expect("registered");
        assert_eq!((located.offset, located.left), (offset, 1));
        assert_eq!(located.id, source.pool.paths()[index].id);
    }
    assert_eq!(source.pool.locate(0), None);
    let pages = [0, 1, 2, 3];
    let arrival = destination.pool.grant("many", &pages, LONG).unwrap();
    push(&prefill, &source, &arrival, &pages, b"");
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    mover::assert_same(&destination.bytes(), &source.bytes());
}

pub(crate) fn one_registration_for_the_same_memory(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 6);
    let destination = Cache::poisoned(&decode, &layout);
    let regions = decode.registrations();
    let memory = || {
        destination
            .memory
            .iter()
            .map(|m| Arc::clone(m) as Arc<dyn Memory>)
    };
    let second = decode
        .register_pool(layout.clone(), memory().collect())
        .unwrap();
    assert_eq!(decode.registrations(), regions, "shared");
    let id = second.paths()[0].id;
    assert_eq!(destination.pool.paths()[0].id, id);
    let Cache {
        pool: first,
        memory,
        ..
    } = destination;
    // The first pool goes; what it registered stays for the second.
    close(first);
    let pages: Vec<u32> = (0..8).collect();
    let arrival = second.grant("shared", &pages, LONG).unwrap();
    push(&prefill, &source, &arrival, &pages, b"");
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    assert!(decode.is_registered(id));
    close(second);
    soon("the registrations end", || decode.registrations() == 0);
    assert!(!decode.is_registered(id));
    soon("the memory is given up", || {
        memory.iter().all(|m| Arc::strong_count(m) == 1)
    });
    // Registered again, it has another name.
    let again: Vec<_> = memory
        .iter()
        .map(|m| Arc::clone(m) as Arc<dyn Memory>)
        .collect();
    let third = decode.register_pool(layout, again).unwrap();
    assert_ne!(third.paths()[0].id, id);
    assert!(!decode.is_registered(id));
}

pub(crate) fn overlapping_regions_are_their_own(fabric: &Fabric) {
    let (reader, owner) = fabric.pair();
    let whole = Arc::new(HostMemory::new(64 << 10).unwrap());
    let middle = std::ptr::NonNull::new(whole.as_ptr().wrapping_add(8192)).unwrap();
    // SAFETY: `whole` outlives the registration of its part, which ends first, and is accessed by raw copies only.
    let part = unsafe { HostMemory::from_raw(middle, 4096) };
    let part: Arc<dyn Memory> = Arc::new(part.unwrap());
    let all = owner
        .register(Arc::clone(&whole) as Arc<dyn Memory>, Access::ALL)
        .unwrap();
    let some = owner.register(part, Access::ALL).unwrap();
    assert_eq!(owner.registrations(), 2);
    let inside = whole.address() + 9000;
    assert_eq!(owner.locate(inside).map(|l| l.id), Some(some.paths().id));
    let ours = Arc::new(HostMemory::new(4096).unwrap());
    ours.fill(0, 4096, 0x5c).unwrap();
    let local = reader
        .register(Arc::clone(&ours) as Arc<dyn Memory>, Access::LOCAL)
        .unwrap();
    let remote = reader.open_region_blocking(some.token().clone()).unwrap();
    remote
        .write_blocking(100, &local, 0, 1000, LONG)
        .expect("through the part");
    drop((remote, some));
    soon("the part ends", || owner.registrations() == 1);
    assert_eq!(owner.locate(inside).map(|l| l.id), Some(all.paths().id));
    let remote = reader.open_region_blocking(all.token().clone()).unwrap();
    ours.fill(0, 4096, 0).unwrap();
    remote
        .read_blocking(8192 + 100, &local, 0, 1000, LONG)
        .expect("through the whole");
    let mut bytes = [0; 1000];
    ours.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0x5c; 1000]);
    drop((remote, all));
    soon("the whole ends", || owner.registrations() == 0);
}

pub(crate) fn a_pool_in_use_is_not_closed(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 7);
    let Cache { pool, memory, .. } = Cache::poisoned(&decode, &layout);
    let arrival = pool.grant("held", &[1, 2], LONG).unwrap();
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    // Dropping it, or asking for its end, does not end what a peer may write into.
    let in_use = pool.clone().close().expect_err("a grant is live");
    assert_eq!(in_use.granted_pages, 2);
    assert!(
        in_use.is_retryable() && in_use.to_string().contains("2 of its pages"),
        "{in_use}"
    );
    drop((pool, in_use));
    let registered = decode.registrations();
    assert!(registered > 0);
    push.layer(0, &[3, 4]).unwrap();
    arrival
        .layer_blocking(0, LONG)
        .expect("no hang")
        .expect("it is still there");
    arrival.revoke_blocking(LONG).expect("no hang");
    drop((arrival, push));
    soon("the registrations end", || decode.registrations() == 0);
    soon("the memory is given up", || {
        memory.iter().all(|m| Arc::strong_count(m) == 1)
    });
}
