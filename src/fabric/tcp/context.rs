//! The data path of the TCP rail: an epoll set over listener, timer and lanes. One thread owns it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use mio::{
    Events, Interest, Poll, Token as Key,
    net::{TcpListener, TcpStream},
    unix::SourceFd,
};

use super::{
    super::{
        Completion, Context, Device, FabricError, FabricErrorKind, LaneAddress, LaneConfig, LaneId,
        MrId, PostError, Sge, Status, Window, WindowBind, WindowId, WorkRequest,
        software::{Alarm, Failure, Timing, after, os_error},
    },
    device::TcpDevice,
    greet::Pending,
    lane::{Lane, Phase},
    memory::MemoryView,
    wire::{Token, decode_address, encode_address, same_token},
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

/// See the module's description.
#[derive(Debug)]
pub(super) struct TcpContext {
    pub(super) device: Arc<TcpDevice>,
    pub(super) timing: Timing,
    pub(super) poll: Poll,
    events: Events,
    pub(super) listener: TcpListener,
    pub(super) listener_ready: bool,
    pub(super) listener_pause: Option<Instant>,
    alarm: Alarm,
    memory: MemoryView,
    pub(super) lanes: HashMap<LaneId, Box<Lane>>,
    next_lane: u32,
    /// Lanes with something to do, in turn.
    ready: VecDeque<LaneId>,
    pub(super) pending: BTreeMap<usize, Pending>,
    pub(super) next_pending: usize,
}

impl TcpContext {
    pub(super) fn new(
        device: Arc<TcpDevice>,
        mut listener: TcpListener,
    ) -> Result<Self, FabricError> {
        let failed = |operation, error: &io::Error| device.error(operation, os_error(error));
        let poll = Poll::new().map_err(|e| failed("epoll_create1", &e))?;
        let alarm = Alarm::new().map_err(|e| failed("timerfd_create", &e))?;
        let registry = poll.registry();
        registry
            .register(&mut listener, LISTENER, Interest::READABLE)
            .and_then(|()| {
                registry.register(&mut SourceFd(&alarm.as_raw_fd()), TIMER, Interest::READABLE)
            })
            .map_err(|e| failed("epoll_ctl", &e))?;
        let config = device.config();
        Ok(Self {
            timing: Timing {
                connect: config.connect_timeout,
                hello: config.hello_timeout,
                rnr: config.rnr_timeout,
                peer: config.peer_timeout,
            },
            memory: MemoryView::new(Arc::clone(device.registry())),
            device,
            poll,
            events: Events::with_capacity(256),
            listener,
            listener_ready: false,
            listener_pause: None,
            alarm,
            lanes: HashMap::new(),
            next_lane: 1,
            ready: VecDeque::new(),
            pending: BTreeMap::new(),
            next_pending: PENDING,
        })
    }

    fn os(&self, operation: &'static str) -> impl Fn(io::Error) -> FabricError + use<> {
        let device = Arc::clone(&self.device);
        move |error| device.error(operation, os_error(&error))
    }

    fn lane_state(
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

    /// Has the next poll service lane `id`.
    pub(super) fn enqueue(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id).filter(|lane| !lane.queued) {
            lane.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Learns what became ready.
    fn gather_events(&mut self) -> Result<(), FabricError> {
        match self.poll.poll(&mut self.events, Some(Duration::ZERO)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(self.os("epoll_wait")(error)),
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
                    let closed = event.is_read_closed() || event.is_error();
                    lane.readable |= event.is_readable() || closed;
                    lane.writable |= event.is_writable() || event.is_error();
                    lane.hangup |= closed;
                    self.enqueue(id);
                }
            }
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
                lane.expire(now);
                due.push(lane.id);
            }
            next = [next, lane.next_deadline()].into_iter().flatten().min();
        }
        for id in due {
            self.enqueue(id);
        }
        self.schedule(next);
    }

    fn dial(
        &mut self,
        id: LaneId,
        to: SocketAddr,
        deadline: Option<Instant>,
    ) -> Result<(), FabricError> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let stream = TcpStream::connect(to).and_then(|mut stream| {
            self.tune(&stream)?;
            self.poll
                .registry()
                .register(&mut stream, lane_key(id), interest)?;
            Ok(stream)
        });
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Err(self.os("connect")(error)),
        };
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.stream = Some(stream);
            lane.phase = Phase::Connecting;
            lane.deadline = deadline;
        }
        Ok(())
    }

    /// Whether `lane` may bind windows and take them back: it works, and its send queue has room.
    fn check_windows_of(&self, operation: &'static str, lane: LaneId) -> Result<(), FabricError> {
        let state = match self.lanes.get(&lane) {
            None => "unknown",
            Some(state) if state.phase == Phase::Idle => "not connected",
            Some(state) if state.failure.is_some() || state.phase == Phase::Refusing => "failed",
            Some(state) => {
                let room = state.send.check_room();
                return room.map_err(|kind| self.device.error(operation, kind));
            }
        };
        Err(self.lane_state(operation, lane, state))
    }

    /// Reports what was asked of a window as done.
    fn window_done(&mut self, lane: LaneId, id: u64) {
        if let Some(state) = self.lanes.get_mut(&lane) {
            state.send.push_done(id);
            self.enqueue(lane);
        }
    }
}

/// The key of a lane's socket in the epoll set.
pub(super) fn lane_key(id: LaneId) -> Key {
    Key(LANES + id.0 as usize)
}

