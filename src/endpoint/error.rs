//! Errors of endpoints, grants, pushes and arrivals.
//!
//! Errors that several waiters of one push or arrival can receive are `Clone`.

use std::{fmt, time::Duration};

use super::{
    control::CloseReason,
    regions::{PathRefusal, Unreachable},
};
use crate::{
    fabric::{FabricError, FabricKind, LaneId, Status},
    kv::{HeadRange, LayoutError, PlanError, pages::PageError},
    memory::{MemoryError, MemoryKind, PciAddress},
    wire::{GoodbyeCode, GrantError, Incarnation, RefuseCode, RejectCode, RevokeReason},
};

/// Why an endpoint could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// No [`Auth`](crate::Auth) was given.
    #[error(
        "no authentication was chosen (hint: Builder::auth with a pre-shared key; Auth::insecure_plaintext() for tests)"
    )]
    NoAuth,
    /// A setting makes no sense.
    #[error("{setting} = {value}: {why}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// The value given.
        value: String,
        /// Why not.
        why: &'static str,
    },
    /// The control address could not be bound, or a thread not started.
    #[error("{operation} {address}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// With which address.
        address: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// None of the wanted fabrics has a usable rail.
    #[error("no usable rail: {}", Reasons(_0))]
    NoRail(Vec<String>),
    /// A fabric failed.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// Memory could not be registered.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A rail reaches a device's memory by none of the paths that it may take.
    #[error("{rail} cannot reach the memory: {}", Refusals(refused))]
    Unreachable {
        /// The rail: device and port.
        rail: String,
        /// Why not by each path ([`Builder::memory_paths`](super::Builder::memory_paths)).
        refused: Vec<PathRefusal>,
    },
    /// Some regions of a pool have to be staged, and this one cannot be, because rails reach it.
    #[error(
        "region {region} need not be staged in a pool that has to be (hint: pools of one kind of memory)"
    )]
    MixedPool {
        /// The region.
        region: usize,
    },
    /// A pool falls into more registrations than a peer can be told of.
    #[error(
        "the pool takes {extents} registrations, of which {limit} can be told (hint: shorter pools)"
    )]
    TooManyExtents {
        /// Registrations on all rails.
        extents: usize,
        /// The limit.
        limit: usize,
    },
    /// A pool's layout does not fit its memory, or is impossible.
    #[error("layout: {0}")]
    Layout(#[from] LayoutError),
    /// A region token cannot be encoded.
    #[error(transparent)]
    Token(#[from] GrantError),
    /// The endpoint has been shut down.
    #[error("the endpoint is shut down")]
    Closed,
}

struct Refusals<'a>(&'a [PathRefusal]);

impl fmt::Display for Refusals<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no path is allowed (Builder::memory_paths)");
        }
        let texts: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&texts.join("; "))
    }
}

impl From<Unreachable> for EndpointError {
    fn from(error: Unreachable) -> Self {
        match error {
            Unreachable::Plain(error) => Self::Fabric(error),
            Unreachable::All { rail, refused } => Self::Unreachable { rail, refused },
        }
    }
}

struct Reasons<'a>(&'a [String]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no fabric was asked for");
        }
        f.write_str(&self.0.join("; "))
    }
}

impl EndpointError {
    /// Whether the same call can succeed later without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Fabric(error) => error.is_retryable(),
            Self::Memory(error) => error.is_retryable(),
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::AddrInUse,
            _ => false,
        }
    }
}

/// Why a pool did not issue a grant. Nothing is reserved then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// No page, or more than a grant or its parts can count.
    #[error(
        "a grant of {pages} pages in {parts_per_layer} parts for each of {layers} layers cannot be counted"
    )]
    Size {
        /// Pages asked for.
        pages: usize,
        /// Layers of the pool.
        layers: usize,
        /// Parts of each layer.
        parts_per_layer: u16,
    },
    /// A page does not exist or occurs twice.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A live grant has the page.
    #[error("page {page} belongs to a live grant (hint: wait for that arrival's end or revoke it)")]
    PageBusy {
        /// The page.
        page: u32,
    },
    /// The pool does not hold these heads.
    #[error("{wanted} are not all held by the pool's layer {layer}")]
    Heads {
        /// What was asked for.
        wanted: HeadRange,
        /// The layer that lacks some.
        layer: usize,
    },
    /// The pool has to be staged, and the pages do not fit into staging memory.
    #[error(
        "the pages take {bytes} bytes of staging memory, of which grants have {room} (hint: Builder::staging_memory)"
    )]
    TooLargeToStage {
        /// Bytes that the pages take.
        bytes: u64,
        /// Bytes that there are for grants.
        room: u64,
    },
    /// The deadline is zero.
    #[error("a grant needs time: its deadline is zero")]
    NoTime,
    /// All grant slots are in use.
    #[error("{limit} grants and pushes are live, which is the limit (Builder::max_transfers)")]
    TooMany {
        /// The limit.
        limit: u32,
    },
    /// The operating system gives no random numbers.
    #[error("no random numbers: {0}")]
    Random(String),
    /// The request's name is too long, or another part of the grant cannot be encoded.
    #[error("the grant cannot be encoded: {0}")]
    Encode(#[from] GrantError),
    /// The endpoint is going away ([`Endpoint::drain`](super::Endpoint::drain)).
    #[error("the endpoint is draining")]
    Draining,
    /// The endpoint has been shut down.
    #[error("the endpoint is shut down")]
    Closed,
}

