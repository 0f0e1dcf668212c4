//! Grants with windows: what their writers can reach, until when, and what happens where there are no windows.

use std::{sync::Arc, time::Duration};

use super::world::World;
use crate::{
    endpoint::{
        Arrival, ArrivalError, GrantKeys, Push, PushError,
        config::{Config, Protection},
    },
    fabric::{LocalKey, Opcode, RemoteKey, Sge, Status, WorkRequest},
    kv::{Dtype, HeadRange, KvLayout, presets::KvShape},
    memory::HostMemory,
    wire::RefuseCode,
};

const LAYERS: usize = 2;
const POISON: u8 = 0xa5;
const MS: Duration = Duration::from_millis(1);

fn layout() -> KvLayout {
    let shape = KvShape {
        layers: LAYERS as u32,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    shape.vllm_flash(16).unwrap()
}

fn config(protection: Protection) -> Config {
    Config {
        protection,
        tail_capacity: 56,
        revoke_grace: 3 * MS,
        ..Config::default()
    }
}

/// Node 0 writes into the pool of node 1.
struct Rig {
    world: World,
    source: crate::endpoint::Pool,
    target: crate::endpoint::Pool,
    memory: Vec<Arc<HostMemory>>,
    _sources: Vec<Arc<HostMemory>>,
}

impl Rig {
    /// With a seed that leaves enough windows.
    fn new(protection: Protection) -> Self {
        Self::seeded(1, protection)
    }

    fn seeded(seed: u64, protection: Protection) -> Self {
        let world = World::new(seed, 2, &config(protection));
        let (source, sources) = world.nodes[0].pool(&layout(), 7);
        let (target, memory) = world.nodes[1].pool(&layout(), POISON);
        Self {
            world,
            source,
            target,
            memory,
            _sources: sources,
        }
    }

    fn run(&mut self, span: Duration) {
        self.world.run(span, |_| {});
    }

    fn open(&mut self, pages: &[u32]) -> (Arrival, Push) {
        let arrival = self.target.grant("windows", pages, 200 * MS).unwrap();
        let push =
            self.world.nodes[0]
                .shared
                .start_push(&self.source, arrival.grant().clone(), None);
        let push = push.unwrap();
        self.run(5 * MS);
        (arrival, push)
    }

    fn finish(&mut self, push: &Push, pages: &[u32]) {
        for layer in 0..LAYERS {
            push.layer(layer, pages).unwrap();
        }
        push.start_finish("end").unwrap();
        self.run(20 * MS);
    }

    /// All bytes of the reader's pool.
    fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for memory in &self.memory {
            let mut bytes = vec![0; crate::memory::Memory::length(&**memory) as usize];
            memory.read(0, &mut bytes).unwrap();
            all.extend(bytes);
        }
        all
    }

    /// The writer posts a write of `length` bytes by hand, on its first lane. Returns whether the lane has survived.
    fn write(&mut self, address: u64, key: RemoteKey, length: u32) -> bool {
        let core = &mut self.world.nodes[0].core;
        let lane = core.sessions.values().next().unwrap().lanes[0].id;
        let pool = core.pools.values().next().unwrap();
        let (from, local, _) = pool.regions[0].rails()[0].at(0).unwrap();
        let request = WorkRequest {
            id: 1 << 40,
            opcode: Opcode::Write,
            remote_address: address,
            remote_key: key,
            first_sge: 0,
            sge_count: 1,
            signaled: false,
            inline: false,
        };
        let sge = Sge {
            address: from,
            length,
            key: LocalKey(local.0),
        };
        // SAFETY: the element lies in the source pool, which the rig keeps and nobody writes.
        unsafe { core.rails[0].context.post(lane, &[request], &[sge]) }.unwrap();
        self.run(5 * MS);
        !self.world.nodes[0].core.sessions.is_empty()
    }

    /// The first window of region 0 that the writer has been told of for its first lane: address, key.
    fn window(&self) -> (u64, RemoteKey) {
        let core = &self.world.nodes[0].core;
        let lane = &core.sessions.values().next().unwrap().lanes[0];
        let push = core.pushes.values().next().unwrap();
        let target = &push.targets(lane).unwrap()[0];
        let first = (0..u64::MAX).find_map(|offset| target.at(offset)).unwrap();
        (first.0, first.1)
    }
}

