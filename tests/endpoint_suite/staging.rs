//! Pushes from and into memory that no rail reaches.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use kvpush::{
    Endpoint,
    endpoint::{ArrivalError, Builder, EndpointError, IssueError, MemoryPath, PushError},
    fabric::Access,
    kv::{HeadRange, KvLayout, region_lengths},
    memory::{HostMemory, Memory},
};

use crate::{
    far::testing::{Device, Far},
    fixture::{Cache, Fabric, LONG, POISON, Random, seed, soon},
    mover,
    transfers::{plain, push, shape},
};

fn bind(builder: Builder) -> Endpoint {
    builder.bind("127.0.0.1:0").expect("start an endpoint")
}

/// A pool in memory of `device`, with bytes as `cache` has them.
fn far(endpoint: &Endpoint, layout: &KvLayout, device: &Arc<Device>, seed: Option<u64>) -> Cache {
    let backing = |length| Arc::new(HostMemory::new(length).unwrap());
    let memory: Vec<_> = region_lengths(layout)
        .unwrap()
        .into_iter()
        .map(backing)
        .collect();
    for (region, memory) in memory.iter().enumerate() {
        let mut random = Random(seed.unwrap_or(0) ^ (region as u64) << 32);
        let bytes: Vec<u8> = (0..memory.length())
            .map(|_| seed.map_or(POISON, |_| random.next() as u8))
            .collect();
        memory.write(0, &bytes).unwrap();
    }
    let regions = memory.iter().map(|memory| {
        Arc::new(Far::new(Arc::clone(memory), Arc::clone(device))) as Arc<dyn Memory>
    });
    let pool = endpoint
        .register_pool(layout.clone(), regions.collect())
        .expect("staged");
    for region in pool.paths() {
        for rail in &region.rails {
            assert_eq!((rail.path, rail.extents), (MemoryPath::Staged, 0));
            let refused: Vec<_> = rail.refused.iter().map(|refusal| refusal.path).collect();
            let better = [
                MemoryPath::Plain,
                MemoryPath::Dmabuf,
                MemoryPath::PeerMemory,
            ];
            assert_eq!(refused, better);
        }
    }
    Cache {
        pool,
        layout: layout.clone(),
        memory,
    }
}

fn device(delay: u64) -> Arc<Device> {
    let device = Device::default();
    device.delay.store(delay, SeqCst);
    Arc::new(device)
}

pub(crate) fn everything_arrives_through_host_memory(fabric: &Fabric) {
    let mut random = Random(seed());
    for round in 0..15 {
        let (from_far, to_far) = [(true, true), (true, false), (false, true)][round % 3];
        // Little memory, so that buffers are short and few.
        let side = |name: &str, random: &mut Random| {
            let builder = fabric.builder(name).staging_memory(2 << 20);
            bind(
                builder
                    .max_sge(random.pick(&[1, 4, 16]))
                    .max_write(random.pick(&[5_000, 1 << 28])),
            )
        };
        let (prefill, decode) = (side("prefill", &mut random), side("decode", &mut random));
        let (ours, theirs) = (device(random.below(40)), device(random.below(40)));
        let heads = HeadRange::new(0, 8);
        let layout = shape(3, heads).vllm_flash(40).unwrap();
        let source = match from_far {
            true => far(&prefill, &layout, &ours, Some(round as u64)),
            false => Cache::filled(&prefill, &layout, round as u64),
        };
        let destination = match to_far {
            true => far(&decode, &layout, &theirs, None),
            false => Cache::poisoned(&decode, &layout),
        };
        let mut expected = destination.bytes();
        // Several grants at once, of some heads each, so that neighbours must not be touched.
        let all = random.distinct(30, 40);
        let some = HeadRange::new(random.below(4) as u32, 1 + random.below(4) as u32);
        let mut arrivals = Vec::new();
        for to in all.chunks(10) {
            let from = random.distinct(10, 40);
            let pairs: Vec<_> = from.iter().copied().zip(to.iter().copied()).collect();
            mover::copy(
                (&layout, &source.bytes()),
                (&layout, &mut expected),
                &pairs,
                some,
            );
            let options = kvpush::endpoint::GrantOptions::new("staged", LONG).heads(some);
            let arrival = destination.pool.grant_with(to, options).unwrap();
            push(&prefill, &source, &arrival, &from, b"tail");
            arrivals.push(arrival);
        }
        for arrival in arrivals {
            let tail = arrival
                .complete_blocking(LONG)
                .expect("no hang")
                .expect("complete");
            assert_eq!(&tail[..], b"tail");
        }
        mover::assert_same(&destination.bytes(), &expected);
        let bytes = |stats: u64, far| assert_eq!(stats > 0, far);
        bytes(prefill.staging().to_host, from_far);
        bytes(decode.staging().to_device, to_far);
        assert_eq!(decode.staging().to_host + prefill.staging().to_device, 0);
        assert_eq!(theirs.flushes.load(SeqCst) > 0, to_far);
        assert_eq!(
            ours.under_way.load(SeqCst) + theirs.under_way.load(SeqCst),
            0
        );
    }
}

