//! Faults on demand. Each takes effect at once and, where it is a state, lasts until it is undone.

use std::collections::BTreeSet;

use super::{
    SimNet,
    packet::Packet,
    trace::TraceEvent,
    world::{At, World},
};
use crate::fabric::{LaneId, RailEvent, Status};

#[derive(Default)]
pub(super) struct Faults {
    loss: f64,
    partitions: BTreeSet<(String, String)>,
    spike_probability: f64,
    spike: u64,
    not_ready: f64,
    /// The next post with more requests than this fails at this one.
    pub(super) post_fails_at: Option<usize>,
    /// Devices whose port is down.
    down: BTreeSet<String>,
    /// Devices whose answers are lost.
    mute: BTreeSet<String>,
    /// Devices that say "receiver not ready" to every immediate.
    pub(super) starved: BTreeSet<String>,
    /// Device and request at which the next lane fails, and how.
    pub(super) failing_request: Option<(String, u64, Status)>,
}

impl World {
    /// Which fault takes this packet, if one does.
    pub(super) fn lose(&mut self, packet: &Packet) -> Option<&'static str> {
        if !(self.faults.down.is_empty() && self.faults.mute.is_empty()) {
            let named = |names: &BTreeSet<String>, at: At| {
                let device = self.devices.get(at.device);
                device.is_some_and(|device| names.contains(&device.name))
            };
            if named(&self.faults.down, packet.from) || named(&self.faults.down, packet.to) {
                return Some("port down");
            }
            if packet.is_answer() && named(&self.faults.mute, packet.from) {
                return Some("answer lost");
            }
        }
        if !self.faults.partitions.is_empty() {
            let name = |at: At| {
                self.devices
                    .get(at.device)
                    .map(|device| device.name.as_str())
            };
            if let (Some(from), Some(to)) = (name(packet.from), name(packet.to))
                && self.faults.partitions.contains(&pair(from, to))
            {
                return Some("partition");
            }
        }
        self.rng.chance(self.faults.loss).then_some("loss")
    }

    /// Whether a responder claims to have no receive, though it may have.
    pub(super) fn claims_no_receive(&mut self) -> bool {
        // Without this fault no number is drawn, so that it changes nothing for those who do not ask for it.
        let p = self.faults.not_ready;
        p > 0.0 && self.rng.chance(p)
    }

    /// Extra delay for a packet.
    pub(super) fn spike(&mut self) -> u64 {
        if self.rng.chance(self.faults.spike_probability) {
            self.faults.spike
        } else {
            0
        }
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.min(b).to_owned(), a.max(b).to_owned())
}

/// Faults.
impl SimNet {
    /// From now on each packet of any kind is lost with probability `p`.
    pub fn set_loss(&self, p: f64) {
        self.world.lock().faults.loss = p;
    }

    /// From now on each packet is late by `extra` nanoseconds with probability `p`; those behind it on its lane wait.
    pub fn set_delay_spikes(&self, p: f64, extra: u64) {
        let faults = &mut self.world.lock().faults;
        faults.spike_probability = p;
        faults.spike = extra;
    }

    /// From now on each immediate is answered with "receiver not ready" with probability `p`, whatever receives there
    /// are. [`SimStats::unready`](super::SimStats::unready) does not count these.
    pub fn set_not_ready(&self, p: f64) {
        self.world.lock().faults.not_ready = p;
    }

    /// From now on the port of `device` has another speed. False if there is no such device.
    pub fn set_speed(&self, device: &str, bits_per_second: u64) -> bool {
        let mut world = self.world.lock();
        let Some(index) = world.find(device) else {
            return false;
        };
        world.devices[index].bits_per_second = bits_per_second;
        true
    }

    /// The lanes that `device` has, in the order in which they were made.
    pub fn lanes_of(&self, device: &str) -> Vec<LaneId> {
        let world = self.world.lock();
        let device = world.find(device).and_then(|at| world.devices.get(at));
        device.map_or_else(Vec::new, |device| device.lanes.keys().copied().collect())
    }

    /// Starts (`cut`) or ends losing all packets between the devices `a` and `b`. Packets already on the wire arrive.
    pub fn partition(&self, a: &str, b: &str, cut: bool) {
        let partitions = &mut self.world.lock().faults.partitions;
        if cut {
            partitions.insert(pair(a, b));
        } else {
            partitions.remove(&pair(a, b));
        }
    }

    /// Makes the next post of more than `index` requests, by whichever context, accept `index` of them and fail with
    /// `ENOMEM`, as a driver may.
    pub fn post_fails_at(&self, index: usize) {
        self.world.lock().faults.post_fails_at = Some(index);
    }

    /// Takes the port of a device down or up again. While it is down every packet from and to it is lost; packets on the
    /// wire arrive. Its context reports the change. False if there is no such device.
    pub fn set_port(&self, device: &str, up: bool) -> bool {
        let mut world = self.world.lock();
        let Some(index) = world.find(device) else {
            return false;
        };
        let changed = match up {
            true => world.faults.down.remove(device),
            false => world.faults.down.insert(device.to_owned()),
        };
        if changed {
            let event = match up {
                true => RailEvent::PortActive,
                false => RailEvent::PortDown,
            };
            world.report(index, event);
        }
        true
    }

    /// Has a device report that its port has another address. Lanes go on, as they may on a real one. False if there is
    /// no such device.
    pub fn change_address(&self, device: &str) -> bool {
        let mut world = self.world.lock();
        let index = world.find(device);
        if let Some(index) = index {
            world.report(index, RailEvent::AddressChanged);
        }
        index.is_some()
    }

    /// Starts or ends losing all acknowledgements that a device sends, while what it sends and receives otherwise
    /// arrives.
    pub fn lose_answers(&self, device: &str, lose: bool) {
        let mute = &mut self.world.lock().faults.mute;
        match lose {
            true => mute.insert(device.to_owned()),
            false => mute.remove(device),
        };
    }

    /// Has a device refuse every immediate with "receiver not ready", or stop that.
    pub fn starve(&self, device: &str, starved: bool) {
        let names = &mut self.world.lock().faults.starved;
        match starved {
            true => names.insert(device.to_owned()),
            false => names.remove(device),
        };
    }

    /// How many times a requester tries again after "receiver not ready", from now on.
    pub fn set_rnr_retry(&self, retries: u8) {
        self.world.lock().config.rnr_retry = retries;
    }

    /// Makes the next request `id` of any lane of `device` fail with `status` when its turn to be sent comes, and with
    /// it the lane. Nothing of the request leaves.
    pub fn fail_at_request(&self, device: &str, id: u64, status: Status) {
        self.world.lock().faults.failing_request = Some((device.to_owned(), id, status));
    }

    /// Moves a lane to the error state as a local fault of the device would; its peer is not told. False if there is
    /// no such lane.
    pub fn fail_lane(&self, device: &str, lane: LaneId) -> bool {
        let mut world = self.world.lock();
        let Some(index) = world.find(device) else {
            return false;
        };
        let at = At {
            device: index,
            lane,
        };
        let exists = world.lane(at).is_some();
        if exists {
            world.trace(at, TraceEvent::State("fault"));
        }
        world.break_lane(at);
        exists
    }

    /// Takes a device away, as when its process dies: its memory can no longer be reached, its peers hear nothing
    /// more, and its context fails. Packets that it has already sent arrive. The name is free for a new device. False
    /// if there is no such device.
    pub fn kill_device(&self, device: &str) -> bool {
        let mut world = self.world.lock();
        let Some(index) = world.find(device) else {
            return false;
        };
        world.remove_device(index, "killed".to_owned());
        true
    }
}