impl IssueError {
    /// Whether the same call can succeed later: when other grants have ended.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::PageBusy { .. } | Self::TooMany { .. })
    }
}

/// A device did not make what NICs had written visible to its kernels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("flush of {kind:?} memory{}: {reason}", device.map(|d| format!(" on {d}")).unwrap_or_default())]
pub struct FlushError {
    /// What the memory is.
    pub kind: MemoryKind,
    /// The device, if it says which it is.
    pub device: Option<PciAddress>,
    /// The runtime's words.
    pub reason: String,
}

impl FlushError {
    /// Whether the same call can succeed later: nobody knows that of a runtime that failed once.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// A device did not copy between its memory and the host's, for a rail that cannot reach it by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("staging of {kind:?} memory: {reason}")]
pub struct StagingError {
    /// What the memory is.
    pub kind: MemoryKind,
    /// The runtime's words.
    pub reason: String,
}

impl StagingError {
    /// Whether the same call can succeed later: nobody knows that of a runtime that failed once.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// A device has not ended a copy between its memory and the host's. Nobody can make it, so the memory it may still touch
/// stays registered and reserved for the life of the process. No copies are started after it until it has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "staging: a copy of {kind:?} memory{} has not ended within {waited:?}",
    device.map_or_else(String::new, |device| format!(" of device {device}"))
)]
pub struct StuckCopy {
    /// What the memory is.
    pub kind: MemoryKind,
    /// The device.
    pub device: Option<PciAddress>,
    /// How long it was waited for after the end.
    pub waited: Duration,
}

/// Why the peer is not reachable, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// It could not be dialled, or the control connection broke, or failed to authenticate.
    #[error("control connection to {peer}: {reason}")]
    Control {
        /// Its address.
        peer: String,
        /// What happened.
        reason: CloseReason,
    },
    /// The session that learnt a region's keys has ended.
    #[error("the session with {peer} has ended; open the region again")]
    NoSession {
        /// Its address.
        peer: String,
    },
    /// It answers, but is another incarnation than the one that issued the grant: it has restarted.
    #[error(
        "{peer} is incarnation {found}, the grant is of {expected}: the peer has restarted since"
    )]
    Restarted {
        /// Its address.
        peer: String,
        /// Who answered.
        found: Incarnation,
        /// Who issued the grant.
        expected: Incarnation,
    },
    /// It refused the session.
    #[error("{peer} refused the session: {code}: {detail}")]
    Rejected {
        /// Its address.
        peer: String,
        /// Why.
        code: RejectCode,
        /// Its words.
        detail: String,
    },
    /// It ended the session.
    #[error("{peer} ended the session: {code}: {detail}")]
    Goodbye {
        /// Its address.
        peer: String,
        /// Why.
        code: GoodbyeCode,
        /// Its words.
        detail: String,
    },
    /// A lane to it failed.
    #[error("{peer}: {fabric} {device}, {lane}: {status:?} (vendor error {vendor_error:#x}){}", hint(*status))]
    Lane {
        /// Its address.
        peer: String,
        /// The fabric.
        fabric: FabricKind,
        /// Our device.
        device: String,
        /// Our lane.
        lane: LaneId,
        /// How the request ended that failed first.
        status: Status,
        /// The vendor's code for it.
        vendor_error: u32,
    },
    /// Its own end of a lane failed.
    #[error("{peer} lost its end of lane {lane}: {detail}")]
    LaneLost {
        /// Its address.
        peer: String,
        /// The lane, counted within the session.
        lane: u16,
        /// Its words.
        detail: String,
    },
    /// No lane to it worked for too long.
    #[error("no lane to {peer} has worked for {waited:?}; the last failure: {last}")]
    NoLane {
        /// Its address.
        peer: String,
        /// How long none worked.
        waited: Duration,
        /// How the last of them failed.
        last: Box<PeerError>,
    },
    /// The fabric failed below a lane to it.
    #[error("{peer}: {source}")]
    Fabric {
        /// Its address.
        peer: String,
        /// Why.
        source: Box<FabricError>,
    },
    /// It sent what it must not.
    #[error("{peer} broke the protocol: {detail}")]
    Protocol {
        /// Its address.
        peer: String,
        /// How.
        detail: String,
    },
    /// It did not answer in time, so its lanes were fenced.
    #[error("{peer} did not answer within {waited:?}; its lanes were fenced")]
    Silent {
        /// Its address.
        peer: String,
        /// How long it had.
        waited: Duration,
    },
    /// This endpoint ended the session ([`Endpoint::disconnect`](super::Endpoint::disconnect)).
    #[error("this endpoint has disconnected from {peer}")]
    Disconnected {
        /// Its address.
        peer: String,
    },
    /// This endpoint is going away ([`Endpoint::drain`](super::Endpoint::drain)).
    #[error("the endpoint is draining")]
    Draining,
    /// This endpoint has been shut down.
    #[error("the endpoint is shut down")]
    Closed,
}