pub(crate) fn a_layer_is_ready_when_it_has_been_copied(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let gpu = device(0);
    let destination = far(&decode, &layout, &gpu, None);
    gpu.hold.store(true, SeqCst);
    let arrival = destination.pool.grant("held", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    for layer in 0..2 {
        writer.layer(layer, &[3, 4]).unwrap();
    }
    writer
        .finish_blocking("", LONG)
        .expect("no hang")
        .expect("finish");
    soon("copies begin", || gpu.under_way.load(SeqCst) > 0);
    assert_eq!(arrival.layer_blocking(0, Duration::from_millis(50)), None);
    // The writer goes; everything is here, so that does not matter.
    prefill.shutdown();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(
        (arrival.complete_layers(), arrival.poll_complete()),
        (0, None)
    );
    gpu.hold.store(false, SeqCst);
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    assert!(gpu.flushes.load(SeqCst) >= 2);
}

pub(crate) fn revoked_while_it_is_copied(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 2);
    let gpu = device(3);
    let destination = far(&decode, &layout, &gpu, None);
    gpu.hold.store(true, SeqCst);
    let arrival = destination.pool.grant("revoked", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    writer.layer(0, &[3, 4]).unwrap();
    soon("copies begin", || gpu.under_way.load(SeqCst) > 0);
    // Its end waits for the device, though the writer has stopped.
    assert_eq!(arrival.revoke_blocking(Duration::from_millis(100)), None);
    writer
        .ended_blocking(LONG)
        .expect("told")
        .expect_err("revoked");
    assert_eq!(destination.pool.granted_pages(), 2);
    gpu.hold.store(false, SeqCst);
    arrival.revoke_blocking(LONG).expect("no hang");
    // From here on the pages are the caller's, and nothing changes them.
    let bytes = destination.bytes();
    assert_eq!(gpu.under_way.load(SeqCst), 0);
    std::thread::sleep(Duration::from_millis(20));
    mover::assert_same(&destination.bytes(), &bytes);
    assert_eq!(destination.pool.granted_pages(), 0);
}

pub(crate) fn copies_that_never_end_hold_up_nobody(fabric: &Fabric) {
    let grace = Duration::from_millis(20);
    let bound = |name| {
        let builder = fabric.builder(name).drain_timeout(grace);
        bind(builder.revoke_grace(grace))
    };
    let (prefill, decode) = (fabric.endpoint("prefill"), bound("decode"));
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 5);
    let gpu = device(0);
    let destination = far(&decode, &layout, &gpu, None);
    gpu.hold.store(true, SeqCst);
    let arrival = destination.pool.grant("stuck", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    writer.layer(0, &[3, 4]).unwrap();
    soon("copies begin", || gpu.under_way.load(SeqCst) > 0);
    arrival.revoke_blocking(LONG).expect("no hang");
    let end = arrival.poll_complete().expect("ended").expect_err("stuck");
    let ArrivalError::Stuck(stuck) = &end else {
        panic!("{end:?}");
    };
    assert_eq!(stuck.device, "0000:7e:00.0".parse().ok());
    let text = end.to_string();
    assert!(
        text.contains("0000:7e:00.0") && !end.is_retryable(),
        "{text}"
    );
    drop(arrival);
    // What the device may still write to is never granted again.
    let again = destination.pool.grant("again", &[2], LONG).err();
    assert_eq!(again, Some(IssueError::PageBusy { page: 2 }));
    assert_eq!(destination.pool.granted_pages(), 2);
    let kept = decode.registrations();
    drop(destination.pool);
    assert!(kept > 0 && decode.registrations() == kept);

    // A writer's source pages. Its peer need not wait for that.
    let (prefill, decode) = (bound("stuck"), fabric.endpoint("patient"));
    let ours = device(0);
    let source = far(&prefill, &layout, &ours, Some(6));
    let destination = Cache::poisoned(&decode, &layout);
    ours.hold.store(true, SeqCst);
    let arrival = destination.pool.grant("stuck", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    writer.layer(0, &[3, 4]).unwrap();
    soon("copies begin", || ours.under_way.load(SeqCst) > 0);
    writer.start_cancel();
    let end = writer
        .ended_blocking(LONG)
        .expect("no hang")
        .expect_err("stuck");
    assert!(matches!(end, PushError::Stuck(_)), "{end:?}");
    // Copies overlap: how many had begun is known only now that no more can.
    let started = ours.under_way.load(SeqCst);
    let arrived = arrival.complete_blocking(LONG).expect("no hang");
    assert!(
        matches!(arrived, Err(ArrivalError::Abandoned { .. })),
        "{arrived:?}"
    );
    // No more is started behind that copy, until it ends.
    let next = destination.pool.grant("next", &[5], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, next.grant().clone(), LONG)
        .expect("open");
    writer.layer(0, &[3]).unwrap();
    let end = writer
        .ended_blocking(LONG)
        .expect("no hang")
        .expect_err("behind");
    assert!(matches!(end, PushError::Staging(_)), "{end:?}");
    assert_eq!(ours.under_way.load(SeqCst), started);
    ours.hold.store(false, SeqCst);
    let again = destination.pool.grant("mended", &[6, 7], LONG).unwrap();
    push(&prefill, &source, &again, &[3, 4], b"");
    again
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");

    // One more never ends, and the endpoint does.
    ours.hold.store(true, SeqCst);
    let arrival = destination.pool.grant("last", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    writer.layer(0, &[3, 4]).unwrap();
    soon("copies begin", || ours.under_way.load(SeqCst) > 0);
    prefill.shutdown();
    let end = writer
        .ended_blocking(LONG)
        .expect("no hang")
        .expect_err("stuck");
    assert!(matches!(end, PushError::Stuck(_)), "{end:?}");
}

pub(crate) fn a_device_that_fails_ends_both_sides(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let (ours, theirs) = (device(2), device(2));
    let source = far(&prefill, &layout, &ours, Some(3));
    let destination = far(&decode, &layout, &theirs, None);
    for to_host in [true, false] {
        let (broken, other) = match to_host {
            true => (&ours.fail_to_host, &theirs.fail_to_device),
            false => (&theirs.fail_to_device, &ours.fail_to_host),
        };
        broken.store(true, SeqCst);
        other.store(false, SeqCst);
        let arrival = destination.pool.grant("broken", &[1, 2], LONG).unwrap();
        let writer = prefill
            .push_blocking(&source.pool, arrival.grant().clone(), LONG)
            .expect("open");
        writer.layer(0, &[3, 4]).unwrap();
        let end = writer
            .ended_blocking(LONG)
            .expect("no hang")
            .expect_err("broken");
        let arrived = arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect_err("broken");
        if to_host {
            assert!(matches!(end, PushError::Staging(_)), "{end:?}");
            assert!(
                matches!(arrived, ArrivalError::Abandoned { .. }),
                "{arrived:?}"
            );
            assert!(arrived.to_string().contains("staging"), "{arrived}");
            assert!(prefill.staging().failures > 0);
        } else {
            assert!(matches!(end, PushError::Revoked(_)), "{end:?}");
            assert!(matches!(arrived, ArrivalError::Staging(_)), "{arrived:?}");
            assert!(decode.staging().failures > 0);
        }
    }
    // Nothing is stuck: the next one goes through.
    theirs.fail_to_device.store(false, SeqCst);
    ours.fail_to_host.store(false, SeqCst);
    let arrival = destination.pool.grant("mended", &[1, 2], LONG).unwrap();
    push(&prefill, &source, &arrival, &[3, 4], b"");
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
}

pub(crate) fn a_full_arena_makes_grants_wait(fabric: &Fabric) {
    let prefill = fabric.endpoint("prefill");
    let layout = plain(2, 16);
    let source = Cache::filled(&prefill, &layout, 4);
    // Room for the landing of 6 pages, and no more: a page is 8 KiB of each layer.
    let decode = bind(fabric.builder("decode").staging_memory(2 * 6 * 16 * 1024));
    let gpu = device(1);
    let destination = far(&decode, &layout, &gpu, None);
    let pages: Vec<u32> = (0..16).collect();
    let too_large = destination
        .pool
        .grant("large", &pages, LONG)
        .expect_err("16 pages");
    assert!(
        matches!(too_large, IssueError::TooLargeToStage { .. }),
        "{too_large}"
    );
    assert!(too_large.to_string().contains("Builder::staging_memory"));
    let grant = |pages: &[u32]| destination.pool.grant("turn", pages, LONG).unwrap();
    let (first, second) = (grant(&[0, 1, 2, 3]), grant(&[4, 5, 6, 7]));
    let open = |arrival: &kvpush::Arrival| {
        prefill.push_blocking(&source.pool, arrival.grant().clone(), LONG)
    };
    let writer = open(&first).expect("open");
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| open(&second).expect("opened in its turn"));
        soon("the second waits", || decode.staging().waits > 0);
        // A third, which expires while it waits, does not hold up the others.
        let late = destination
            .pool
            .grant("late", &[8, 9, 10, 11], Duration::from_millis(50))
            .unwrap();
        let third = scope.spawn(move || {
            let refused = open(&late).expect_err("expired");
            assert!(
                matches!(refused, PushError::Refused { .. } | PushError::Expired),
                "{refused:?}"
            );
            late.complete_blocking(LONG)
        });
        std::thread::sleep(Duration::from_millis(100));
        for layer in 0..2 {
            writer.layer(layer, &[0, 1, 2, 3]).unwrap();
        }
        writer
            .finish_blocking("", LONG)
            .expect("no hang")
            .expect("finish");
        first
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");
        let expired = third.join().expect("no panic").expect("no hang");
        assert!(
            matches!(expired, Err(ArrivalError::Expired { .. })),
            "{expired:?}"
        );
        waiting.join().expect("no panic")
    });
    for layer in 0..2 {
        waiting.layer(layer, &[4, 5, 6, 7]).unwrap();
    }
    waiting
        .finish_blocking("", LONG)
        .expect("no hang")
        .expect("finish");
    second
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    let expected = {
        let (mut to, pairs): (_, Vec<_>) = (
            Cache::poisoned(&decode, &layout).bytes(),
            (0..8).map(|p| (p, p)).collect(),
        );
        mover::copy(
            (&layout, &source.bytes()),
            (&layout, &mut to),
            &pairs,
            HeadRange::new(0, 4),
        );
        to
    };
    mover::assert_same(&destination.bytes(), &expected);
}

