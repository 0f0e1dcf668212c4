//! The data path of a rail: completion queue, lanes, receives.
//!
//! One thread owns a context. Nothing waits for a peer; creating, connecting (which on RoCE resolves the peer's MAC
//! address in the kernel, and takes a second or so if nobody answers), fencing and destroying lanes make system calls,
//! posting and polling do not (except on soft-RoCE, whose doorbell is one).
//!
//! # Shared receive queue
//!
//! All lanes of a context may draw from one queue of receives. Each lane's share is still bounded: it counts the
//! receives promised to it, and a peer that takes more than its share has its lane failed and what it took replaced.
//! Invariant: the queue holds at least as many receives as are promised in total, or is full. So a refusal for want of
//! room is no error, and receives of a lane that went need not be taken back. A failed queue pair with a shared queue
//! gets no flushed receives from the device; the lane reports them itself.

mod fence;
mod progress;

use std::{collections::VecDeque, net::IpAddr, os::fd::RawFd, ptr, sync::Arc};

use crate::fabric::{
    Completion, CompletionKind, Context, FabricError, FabricErrorKind, LaneAddress, LaneConfig,
    LaneId, MrId, PostError, RailEvent, Sge, Status, Window, WindowBind, WindowId, WorkRequest,
};

use super::{
    address::VerbsAddress,
    attributes::{Path, init_attributes, modify, random_psn, rtr_attributes, rts_attributes},
    device::VerbsDevice,
    error::Place,
    events::Completions,
    lane::{Lane, LaneState, Outstanding},
    poll::BATCH,
    post::{Limits, Poster, ReceiveQueue},
    sys::{self, Zeroable as _},
    windows::Windows,
};

/// Completions handed out with one poll, besides the flushed receives of a lane that fails with the last of them.
const MOST_PER_POLL: usize = 4 * BATCH;
/// Polls between two looks at the asynchronous events, which cost a system call. A sleeping engine looks each time.
const EVENT_INTERVAL: u32 = 4096;

/// The data path of one [`VerbsDevice`].
pub(super) struct VerbsContext {
    device: Arc<VerbsDevice>,
    /// Taken only on drop.
    completions: Option<Completions>,
    srq: Option<Shared>,
    /// Sorted by id, which only grows.
    lanes: Vec<Lane>,
    /// Queue pair number to lane, sorted; receives from a shared queue are named by it.
    numbers: Vec<(u32, LaneId)>,
    next_lane: u32,
    poster: Poster,
    windows: Windows,
    batch: Box<[sys::ibv_wc; BATCH]>,
    /// Found while arming, fencing or destroying; handed out before anything newer.
    stash: VecDeque<Completion>,
    /// Lanes that failed in the batch being read.
    failing: Vec<LaneId>,
    /// Receives that lanes took from the shared queue beyond their share in the batch being read.
    overdrawn: u32,
    armed: bool,
    polls: u32,
    fatal: Option<String>,
    /// What the engine has not asked for yet.
    events: Vec<RailEvent>,
}

// SAFETY: all pointers are to verbs objects, which any thread may use; the value is used by the one that owns it.
unsafe impl Send for VerbsContext {}

struct Shared {
    srq: *mut sys::ibv_srq,
    depth: u32,
}

impl VerbsContext {
    pub(super) fn new(
        device: Arc<VerbsDevice>,
        completion_depth: u32,
    ) -> Result<Self, FabricError> {
        let completions = Completions::new(&device, completion_depth)?;
        let srq = shared_receive_queue(&device, completion_depth);
        let windows = Windows::new(device.info_ref().caps.windows);
        let limits = Limits {
            max_message: device.info_ref().caps.max_message,
            max_read_sge: device.limits().max_sge_rd,
        };
        Ok(Self {
            device,
            completions: Some(completions),
            srq,
            lanes: Vec::new(),
            numbers: Vec::new(),
            next_lane: 0,
            windows,
            poster: Poster::new(limits),
            batch: Box::new([sys::ibv_wc::zeroed(); BATCH]),
            stash: VecDeque::with_capacity(MOST_PER_POLL),
            failing: Vec::with_capacity(BATCH),
            overdrawn: 0,
            armed: false,
            polls: 0,
            fatal: None,
            events: Vec::new(),
        })
    }

    fn place(&self) -> &Place {
        self.device.place()
    }

    fn index(&self, id: LaneId) -> Option<usize> {
        self.lanes.binary_search_by_key(&id, |lane| lane.id).ok()
    }

    fn lane(&self, id: LaneId, operation: &'static str) -> Result<usize, FabricError> {
        self.index(id).ok_or_else(|| {
            let kind = FabricErrorKind::LaneState {
                lane: id,
                state: "not there",
            };
            self.place().error(operation, kind)
        })
    }