fn hint(status: Status) -> &'static str {
    match status {
        Status::RetryExceeded => {
            " (hint: peer gone, or packets lost: check the link, PFC and the traffic class)"
        }
        Status::RemoteAccess => {
            " (hint: the peer's registration is gone or does not allow the access)"
        }
        Status::RemoteInvalidRequest => {
            " (hint: on soft-RoCE, acknowledgements were slower than the timeout: raise VerbsConfig::timeout)"
        }
        Status::RnrRetryExceeded => " (hint: the peer posts no receives; is it stopped?)",
        _ => "",
    }
}

impl PeerError {
    /// Whether a new attempt with a new grant may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Control { reason, .. } => reason.is_retryable(),
            Self::Rejected { code, .. } => *code == RejectCode::Busy,
            Self::NoSession { .. }
            | Self::Restarted { .. }
            | Self::Lane { .. }
            | Self::LaneLost { .. }
            | Self::NoLane { .. }
            | Self::Silent { .. }
            | Self::Disconnected { .. }
            | Self::Goodbye { .. } => true,
            Self::Fabric { source, .. } => source.is_retryable(),
            Self::Protocol { .. } | Self::Draining | Self::Closed => false,
        }
    }
}

/// Why a push did not go on. Whichever it is, nothing of the push is in flight any more when it is reported by
/// `finish`, so the source pages may be reused; [`PushError::Unfenced`] and [`PushError::Stuck`] are the exceptions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The call is wrong; nothing was written by it and the push goes on.
    #[error(transparent)]
    Input(#[from] PushInputError),
    /// The source pool and the granted pool do not match.
    #[error("the pools do not match: {0}")]
    Mismatch(#[from] PlanError),
    /// The reader refused the grant.
    #[error("the grant was refused: {code}: {detail}")]
    Refused {
        /// Why.
        code: RefuseCode,
        /// The reader's words.
        detail: String,
    },
    /// The reader took the grant back.
    #[error("the grant was taken back: {0}")]
    Revoked(RevokeReason),
    /// The deadline passed.
    #[error("the deadline has passed")]
    Expired,
    /// This side cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// Its lanes could not be fenced, so a device may still read: the source pages must not change any more. They stay
    /// registered.
    #[error("lanes could not be fenced, the source pages must not be used again: {0}")]
    Unfenced(Box<FabricError>),
    /// A device may still copy from the source pages to staging memory: they must not change any more. They stay
    /// registered.
    #[error("the source pages must not be used again: {0}")]
    Stuck(StuckCopy),
    /// The device did not copy the source pages to staging memory.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// No lane joins a rail that the source pool uses with one that the granted pool uses.
    #[error(
        "no lane joins the rails of both pools: the source pool uses lanes of [{}], the granted one those whose other \
         end is [{}] here (hint: PoolOptions::rails, on either side)",
        ours.join(", "),
        theirs.join(", ")
    )]
    NoLane {
        /// Rails of this side that the source pool uses.
        ours: Vec<String>,
        /// Rails of this side whose lanes lead to rails that the granted pool uses.
        theirs: Vec<String>,
    },
    /// The peer is not reachable.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

impl PushError {
    /// Whether a new attempt with a new grant may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code.is_retryable(),
            Self::Staging(error) => error.is_retryable(),
            Self::Peer(error) => error.is_retryable(),
            Self::Expired | Self::Revoked(_) => true,
            Self::Input(_)
            | Self::Mismatch(_)
            | Self::Cancelled
            | Self::Unfenced(_)
            | Self::Stuck(_)
            | Self::NoLane { .. } => false,
        }
    }
}

