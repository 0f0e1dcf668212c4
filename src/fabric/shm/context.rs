//! The data path of the shared-memory rail: lanes to look at, and an epoll set for everything else. One thread owns it.
//!
//! A lane with traffic is *hot*: every poll looks at its peer's outbox, which costs one cache line and no system call.
//! A lane that has been idle for long, and every lane when the owner wants to sleep, announces that it sleeps and is
//! looked at again only when its socket becomes readable, because the peer then sends a message with each change.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token as Key, unix::SourceFd};

use super::{
    super::{
        Completion, Context, Device, FabricError, FabricErrorKind, LaneAddress, LaneConfig, LaneId,
        MrId, PostError, Sge, Status, Window, WindowBind, WindowId, WorkRequest,
        software::{Alarm, Failure, Timing, after, os_error},
    },
    connect::Pending,
    copier::Copier,
    device::ShmDevice,
    files::Mappings,
    lane::{Common, Lane, Phase},
    memory::{MemoryView, Own},
    wire::{Address, Token},
};

const LISTENER: Key = Key(0);
const TIMER: Key = Key(1);
/// Lanes have the key `LANES + id`, accepted sockets `PENDING + number`.
const LANES: usize = 2;
const PENDING: usize = usize::MAX / 2;

/// Most completions of one poll.
const POLL_COMPLETIONS: usize = 256;
/// Most lanes serviced by one poll.
const POLL_LANES: usize = 64;
/// Polls between two looks at the epoll set, as long as lanes are hot.
const EVENT_POLLS: u32 = 64;

/// See the module's description.
#[derive(Debug)]
pub(super) struct ShmContext {
    pub(super) device: Arc<ShmDevice>,
    pub(super) common: Common,
    pub(super) poll: Poll,
    events: Events,
    pub(super) listener: OwnedFd,
    pub(super) listener_ready: bool,
    pub(super) listener_pause: Option<Instant>,
    alarm: Alarm,
    pub(super) lanes: HashMap<LaneId, Box<Lane>>,
    next_lane: u32,
    /// Hot lanes, and failed ones with completions, in turn.
    hot: VecDeque<LaneId>,
    /// Polls until the epoll set is looked at.
    until_events: u32,
    pub(super) pending: BTreeMap<usize, Pending>,
    pub(super) next_pending: usize,
}

impl ShmContext {
    pub(super) fn new(device: Arc<ShmDevice>, listener: OwnedFd) -> Result<Self, FabricError> {
        let failed = |operation, error: &io::Error| device.error(operation, os_error(error));
        let poll = Poll::new().map_err(|e| failed("epoll_create1", &e))?;
        let alarm = Alarm::new().map_err(|e| failed("timerfd_create", &e))?;
        let registry = poll.registry();
        for (fd, key) in [(listener.as_raw_fd(), LISTENER), (alarm.as_raw_fd(), TIMER)] {
            registry
                .register(&mut SourceFd(&fd), key, Interest::READABLE)
                .map_err(|e| failed("epoll_ctl", &e))?;
        }
        let config = device.config();
        let common = Common {
            memory: MemoryView::new(Arc::clone(device.registry())),
            copier: Copier::new(),
            mappings: Mappings::default(),
            slice: config.slice.max(1),
            timing: Timing {
                connect: config.connect_timeout,
                hello: config.hello_timeout,
                rnr: config.rnr_timeout,
                peer: config.peer_timeout,
            },
        };
        Ok(Self {
            device,
            common,
            poll,
            events: Events::with_capacity(256),
            listener,
            listener_ready: false,
            listener_pause: None,
            alarm,
            lanes: HashMap::new(),
            next_lane: 1,
            hot: VecDeque::new(),
            until_events: 0,
            pending: BTreeMap::new(),
            next_pending: PENDING,
        })
    }

    pub(super) fn lane_state(
        &self,
        operation: &'static str,
        lane: LaneId,
        state: &'static str,
    ) -> FabricError {
        let kind = FabricErrorKind::LaneState { lane, state };
        self.device.error(operation, kind)
    }

    /// Makes sure that the timer fires no later than `at`.
    pub(super) fn schedule(&mut self, at: Option<Instant>) {
        self.alarm.no_later_than(at);
    }

