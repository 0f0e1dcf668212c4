//! The memory that a lane shares: each side has an *outbox*, which only it writes and which its peer maps for reading.
//!
//! An outbox is one page of counters and answers, and then the slots of the send queue:
//!
//! | Offset | What |
//! |---|---|
//! | 0 | eight words, see [`Word`]: one cache line, so that looking at an idle peer touches one line |
//! | 1024 | the answers to the peer's reads, 16 bytes each: file and place |
//! | 4096 | slots of `stride` bytes: a header of 24 bytes, then gather elements of 16 bytes or the inline payload |
//!
//! The peer may change its outbox at any moment, in any way. So every word is read once, into a variable, and checked
//! there; no reference to the memory is ever made; all accesses are atomic words, except that an inline payload is
//! copied as bytes. The file is sealed against shrinking before it is mapped, so no access can fault.
//!
//! Loads are relaxed and followed by a fence, because a stronger load of memory that is mapped for reading only is not
//! promised to work (`std::sync::atomic`, "Atomic accesses to read-only memory").

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering, fence},
};

use super::{
    sys::{self, Mapping},
    wire::{Geometry, Location, MAX_READS},
};

/// The words of an outbox. All count from the lane's beginning and only grow, except `State`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Word {
    /// Requests published.
    Published = 0,
    /// Requests of the peer executed.
    Executed = 1,
    /// Receives posted.
    Credit = 2,
    /// Reads of the peer answered.
    Answered = 3,
    /// Own reads whose bytes have been taken.
    Taken = 4,
    /// Rounds in which bytes were moved: shows that a long message makes progress.
    Rounds = 5,
    /// 0 while the lane lives. Anything else: it has ended, and nothing published may be taken any more. 1 says no
    /// more; otherwise the low byte says why a request of the peer was refused, and the rest which.
    State = 6,
    /// Odd while this side sleeps and wants to be woken for every change; a new number each time.
    Sleep = 7,
}

/// A copy of the words at one moment.
pub(super) type Words = [u64; 8];

/// The value of a word in a copy.
pub(super) fn word(words: &Words, which: Word) -> u64 {
    // The discriminants are below 8.
    words.get(which as usize).copied().unwrap_or(0)
}

const ANSWERS: usize = 1024;
const SLOTS: usize = 4096;
const SLOT_HEADER: usize = 24;

const _: () = assert!(ANSWERS + MAX_READS * 16 <= SLOTS);

/// Bytes of an outbox.
fn length(geometry: Geometry) -> usize {
    SLOTS + geometry.depth as usize * geometry.stride as usize
}

/// The stride of slots that hold `sges` gather elements or `inline` bytes.
pub(super) fn stride(sges: u32, inline: u32) -> u32 {
    let content = (sges * 16).max(inline);
    (SLOT_HEADER as u32 + content).next_multiple_of(64)
}

/// A word of a mapping.
///
/// # Safety
///
/// `offset + 8` must not exceed the length of the mapping, `offset` must be a multiple of 8, and a mapping for reading
/// must only be loaded from, with relaxed order.
unsafe fn atomic(mapping: &Mapping, offset: usize) -> &AtomicU64 {
    debug_assert!(offset.is_multiple_of(8) && offset + 8 <= mapping.length());
    // SAFETY: in bounds and aligned by the caller's promise, mapped as long as `mapping` is borrowed, and nobody in
    // this process accesses it but by atomics (an inline payload is copied in before it is published).
    unsafe { AtomicU64::from_ptr(mapping.base().add(offset).cast()) }
}

/// A request as it lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Operation, flags, number of gather elements and immediate.
    pub(super) what: u64,
    /// Where in the memory of the one who executes it.
    pub(super) address: u64,
    /// Key (upper half) and payload length (lower half).
    pub(super) key_length: u64,
}

/// This side's outbox.
#[derive(Debug)]
pub(super) struct Outbox {
    mapping: Mapping,
    /// For the peer.
    file: OwnedFd,
    geometry: Geometry,
}

impl Outbox {
    pub(super) fn new(geometry: Geometry) -> io::Result<Self> {
        let length = length(geometry);
        let file = sys::memory_file(length)?;
        let mapping = Mapping::new(file.as_fd(), length, true)?;
        // From here on no size changes, and no other mapping can write.
        sys::seal(file.as_fd(), sys::RING_SEALS)?;
        Ok(Self {
            mapping,
            file,
            geometry,
        })
    }

    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn word(&self, which: Word) -> &AtomicU64 {
        // SAFETY: eight words at the beginning of a mapping of more than a page, which is writable.
        unsafe { atomic(&self.mapping, which as usize * 8) }
    }

    /// Publishes a counter: whoever sees it sees what was stored before.
    pub(super) fn store(&self, which: Word, value: u64) {
        self.word(which).store(value, Ordering::Release);
    }

    /// What was stored last.
    pub(super) fn load(&self, which: Word) -> u64 {
        self.word(which).load(Ordering::Relaxed)
    }

    fn slot(&self, sequence: u64) -> usize {
        let index = sequence % u64::from(self.geometry.depth);
        SLOTS + index as usize * self.geometry.stride as usize
    }

    fn put(&self, offset: usize, value: u64) {
        if offset + 8 <= self.mapping.length() {
            // SAFETY: in bounds (checked); all offsets are multiples of 8; the mapping is writable.
            unsafe { atomic(&self.mapping, offset) }.store(value, Ordering::Relaxed);
        }
    }

    /// Writes the header of request `sequence`, which is not published yet.
    pub(super) fn put_request(&self, sequence: u64, request: &Descriptor) {
        let slot = self.slot(sequence);
        self.put(slot, request.what);
        self.put(slot + 8, request.address);
        self.put(slot + 16, request.key_length);
    }

