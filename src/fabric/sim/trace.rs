//! The last events of a net, for the message of a failing test, and a hash of all of them.
//!
//! Entries hold no memory addresses, which differ from run to run: places are offsets in their registration.

use std::{
    collections::VecDeque,
    fmt::{self, Write},
    hash::{DefaultHasher, Hasher},
};

use super::world::At;
use crate::fabric::{LaneId, Status};

/// Something that happened to a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceEvent {
    /// A request was accepted.
    Post {
        /// Its id.
        id: u64,
        /// Its payload.
        length: u64,
    },
    /// A packet left.
    Send {
        /// Its sequence number on the lane.
        psn: u64,
        /// What it is.
        what: &'static str,
    },
    /// A packet was lost to a fault.
    Lose {
        /// Its sequence number.
        psn: u64,
        /// Which fault.
        why: &'static str,
    },
    /// A packet arrived and was dropped.
    Refuse {
        /// Its sequence number.
        psn: u64,
        /// Why.
        why: &'static str,
    },
    /// Bytes changed in memory.
    Place {
        /// The packet's sequence number.
        psn: u64,
        /// Where in the registration.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// The requester waits for the peer's receives.
    RnrWait {
        /// The packet that found none.
        psn: u64,
    },
    /// The requester heard nothing in time.
    Timeout {
        /// The oldest packet without answer.
        psn: u64,
    },
    /// A completion was queued.
    Complete {
        /// The request, if it is of the send queue.
        id: Option<u64>,
        /// How it ended.
        status: Status,
    },
    /// A completion was polled.
    Deliver {
        /// The request, if it is of the send queue.
        id: Option<u64>,
    },
    /// The lane changed its state.
    State(&'static str),
}

/// One event with its time and place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// Virtual nanoseconds.
    pub time: u64,
    /// The device, by its number in the net.
    pub device: usize,
    /// The lane; 0 for the device itself.
    pub lane: LaneId,
    /// What happened.
    pub event: TraceEvent,
}

/// A snapshot of the latest events. [`Display`](fmt::Display) prints one line for each.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Device names by number.
    pub devices: Vec<String>,
    /// Events, oldest first.
    pub entries: Vec<TraceEntry>,
    /// How many events there were before them.
    pub forgotten: u64,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forgotten > 0 {
            writeln!(f, "({} earlier events forgotten)", self.forgotten)?;
        }
        for entry in &self.entries {
            let device = self.devices.get(entry.device).map_or("?", String::as_str);
            let TraceEntry {
                time, lane, event, ..
            } = entry;
            writeln!(f, "{time:>12} ns {device} {lane}: {event:?}")?;
        }
        Ok(())
    }
}

/// Hashes what is printed into it.
struct Digest<'a>(&'a mut DefaultHasher);

impl Write for Digest<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

pub(super) struct Recorder {
    capacity: usize,
    entries: VecDeque<TraceEntry>,
    forgotten: u64,
    hasher: DefaultHasher,
}

impl Recorder {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: VecDeque::with_capacity(capacity.min(4096)),
            forgotten: 0,
            // Unlike `RandomState`, always the same keys.
            hasher: DefaultHasher::new(),
        }
    }

    pub(super) fn record(&mut self, time: u64, at: At, event: TraceEvent) {
        let entry = TraceEntry {
            time,
            device: at.device,
            lane: at.lane,
            event,
        };
        // Writing into a hasher cannot fail.
        let _ = write!(Digest(&mut self.hasher), "{entry:?}");
        self.entries.push_back(entry);
        if self.entries.len() > self.capacity {
            self.entries.pop_front();
            self.forgotten += 1;
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    pub(super) fn snapshot(&self, devices: Vec<String>) -> Trace {
        Trace {
            devices,
            entries: self.entries.iter().copied().collect(),
            forgotten: self.forgotten,
        }
    }
}
