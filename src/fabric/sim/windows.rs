//! Memory windows of the simulation: bound and taken back a while after they were asked to be, as on a device.
//!
//! A key opens nothing before its binding has taken effect, and an invalidation lets packets through until it has. So
//! whoever hands out a key too early, or takes pages back too early, is found out.

use super::{
    event::Event,
    lane::LaneState,
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{
    CompletionKind, FabricErrorKind, Status, Window, WindowBind, WindowCaps, WindowId,
};

/// What a lane was asked to do with a window.
pub(super) struct Asked {
    /// Of the completion.
    pub(super) id: u64,
    window: WindowId,
    /// Take it back rather than bind it.
    back: bool,
}

impl World {
    pub(super) fn bind_window(
        &mut self,
        at: At,
        bind: &WindowBind,
    ) -> Result<Window, FabricErrorKind> {
        let caps = self.window_caps()?;
        self.take_window_slot(at)?;
        let device = self.devices.get_mut(at.device).ok_or_else(no_device)?;
        let result = match device.regions.windows() {
            count if count >= caps.max => Err(FabricErrorKind::Limit {
                what: "number of windows",
                value: u64::from(count) + 1,
                limit: caps.max.into(),
            }),
            _ => device
                .regions
                .add_window(at.lane, bind)
                .map_err(|why| FabricErrorKind::Memory(why.to_owned())),
        };
        match &result {
            Ok(window) => self.ask(at, bind.id, window.id, false),
            Err(_) => self.return_window_slot(at),
        }
        result
    }

    pub(super) fn invalidate_window(
        &mut self,
        at: At,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricErrorKind> {
        let unknown = || FabricErrorKind::Memory(format!("no window {}", window.0));
        let lane = self.lane(at).ok_or_else(unknown)?;
        if lane
            .windows
            .iter()
            .any(|asked| asked.back && asked.window == window)
        {
            return Err(unknown());
        }
        let device = self.devices.get(at.device).ok_or_else(no_device)?;
        if !device.regions.is_window_of(at.lane, window) {
            return Err(unknown());
        }
        self.take_window_slot(at)?;
        self.ask(at, id, window, true);
        Ok(())
    }

    fn window_caps(&self) -> Result<WindowCaps, FabricErrorKind> {
        let none = || FabricErrorKind::Unavailable("this device has no memory windows".to_owned());
        self.config.caps.windows.ok_or_else(none)
    }

    /// Reserves a slot of the send queue of a lane that works.
    fn take_window_slot(&mut self, at: At) -> Result<(), FabricErrorKind> {
        let state = |state| FabricErrorKind::LaneState {
            lane: at.lane,
            state,
        };
        let lane = self.lane_mut(at).ok_or_else(|| state("unknown"))?;
        if lane.state != LaneState::Ready {
            return Err(state(lane.state.name()));
        }
        let depth = lane.config.send_depth;
        if lane.send_used >= depth {
            self.stats.queue_full += 1;
            let queue = "send queue";
            return Err(FabricErrorKind::QueueFull { queue, depth });
        }
        lane.send_used += 1;
        Ok(())
    }

    fn return_window_slot(&mut self, at: At) {
        if let Some(lane) = self.lane_mut(at) {
            lane.send_used -= 1;
        }
    }

    fn ask(&mut self, at: At, id: u64, window: WindowId, back: bool) {
        if let Some(lane) = self.lane_mut(at) {
            lane.windows.push_back(Asked { id, window, back });
        }
        self.trace(at, TraceEvent::Post { id, length: 0 });
        // A device works its queue off by itself; how long that takes is anything up to a packet's way.
        let delay = self.rng.within(&self.config.latency);
        self.schedule(self.now.saturating_add(delay), Event::Window(at));
    }

    /// The oldest of what was asked of a lane is done. (Events of one lane may overtake each other; there is one for
    /// each thing asked, so all get done, in order.)
    pub(super) fn on_window(&mut self, at: At) {
        let Some(asked) = self.lane_mut(at).and_then(|lane| lane.windows.pop_front()) else {
            return;
        };
        if let Some(device) = self.devices.get_mut(at.device) {
            match asked.back {
                false => device.regions.open_window(asked.window),
                true => device.regions.remove_window(asked.window),
            }
        }
        self.complete(
            at,
            CompletionKind::Sent { id: asked.id },
            Status::Success,
            1,
        );
    }
}

fn no_device() -> FabricErrorKind {
    FabricErrorKind::Os(libc::ENODEV)
}