    /// Writes gather element `index` of request `sequence`, which is not published yet.
    pub(super) fn put_element(&self, sequence: u64, index: usize, length: u32, from: Location) {
        let at = self.slot(sequence) + SLOT_HEADER + index * 16;
        self.put(at, u64::from(length) << 32 | u64::from(from.file));
        self.put(at + 8, from.place);
    }

    /// Writes `length` inline bytes from `source` at `offset` of the payload of request `sequence`, which is not
    /// published yet. The caller has checked that they fit the stride.
    ///
    /// # Safety
    ///
    /// The source must be readable, and nobody may be writing it.
    pub(super) unsafe fn put_inline(
        &self,
        sequence: u64,
        offset: usize,
        source: u64,
        length: usize,
    ) {
        let at = self.slot(sequence) + SLOT_HEADER + offset;
        if SLOT_HEADER + offset + length <= self.geometry.stride as usize
            && let Some(to) = self.mapping.at(at as u64, length as u64)
        {
            // SAFETY: in bounds (checked); the peer takes nothing of this slot before it is published; the caller
            // promises the source, which is no part of this private mapping.
            unsafe { sys::copy(source, to, length) };
        }
    }

    /// Writes the answer to the peer's read number `read`, which is not published yet.
    pub(super) fn put_answer(&self, read: u64, from: Location) {
        let at = ANSWERS + (read % MAX_READS as u64) as usize * 16;
        self.put(at, u64::from(from.file));
        self.put(at + 8, from.place);
    }

    /// Ends the lane for the peer: what it takes after this is not counted. `reason` is not 0. Once ended, it stays so.
    ///
    /// When this returns, the caller may change memory that published requests name: the peer looks at the state after
    /// it has copied, and the order of both sides is fixed by fences, so it sees the end if it copied a change.
    pub(super) fn end(&self, reason: u64) {
        if self.load(Word::State) == 0 {
            self.store(Word::State, reason);
        }
        fence(Ordering::SeqCst);
    }
}

/// The peer's outbox.
#[derive(Debug)]
pub(super) struct PeerBox {
    mapping: Mapping,
    geometry: Geometry,
}

impl PeerBox {
    /// Maps the file that the peer sent. `None` if it is not what `geometry` needs.
    pub(super) fn new(file: &OwnedFd, geometry: Geometry) -> io::Result<Option<Self>> {
        let needed = length(geometry);
        match sys::facts(file.as_fd())? {
            Some(facts) if facts.length >= needed as u64 => {}
            _ => return Ok(None),
        }
        let mapping = Mapping::new(file.as_fd(), needed, false)?;
        Ok(Some(Self { mapping, geometry }))
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn load(&self, offset: usize) -> u64 {
        if offset + 8 > self.mapping.length() {
            return 0;
        }
        // SAFETY: in bounds (checked); all offsets are multiples of 8; only loaded from, relaxed.
        unsafe { atomic(&self.mapping, offset) }.load(Ordering::Relaxed)
    }

    /// One word, and everything that was stored before it.
    pub(super) fn word(&self, which: Word) -> u64 {
        let value = self.load(which as usize * 8);
        fence(Ordering::Acquire);
        value
    }

    /// All words. `State` is read first, so the counters are at least those of the moment when the lane ended.
    pub(super) fn words(&self) -> Words {
        let state = self.word(Word::State);
        let mut words = [0; 8];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.load(index * 8);
        }
        if let Some(word) = words.get_mut(Word::State as usize) {
            *word = state;
        }
        fence(Ordering::Acquire);
        words
    }

    /// Whether the peer has ended the lane, asked after its memory has been copied: see [`Outbox::end`].
    pub(super) fn has_ended(&self) -> bool {
        fence(Ordering::SeqCst);
        self.word(Word::State) != 0
    }

    fn slot(&self, sequence: u64) -> usize {
        let index = sequence % u64::from(self.geometry.depth);
        SLOTS + index as usize * self.geometry.stride as usize
    }

    /// Request `sequence`.
    pub(super) fn request(&self, sequence: u64) -> Descriptor {
        let slot = self.slot(sequence);
        Descriptor {
            what: self.load(slot),
            address: self.load(slot + 8),
            key_length: self.load(slot + 16),
        }
    }

    /// How many gather elements a slot has room for.
    pub(super) fn max_elements(&self) -> usize {
        (self.geometry.stride as usize - SLOT_HEADER) / 16
    }

    /// Gather element `index` of request `sequence`: length and place.
    pub(super) fn element(&self, sequence: u64, index: usize) -> (u32, Location) {
        let at = self.slot(sequence) + SLOT_HEADER + index * 16;
        let first = self.load(at);
        let from = Location {
            file: first as u32,
            place: self.load(at + 8),
        };
        ((first >> 32) as u32, from)
    }

    /// Where the inline payload of request `sequence` is, if a slot can hold `length` bytes.
    pub(super) fn inline(&self, sequence: u64, length: u32) -> Option<u64> {
        let room = self.geometry.stride as usize - SLOT_HEADER;
        let at = self.slot(sequence) + SLOT_HEADER;
        (length as usize <= room)
            .then(|| self.mapping.at(at as u64, length.into()))
            .flatten()
    }

    /// The answer to our read number `read`.
    pub(super) fn answer(&self, read: u64) -> Location {
        let at = ANSWERS + (read % MAX_READS as u64) as usize * 16;
        Location {
            file: self.load(at) as u32,
            place: self.load(at + 8),
        }
    }
}