    fn check_fatal(&self, operation: &'static str) -> Result<(), FabricError> {
        match &self.fatal {
            None => Ok(()),
            Some(what) => Err(self
                .place()
                .error(operation, FabricErrorKind::Fatal(what.clone()))),
        }
    }

    /// Creates the queue pair of `lane`, as far as INIT.
    fn create_queue_pair(&self, config: &LaneConfig) -> Result<*mut sys::ibv_qp, FabricError> {
        let place = self.place();
        let Some(completions) = &self.completions else {
            return Err(place.error("ibv_create_qp", FabricErrorKind::Fatal("closed".into())));
        };
        let asked = sys::ibv_qp_cap {
            max_send_wr: config.send_depth.max(1),
            max_recv_wr: if self.srq.is_some() {
                0
            } else {
                config.receive_depth.max(1)
            },
            max_send_sge: config.max_sge.max(1),
            max_recv_sge: u32::from(self.srq.is_none()),
            max_inline_data: config.max_inline,
        };
        let mut init = sys::ibv_qp_init_attr::zeroed();
        init.send_cq = completions.cq();
        init.recv_cq = completions.cq();
        init.srq = self
            .srq
            .as_ref()
            .map_or(ptr::null_mut(), |shared| shared.srq);
        init.qp_type = sys::IBV_QPT_RC;
        init.sq_sig_all = 0;
        init.cap = asked;
        // SAFETY: domain, completion queue and shared receive queue are live and outlive the queue pair.
        let qp = unsafe {
            self.device
                .lib()
                .create_qp(self.device.domain().raw(), &mut init)
        }
        .map_err(|errno| place.os("ibv_create_qp", errno.code()))?;
        let granted = init.cap;
        let checked = [
            ("send depth", asked.max_send_wr, granted.max_send_wr),
            ("gather elements", asked.max_send_sge, granted.max_send_sge),
            (
                "inline bytes",
                asked.max_inline_data,
                granted.max_inline_data,
            ),
            ("receive depth", asked.max_recv_wr, granted.max_recv_wr),
        ]
        .into_iter()
        // The receive capacity of a queue pair with a shared queue is whatever the driver left in it.
        .filter(|(what, ..)| self.srq.is_none() || *what != "receive depth")
        .try_for_each(|(what, asked, granted)| {
            place.limit("ibv_create_qp", what, u64::from(asked), u64::from(granted))
        })
        .and_then(|()| {
            let attributes = init_attributes(place.port);
            // SAFETY: made just above.
            unsafe {
                modify(
                    self.device.lib(),
                    qp,
                    attributes,
                    "ibv_modify_qp(INIT)",
                    place,
                )
            }
        });
        if let Err(error) = checked {
            self.destroy_queue_pair(qp);
            return Err(error);
        }
        Ok(qp)
    }

    fn destroy_queue_pair(&self, qp: *mut sys::ibv_qp) {
        // SAFETY: the caller has it from `create_queue_pair` and forgets it.
        if let Err(errno) = unsafe { self.device.lib().destroy_qp(qp) } {
            tracing::warn!(%errno, "ibv_destroy_qp");
        }
    }

    /// Posts `count` receives for the lane at `index`.
    fn replenish(&mut self, index: usize, count: u32) -> Result<(), FabricError> {
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        let queue = match &self.srq {
            Some(shared) => ReceiveQueue::Shared(shared.srq),
            None => ReceiveQueue::Lane(lane.id, lane.qp),
        };
        let (posted, result) = self.poster.post_receives(queue, count);
        match result {
            Ok(()) => {}
            // A full shared queue holds all that is promised.
            Err(libc::ENOMEM) if self.srq.is_some() => {
                lane.receives += count;
                return Ok(());
            }
            Err(libc::ENOMEM) => {
                lane.receives += posted;
                let kind = FabricErrorKind::QueueFull {
                    queue: "receive queue",
                    depth: lane.config.receive_depth,
                };
                return Err(self.place().error("ibv_post_recv", kind));
            }
            Err(errno) => {
                lane.receives += posted;
                return Err(self.place().os("ibv_post_recv", errno));
            }
        }
        lane.receives += posted;
        Ok(())
    }
}

