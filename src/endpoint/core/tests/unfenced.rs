//! A device that refuses to destroy queue pairs, and what that costs: the pages its peers could still write.

use std::{
    net::IpAddr,
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::world::World;
use crate::{
    endpoint::{ArrivalError, IssueError, Push, config::Config},
    fabric::{
        Completion, Context, FabricError, FabricErrorKind, LaneAddress, LaneConfig, LaneId, MrId,
        PostError, RailEvent, Sge, Window, WindowBind, WindowId, WorkRequest,
    },
    kv::{Dtype, HeadRange, presets::KvShape},
};

/// A context that is asked to destroy lanes in vain while `refuses` says so, and that shows no completion from when
/// `late` is set until a lane is fenced: as if all that happens had happened between the last poll and the fence.
pub(super) struct Guarded {
    inner: Box<dyn Context>,
    refuses: Arc<AtomicBool>,
    late: Arc<AtomicBool>,
}

impl Guarded {
    pub(super) fn new(
        inner: Box<dyn Context>,
        refuses: Arc<AtomicBool>,
        late: Arc<AtomicBool>,
    ) -> Self {
        Self {
            inner,
            refuses,
            late,
        }
    }
}

impl Context for Guarded {
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError> {
        self.inner.deregister(mr)
    }

    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError> {
        self.inner.create_lane(config)
    }

    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        host: IpAddr,
        dial: bool,
    ) -> Result<(), FabricError> {
        self.inner.connect_lane(lane, remote, host, dial)
    }

    unsafe fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        // SAFETY: the caller keeps the contract of `Context::post`, which is that of the inner context.
        unsafe { self.inner.post(lane, requests, sges) }
    }

    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError> {
        self.inner.bind_window(lane, bind)
    }

    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        self.inner.invalidate_window(lane, id, window)
    }

    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError> {
        self.inner.post_receives(lane, count)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        match self.late.load(Ordering::Relaxed) {
            true => Ok(()),
            false => self.inner.poll(out),
        }
    }

    fn events(&mut self, out: &mut Vec<RailEvent>) {
        self.inner.events(out);
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        self.inner.arm()
    }

    fn wait_fd(&self) -> RawFd {
        self.inner.wait_fd()
    }

    fn fence_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        self.late.store(false, Ordering::Relaxed);
        self.inner.fence_lane(lane)
    }

    fn destroy_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(FabricError {
                device: "refusing".to_owned(),
                port: 1,
                operation: "destroy lane",
                kind: FabricErrorKind::Limit {
                    what: "patience",
                    value: 1,
                    limit: 0,
                },
                hint: None,
            });
        }
        self.inner.destroy_lane(lane)
    }
}

fn finish(world: &mut World, push: &Push, pages: &[u32], from: usize) {
    for layer in from..2 {
        push.layer(layer, pages).unwrap();
    }
    push.start_finish("end").unwrap();
    world.run(Duration::from_millis(20), |_| {});
}

/// Two writers: one over both rails of the reader, one over the first only. The second rail cannot be fenced.
#[test]
fn pages_behind_lanes_that_cannot_be_fenced_are_never_given_back() {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(16).unwrap();
    let mut world = World::with_rails(3, &[2, 1, 2], &Config::default());
    let (wide, _wide_memory) = world.nodes[0].pool(&layout, 1);
    let (narrow, _narrow_memory) = world.nodes[1].pool(&layout, 2);
    let (pool, _memory) = world.nodes[2].pool(&layout, 0);
    let deadline = Duration::from_secs(10);
    let running = pool.grant("running", &[1, 2], deadline).unwrap();
    let draining = pool.grant("draining", &[3], deadline).unwrap();
    let other = pool.grant("other", &[4], deadline).unwrap();
    let start = |world: &World, node: usize, source, arrival: &crate::endpoint::Arrival| {
        let grant = arrival.grant().clone();
        let shared = &world.nodes[node].shared;
        shared.start_push(source, grant, None).unwrap()
    };
    let pushes = [
        start(&world, 0, &wide, &running),
        start(&world, 0, &wide, &draining),
        start(&world, 1, &narrow, &other),
    ];
    world.run(Duration::from_millis(20), |_| {});
    for push in &pushes {
        assert_eq!(push.poll_opened(), Some(Ok(())));
    }
    pushes[0].layer(0, &[1, 2]).unwrap();
    world.run(Duration::from_millis(1), |_| {});
    draining.start_revoke();
    world.nodes[0].running = false;
    world.run(Duration::from_micros(1), |_| {});

    world.nodes[2].unfenceable[1].store(true, Ordering::Relaxed);
    world.cut(0);
    world.run(Duration::from_millis(1), |_| {});
    for arrival in [&running, &draining] {
        let end = arrival.poll_complete();
        let unfenced = matches!(end, Some(Err(ArrivalError::Unfenced(_))));
        assert!(unfenced, "{end:?}");
    }
    drop((running, draining));
    world.nodes[2].unfenceable[1].store(false, Ordering::Relaxed);
    world.nodes[0].running = true;
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(pool.granted_pages(), 4, "three in doubt and the other's");
    let again = pool.grant("again", &[2], deadline);
    assert_eq!(again.err(), Some(IssueError::PageBusy { page: 2 }));

    finish(&mut world, &pushes[2], &[4], 0);
    assert_eq!(other.poll_complete().unwrap().unwrap(), "end");
    assert_eq!(pool.granted_pages(), 3);

    // A new session with the same writer keeps to the rail that can be trusted.
    let next = pool.grant("next", &[5, 6], deadline).unwrap();
    let push = start(&world, 0, &wide, &next);
    world.run(Duration::from_millis(20), |_| {});
    assert_eq!(push.poll_opened(), Some(Ok(())));
    let reader = &world.nodes[2].core;
    assert!(!reader.rails[1].is_usable() && reader.rails[0].is_usable());
    assert!(reader.lanes.keys().all(|(rail, _)| *rail == 0));
    finish(&mut world, &push, &[5, 6], 0);
    assert_eq!(next.poll_complete().unwrap().unwrap(), "end");
    assert_eq!(pool.granted_pages(), 3);
}

