//! What travels on the fabric itself: the immediate of a write, and the header in front of a tail.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The immediate of a write: which of the reader's pushes, and which part of it has now arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Imm {
    slot: u16,
    part: u32,
}

impl Imm {
    /// Slots a reader can have in use: `0 .. SLOTS`.
    pub(crate) const SLOTS: u16 = 1 << 12;
    /// Parts one push can have: `0 .. PARTS`.
    pub(crate) const PARTS: u32 = 1 << 20;

    /// Nothing if either number does not fit.
    pub(crate) const fn new(slot: u16, part: u32) -> Option<Self> {
        if slot < Self::SLOTS && part < Self::PARTS {
            Some(Self { slot, part })
        } else {
            None
        }
    }

    /// Every value means something; whether the slot is in use is the reader's to check.
    pub(crate) const fn from_wire(value: u32) -> Self {
        Self {
            slot: (value >> 20) as u16,
            part: value & (Self::PARTS - 1),
        }
    }

    pub(crate) const fn to_wire(self) -> u32 {
        (self.slot as u32) << 20 | self.part
    }

    pub(crate) const fn slot(self) -> u16 {
        self.slot
    }

    pub(crate) const fn part(self) -> u32 {
        self.part
    }
}

/// Precedes the tail's payload in the reader's tail buffer. The reader copies the whole buffer out before it trusts
/// any of it, because the writer could still change it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub(crate) struct TailHeader {
    generation: U32,
    length: U32,
}

impl TailHeader {
    /// Bytes in front of the payload.
    pub(crate) const SIZE: usize = size_of::<Self>();

    pub(crate) fn new(generation: u32, length: u32) -> Self {
        Self {
            generation: U32::new(generation),
            length: U32::new(length),
        }
    }

    /// The bytes to write in front of the payload.
    pub(crate) fn to_bytes(self) -> [u8; Self::SIZE] {
        zerocopy::transmute!(self)
    }

    /// The payload in `buffer`, or nothing if it is of another generation or claims more than the buffer holds.
    pub(crate) fn payload(buffer: &[u8], generation: u32) -> Option<&[u8]> {
        let (header, rest) = Self::ref_from_prefix(buffer).ok()?;
        if header.generation.get() != generation {
            return None;
        }
        rest.get(..usize::try_from(header.length.get()).ok()?)
    }
}