impl Context for VerbsContext {
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError> {
        if self.windows.are_into(mr) {
            return Err(self.place().os("ibv_dereg_mr", libc::EBUSY));
        }
        self.device.deregister(mr)
    }

    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError> {
        const CALL: &str = "create_lane";
        self.check_fatal(CALL)?;
        let place = self.place();
        let fits = self.device.info_ref().caps.check_lane(config);
        fits.map_err(|kind| place.error(CALL, kind))?;
        if let Some(shared) = &self.srq {
            let promised = self
                .lanes
                .iter()
                .filter(|lane| lane.state != LaneState::Fenced)
                .map(|lane| u64::from(lane.config.receive_depth))
                .sum::<u64>();
            if promised + u64::from(config.receive_depth) > u64::from(shared.depth) {
                let kind = FabricErrorKind::QueueFull {
                    queue: "shared receive queue",
                    depth: shared.depth,
                };
                return Err(place.error(CALL, kind));
            }
        }
        if self.next_lane > LaneId::LAST.0 {
            let what = "no lane identifier is left".to_owned();
            return Err(place.error(CALL, FabricErrorKind::Unavailable(what)));
        }
        let psn = random_psn(place)?;
        let qp = self.create_queue_pair(config)?;
        // SAFETY: made just above.
        let qpn = unsafe { (*qp).qp_num };
        let id = LaneId(self.next_lane);
        self.next_lane += 1;
        let address = self.device.lane_address(qpn, psn);
        let index = self.lanes.len();
        self.lanes.push(Lane {
            id,
            state: LaneState::Created,
            config: *config,
            qp,
            qpn,
            address,
            gid_index: self.device.gid_index(),
            sent: Outstanding::new(config.send_depth),
            receives: 0,
        });
        match self
            .numbers
            .binary_search_by_key(&qpn, |(number, _)| *number)
        {
            Ok(at) | Err(at) => self.numbers.insert(at, (qpn, id)),
        }
        let address = LaneAddress::new(address.encode());
        let posted = self.replenish(index, config.receive_depth);
        match (posted, address) {
            (Ok(()), Some(address)) => Ok((id, address)),
            (posted, _) => {
                let _ = self.destroy_lane(id);
                Err(posted.err().unwrap_or_else(|| {
                    self.place()
                        .error(CALL, FabricErrorKind::BadAddress("too long"))
                }))
            }
        }
    }

    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        _host: IpAddr,
        _dial: bool,
    ) -> Result<(), FabricError> {
        const CALL: &str = "connect_lane";
        self.check_fatal(CALL)?;
        let index = self.lane(lane, CALL)?;
        let place = self.device.place();
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        if lane.state != LaneState::Created {
            let kind = FabricErrorKind::LaneState {
                lane: lane.id,
                state: lane.state.word(),
            };
            return Err(place.error(CALL, kind));
        }
        let bad = |what| place.error(CALL, FabricErrorKind::BadAddress(what));
        let theirs = VerbsAddress::decode(remote).map_err(bad)?;
        let ours = lane.address;
        let path = Path {
            config: self.device.config(),
            gid_index: lane.gid_index,
            max_initiated_reads: self.device.reads().1,
            most_retries: self.device.most_retries(),
        };
        let rtr = rtr_attributes(&ours, &theirs, path).map_err(bad)?;
        let rts = rts_attributes(&ours, &theirs, path);
        let (id, qp, lib) = (lane.id, lane.qp, self.device.lib());
        // SAFETY: a lane in this state has a live queue pair. If this fails it stays in INIT, and may be tried again.
        unsafe { modify(lib, qp, rtr, "ibv_modify_qp(RTR)", place)? };
        // SAFETY: as above.
        if let Err(error) = unsafe { modify(lib, qp, rts, "ibv_modify_qp(RTS)", place) } {
            // Half connected is of no use.
            self.fail_lane(id)?;
            return Err(error);
        }
        lane.state = LaneState::Connected;
        Ok(())
    }

    unsafe fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        let refuse = |source| PostError { posted: 0, source };
        let index = self.lane(lane, "ibv_post_send").map_err(refuse)?;
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        if lane.state == LaneState::Fenced {
            // No device any more: what is posted flushes at once, within the depth that was granted.
            let room = lane.sent.depth() as usize;
            let taken = requests.iter().take(room);
            self.stash.extend(taken.map(|request| Completion {
                lane: lane.id,
                kind: CompletionKind::Sent { id: request.id },
                status: Status::Flushed,
                vendor_error: 0,
            }));
            if requests.len() > room {
                let kind = FabricErrorKind::QueueFull {
                    queue: "send queue",
                    depth: lane.sent.depth(),
                };
                let source = self.device.place().error("ibv_post_send", kind);
                return Err(PostError {
                    posted: room,
                    source,
                });
            }
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.poster.post(self.device.place(), lane, requests, sges) }
    }

    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError> {
        let index = self.lane(lane, "bind_window")?;
        let Some(lane) = self.lanes.get_mut(index) else {
            let kind = FabricErrorKind::Fatal("closed".into());
            return Err(self.device.place().error("bind_window", kind));
        };
        let (place, domain) = (self.device.place(), self.device.domain());
        let (windows, poster) = (&mut self.windows, &mut self.poster);
        self.device.with_region(bind, |region| {
            windows.bind(place, domain, poster, lane, region, bind)
        })
    }

    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        let index = self.lane(lane, "invalidate_window")?;
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        self.windows
            .invalidate(self.device.place(), &mut self.poster, lane, id, window)
    }

    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError> {
        const CALL: &str = "ibv_post_recv";
        let index = self.lane(lane, CALL)?;
        let Some(lane) = self.lanes.get(index) else {
            return Ok(());
        };
        if matches!(lane.state, LaneState::Failed | LaneState::Fenced) {
            let kind = FabricErrorKind::LaneState {
                lane: lane.id,
                state: lane.state.word(),
            };
            return Err(self.place().error(CALL, kind));
        }
        let depth = lane.config.receive_depth;
        if lane
            .receives
            .checked_add(count)
            .is_none_or(|total| total > depth)
        {
            let kind = FabricErrorKind::QueueFull {
                queue: "receive queue",
                depth,
            };
            return Err(self.place().error(CALL, kind));
        }
        self.replenish(index, count)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        if self.armed {
            // Sleepers are woken by either kind of event, and both must be taken off their descriptors.
            if let Some(completions) = &mut self.completions
                && completions.drain(&self.device)?
            {
                self.armed = false;
            }
            self.handle_events()?;
        } else {
            self.polls = self.polls.wrapping_add(1);
            if self.polls.is_multiple_of(EVENT_INTERVAL) {
                self.handle_events()?;
            }
        }
        if !self.stash.is_empty() {
            let take = self.stash.len().min(MOST_PER_POLL);
            out.extend(self.stash.drain(..take));
            return Ok(());
        }
        self.check_fatal("poll")?;
        for _ in 0..MOST_PER_POLL / BATCH {
            let full = self.poll_device(out)? == BATCH;
            if !self.failing.is_empty() {
                // Whatever else they find comes after, from the stash.
                return self.settle_failures();
            }
            if !full {
                break;
            }
        }
        Ok(())
    }

    fn events(&mut self, out: &mut Vec<RailEvent>) {
        out.append(&mut self.events);
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        self.check_fatal("arm")?;
        if !self.stash.is_empty() {
            return Ok(false);
        }
        self.handle_events()?;
        if let Some(completions) = &mut self.completions {
            completions.arm(&self.device)?;
        }
        self.armed = true;
        // Completions that came before the queue was armed make no event.
        self.drain_to_stash()?;
        self.settle_failures()?;
        Ok(self.stash.is_empty() && self.events.is_empty() && self.fatal.is_none())
    }

    fn wait_fd(&self) -> RawFd {
        self.completions.as_ref().map_or(-1, Completions::wait_fd)
    }

    fn fence_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        let index = self.lane(lane, "fence_lane")?;
        self.fence(index)
    }

    fn destroy_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        let index = self.lane(lane, "destroy_lane")?;
        self.fence(index)?;
        self.stash.retain(|completion| completion.lane != lane);
        // Failures settled by the fence do not remove lanes, so the index still holds.
        self.lanes.remove(index);
        Ok(())
    }
}

