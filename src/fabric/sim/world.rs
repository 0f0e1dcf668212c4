//! Everything of one net behind one mutex: time, devices, lanes, events.
//!
//! Any thread may lock it. All choices come from one seeded generator and no collection has a random order, so a
//! single-threaded harness sees the same run for the same seed. No Rust reference to registered memory exists here.

use std::collections::BTreeMap;

use super::{
    completion::{CompletionQueue, Entry},
    config::SimConfig,
    event::{Event, EventQueue},
    faults::Faults,
    lane::{Lane, LaneState},
    memory::Regions,
    rng::Rng,
    stats::SimStats,
    trace::{Recorder, TraceEvent},
};
use crate::fabric::{
    Completion, CompletionKind, FabricError, FabricErrorKind, LaneId, RailEvent, Status,
};

/// The port number that every device has.
pub(super) const PORT: u8 = 1;

/// A lane of a device. Lane numbers repeat across devices, as queue pair numbers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) device: usize,
    pub(super) lane: LaneId,
}

pub(super) struct DeviceState {
    pub(super) name: String,
    /// Why it is gone, if it is.
    pub(super) gone: Option<String>,
    pub(super) handles: usize,
    pub(super) regions: Regions,
    pub(super) queue: Option<CompletionQueue>,
    pub(super) lanes: BTreeMap<LaneId, Lane>,
    pub(super) next_lane: u32,
    pub(super) bits_per_second: u64,
    /// Lanes in line for the port.
    ready: Vec<LaneId>,
    transmit_queued: bool,
    port_free_at: u64,
    /// What its context has not handed out yet.
    pub(super) events: Vec<RailEvent>,
}

impl DeviceState {
    pub(super) fn error(&self, operation: &'static str, kind: FabricErrorKind) -> FabricError {
        FabricError {
            device: self.name.clone(),
            port: PORT,
            operation,
            kind,
            hint: None,
        }
    }

    /// An error if the device is gone.
    pub(super) fn alive(&self, operation: &'static str) -> Result<(), FabricError> {
        match &self.gone {
            None => Ok(()),
            Some(why) => Err(self.error(operation, FabricErrorKind::Fatal(why.clone()))),
        }
    }
}

pub(super) struct World {
    pub(super) config: SimConfig,
    pub(super) rng: Rng,
    pub(super) now: u64,
    pub(super) devices: Vec<DeviceState>,
    pub(super) faults: Faults,
    pub(super) stats: SimStats,
    pub(super) recorder: Recorder,
    events: EventQueue,
}

impl World {
    pub(super) fn new(config: SimConfig) -> Self {
        Self {
            rng: Rng::new(config.seed),
            now: 0,
            devices: Vec::new(),
            faults: Faults::default(),
            stats: SimStats::default(),
            recorder: Recorder::new(config.trace_capacity),
            events: EventQueue::default(),
            config,
        }
    }

    /// The living device of that name, made if there is none. Counts one more handle.
    pub(super) fn device(&mut self, name: &str) -> usize {
        if let Some(index) = self.find(name) {
            self.devices[index].handles += 1;
            return index;
        }
        let regions = Regions::new(&mut self.rng);
        self.devices.push(DeviceState {
            name: name.to_owned(),
            gone: None,
            handles: 1,
            regions,
            queue: None,
            lanes: BTreeMap::new(),
            next_lane: 1,
            bits_per_second: self.config.bits_per_second,
            ready: Vec::new(),
            transmit_queued: false,
            port_free_at: 0,
            events: Vec::new(),
        });
        self.devices.len() - 1
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.devices
            .iter()
            .position(|device| device.name == name && device.gone.is_none())
    }

    pub(super) fn lane(&self, at: At) -> Option<&Lane> {
        self.devices.get(at.device)?.lanes.get(&at.lane)
    }

    pub(super) fn lane_mut(&mut self, at: At) -> Option<&mut Lane> {
        self.devices.get_mut(at.device)?.lanes.get_mut(&at.lane)
    }

    pub(super) fn trace(&mut self, at: At, event: TraceEvent) {
        self.recorder.record(self.now, at, event);
    }

    /// Adds an event. In a free-running net somebody must be awake to drive it.
    pub(super) fn schedule(&mut self, time: u64, event: Event) {
        self.events.push(time.max(self.now), event, &mut self.rng);
        if self.config.free_running {
            for queue in self.devices.iter_mut().filter_map(|d| d.queue.as_mut()) {
                queue.wake();
            }
        }
    }

    /// The time of the next event that will do something.
    pub(super) fn next_event(&mut self) -> Option<u64> {
        while let Some((time, event)) = self.events.peek() {
            // A timer that was stopped or moved costs no virtual time.
            let (at, moved_to) = match *event {
                Event::Timeout(at) => (at, self.lane(at).and_then(|lane| lane.deadline)),
                Event::Resume(at) => (at, self.lane(at).and_then(|lane| lane.resume_at)),
                _ => return Some(time),
            };
            if moved_to == Some(time) {
                return Some(time);
            }
            if let (Some((_, Event::Timeout(_))), Some(lane)) =
                (self.events.pop(), self.lane_mut(at))
            {
                lane.timer_queued = false;
                self.start_timer(at);
            }
        }
        None
    }

    /// Lets the next event happen. False if there is none.
    pub(super) fn step(&mut self) -> bool {
        if self.next_event().is_none() {
            return false;
        }
        let Some((time, event)) = self.events.pop() else {
            return false;
        };
        self.now = self.now.max(time);
        match event {
            Event::Transmit(device) => self.transmit(device),
            Event::Arrive(packet) => self.arrive(*packet),
            Event::Timeout(at) => self.on_timeout(at),
            Event::Resume(at) => self.on_resume(at),
            Event::Window(at) => self.on_window(at),
        }
        true
    }