/// A rail that is set aside because of one session still serves the others that it has.
#[test]
fn other_sessions_of_the_rail_go_on() {
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 4,
        heads: HeadRange::new(0, 2),
        head_dim: 16,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(16).unwrap();
    let mut world = World::with_rails(3, &[1, 1, 1], &Config::default());
    let (a, _a) = world.nodes[0].pool(&layout, 1);
    let (b, _b) = world.nodes[1].pool(&layout, 2);
    let (pool, _memory) = world.nodes[2].pool(&layout, 0);
    let deadline = Duration::from_secs(10);
    let one = pool.grant("one", &[1], deadline).unwrap();
    let two = pool.grant("two", &[2], deadline).unwrap();
    let s = |n: usize, p, g: &crate::endpoint::Arrival| {
        world.nodes[n]
            .shared
            .start_push(p, g.grant().clone(), None)
            .unwrap()
    };
    let (_p, q) = (s(0, &a, &one), s(1, &b, &two));
    world.run(Duration::from_millis(20), |_| {});
    world.nodes[2].unfenceable[0].store(true, Ordering::Relaxed);
    world.cut(0);
    world.run(Duration::from_millis(5), |_| {});
    world.nodes[2].unfenceable[0].store(false, Ordering::Relaxed);
    q.layer(0, &[2]).unwrap();
    q.layer(1, &[2]).unwrap();
    q.start_finish("end").unwrap();
    world.run(Duration::from_millis(100), |_| {});
    assert!(
        matches!(q.poll_ended(), Some(Ok(_))),
        "{:?}",
        q.poll_ended()
    );
    assert_eq!(two.poll_complete().unwrap().unwrap(), "end");
    let end = one.poll_complete();
    assert!(
        matches!(end, Some(Err(ArrivalError::Unfenced(_)))),
        "{end:?}"
    );
}

/// The dialling side cannot fence while a read is in flight: the bytes still land, so the memory is kept and the caller
/// is told.
#[test]
fn a_read_whose_lanes_cannot_be_fenced_keeps_its_memory() {
    use crate::{
        endpoint::{AccessError, core::AccessOp},
        fabric::Access,
    };
    let mut world = World::with_rails(3, &[1, 1], &Config::default());
    let (_e, token, theirs) = world.nodes[1].export(1 << 20, Access::ALL);
    let (local, _, ours) = world.nodes[0].export(1 << 20, Access::LOCAL);
    theirs.fill(0, 1 << 20, 9).unwrap();
    let open = world.nodes[0].access(&token, AccessOp::Open);
    world.run(Duration::from_millis(20), |_| {});
    let remote = open.keys.look(Clone::clone).unwrap();
    let op = AccessOp::Move {
        read: true,
        local: Arc::clone(&local),
        local_offset: 0,
        remote,
        remote_offset: 0,
        length: 1 << 20,
    };
    let read = world.nodes[0].access(&token, op);
    world.round();
    world.nodes[0].unfenceable[0].store(true, Ordering::Relaxed);
    let conn = world.conns_of(0)[0];
    world.nodes[1].running = false;
    let bye = crate::wire::Message::Goodbye(crate::wire::Goodbye {
        code: crate::wire::GoodbyeCode::Error,
        detail: String::new(),
    });
    world.inject(0, conn, &bye);
    world.round();
    let end = read.signal.look(Clone::clone);
    assert!(
        matches!(end, Some(Err(AccessError::Unfenced(_)))),
        "{end:?}"
    );
    let record = Arc::downgrade(&local.record);
    drop(local);
    world.run(Duration::from_millis(20), |_| {});
    let mut after = vec![0; 1 << 20];
    ours.read(0, &mut after).unwrap();
    assert!(
        after.contains(&9),
        "nothing landed: the test is worth nothing"
    );
    let kept = record.upgrade().is_some();
    assert!(kept, "memory that a device still writes was let go");
}