    /// Has the next polls look at lane `id`.
    pub(super) fn enqueue(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id).filter(|lane| !lane.is_hot) {
            lane.is_hot = true;
            lane.wake_up();
            self.hot.push_back(id);
        }
    }

    /// Learns what became ready.
    fn gather_events(&mut self) -> Result<(), FabricError> {
        self.until_events = EVENT_POLLS;
        match self.poll.poll(&mut self.events, Some(Duration::ZERO)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(self.device.error("epoll_wait", os_error(&error))),
        }
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        for event in &events {
            match event.token() {
                LISTENER => self.listener_ready = true,
                TIMER => {}
                Key(key) if key >= PENDING => self.read_pending(key),
                Key(key) => {
                    let Ok(id) = u32::try_from(key - LANES) else {
                        continue;
                    };
                    let id = LaneId(id);
                    let Some(lane) = self.lanes.get_mut(&id) else {
                        continue;
                    };
                    match lane.phase {
                        Phase::Greeting => self.read_greeting(id),
                        _ => {
                            lane.readable |=
                                event.is_readable() || event.is_read_closed() || event.is_error();
                            self.enqueue(id);
                        }
                    }
                }
            }
        }
        // A full set may have left some behind.
        if events.iter().count() >= events.capacity() {
            self.until_events = 0;
        }
        events.clear();
        self.events = events;
        Ok(())
    }

    /// Handles deadlines if the timer should have fired.
    fn expire(&mut self) {
        let Some(now) = self.alarm.ring() else {
            return;
        };
        if self.listener_pause.is_some_and(|until| until <= now) {
            self.listener_pause = None;
            self.listener_ready = true;
        }
        self.pending
            .retain(|_, pending| pending.deadline.is_none_or(|deadline| deadline > now));
        let mut next = self
            .pending
            .values()
            .filter_map(|pending| pending.deadline)
            .min();
        next = [next, self.listener_pause].into_iter().flatten().min();
        let mut due = Vec::new();
        for lane in self.lanes.values_mut() {
            if lane.next_deadline().is_some_and(|deadline| deadline <= now) {
                lane.expire(now, &self.common.timing);
                due.push(lane.id);
            }
            next = [next, lane.next_deadline()].into_iter().flatten().min();
        }
        for id in due {
            self.enqueue(id);
        }
        self.schedule(next);
    }

    /// Whether `lane` may bind windows and take them back: it works, and its send queue has room.
    fn check_windows_of(&self, operation: &'static str, lane: LaneId) -> Result<(), FabricError> {
        let checked = self
            .lanes
            .get(&lane)
            .map_or(Err("unknown"), |lane| lane.check_windows());
        match checked {
            Ok(room) => room.map_err(|kind| self.device.error(operation, kind)),
            Err(state) => Err(self.lane_state(operation, lane, state)),
        }
    }

    /// Reports what was asked of a window as done.
    fn window_done(&mut self, lane: LaneId, id: u64) {
        if let Some(state) = self.lanes.get_mut(&lane) {
            state.window_done(id);
        }
        self.enqueue(lane);
    }
}

/// The key of a lane's socket in the epoll set.
pub(super) fn lane_key(id: LaneId) -> Key {
    Key(LANES + id.0 as usize)
}

