//! What travels: lane addresses (over the control channel) and the messages of a lane's socket. Fixed little-endian
//! structures, as everything that kvpush sends. Pure.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::super::LaneAddress;

/// A secret number.
pub(super) type Token = [u8; 16];

/// Most reads that a requester may have unfinished on one lane.
pub(super) const MAX_READS: usize = 128;
/// Most requests of a send queue.
pub(super) const MAX_DEPTH: u32 = 1 << 14;
/// Most gather elements of a request.
pub(super) const MAX_SGE: u32 = 64;
/// Most inline bytes of a request.
pub(super) const MAX_INLINE: u32 = 256;
/// Most bytes of a slot: the header and [`MAX_SGE`] elements, in whole cache lines.
const MAX_STRIDE: u32 = 1088;

const TAG: u8 = b'M';
const VERSION: u8 = 1;
const MAGIC: [u8; 6] = *b"kvpshm";

/// The process that owns a device, as its lane addresses tell of it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Host {
    /// The boot of the kernel: the same for everyone on one host, and for nobody else.
    pub(super) boot: [u8; 16],
    /// Inodes of the process and network name spaces; told apart only to explain a refusal.
    pub(super) pid_namespace: U32,
    pub(super) net_namespace: U32,
}

/// How a lane is reached.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Address {
    tag: u8,
    version: u8,
    /// 1 if all memory registered so far can be mapped by peers, so nobody needs to read this process's memory.
    files_only: u8,
    reserved: u8,
    pub(super) host: Host,
    /// The abstract socket that the device listens on.
    pub(super) listener: Token,
    /// Sixteen random bytes of the device, and where they are in its memory: who finds them there has the right
    /// process, and may read it.
    pub(super) beacon: Token,
    pub(super) beacon_address: U64,
    /// The lane.
    pub(super) token: Token,
}

impl Address {
    pub(super) fn new(
        host: Host,
        listener: Token,
        beacon: Token,
        beacon_address: u64,
        token: Token,
        files_only: bool,
    ) -> Self {
        Self {
            tag: TAG,
            version: VERSION,
            files_only: files_only.into(),
            reserved: 0,
            host,
            listener,
            beacon,
            beacon_address: beacon_address.into(),
            token,
        }
    }

    pub(super) fn files_only(&self) -> bool {
        self.files_only != 0
    }

    pub(super) fn encode(&self) -> Option<LaneAddress> {
        LaneAddress::new(self.as_bytes().to_vec())
    }

    /// The address in `address`, or what is wrong with it.
    pub(super) fn decode(address: &LaneAddress) -> Result<Self, &'static str> {
        let bytes = address.as_bytes();
        if bytes.first() != Some(&TAG) {
            return Err("not of the shared-memory fabric");
        }
        let address = Self::read_from_bytes(bytes).map_err(|_| "of another length")?;
        match address {
            Self { version, .. } if version != VERSION => Err("of another version"),
            Self {
                files_only: 2.., ..
            } => Err("with an unknown flag"),
            Self { reserved: 1.., .. } => Err("with a reserved field in use"),
            _ => Ok(address),
        }
    }
}

/// The shape of an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Slots.
    pub(super) depth: u32,
    /// Bytes of a slot.
    pub(super) stride: u32,
}

/// The first message in each direction; the sender's outbox comes with it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Hello {
    magic: [u8; 6],
    version: u8,
    /// 1 if the sender can read the receiver's memory, so that requests may name memory that is in no file.
    reads_process: u8,
    depth: U32,
    stride: U32,
    /// The token of the lane this is addressed to.
    pub(super) to: Token,
    /// The token of the sending lane.
    pub(super) from: Token,
}

impl Hello {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = size_of::<Self>();

    pub(super) fn new(to: Token, from: Token, geometry: Geometry, reads_process: bool) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            reads_process: reads_process.into(),
            depth: geometry.depth.into(),
            stride: geometry.stride.into(),
            to,
            from,
        }
    }

    /// The hello in `bytes`, or nothing if it is none of this version or a field is out of its bounds.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let hello = Self::read_from_bytes(bytes).ok()?;
        let (depth, stride) = (hello.depth.get(), hello.stride.get());
        let valid = hello.magic == MAGIC
            && hello.version == VERSION
            && hello.reads_process <= 1
            && (1..=MAX_DEPTH).contains(&depth)
            && (64..=MAX_STRIDE).contains(&stride)
            && stride.is_multiple_of(64);
        valid.then_some(hello)
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            depth: self.depth.get(),
            stride: self.stride.get(),
        }
    }

    pub(super) fn reads_process(&self) -> bool {
        self.reads_process != 0
    }
}

