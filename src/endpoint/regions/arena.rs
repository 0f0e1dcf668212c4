//! Pinned host memory through which bytes go that a rail cannot fetch or place by itself.
//!
//! One arena for an endpoint, made when the first pool needs it, and registered with every rail. Its first half is cut
//! into *bounce buffers*, from which writers send; grants get *landings* out of the second half, where their peers
//! write. Both are given back when the last [`Buffer`] or [`LandingRange`] of them is dropped, so whoever may still
//! touch a range holds it.
//!
//! Any thread may call.

use std::{collections::BTreeMap, sync::Arc};

use metrics::counter;
use parking_lot::Mutex;

use super::Region;
use crate::{
    endpoint::telemetry::meters::Tally,
    memory::{HostMemory, Memory},
};

/// Most bytes of one bounce buffer.
const BUFFER: u64 = 1 << 20;
/// Fewest bounce buffers, so that one can be filled while another is on its way.
const FEWEST: u64 = 4;
/// Where landings begin: multiples of this.
const ALIGN: u64 = 256;

/// What has gone through the arena of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StagingStats {
    /// Bytes copied from devices to the host, to be pushed.
    pub to_host: u64,
    /// Bytes copied from the host to devices, after they had arrived.
    pub to_device: u64,
    /// Pieces copied.
    pub copies: u64,
    /// Batches of copies that a device failed.
    pub failures: u64,
    /// Batches of copies that had not ended when an end could wait no longer: their memory is set aside for good.
    pub stuck: u64,
    /// Grants that had to wait for room.
    pub waits: u64,
}

/// [`StagingStats`], counted.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) to_host: Tally,
    pub(crate) to_device: Tally,
    pub(crate) copies: Tally,
    pub(crate) failures: Tally,
    pub(crate) stuck: Tally,
    pub(crate) waits: Tally,
}

impl Counters {
    fn new() -> Self {
        let bytes = |direction| {
            Tally::new(counter!("kvpush_staging_bytes_total", "direction" => direction))
        };
        Self {
            to_host: bytes("to_host"),
            to_device: bytes("to_device"),
            copies: Tally::new(counter!("kvpush_staging_copies_total")),
            failures: Tally::new(counter!("kvpush_staging_failures_total")),
            stuck: Tally::new(counter!("kvpush_staging_stuck_total")),
            waits: Tally::new(counter!("kvpush_staging_waits_total")),
        }
    }

    pub(crate) fn stats(&self) -> StagingStats {
        StagingStats {
            to_host: self.to_host.total(),
            to_device: self.to_device.total(),
            copies: self.copies.total(),
            failures: self.failures.total(),
            stuck: self.stuck.total(),
            waits: self.waits.total(),
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Arena {
    // The registration goes before the memory.
    region: Region,
    memory: Arc<HostMemory>,
    buffer: u64,
    buffers: Mutex<Vec<u32>>,
    landings: Mutex<Free>,
    pub(crate) counters: Counters,
}

/// A bounce buffer, given back when dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    arena: Arc<Arena>,
    pub(crate) number: u32,
}

/// Room for a grant, given back when dropped.
#[derive(Debug)]
pub(crate) struct LandingRange {
    arena: Arc<Arena>,
    offset: u64,
    length: u64,
}

impl Arena {
    /// An arena in `memory`, which `region` has registered as a whole with every rail.
    pub(crate) fn new(memory: Arc<HostMemory>, region: Region) -> Self {
        let half = memory.length() / 2;
        let buffer = BUFFER.min(half / FEWEST);
        let buffer = (buffer - buffer % ALIGN).max(1);
        let count = u32::try_from(half / buffer).unwrap_or(u32::MAX);
        let start = half.next_multiple_of(ALIGN);
        Self {
            buffer,
            buffers: Mutex::new((0..count).rev().collect()),
            landings: Mutex::new(Free::new(start, memory.length().saturating_sub(start))),
            region,
            memory,
            counters: Counters::new(),
        }
    }

    pub(crate) fn memory(&self) -> &HostMemory {
        &self.memory
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// Bytes of a bounce buffer.
    pub(crate) fn buffer_bytes(&self) -> u32 {
        self.buffer as u32
    }

    /// Bytes that one landing can have at most.
    pub(crate) fn landing_bytes(&self) -> u64 {
        let half = self.memory.length() / 2;
        self.memory
            .length()
            .saturating_sub(half.next_multiple_of(ALIGN))
    }

    pub(crate) fn take_buffer(self: &Arc<Self>) -> Option<Buffer> {
        let number = self.buffers.lock().pop()?;
        Some(Buffer {
            arena: Arc::clone(self),
            number,
        })
    }

    pub(crate) fn take_landing(self: &Arc<Self>, length: u64) -> Option<LandingRange> {
        let length = length.next_multiple_of(ALIGN);
        let offset = self.landings.lock().take(length)?;
        Some(LandingRange {
            arena: Arc::clone(self),
            offset,
            length,
        })
    }
}

impl Buffer {
    /// Where it begins in the arena.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.number) * self.arena.buffer
    }

    /// Where it begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.arena.memory.address() + self.offset()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.arena.buffers.lock().push(self.number);
    }
}

impl LandingRange {
    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Where it begins in the arena.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Where it begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.arena.memory.address() + self.offset
    }
}

impl Drop for LandingRange {
    fn drop(&mut self) {
        self.arena.landings.lock().give(self.offset, self.length);
    }
}

/// Free ranges, first fit: offset and bytes, none touching another.
#[derive(Debug)]
struct Free(BTreeMap<u64, u64>);

impl Free {
    fn new(offset: u64, length: u64) -> Self {
        Self([(offset, length)].into_iter().filter(|r| r.1 > 0).collect())
    }

    fn take(&mut self, length: u64) -> Option<u64> {
        let (&offset, &room) = self.0.iter().find(|&(_, &room)| room >= length)?;
        self.0.remove(&offset);
        if room > length {
            self.0.insert(offset + length, room - length);
        }
        Some(offset)
    }

    fn give(&mut self, mut offset: u64, mut length: u64) {
        if let Some((&before, &room)) = self.0.range(..offset).next_back()
            && before + room == offset
        {
            self.0.remove(&before);
            (offset, length) = (before, room + length);
        }
        if let Some(room) = self.0.remove(&(offset + length)) {
            length += room;
        }
        self.0.insert(offset, length);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_come_back(
            steps in vec((any::<bool>(), 1u64..40, any::<prop::sample::Index>()), 1..80),
        ) {
            let mut free = Free::new(16, 128);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (take, length, which) in steps {
                if take {
                    let Some(offset) = free.take(length) else { continue };
                    prop_assert!(offset >= 16 && offset + length <= 144);
                    for &(other, bytes) in &taken {
                        prop_assert!(offset + length <= other || other + bytes <= offset);
                    }
                    taken.push((offset, length));
                } else if !taken.is_empty() {
                    let (offset, length) = taken.swap_remove(which.index(taken.len()));
                    free.give(offset, length);
                }
            }
            for (offset, length) in taken {
                free.give(offset, length);
            }
            prop_assert_eq!(free.0, BTreeMap::from([(16, 128)]));
        }
    }
}