impl Context for ShmContext {
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError> {
        let region = self.common.memory.deregister(mr);
        let region = region.map_err(|kind| self.device.error("deregister", kind))?;
        // Requests that arrive for it are refused from here on. Those that name it as a source must not go on.
        let file = region.own().as_ref().filter(|gone| {
            let number = gone.file.number;
            let other = |own: &Own| own.as_ref().is_none_or(|own| own.file.number != number);
            self.device.registry().all(other)
        });
        let mut busy = Vec::new();
        for lane in self.lanes.values_mut() {
            if lane.touches(&region) {
                lane.fail(Failure::new(Status::LocalProtection));
                busy.push(lane.id);
            } else if let Some(file) = file {
                lane.forget_file(file.file.number);
                busy.push(lane.id);
            }
        }
        for id in busy {
            self.enqueue(id);
        }
        Ok(())
    }

    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError> {
        const OPERATION: &str = "create_lane";
        let fits = self.device.info().caps.check_lane(config);
        fits.map_err(|kind| self.device.error(OPERATION, kind))?;
        let unavailable = |text| {
            self.device
                .error(OPERATION, FabricErrorKind::Unavailable(text))
        };
        let id = LaneId(self.next_lane);
        let next = self
            .next_lane
            .checked_add(1)
            .ok_or_else(|| unavailable("all lane numbers have been used".into()))?;
        let mut token: Token = [0; 16];
        getrandom::fill(&mut token)
            .map_err(|error| unavailable(format!("random numbers: {error}")))?;
        let address = self.device.address(token).encode();
        let address = address.ok_or_else(|| {
            self.device
                .error(OPERATION, FabricErrorKind::BadAddress("too long"))
        })?;
        let lane = Lane::new(id, token, config)
            .map_err(|error| self.device.error("memfd_create", os_error(&error)))?;
        self.next_lane = next;
        self.lanes.insert(id, Box::new(lane));
        Ok((id, address))
    }

    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        _host: IpAddr,
        dial: bool,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "connect_lane";
        let address = Address::decode(remote).map_err(|what| {
            self.device
                .error(OPERATION, FabricErrorKind::BadAddress(what))
        })?;
        let Some(state) = self.lanes.get_mut(&lane) else {
            return Err(self.lane_state(OPERATION, lane, "unknown"));
        };
        if state.phase != Phase::Idle {
            return Err(self.lane_state(OPERATION, lane, "connected already"));
        }
        let deadline = after(self.common.timing.connect);
        state.peer_address = Some(address);
        state.deadline = deadline;
        if dial {
            state.phase = Phase::Awaiting;
            let state = self.lanes.get(&lane);
            // The peer may have connected first.
            if let Some(key) = state.and_then(|state| self.pending_for(state)) {
                self.adopt(lane, key);
            }
        } else {
            self.connect(lane, address)?;
        }
        self.schedule(deadline);
        Ok(())
    }

    unsafe fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        let refuse = |posted, source| Err(PostError { posted, source });
        let Some(state) = self.lanes.get_mut(&lane) else {
            return refuse(0, self.lane_state("post", lane, "unknown"));
        };
        if state.phase == Phase::Idle {
            return refuse(0, self.lane_state("post", lane, "not connected"));
        }
        let mut outcome = Ok(());
        for (posted, request) in requests.iter().enumerate() {
            // SAFETY: the caller's promise for each of its requests.
            let pushed = unsafe { state.push(request, sges, &mut self.common.memory) };
            if let Err(kind) = pushed {
                outcome = refuse(posted, self.device.error("post", kind));
                break;
            }
        }
        state.flush_posted(&self.common.timing);
        let deadline = state.next_deadline();
        self.schedule(deadline);
        self.enqueue(lane);
        outcome
    }

    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError> {
        const OPERATION: &str = "bind a window";
        self.check_windows_of(OPERATION, lane)?;
        let caps = self.device.info().caps.windows.as_ref();
        let window = self.common.memory.bind(lane, bind, caps);
        let window = window.map_err(|kind| self.device.error(OPERATION, kind))?;
        self.window_done(lane, bind.id);
        Ok(window)
    }

    /// A write under way is checked again before each turn of its bytes is copied, so it ends here, too; a read is
    /// checked once more when it has been taken.
    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "invalidate a window";
        self.check_windows_of(OPERATION, lane)?;
        let taken = self.common.memory.unbind(lane, window);
        taken.map_err(|kind| self.device.error(OPERATION, kind))?;
        self.window_done(lane, id);
        Ok(())
    }

    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError> {
        let Some(state) = self.lanes.get_mut(&lane) else {
            return Err(self.lane_state("post_receives", lane, "unknown"));
        };
        if let Err(depth) = state.post_receives(count) {
            let queue = "receive queue";
            let kind = FabricErrorKind::QueueFull { queue, depth };
            return Err(self.device.error("post_receives", kind));
        }
        if state.has_work() {
            self.enqueue(lane);
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        let limit = out.len() + POLL_COMPLETIONS;
        if self.until_events == 0 || self.hot.is_empty() {
            self.gather_events()?;
        } else {
            self.until_events -= 1;
        }
        self.expire();
        if self.listener_ready {
            self.accept();
        }
        for _ in 0..self.hot.len().min(POLL_LANES) {
            if out.len() >= limit {
                break;
            }
            let Some(id) = self.hot.pop_front() else {
                break;
            };
            let Some(lane) = self.lanes.get_mut(&id) else {
                continue;
            };
            if lane.service(&mut self.common) {
                lane.idle_rounds = 0;
            } else {
                lane.idle_rounds += 1;
            }
            lane.take_completions(out, limit);
            let deadline = lane.next_deadline();
            let stays = match lane.phase {
                Phase::Live => !lane.is_tired() || !lane.go_to_sleep(),
                _ => lane.has_work(),
            };
            lane.is_hot = stays;
            if stays {
                self.hot.push_back(id);
            }
            self.schedule(deadline);
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        // What became ready since the last look keeps the descriptor readable, so nothing else can be missed.
        self.until_events = 0;
        if self.listener_ready {
            return Ok(false);
        }
        while let Some(&id) = self.hot.front() {
            if let Some(lane) = self.lanes.get_mut(&id) {
                if !lane.go_to_sleep() {
                    return Ok(false);
                }
                lane.is_hot = false;
            }
            self.hot.pop_front();
        }
        Ok(true)
    }

    fn wait_fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    fn fence_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        let Some(state) = self.lanes.get_mut(&lane) else {
            return Err(self.lane_state("fence_lane", lane, "unknown"));
        };
        state.fail(Failure::new(Status::Flushed));
        if state.has_work() {
            self.enqueue(lane);
        }
        Ok(())
    }

    fn destroy_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        self.common.memory.unbind_all(lane);
        match self.lanes.remove(&lane) {
            // Ends it for the peer and closes the socket. A stale place in the list of hot lanes is skipped.
            Some(_) => Ok(()),
            None => Err(self.lane_state("destroy_lane", lane, "unknown")),
        }
    }
}
