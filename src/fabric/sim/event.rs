//! What is going to happen, in order of virtual time. Events of one instant happen in seeded random order.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

use super::{packet::Packet, rng::Rng, world::At};

pub(super) enum Event {
    /// A device's port is free for the next packet.
    Transmit(usize),
    /// A packet reaches its lane.
    Arrive(Box<Packet>),
    /// A requester may have waited too long. Its lane knows the real deadline, which has often moved on.
    Timeout(At),
    /// A requester may try again after "receiver not ready".
    Resume(At),
    /// A lane does the next of what it was asked to do with windows.
    Window(At),
}

struct Scheduled {
    time: u64,
    tie: u32,
    sequence: u64,
    event: Event,
}

impl Scheduled {
    fn rank(&self) -> (u64, u32, u64) {
        (self.time, self.tie, self.sequence)
    }
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

#[derive(Default)]
pub(super) struct EventQueue {
    heap: BinaryHeap<Reverse<Scheduled>>,
    sequence: u64,
}

impl EventQueue {
    pub(super) fn push(&mut self, time: u64, event: Event, rng: &mut Rng) {
        self.sequence += 1;
        self.heap.push(Reverse(Scheduled {
            time,
            tie: rng.next_u32(),
            sequence: self.sequence,
            event,
        }));
    }

    pub(super) fn peek(&self) -> Option<(u64, &Event)> {
        self.heap
            .peek()
            .map(|Reverse(next)| (next.time, &next.event))
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Event)> {
        self.heap.pop().map(|Reverse(next)| (next.time, next.event))
    }
}
