//! The data path of one simulated rail: lanes, posts, polls. One thread owns it; it locks the net for each call.

use std::{net::IpAddr, os::fd::RawFd, sync::Arc};

use parking_lot::MutexGuard;

use super::{
    completion::Waker,
    device::SimDevice,
    lane::{Lane, LaneState},
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{
    Completion, CompletionKind, Context, FabricError, FabricErrorKind, LaneAddress, LaneConfig,
    LaneId, MrId, PostError, RailEvent, Sge, Window, WindowBind, WindowId, WorkRequest,
};

/// Most completions of one poll.
const POLL_BATCH: usize = 64;

/// Most events that one call of a free-running context drives.
const EVENTS_PER_CALL: usize = 128;

const MAGIC: [u8; 4] = *b"SIM1";

pub(super) struct SimContext {
    device: Arc<SimDevice>,
    waker: Arc<Waker>,
}

impl SimContext {
    pub(super) fn new(device: Arc<SimDevice>, waker: Arc<Waker>) -> Self {
        Self { device, waker }
    }

    fn at(&self, lane: LaneId) -> At {
        At {
            device: self.device.index,
            lane,
        }
    }

    /// The locked world, if the device is still part of it.
    fn world(&self, operation: &'static str) -> Result<MutexGuard<'_, World>, FabricError> {
        let world = self.device.world.lock();
        if let Some(device) = world.devices.get(self.device.index) {
            device.alive(operation)?;
        }
        Ok(world)
    }

    fn lane_error(
        &self,
        operation: &'static str,
        lane: LaneId,
        state: &'static str,
    ) -> FabricError {
        self.device
            .error(operation, FabricErrorKind::LaneState { lane, state })
    }

    fn no_lane(&self, operation: &'static str, lane: LaneId) -> FabricError {
        self.lane_error(operation, lane, "unknown")
    }

    fn address_of(&self, lane: LaneId) -> Option<LaneAddress> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.device.net.to_le_bytes());
        bytes.extend((self.device.index as u64).to_le_bytes());
        bytes.extend(lane.0.to_le_bytes());
        LaneAddress::new(bytes)
    }

    fn parse_address(&self, address: &LaneAddress) -> Result<At, &'static str> {
        let rest = address.as_bytes().strip_prefix(&MAGIC);
        let rest = rest.ok_or("not of a simulated device")?;
        let (net, rest) = rest.split_first_chunk().ok_or("truncated")?;
        let (device, rest) = rest.split_first_chunk().ok_or("truncated")?;
        let lane: &[u8; 4] = rest.try_into().map_err(|_| "wrong length")?;
        if u64::from_le_bytes(*net) != self.device.net {
            return Err("of another simulated network");
        }
        let device = usize::try_from(u64::from_le_bytes(*device)).map_err(|_| "no such device")?;
        Ok(At {
            device,
            lane: LaneId(u32::from_le_bytes(*lane)),
        })
    }

    /// In a free-running net, lets events happen until this context has a completion, for a bounded while.
    fn drive(&self, world: &mut World) {
        if !world.config.free_running {
            return;
        }
        for _ in 0..EVENTS_PER_CALL {
            if self.has_completions(world) || !world.step() {
                break;
            }
        }
    }

    fn has_completions(&self, world: &World) -> bool {
        world.devices.get(self.device.index).is_none_or(|device| {
            device.gone.is_some()
                || !device.events.is_empty()
                || device.queue.as_ref().is_none_or(|queue| !queue.is_empty())
        })
    }
}

impl Context for SimContext {
    fn deregister(&mut self, mr: MrId) -> Result<(), FabricError> {
        const OPERATION: &str = "deregister";
        let mut world = self.world(OPERATION)?;
        if let Some(device) = world.devices.get_mut(self.device.index) {
            if device.regions.has_windows(mr) {
                return Err(device.error(OPERATION, FabricErrorKind::Os(libc::EBUSY)));
            }
            if device.regions.deregister(mr) {
                return Ok(());
            }
        }
        let kind = FabricErrorKind::Memory(format!("no registration {}", mr.0));
        Err(self.device.error(OPERATION, kind))
    }

    fn create_lane(&mut self, config: &LaneConfig) -> Result<(LaneId, LaneAddress), FabricError> {
        const OPERATION: &str = "create lane";
        let mut world = self.world(OPERATION)?;
        let fits = world.config.caps.check_lane(config);
        fits.map_err(|kind| self.device.error(OPERATION, kind))?;
        let exhausted = || {
            self.device
                .error(OPERATION, FabricErrorKind::Os(libc::ENOMEM))
        };
        let device = world
            .devices
            .get_mut(self.device.index)
            .ok_or_else(exhausted)?;
        let lane = LaneId(device.next_lane);
        device.next_lane = device.next_lane.checked_add(1).ok_or_else(exhausted)?;
        let address = self.address_of(lane).ok_or_else(exhausted)?;
        device.lanes.insert(lane, Lane::new(*config));
        world.trace(self.at(lane), TraceEvent::State("created"));
        Ok((lane, address))
    }

    fn connect_lane(
        &mut self,
        lane: LaneId,
        remote: &LaneAddress,
        _host: IpAddr,
        _dial: bool,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "connect lane";
        let peer = self.parse_address(remote).map_err(|why| {
            self.device
                .error(OPERATION, FabricErrorKind::BadAddress(why))
        })?;
        let mut world = self.world(OPERATION)?;
        let at = self.at(lane);
        let state = world
            .lane_mut(at)
            .ok_or_else(|| self.no_lane(OPERATION, lane))?;
        if state.state != LaneState::Unconnected {
            return Err(self.lane_error(OPERATION, lane, state.state.name()));
        }
        state.peer = Some(peer);
        state.state = LaneState::Ready;
        world.trace(at, TraceEvent::State("ready"));
        Ok(())
    }

