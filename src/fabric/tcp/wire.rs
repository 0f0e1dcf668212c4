//! What travels on the socket and in lane addresses: fixed-size little-endian structures. Pure.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::super::{FabricKind, LaneAddress};

/// Most headers in a train.
pub(super) const TRAIN: usize = 64;
/// Most payload bytes in a train, hence the longest segment.
pub(super) const TRAIN_BYTES: u32 = 512 << 10;
/// Most reads that a requester may have outstanding on one lane, hence the responder's bound.
pub(super) const MAX_READS: usize = 128;

/// A lane's secret name.
pub(super) type Token = [u8; 16];

const MAGIC: [u8; 8] = *b"kvpush\0T";
const VERSION: u8 = 1;
const ADDRESS_BYTES: usize = 20;

/// The first bytes in each direction.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Hello {
    magic: [u8; 8],
    version: u8,
    reserved: [u8; 7],
    /// The receives posted so far.
    pub(super) credit: U64,
    /// The token of the lane this is addressed to.
    pub(super) to: Token,
    /// The token of the sending lane.
    pub(super) from: Token,
}

impl Hello {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = size_of::<Self>();

    pub(super) fn new(to: Token, from: Token, credit: u64) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            reserved: [0; 7],
            credit: credit.into(),
            to,
            from,
        }
    }

    /// The hello in `bytes`, or nothing if it is not one of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let hello = Self::read_from_bytes(bytes).ok()?;
        (hello.magic == MAGIC && hello.version == VERSION && hello.reserved == [0; 7])
            .then_some(hello)
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    /// A segment of a write; payload follows.
    Write = 1,
    /// A segment of a write with immediate; payload follows.
    WriteImm = 2,
    /// A request to read `remaining` bytes.
    Read = 3,
    /// A segment of the answer to a read; payload follows.
    ReadResponse = 4,
    /// Only the counters.
    Ack = 5,
    /// Request `sequence` was refused with the reason in `imm`; the lane is finished.
    Nak = 6,
}

/// Set on the last segment of a request whose requester waits for the completion.
pub(super) const FLAG_ACK: u8 = 1;

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Refusal {
    /// Key, range or permission.
    Access = 1,
    /// A write with immediate without credit.
    NoReceive = 2,
}

impl Refusal {
    pub(super) fn from_wire(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Access),
            2 => Some(Self::NoReceive),
            _ => None,
        }
    }
}

/// A frame header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    op: u8,
    pub(super) flags: u8,
    /// Headers of this train after this one.
    pub(super) follow: U16,
    pub(super) imm: U32,
    pub(super) key: U32,
    /// Payload bytes of this frame.
    pub(super) length: U32,
    /// Bytes of the message from this frame on; for a read request, the bytes wanted.
    pub(super) remaining: U32,
    reserved: U32,
    /// Where in the peer's memory this frame's payload goes or a read starts.
    pub(super) address: U64,
    /// The number of the request, from 0, in the direction in which requests travel.
    pub(super) sequence: U64,
    /// How many requests of the other direction have been executed.
    pub(super) ack: U64,
    /// How many receives have been posted for the other direction since the lane exists.
    pub(super) credit: U64,
}

impl Header {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = size_of::<Self>();

    /// A header with nothing but its kind and number.
    pub(super) fn new(op: Op, sequence: u64) -> Self {
        Self {
            op: op as u8,
            flags: 0,
            follow: 0.into(),
            imm: 0.into(),
            key: 0.into(),
            length: 0.into(),
            remaining: 0.into(),
            reserved: 0.into(),
            address: 0.into(),
            sequence: sequence.into(),
            ack: 0.into(),
            credit: 0.into(),
        }
    }

    /// What the frame is, or nothing if this version has no such frame or a field is out of its bounds.
    pub(super) fn op(&self) -> Option<Op> {
        let op = match self.op {
            1 => Op::Write,
            2 => Op::WriteImm,
            3 => Op::Read,
            4 => Op::ReadResponse,
            5 => Op::Ack,
            6 => Op::Nak,
            _ => return None,
        };
        let (length, remaining) = (self.length.get(), self.remaining.get());
        let sound = match op {
            // Only the last segment may be empty, and then the whole message is.
            Op::Write | Op::WriteImm | Op::ReadResponse => {
                length <= remaining && length <= TRAIN_BYTES && (length > 0 || remaining == 0)
            }
            Op::Read => length == 0,
            Op::Ack | Op::Nak => length == 0 && remaining == 0,
        };
        (sound && self.flags & !FLAG_ACK == 0 && self.reserved.get() == 0).then_some(op)
    }

    /// Whether this frame ends its message.
    pub(super) fn is_last(&self) -> bool {
        self.length == self.remaining
    }
}

/// Encodes the address of a lane: fabric tag, version, data port, token.
pub(super) fn encode_address(port: u16, token: &Token) -> Option<LaneAddress> {
    let mut bytes = Vec::with_capacity(ADDRESS_BYTES);
    bytes.extend_from_slice(&[FabricKind::Tcp as u8, VERSION]);
    bytes.extend_from_slice(&port.to_le_bytes());
    bytes.extend_from_slice(token);
    LaneAddress::new(bytes)
}

/// The port and token of `address`, or what is wrong with it.
pub(super) fn decode_address(address: &LaneAddress) -> Result<(u16, Token), &'static str> {
    let bytes: &[u8; ADDRESS_BYTES] = address
        .as_bytes()
        .try_into()
        .map_err(|_| "not the length of a tcp lane address")?;
    let [tag, version, port0, port1, token @ ..] = bytes;
    if *tag != FabricKind::Tcp as u8 {
        return Err("of another fabric");
    }
    if *version != VERSION {
        return Err("of another version of the tcp fabric");
    }
    match u16::from_le_bytes([*port0, *port1]) {
        0 => Err("data port 0"),
        port => Ok((port, *token)),
    }
}

/// Compares in a time that does not depend on where the tokens differ.
pub(super) fn same_token(a: &Token, b: &Token) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |d, (x, y)| d | (x ^ y));
    std::hint::black_box(difference) == 0
}