/// Where bytes are at the peer: at `place` in its address space if `file` is 0, or in the file of that number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) file: u32,
    pub(super) place: u64,
}

/// A message after the hellos.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// Something in the outbox has changed.
    Wake,
    /// The file that comes with this has number `file` from now on, and `length` bytes of it may be named.
    File {
        /// From 1; not used twice on one lane.
        file: u32,
        /// Bytes.
        length: u64,
    },
    /// The file will not be named any more.
    Forget {
        /// Its number.
        file: u32,
    },
}

impl Note {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = 16;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let (kind, file, length) = match self {
            Self::Wake => (0u32, 0, 0),
            Self::File { file, length } => (1, file, length),
            Self::Forget { file } => (2, file, 0),
        };
        let mut bytes = [0; Self::BYTES];
        let fields = [kind.to_le_bytes(), file.to_le_bytes()];
        let (head, tail) = bytes.split_at_mut(8);
        head.copy_from_slice(fields.as_flattened());
        tail.copy_from_slice(&length.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let (head, tail) = bytes.split_first_chunk::<8>()?;
        let length = u64::from_le_bytes(tail.try_into().ok()?);
        let (kind, file) = head.split_first_chunk::<4>()?;
        let file = u32::from_le_bytes(file.try_into().ok()?);
        match (u32::from_le_bytes(*kind), file, length) {
            (0, 0, 0) => Some(Self::Wake),
            (1, 1.., 1..) => Some(Self::File { file, length }),
            (2, 1.., 0) => Some(Self::Forget { file }),
            _ => None,
        }
    }
}

/// What a request is, as its slot says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// A write.
    Write,
    /// A write with this immediate.
    WriteImm(u32),
    /// A read.
    Read,
}

/// Set in the first word of a slot: the requester waits for this request, so it is woken when it has been executed.
pub(super) const SIGNALED: u64 = 2 << 8;

/// Packs the first word of a slot.
pub(super) fn pack(op: Op, inline: bool, elements: u32) -> u64 {
    let (code, imm) = match op {
        Op::Write => (1, 0),
        Op::WriteImm(imm) => (2, imm),
        Op::Read => (3, 0),
    };
    u64::from(imm) << 32 | u64::from(elements as u16) << 16 | u64::from(inline) << 8 | code
}

/// Unpacks the first word of a slot: operation, inline, gather elements.
pub(super) fn unpack(word: u64) -> Option<(Op, bool, usize)> {
    let imm = (word >> 32) as u32;
    let op = match (word as u8, imm) {
        (1, 0) => Op::Write,
        (2, imm) => Op::WriteImm(imm),
        (3, 0) => Op::Read,
        _ => return None,
    };
    let inline = match (word & !SIGNALED) >> 8 & 0xff {
        0 => false,
        1 => true,
        _ => return None,
    };
    Some((op, inline, usize::from((word >> 16) as u16)))
}

/// Why a lane ended, in the word of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It was given up; nothing more is said.
    Closed,
    /// A request of the peer was refused.
    Refused {
        /// Its number.
        sequence: u64,
        /// Why.
        why: Refusal,
    },
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Refusal {
    /// Key, range or permission.
    Access = 2,
    /// A write with immediate without a receive.
    NoReceive = 3,
    /// The memory that it names at the requester cannot be read.
    Source = 4,
}

impl End {
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Closed => 1,
            Self::Refused { sequence, why } => sequence << 8 | why as u64,
        }
    }

    /// `None` while the lane lives.
    pub(super) fn decode(word: u64) -> Option<Self> {
        let why = match word as u8 {
            2 => Refusal::Access,
            3 => Refusal::NoReceive,
            4 => Refusal::Source,
            _ if word == 0 => return None,
            _ => return Some(Self::Closed),
        };
        let sequence = word >> 8;
        Some(Self::Refused { sequence, why })
    }
}

/// Compares without telling by its duration where the first difference is.
pub(super) fn same_token(a: &Token, b: &Token) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    std::hint::black_box(difference) == 0
}