#[test]
fn a_grant_has_windows_and_they_go_with_it() {
    for protection in [Protection::Auto, Protection::Window] {
        let mut rig = Rig::new(protection);
        let pages = [3, 4, 9];
        let (arrival, push) = rig.open(&pages);
        assert_eq!(push.poll_opened(), Some(Ok(())));
        let count = rig.world.windows();
        assert!(count > 0);
        let exact = GrantKeys::Windows { count, exact: true };
        assert_eq!(arrival.keys(), Some(exact));
        let core = &rig.world.nodes[0].core;
        let entry = core.pushes.values().next().unwrap();
        assert!(entry.windows.is_some());
        let remote = entry.remote.as_ref().unwrap();
        assert!(remote.targets.is_empty(), "keys of regions are told");
        assert!(
            entry.tail_targets.is_empty(),
            "the tail arena's keys are told"
        );
        rig.finish(&push, &pages);
        assert!(
            matches!(arrival.poll_complete(), Some(Ok(_))),
            "{arrival:?}"
        );
        assert!(matches!(push.poll_ended(), Some(Ok(_))));
        assert_eq!(rig.world.windows(), 0);
        assert_eq!(rig.target.granted_pages(), 0);
        // The next one of the session, too.
        let (arrival, push) = rig.open(&pages);
        rig.finish(&push, &pages);
        assert!(
            matches!(arrival.poll_complete(), Some(Ok(_))),
            "{arrival:?}"
        );
        assert_eq!(rig.world.windows(), 0);
    }
}

#[test]
fn without_protection_there_are_none() {
    let mut rig = Rig::new(Protection::Region);
    let (arrival, push) = rig.open(&[1]);
    assert_eq!(arrival.keys(), Some(GrantKeys::Region));
    assert_eq!(rig.world.windows(), 0);
    rig.finish(&push, &[1]);
    assert!(matches!(arrival.poll_complete(), Some(Ok(_))));
}

/// A writer with an open grant that wants more than that.
#[test]
fn a_hostile_writer_does_not_leave_its_grant() {
    for (what, skip, length, allowed) in [
        ("its first byte", 0i64, 1, true),
        ("the byte before", -1, 1, false),
        ("another page", 4096, 16, false),
        ("over the end", 0, 4096, false),
    ] {
        let mut rig = Rig::new(Protection::Window);
        let (arrival, _push) = rig.open(&[5]);
        let (address, key) = rig.window();
        let before = rig.bytes();
        let survived = rig.write(address.wrapping_add_signed(skip), key, length);
        assert_eq!(survived, allowed, "{what}");
        assert_eq!(rig.bytes() == before, !allowed, "{what}");
        drop(arrival);
        rig.run(50 * MS);
        assert_eq!(rig.world.windows(), 0);
    }
    // The same with the key of the region, which is all that there would be otherwise, is not refused.
    let mut rig = Rig::new(Protection::Region);
    let (_arrival, _push) = rig.open(&[5]);
    let pool = rig.world.nodes[1].core.pools.values().next().unwrap();
    let region = &pool.regions[0];
    let (address, key) = (region.address(), region.rails()[0].remote()[0]);
    let before = rig.bytes();
    assert!(rig.write(address, key, 16));
    assert_ne!(rig.bytes(), before);
}

/// The writer stands still: its grant is taken back within the grace, and the session goes on.
#[test]
fn a_silent_writer_loses_its_windows_and_no_other_push() {
    let mut rig = Rig::new(Protection::Window);
    let (taken, mute) = rig.open(&[1, 2]);
    let (kept, other) = rig.open(&[7, 8]);
    mute.layer(0, &[1, 2]).unwrap();
    rig.run(5 * MS);
    let (address, key) = rig.window();
    rig.world.nodes[0].running = false;
    taken.start_revoke();
    rig.run(5 * MS);
    assert!(
        matches!(taken.poll_complete(), Some(Err(ArrivalError::Revoked))),
        "{taken:?}"
    );
    assert_eq!(rig.target.granted_pages(), 2, "the other grant's");
    assert!(kept.poll_complete().is_none(), "{kept:?}");
    let before = rig.bytes();
    // It wakes up, hears of it, and finishes the other.
    rig.world.nodes[0].running = true;
    rig.run(5 * MS);
    assert!(
        matches!(mute.poll_ended(), Some(Err(PushError::Revoked(_)))),
        "{mute:?}"
    );
    assert_eq!(rig.bytes(), before, "a late write");
    rig.finish(&other, &[7, 8]);
    assert!(matches!(kept.poll_complete(), Some(Ok(_))), "{kept:?}");
    assert_eq!(rig.world.windows(), 0);
    let session = rig.world.nodes[1].core.sessions.values().next().unwrap();
    assert!(session.shut.is_empty() && session.slots.iter().all(Option::is_none));
    // What it held before opens nothing now.
    let before = rig.bytes();
    // The lane fails for it, and is made again; the session relies on no window any more.
    rig.write(address, key, 1);
    assert_eq!(rig.bytes(), before);
}

/// With keys of regions the same costs the session: windows are what makes the difference above.
#[test]
fn a_silent_writer_without_windows_costs_its_session() {
    let mut rig = Rig::new(Protection::Region);
    let (taken, _mute) = rig.open(&[1, 2]);
    let (kept, _other) = rig.open(&[7, 8]);
    rig.world.nodes[0].running = false;
    taken.start_revoke();
    rig.run(5 * MS);
    assert!(matches!(
        taken.poll_complete(),
        Some(Err(ArrivalError::Revoked))
    ));
    assert!(matches!(
        kept.poll_complete(),
        Some(Err(ArrivalError::Peer(_)))
    ));
}