/// A wrong call of a push. Nothing was written by it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushInputError {
    /// No such layer.
    #[error("layer {layer} does not exist, there are {layers}")]
    Layer {
        /// The layer.
        layer: usize,
        /// Layers there are.
        layers: usize,
    },
    /// The positions do not exist in the grant.
    #[error("positions {first}..+{count} are outside of a grant of {granted} pages")]
    Positions {
        /// First position.
        first: usize,
        /// Number of pages given.
        count: usize,
        /// Pages of the grant.
        granted: usize,
    },
    /// A source page does not exist or occurs twice.
    #[error("source: {0}")]
    Page(#[from] PageError),
    /// The position has been pushed before.
    #[error("position {position} of layer {layer} has been pushed before")]
    Repeated {
        /// The layer.
        layer: usize,
        /// The position in the grant.
        position: usize,
    },
    /// Not everything has been pushed yet.
    #[error("layer {layer} lacks {missing} pages; push them before finishing")]
    Incomplete {
        /// The first layer that is incomplete.
        layer: usize,
        /// Pages missing of it.
        missing: usize,
    },
    /// The tail is longer than the grant has room for.
    #[error("a tail of {length} bytes does not fit into {capacity}")]
    Tail {
        /// Its length.
        length: usize,
        /// Room for it.
        capacity: usize,
    },
    /// `finish` was called before.
    #[error("the push is already finished")]
    Finished,
    /// The reader has not agreed yet.
    #[error("the push is not open yet; wait for Push::opened")]
    NotOpen,
    /// The pool belongs to another endpoint.
    #[error("the source pool is of another endpoint")]
    ForeignPool,
    /// The pages were prepared for another push.
    #[error("the pages were prepared for another push")]
    ForeignPages,
    /// All transfer slots are in use.
    #[error("{limit} grants and pushes are live, which is the limit (Builder::max_transfers)")]
    TooMany {
        /// The limit.
        limit: u32,
    },
}

/// Why an arrival did not complete. When it is reported, no write of the grant can land any more, so the pages may be
/// reused; [`ArrivalError::Unfenced`] and [`ArrivalError::Stuck`] are the exceptions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalError {
    /// The deadline passed.
    #[error("the deadline has passed with {missing} of {parts} parts missing")]
    Expired {
        /// Parts missing.
        missing: u32,
        /// Parts in all.
        parts: u32,
    },
    /// Taken back by this side.
    #[error("revoked")]
    Revoked,
    /// The writer gave up.
    #[error("the writer gave up: {detail}")]
    Abandoned {
        /// Its words.
        detail: String,
    },
    /// The writer is lost.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The lanes of the writer could not be fenced, so its writes may still land: the pages must not be used any more.
    /// They stay reserved.
    #[error("the writer's lanes could not be fenced, its pages must not be used again: {0}")]
    Unfenced(Box<FabricError>),
    /// A device may still copy from staging memory to the pages: they must not be used any more. They stay reserved.
    #[error("its pages must not be used again: {0}")]
    Stuck(StuckCopy),
    /// The bytes are there, but the device whose memory they are in did not make them visible to its kernels.
    #[error(transparent)]
    Flush(#[from] FlushError),
    /// The bytes are in staging memory, but the device did not copy them to the pages. What the pages hold is unknown.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// There is no such layer to wait for.
    #[error("layer {layer} does not exist, there are {layers}")]
    NoSuchLayer {
        /// The layer.
        layer: usize,
        /// Layers there are.
        layers: usize,
    },
}

impl ArrivalError {
    /// Whether a new grant for the same pages may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Expired { .. } | Self::Abandoned { .. } => true,
            Self::Revoked | Self::Unfenced(_) | Self::Stuck(_) | Self::NoSuchLayer { .. } => false,
            Self::Peer(error) => error.is_retryable(),
            Self::Flush(error) => error.is_retryable(),
            Self::Staging(error) => error.is_retryable(),
        }
    }
}

/// Why one-sided access failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The range is outside of the local or the remote region.
    #[error("bytes {offset}..+{length} are outside of the {side} region of {capacity} bytes")]
    OutOfRange {
        /// `local` or `remote`.
        side: &'static str,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Bytes there are.
        capacity: u64,
    },
    /// The export does not allow it.
    #[error("the export does not allow to {0}")]
    NotAllowed(&'static str),
    /// The owner refused the token.
    #[error("the token was refused: {code}: {detail}")]
    Refused {
        /// Why.
        code: RefuseCode,
        /// The owner's words.
        detail: String,
    },
    /// The owner is not reachable.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Its lanes could not be fenced, so a device may still use the local memory, which stays registered.
    #[error("lanes could not be fenced, the local memory must not be used again: {0}")]
    Unfenced(Box<FabricError>),
    /// It did not get to move bytes in time. (One that did is [`PeerError::Silent`], after a fence.)
    #[error("the deadline has passed")]
    Expired,
}

impl AccessError {
    /// Whether the same call can succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code.is_retryable(),
            Self::Peer(error) => error.is_retryable(),
            Self::Expired => true,
            Self::OutOfRange { .. } | Self::NotAllowed(_) | Self::Unfenced(_) => false,
        }
    }
}