impl Context for TcpContext {
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError> {
        let region = self.memory.deregister(mr);
        let region = region.map_err(|kind| self.device.error("deregister", kind))?;
        // Frames that arrive for it are refused from here on. A train that is being sent from it must not go on.
        let mut failed = Vec::new();
        for lane in self.lanes.values_mut() {
            if lane.stream.is_some() && lane.transmitter.touches(&region) {
                lane.fail(Failure::new(Status::LocalProtection));
                failed.push(lane.id);
            }
        }
        for id in failed {
            self.enqueue(id);
        }
        Ok(())
    }

    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError> {
        let fits = self.device.info().caps.check_lane(config);
        fits.map_err(|kind| self.device.error("create_lane", kind))?;
        let id = LaneId(self.next_lane);
        let Some(next) = self.next_lane.checked_add(1) else {
            let kind = FabricErrorKind::Unavailable("all lane numbers have been used".into());
            return Err(self.device.error("create_lane", kind));
        };
        let mut token: Token = [0; 16];
        if let Err(error) = getrandom::fill(&mut token) {
            let kind = FabricErrorKind::Unavailable(format!("random numbers: {error}"));
            return Err(self.device.error("create_lane", kind));
        }
        let Some(address) = encode_address(self.device.local_addr().port(), &token) else {
            let kind = FabricErrorKind::BadAddress("too long");
            return Err(self.device.error("create_lane", kind));
        };
        self.next_lane = next;
        let lane = Lane::new(id, token, config, self.device.info().caps.max_message);
        self.lanes.insert(id, Box::new(lane));
        Ok((id, address))
    }

    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        host: IpAddr,
        dial: bool,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "connect_lane";
        let (port, peer_token) = decode_address(remote).map_err(|what| {
            self.device
                .error(OPERATION, FabricErrorKind::BadAddress(what))
        })?;
        let Some(state) = self.lanes.get_mut(&lane) else {
            return Err(self.lane_state(OPERATION, lane, "unknown"));
        };
        if state.phase != Phase::Idle {
            return Err(self.lane_state(OPERATION, lane, "connected already"));
        }
        let deadline = after(self.timing.connect);
        state.peer_token = peer_token;
        if dial {
            self.dial(lane, SocketAddr::new(host, port), deadline)?;
        } else {
            state.deadline = deadline;
            state.phase = Phase::Awaiting;
            let token = state.token;
            // The peer may have dialled first.
            let early = self.pending.iter().find_map(|(key, pending)| {
                let hello = pending
                    .hello
                    .filter(|hello| same_token(&hello.to, &token))?;
                Some((*key, hello))
            });
            if let Some((key, hello)) = early {
                self.adopt(lane, key, &hello);
            }
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
            let pushed = unsafe { state.send.push(request, sges, &mut self.memory) };
            if let Err(kind) = pushed {
                outcome = refuse(posted, self.device.error("post", kind));
                break;
            }
        }
        state.flush_posted(&mut self.memory, &self.timing);
        let (deadline, work) = (state.next_deadline(), state.has_work());
        self.schedule(deadline);
        if work {
            self.enqueue(lane);
        }
        outcome
    }

    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError> {
        const OPERATION: &str = "bind a window";
        self.check_windows_of(OPERATION, lane)?;
        let caps = self.device.info().caps.windows.as_ref();
        let window = self.memory.bind(lane, bind, caps);
        let window = window.map_err(|kind| self.device.error(OPERATION, kind))?;
        self.window_done(lane, bind.id);
        Ok(window)
    }

    /// A frame under way is checked again before each of its bytes is placed (`Lane::aim`), so it ends here, too.
    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "invalidate a window";
        self.check_windows_of(OPERATION, lane)?;
        let readable = self.memory.unbind(lane, window);
        let readable = readable.map_err(|kind| self.device.error(OPERATION, kind))?;
        self.window_done(lane, id);
        // An answer that is being sent from it must not go on.
        if let Some(range) = readable
            && let Some(state) = self.lanes.get_mut(&lane)
            && state.transmitter.touches(&range)
        {
            state.fail(Failure::new(Status::LocalProtection));
        }
        Ok(())
    }

    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError> {
        let Some(state) = self.lanes.get_mut(&lane) else {
            return Err(self.lane_state("post_receives", lane, "unknown"));
        };
        if let Err(depth) = state.receives.post(count) {
            let queue = "receive queue";
            let kind = FabricErrorKind::QueueFull { queue, depth };
            return Err(self.device.error("post_receives", kind));
        }
        if state.is_credit_due() || state.failure.is_some() {
            state.flush_posted(&mut self.memory, &self.timing);
            let (deadline, work) = (state.next_deadline(), state.has_work());
            self.schedule(deadline);
            if work {
                self.enqueue(lane);
            }
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        let limit = out.len() + POLL_COMPLETIONS;
        self.gather_events()?;
        self.expire();
        if self.listener_ready {
            self.accept();
        }
        for _ in 0..self.ready.len().min(POLL_LANES) {
            if out.len() >= limit {
                break;
            }
            let Some(id) = self.ready.pop_front() else {
                break;
            };
            let Some(lane) = self.lanes.get_mut(&id) else {
                continue;
            };
            lane.queued = false;
            lane.service(&mut self.memory, &self.timing);
            lane.take_completions(out, limit);
            let (deadline, work) = (lane.next_deadline(), lane.has_work());
            self.schedule(deadline);
            if work {
                self.enqueue(id);
            }
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        // What became ready since the last poll keeps the descriptor readable, so nothing else can be missed.
        Ok(self.ready.is_empty() && !self.listener_ready)
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
        self.memory.unbind_all(lane);
        match self.lanes.remove(&lane) {
            // Closes the socket. A stale place in the ready list is skipped.
            Some(_) => Ok(()),
            None => Err(self.lane_state("destroy_lane", lane, "unknown")),
        }
    }
}