/// Seeds that are multiples of four leave twenty windows to a device.
#[test]
fn where_windows_run_out_grants_fall_back_or_are_refused() {
    let pages: Vec<u32> = (0..16).collect();
    let open_two = |protection| {
        let mut rig = Rig::seeded(4, protection);
        let first = rig.open(&pages[..4]);
        let second = rig.open(&[5, 7]);
        (rig, first, second)
    };
    let (mut rig, first, second) = open_two(Protection::Auto);
    assert_eq!(first.1.poll_opened(), Some(Ok(())));
    assert_eq!(second.1.poll_opened(), Some(Ok(())));
    rig.finish(&second.1, &[5, 7]);
    rig.finish(&first.1, &pages[..4]);
    assert!(matches!(first.0.poll_complete(), Some(Ok(_))));
    assert!(matches!(second.0.poll_complete(), Some(Ok(_))));
    assert_eq!(rig.world.windows(), 0);

    let (mut rig, first, second) = open_two(Protection::Window);
    assert_eq!(first.1.poll_opened(), Some(Ok(())));
    let Some(Err(PushError::Refused { code, .. })) = second.1.poll_opened() else {
        panic!("{:?}", second.1);
    };
    assert_eq!(code, RefuseCode::Busy);
    assert!(code.is_retryable());
    // It can be opened once there are windows again.
    rig.finish(&first.1, &pages[..4]);
    let grant = second.0.grant().clone();
    let again = rig.world.nodes[0]
        .shared
        .start_push(&rig.source, grant, None)
        .unwrap();
    rig.run(5 * MS);
    assert_eq!(again.poll_opened(), Some(Ok(())));
    rig.finish(&again, &[5, 7]);
    assert!(
        matches!(second.0.poll_complete(), Some(Ok(_))),
        "{:?}",
        second.0
    );
    assert_eq!(rig.world.windows(), 0);
}

/// A key that is told before its binding has taken effect opens nothing yet: an honest writer's lane would fail for it.
#[test]
fn nobody_is_told_of_windows_that_are_not_bound() {
    let (mut waiting, mut told) = (0, 0);
    for seed in [1, 2, 3, 5, 6, 7] {
        let mut rig = Rig::seeded(seed, Protection::Window);
        let arrival = rig.target.grant("bound", &[2, 5, 11], 200 * MS).unwrap();
        let grant = arrival.grant().clone();
        let push = rig.world.nodes[0]
            .shared
            .start_push(&rig.source, grant, None);
        rig.world.run(10 * MS, |world| {
            let mut windows = world.nodes[1].core.arrivals.values();
            let Some(windows) = windows.find_map(|arrival| arrival.windows.as_ref()) else {
                return;
            };
            match windows.is_told() {
                true => told += 1,
                false => waiting += 1,
            }
            assert!(
                !windows.is_told() || windows.outstanding == 0,
                "seed {seed}: told with {} bindings to come",
                windows.outstanding
            );
        });
        assert_eq!(push.unwrap().poll_opened(), Some(Ok(())));
    }
    assert!(waiting > 0 && told > 0, "{waiting} {told}");
}

/// Taken back before the writer has been told: it hears that, and nothing stays behind.
#[test]
fn revoked_while_it_is_being_opened() {
    for after in 0..40 {
        let mut rig = Rig::new(Protection::Window);
        rig.open(&[15]).0.start_revoke();
        rig.run(10 * MS);
        let arrival = rig.target.grant("early", &[1, 2], 200 * MS).unwrap();
        let grant = arrival.grant().clone();
        let push = rig.world.nodes[0]
            .shared
            .start_push(&rig.source, grant, None)
            .unwrap();
        rig.run(Duration::from_micros(after));
        arrival.start_revoke();
        rig.run(20 * MS);
        assert!(
            matches!(arrival.poll_complete(), Some(Err(ArrivalError::Revoked))),
            "{arrival:?}"
        );
        assert!(
            matches!(push.poll_ended(), Some(Err(_))),
            "after {after} µs: {push:?}"
        );
        assert_eq!(rig.world.windows(), 0);
        assert_eq!(rig.target.granted_pages(), 0);
    }
}

#[test]
fn a_status_that_says_refused_is_what_the_tests_above_rely_on() {
    // `write` only sees that the session has ended; this is why it does.
    let mut rig = Rig::new(Protection::Window);
    let (_arrival, push) = rig.open(&[5]);
    let (address, key) = rig.window();
    assert!(!rig.write(address - 1, key, 1));
    let Some(Err(PushError::Peer(crate::endpoint::PeerError::Lane { status, .. }))) =
        push.poll_ended()
    else {
        panic!("{push:?}");
    };
    assert_eq!(status, Status::RemoteAccess);
}
