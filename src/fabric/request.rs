//! Requests, keys and completions as plain data.

use std::{fmt, os::fd::BorrowedFd};

use crate::wire::RemoteKey;

/// What a registration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// The local side may receive or read into it.
    pub local_write: bool,
    /// Peers may write into it.
    pub remote_write: bool,
    /// Peers may read from it.
    pub remote_read: bool,
    /// The device may reorder its accesses on the host's bus (`IBV_ACCESS_RELAXED_ORDERING`, PCIe relaxed ordering),
    /// where it can. Faster on some hosts, but then nothing orders the bytes of two writes, or of a write and what a
    /// kernel of another device is told of it, except the completion; see `Builder::relaxed_ordering`.
    pub relaxed_ordering: bool,
}

impl Access {
    /// A source of pushes: peers cannot reach it.
    pub const LOCAL: Self = Self {
        local_write: true,
        remote_write: false,
        remote_read: false,
        relaxed_ordering: false,
    };
    /// A destination of pushes.
    pub const REMOTE_WRITE: Self = Self {
        local_write: true,
        remote_write: true,
        remote_read: false,
        relaxed_ordering: false,
    };
    /// Everything, for engines that pull.
    pub const ALL: Self = Self {
        local_write: true,
        remote_write: true,
        remote_read: true,
        relaxed_ordering: false,
    };
}

/// A piece of a dmabuf to register.
#[derive(Clone, Copy, Debug)]
pub struct DmabufRange<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the range begins.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// How requests and peers name the first byte (the I/O virtual address). Verbs want it at the same place within
    /// its page as `offset` is in the file.
    pub address: u64,
}

/// A piece of mapped memory to register, and the file that it maps.
#[derive(Clone, Copy, Debug)]
pub struct FileRange<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the range begins.
    pub offset: u64,
    /// Where in this process.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// Names a registration in requests of its own device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct LocalKey(pub u32);

/// Names a registration for deregistration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MrId(pub u64);

/// The keys of one registration on one rail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryKeys {
    /// For deregistration.
    pub mr: MrId,
    /// For gather lists.
    pub local: LocalKey,
    /// For peers.
    pub remote: RemoteKey,
}

/// A lane (one reliable connection) within its context. Identifiers are not reused while a process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u32);

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}", self.0)
    }
}

/// What a lane must hold. A fabric grants exactly this or refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneConfig {
    /// Requests outstanding on the send queue.
    pub send_depth: u32,
    /// Receives posted.
    pub receive_depth: u32,
    /// Gather elements of one request.
    pub max_sge: u32,
    /// Bytes sent inline.
    pub max_inline: u32,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// One-sided write.
    Write,
    /// One-sided write, and one receive completion at the peer carrying this value.
    WriteImm(u32),
    /// One-sided read into the gather list.
    Read,
}

/// One request. Its gather list is `sges[first_sge .. first_sge + sge_count]` of the slice posted with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkRequest {
    /// Returned in the completion.
    pub id: u64,
    /// What to do.
    pub opcode: Opcode,
    /// Where at the peer.
    pub remote_address: u64,
    /// With which of the peer's keys.
    pub remote_key: RemoteKey,
    /// First gather element.
    pub first_sge: u32,
    /// Number of gather elements; 0 is a message without payload.
    pub sge_count: u32,
    /// Whether success makes a completion. Failure always does.
    pub signaled: bool,
    /// Whether the payload is copied during the post, so that its memory may be reused at once and needs no key. Only
    /// for up to [`LaneConfig::max_inline`] bytes.
    pub inline: bool,
}

/// A piece of local memory, in the layout that verbs have for it (`struct ibv_sge`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Sge {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The key of the registration that holds all of it; ignored for inline requests.
    pub key: LocalKey,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Done.
    Success,
    /// Not done, because the lane had failed before (`IBV_WC_WR_FLUSH_ERR`).
    Flushed,
    /// The peer's device refused the access: bad key, range or permission (`IBV_WC_REM_ACCESS_ERR`).
    RemoteAccess,
    /// The peer's device found the request invalid (`IBV_WC_REM_INV_REQ_ERR`): soft-RoCE says so at times when a request
    /// is sent again that it has served already.
    RemoteInvalidRequest,
    /// The peer stopped answering (`IBV_WC_RETRY_EXC_ERR`).
    RetryExceeded,
    /// The peer had no receive posted for too long (`IBV_WC_RNR_RETRY_EXC_ERR`).
    RnrRetryExceeded,
    /// The local device refused the gather list (`IBV_WC_LOC_PROT_ERR`).
    LocalProtection,
    /// Anything else, with the raw verbs status.
    Other(u32),
}

/// Which queue a completion is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionKind {
    /// A request of ours; `id` is its [`WorkRequest::id`].
    Sent {
        /// The request.
        id: u64,
    },
    /// A peer's write with immediate has been placed, or (if the status is not success) a receive was flushed, in
    /// which case `imm` is meaningless.
    Received {
        /// The immediate, in host order.
        imm: u32,
    },
}

/// One completion. If `status` is not [`Status::Success`], only `lane`, the request id and `vendor_error` are valid
/// (`ibv_poll_cq(3)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The lane.
    pub lane: LaneId,
    /// The queue and its payload.
    pub kind: CompletionKind,
    /// How it ended.
    pub status: Status,
    /// The vendor's own error code, 0 on success.
    pub vendor_error: u32,
}

/// What a rail reports of itself, beside completions.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RailEvent {
    /// The port carries no traffic any more. Lanes may survive a short while of that.
    PortDown,
    /// The port carries traffic again.
    PortActive,
    /// The port's address (LID or GID) is another: lanes made before may not work any more.
    AddressChanged,
    /// A lane has failed, which need not show in a completion: there may be nothing posted to it.
    LaneFailed(LaneId),
}