impl Drop for VerbsContext {
    fn drop(&mut self) {
        // Events first: destroying an object waits for the acknowledgement of its events.
        let _ = self.handle_events();
        // A window holds its queue pair. None can be used any more, for nobody polls; the queue pairs follow at once.
        self.windows.free_all();
        for lane in std::mem::take(&mut self.lanes) {
            if !lane.qp.is_null() {
                self.destroy_queue_pair(lane.qp);
            }
        }
        if let Some(shared) = self.srq.take() {
            // SAFETY: all queue pairs that drew from it are gone.
            if let Err(errno) = unsafe { self.device.lib().destroy_srq(shared.srq) } {
                tracing::warn!(%errno, "ibv_destroy_srq");
            }
        }
        if let Some(completions) = self.completions.take() {
            completions.destroy(&self.device);
        }
        self.device.context_closed();
    }
}

/// A shared receive queue, where wanted and possible. Every receive makes a completion, so the completion queue's
/// depth is all it can need.
fn shared_receive_queue(device: &VerbsDevice, completion_depth: u32) -> Option<Shared> {
    let limits = device.limits();
    if !device.config().shared_receive_queue || !limits.shared_receive_queue() {
        return None;
    }
    let depth = completion_depth.clamp(1, limits.max_srq_wr);
    let mut init = sys::ibv_srq_init_attr::zeroed();
    init.attr.max_wr = depth;
    init.attr.max_sge = 1;
    // SAFETY: the domain is live and outlives the queue.
    match unsafe { device.lib().create_srq(device.domain().raw(), &mut init) } {
        Ok(srq) => Some(Shared { srq, depth }),
        Err(errno) => {
            let name = &device.place().device;
            tracing::info!(device = %name, %errno, "no shared receive queue; each lane gets its own");
            None
        }
    }
}