    /// Makes sure that the lane's deadline, if it has one, is watched.
    pub(super) fn start_timer(&mut self, at: At) {
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        if let (Some(deadline), false) = (lane.deadline, lane.timer_queued) {
            lane.timer_queued = true;
            self.schedule(deadline, Event::Timeout(at));
        }
    }

    /// Puts the lane in line for its device's port if it has something to send.
    pub(super) fn kick(&mut self, at: At) {
        let Some(device) = self.devices.get_mut(at.device) else {
            return;
        };
        let Some(lane) = device.lanes.get_mut(&at.lane) else {
            return;
        };
        if lane.queued || !lane.has_work() {
            return;
        }
        lane.queued = true;
        device.ready.push(at.lane);
        if !device.transmit_queued {
            device.transmit_queued = true;
            let time = device.port_free_at;
            self.schedule(time, Event::Transmit(at.device));
        }
    }

    /// Sends one packet of a random lane of those in line.
    fn transmit(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.transmit_queued = false;
        if device.ready.is_empty() {
            return;
        }
        let chosen = self.rng.below(device.ready.len());
        let at = At {
            device: index,
            lane: device.ready.swap_remove(chosen),
        };
        if let Some(lane) = device.lanes.get_mut(&at.lane) {
            lane.queued = false;
        }
        let bytes = self.send_next(at);
        let speed = self.devices[index].bits_per_second;
        let busy = bytes.map_or(0, |bytes| SimConfig::wire_time(bytes, speed));
        let free_at = self.now.saturating_add(busy);
        self.devices[index].port_free_at = free_at;
        self.kick(at);
        let device = &mut self.devices[index];
        if !device.ready.is_empty() && !device.transmit_queued {
            device.transmit_queued = true;
            self.schedule(free_at, Event::Transmit(index));
        }
    }

    /// Has the context of a device report `event`.
    pub(super) fn report(&mut self, index: usize, event: RailEvent) {
        let at = At {
            device: index,
            lane: LaneId(0),
        };
        let word = match event {
            RailEvent::PortDown => "port down",
            RailEvent::PortActive => "port active",
            RailEvent::AddressChanged => "address changed",
            RailEvent::LaneFailed(_) => "lane failed",
        };
        self.trace(at, TraceEvent::State(word));
        if let Some(device) = self.devices.get_mut(index) {
            device.events.push(event);
            if let Some(queue) = device.queue.as_mut() {
                queue.wake();
            }
        }
    }

    /// Queues a completion; a full queue is the end of the context.
    pub(super) fn complete(&mut self, at: At, kind: CompletionKind, status: Status, frees: u32) {
        let Some(device) = self.devices.get_mut(at.device) else {
            return;
        };
        if device.gone.is_some() {
            return;
        }
        let Some(queue) = device.queue.as_mut() else {
            return;
        };
        let completion = Completion {
            lane: at.lane,
            kind,
            status,
            vendor_error: u32::from(status != Status::Success) * 0x51,
        };
        if !queue.push(Entry { completion, frees }) {
            let why = format!("completion queue overflow ({} entries)", queue.depth);
            self.stats.cq_overflows += 1;
            self.remove_device(at.device, why);
            return;
        }
        let length = queue.len();
        self.stats.completions += 1;
        self.stats.cq_high_water = self.stats.cq_high_water.max(length);
        let id = match kind {
            CompletionKind::Sent { id } => Some(id),
            CompletionKind::Received { .. } => None,
        };
        self.trace(at, TraceEvent::Complete { id, status });
    }

    /// Moves the lane to the error state: no packet passes it any more, and its requests and receives are flushed in
    /// order.
    pub(super) fn break_lane(&mut self, at: At) {
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        if lane.state == LaneState::Error {
            return;
        }
        lane.state = LaneState::Error;
        lane.deadline = None;
        lane.resume_at = None;
        lane.responses.clear();
        let requests = std::mem::take(&mut lane.requests);
        let receives = std::mem::take(&mut lane.receives);
        let windows = std::mem::take(&mut lane.windows);
        self.trace(at, TraceEvent::State("in error"));
        for asked in windows {
            self.complete(
                at,
                CompletionKind::Sent { id: asked.id },
                Status::Flushed,
                1,
            );
        }
        for request in requests {
            self.finish_request(at, request.id, Status::Flushed);
        }
        self.flush_receives(at, receives);
    }

    /// Completes a request that is no longer on the send queue.
    pub(super) fn finish_request(&mut self, at: At, id: u64, status: Status) {
        let Some(lane) = self.lane_mut(at) else {
            return;
        };
        let frees = std::mem::take(&mut lane.unreported) + 1;
        self.complete(at, CompletionKind::Sent { id }, status, frees);
    }

    pub(super) fn flush_receives(&mut self, at: At, count: u32) {
        for _ in 0..count {
            // Of a failed completion the immediate means nothing, so it is anything.
            let imm = self.rng.next_u32();
            self.complete(at, CompletionKind::Received { imm }, Status::Flushed, 1);
        }
    }

    /// The device disappears: no memory of it can be reached, and its context only fails.
    pub(super) fn remove_device(&mut self, index: usize, why: String) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        if device.gone.is_some() {
            return;
        }
        device.gone = Some(why);
        device.lanes.clear();
        device.ready.clear();
        device.regions.clear();
        if let Some(queue) = device.queue.as_mut() {
            queue.clear();
            queue.wake();
        }
        let at = At {
            device: index,
            lane: LaneId(0),
        };
        self.trace(at, TraceEvent::State("gone"));
    }
}