    unsafe fn post(
        &mut self,
        lane: LaneId,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        let mut world = self
            .world("post")
            .map_err(|source| PostError { posted: 0, source })?;
        let at = self.at(lane);
        if world.lane_mut(at).is_none() {
            let source = self.no_lane("post", lane);
            return Err(PostError { posted: 0, source });
        }
        // SAFETY: the caller's promise.
        unsafe { world.post(at, requests, sges) }
    }

    fn bind_window(&mut self, lane: LaneId, bind: &WindowBind) -> Result<Window, FabricError> {
        const OPERATION: &str = "bind a window";
        let mut world = self.world(OPERATION)?;
        world
            .bind_window(self.at(lane), bind)
            .map_err(|kind| self.device.error(OPERATION, kind))
    }

    fn invalidate_window(
        &mut self,
        lane: LaneId,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        const OPERATION: &str = "invalidate a window";
        let mut world = self.world(OPERATION)?;
        world
            .invalidate_window(self.at(lane), id, window)
            .map_err(|kind| self.device.error(OPERATION, kind))
    }

    fn post_receives(&mut self, lane: LaneId, count: u32) -> Result<(), FabricError> {
        const OPERATION: &str = "post receives";
        let mut world = self.world(OPERATION)?;
        let at = self.at(lane);
        let state = world
            .lane_mut(at)
            .ok_or_else(|| self.no_lane(OPERATION, lane))?;
        let depth = state.config.receive_depth;
        if depth - state.receive_used < count {
            world.stats.queue_full += 1;
            let queue = "receive queue";
            let kind = FabricErrorKind::QueueFull { queue, depth };
            return Err(self.device.error(OPERATION, kind));
        }
        state.receive_used += count;
        if state.state == LaneState::Error {
            world.flush_receives(at, count);
        } else {
            state.receives += count;
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        let mut guard = self.world("poll")?;
        self.drive(&mut guard);
        let world = &mut *guard;
        let reorder = world.config.reorder_completions;
        let Some(device) = world.devices.get_mut(self.device.index) else {
            return Ok(());
        };
        device.alive("poll")?;
        for _ in 0..POLL_BATCH {
            let entry = device
                .queue
                .as_mut()
                .and_then(|queue| queue.pop(reorder, &mut world.rng));
            let Some(entry) = entry else {
                break;
            };
            let completion = entry.completion;
            let mut delivered = None;
            if let Some(lane) = device.lanes.get_mut(&completion.lane) {
                match completion.kind {
                    CompletionKind::Sent { id } => {
                        lane.send_used -= entry.frees;
                        delivered = Some(id);
                    }
                    CompletionKind::Received { .. } => lane.receive_used -= entry.frees,
                }
            }
            let at = self.at(completion.lane);
            let event = TraceEvent::Deliver { id: delivered };
            world.recorder.record(world.now, at, event);
            out.push(completion);
        }
        Ok(())
    }

    fn events(&mut self, out: &mut Vec<RailEvent>) {
        let mut world = self.device.world.lock();
        if let Some(device) = world.devices.get_mut(self.device.index) {
            out.append(&mut device.events);
        }
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        let mut world = self.world("arm")?;
        self.drive(&mut world);
        self.waker.drain();
        // Nobody else may be awake to drive what is still to happen.
        let free_running = world.config.free_running;
        if self.has_completions(&world) {
            return Ok(false);
        }
        if free_running && world.next_event().is_some() {
            // It may be a sender that waits for a receive which another thread would post if it had the processor.
            drop(world);
            std::thread::yield_now();
            return Ok(false);
        }
        if let Some(queue) = world
            .devices
            .get_mut(self.device.index)
            .and_then(|device| device.queue.as_mut())
        {
            queue.armed = true;
        }
        Ok(true)
    }

    fn wait_fd(&self) -> RawFd {
        self.waker.fd()
    }

    fn fence_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        const OPERATION: &str = "fence lane";
        let mut world = self.world(OPERATION)?;
        let at = self.at(lane);
        if world.lane(at).is_none() {
            return Err(self.no_lane(OPERATION, lane));
        }
        world.break_lane(at);
        Ok(())
    }

    fn destroy_lane(&mut self, lane: LaneId) -> Result<(), FabricError> {
        const OPERATION: &str = "destroy lane";
        let mut world = self.device.world.lock();
        if let Some(device) = world.devices.get(self.device.index)
            && device.gone.is_some()
        {
            // Its lanes went with it, as a kernel sees to when a device is pulled out.
            return Ok(());
        }
        let removed = world.devices.get_mut(self.device.index).and_then(|device| {
            if let Some(queue) = device.queue.as_mut() {
                queue.discard(lane);
            }
            device.regions.remove_windows_of(lane);
            device.lanes.remove(&lane)
        });
        if removed.is_none() {
            return Err(self.no_lane(OPERATION, lane));
        }
        world.trace(self.at(lane), TraceEvent::State("destroyed"));
        Ok(())
    }
}

impl Drop for SimContext {
    fn drop(&mut self) {
        // The device's own handle is dropped after this and locks again.
        let mut world = self.device.world.lock();
        if let Some(device) = world.devices.get_mut(self.device.index) {
            for lane in device.lanes.keys() {
                device.regions.remove_windows_of(*lane);
            }
            device.lanes.clear();
            device.queue = None;
        }
    }
}