pub(crate) fn what_cannot_be_staged_is_refused(fabric: &Fabric) {
    let endpoint = bind(fabric.builder("none").staging_memory(0));
    let gpu = device(0);
    let memory = || {
        let bytes = Arc::new(HostMemory::new(1 << 20).unwrap());
        Arc::new(Far::new(bytes, Arc::clone(&gpu))) as Arc<dyn Memory>
    };
    let layout = plain(1, 4);
    let none = endpoint
        .register_pool(layout.clone(), vec![memory()])
        .expect_err("no memory");
    assert!(matches!(none, EndpointError::Unreachable { .. }), "{none}");
    assert!(
        none.to_string().contains("Builder::staging_memory"),
        "{none}"
    );
    let endpoint = fabric.endpoint("some");
    let export = endpoint
        .register(memory(), Access::ALL)
        .expect_err("one-sided");
    assert!(
        export.to_string().contains("only pools are staged"),
        "{export}"
    );
    let never = bind(fabric.builder("never").memory_paths([MemoryPath::Dmabuf]));
    assert!(never.register_pool(layout, vec![memory()]).is_err());
    let two = plain(2, 4);
    let host = Arc::new(HostMemory::new(1 << 20).unwrap()) as Arc<dyn Memory>;
    let mixed = endpoint
        .register_pool(two, vec![memory(), host])
        .expect_err("mixed");
    assert!(
        matches!(mixed, EndpointError::MixedPool { region: 1 }),
        "{mixed}"
    );
    soon("nothing stays registered", || endpoint.registrations() == 0);
}
