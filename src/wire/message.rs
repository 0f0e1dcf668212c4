//! The control messages of a session. See [`super`] for the roles; a comment on each message says who sends it.

use super::ids::{Digest, GrantId, Incarnation, Nonce, PoolId};
use super::pool::{PoolDescriptor, RegionKey};
use super::windows::GrantWindows;
use crate::wire::{FabricKind, LaneAddress, RemoteKey};

/// Most bytes of an endpoint's name.
pub(crate) const MAX_NAME: usize = 255;
/// Most bytes of a rail's address, which is for people.
pub(crate) const MAX_RAIL_ADDRESS: usize = 128;
/// Most lanes of a session.
pub(crate) const MAX_LANES: usize = 64;
/// Most parts that a failed lane may have left unacknowledged: the deepest send queue there is.
pub(crate) const MAX_UNACKNOWLEDGED: usize = 1 << 15;
/// Most bytes of an explanation; longer ones are cut.
pub(crate) const MAX_DETAIL: usize = 512;

/// An enumeration with a number for each value.
macro_rules! codes {
    ($(#[$meta:meta])* $vis:vis $name:ident { $($(#[$doc:meta])* $value:ident = $number:literal => $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        #[non_exhaustive]
        $vis enum $name { $($(#[$doc])* $value = $number,)* }

        impl $name {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$value,)*];

            /// The value encoded as `number` on the wire.
            pub(crate) const fn from_wire(number: u16) -> Option<Self> {
                Some(match number {
                    $($number => Self::$value,)*
                    _ => return None,
                })
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$value => $text,)* })
            }
        }
    };
}

codes! {
    /// Why a reader did not open a session.
    pub RejectCode {
        /// No kind of fabric is common to both.
        NoCommonFabric = 1 => "no fabric in common",
        /// The lanes could not be set up.
        LaneSetup = 2 => "lanes could not be set up",
        /// The reader has as many sessions as it takes.
        Busy = 3 => "too many sessions",
        /// The writer's software cannot be served.
        Version = 4 => "version not served",
        /// The endpoint dialled itself.
        SelfConnect = 5 => "connected to itself",
        /// Anything else; see the text.
        Other = 6 => "refused",
    }
}

codes! {
    /// Why a reader refused a grant or region token.
    pub RefuseCode {
        /// No such grant or region, or the secret is wrong.
        UnknownGrant = 1 => "unknown",
        /// The slot has been used again since.
        StaleGeneration = 2 => "of an earlier generation",
        /// Issued by an earlier start of the reader, or by another endpoint.
        WrongIncarnation = 3 => "issued by another incarnation",
        /// Its deadline has passed.
        Expired = 4 => "expired",
        /// Another push has opened it.
        AlreadyOpened = 5 => "already opened",
        /// The content is not what was issued.
        DigestMismatch = 6 => "not what was issued",
        /// The pool was closed.
        PoolGone = 7 => "its pool is closed",
        /// The reader has no slot left for now.
        Busy = 8 => "too many pushes",
        /// The reader is shutting down.
        Draining = 9 => "shutting down",
        /// Anything else; see the text.
        Other = 10 => "refused",
    }
}

impl RefuseCode {
    /// Whether the same grant may be accepted later.
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Busy)
    }
}

codes! {
    /// Why a reader took a grant back.
    pub RevokeReason {
        /// The user asked for it.
        Requested = 1 => "revoked by the reader",
        /// Its deadline passed.
        Expired = 2 => "expired",
        /// The pool was closed.
        PoolClosed = 3 => "pool closed",
        /// The reader is shutting down.
        Shutdown = 4 => "reader shutting down",
    }
}

codes! {
    /// Why a peer ends a session.
    pub GoodbyeCode {
        /// The endpoint was closed.
        Shutdown = 1 => "endpoint closed",
        /// The other side broke the protocol.
        Protocol = 2 => "protocol violation",
        /// The other side was silent for too long.
        Timeout = 3 => "peer silent",
        /// Anything else; see the text.
        Error = 4 => "error",
    }
}

codes! {
    /// Why a reader did not make a lane again.
    pub(crate) LaneRefusal {
        /// No rail of the reader can carry it now.
        NoRail = 1 => "no rail",
        /// It could not be set up.
        Setup = 2 => "could not be set up",
    }
}

/// A control message. `push` and `request` numbers are chosen by the writer and name one push or request of the
/// session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Writer: opens the session.
    Hello(Hello),
    /// Reader: the session is open.
    HelloAck(HelloAck),
    /// Reader: no session.
    HelloReject(HelloReject),
    /// Writer: wants to use a grant.
    Open(Open),
    /// Reader: may be used; boxed because a pool descriptor is large and rare.
    Accept(Box<Accept>),
    /// Reader: may not be used.
    Refuse(Refuse),
    /// Reader: receives posted so far.
    Credits(Credits),
    /// Reader: stop this push; answered by `Drained` once nothing of it is in flight.
    Revoke(Revoke),
    /// Writer: nothing of this push is in flight any more, and nothing will be.
    Drained { push: u64 },
    /// Writer: gives the push up; already drained.
    Cancel(Cancel),
    /// Reader: every part has arrived.
    Done { push: u64 },
    /// Writer: wants the keys of an exported region.
    OpenRegion(OpenRegion),
    /// Reader: the keys.
    RegionAccept(RegionAccept),
    /// Reader: no access.
    RegionRefuse(RegionRefuse),
    /// Reader: its end of a lane has failed, or should be made again.
    LaneLost(LaneLost),
    /// Writer: its end of a lane is gone for good; asks which parts have been counted.
    LaneDown(LaneDown),
    /// Reader: its end is gone too, so nothing of the lane can land any more; and the answer.
    LaneFenced(LaneFenced),
    /// Writer: offers a new end for a lane that is gone on both sides.
    LaneRenew(LaneRenew),
    /// Reader: the lane is connected again.
    LaneRenewed(LaneRenewed),
    /// Reader: not now.
    LaneRefused(LaneRefused),
    /// Either: are you there?
    Ping { nonce: u64 },
    /// Either: yes; the nonce of the ping.
    Pong { nonce: u64 },
    /// Either: the last message of the session.
    Goodbye(Goodbye),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) incarnation: Incarnation,
    pub(crate) name: String,
    /// The fabric of the lanes offered.
    pub(crate) fabric: FabricKind,
    /// Every kind of fabric the writer has, as a mask of [`FabricKind`] values.
    pub(crate) supported: u8,
    pub(crate) rails: Vec<RailOffer>,
    pub(crate) lanes: Vec<LaneOffer>,
    /// The silence after which the writer gives the reader up, in milliseconds; 0 for never.
    pub(crate) keepalive_ms: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RailOffer {
    pub(crate) rail: u8,
    /// Bits per second, 0 if unknown.
    pub(crate) speed_bits: u64,
    pub(crate) address: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneOffer {
    /// The writer's rail.
    pub(crate) rail: u8,
    /// Which of the reader's rails of this fabric it wants to meet, counted from 0; taken modulo their number.
    pub(crate) remote_rail: u8,
    pub(crate) address: LaneAddress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HelloAck {
    pub(crate) incarnation: Incarnation,
    pub(crate) name: String,
    /// One for each lane offered, in the same order.
    pub(crate) lanes: Vec<LaneAnswer>,
    /// Receives posted on each lane at the start.
    pub(crate) receives_per_lane: u32,
    /// The silence after which the reader gives the writer up, in milliseconds; 0 for never.
    pub(crate) keepalive_ms: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneAnswer {
    /// The reader's rail.
    pub(crate) rail: u8,
    /// Its bits per second, 0 if unknown.
    pub(crate) speed_bits: u64,
    pub(crate) address: LaneAddress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HelloReject {
    pub(crate) code: RejectCode,
    /// Every kind of fabric the reader has, as a mask of [`FabricKind`] values.
    pub(crate) supported: u8,
    pub(crate) detail: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) push: u64,
    pub(crate) grant: GrantId,
    pub(crate) pool: PoolId,
    /// Of the reader, as the grant has it.
    pub(crate) incarnation: Incarnation,
    pub(crate) digest: Digest,
    /// Whether the writer has no descriptor of this pool yet.
    pub(crate) want_pool: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) push: u64,
    /// Goes into the immediate of every part.
    pub(crate) slot: u16,
    /// Until the grant's deadline by the reader's clock.
    pub(crate) remaining_ns: u64,
    pub(crate) tail: TailTarget,
    /// If there are any, they are the only keys there are: neither the tail nor the pool has others.
    pub(crate) windows: Option<GrantWindows>,
    pub(crate) pool: Option<PoolDescriptor>,
    /// Where to write in place of the pool, for this push only: page `i` is for position `i` of the grant.
    pub(crate) landing: Option<PoolDescriptor>,
}

/// Where the tail goes: a header and then at most `capacity` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TailTarget {
    pub(crate) address: u64,
    /// The reader's rail and the key there.
    pub(crate) keys: Vec<(u8, RemoteKey)>,
    pub(crate) capacity: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refuse {
    pub(crate) push: u64,
    pub(crate) code: RefuseCode,
    pub(crate) detail: String,
}

/// The total of receives posted on a lane since it was made, so a repeated message does no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credits {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    pub(crate) total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Revoke {
    pub(crate) push: u64,
    pub(crate) reason: RevokeReason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cancel {
    pub(crate) push: u64,
    /// [`Cancel::EXPIRED`], or 0 for any other reason.
    pub(crate) code: u16,
    pub(crate) detail: String,
}

impl Cancel {
    /// The writer saw the grant's deadline pass. Its clock may run a little ahead of the reader's.
    pub(crate) const EXPIRED: u16 = 1;
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct OpenRegion {
    pub(crate) request: u64,
    pub(crate) region: u32,
    pub(crate) nonce: Nonce,
    /// Of the reader, as the token has it.
    pub(crate) incarnation: Incarnation,
}

impl std::fmt::Debug for OpenRegion {
    // Without the nonce, which is the authority.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenRegion")
            .field("request", &self.request)
            .field("region", &self.region)
            .field("incarnation", &self.incarnation)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionAccept {
    pub(crate) request: u64,
    pub(crate) length: u64,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) keys: Vec<RegionKey>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RegionRefuse {
    pub(crate) request: u64,
    pub(crate) code: RefuseCode,
    pub(crate) detail: String,
}

/// `lane` counts the lanes of the offer from 0; `epoch` counts how often it has been offered again since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneLost {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    pub(crate) detail: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneDown {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    /// Push and part of each immediate that was posted and not acknowledged, oldest first.
    pub(crate) unacknowledged: Vec<(u64, u32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneFenced {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    /// For each of `LaneDown::unacknowledged`: whether it must not be sent again.
    pub(crate) counted: Vec<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneRenew {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    /// The writer's rail.
    pub(crate) rail: u8,
    /// The reader's rail that the lane belongs to.
    pub(crate) remote_rail: u8,
    pub(crate) address: LaneAddress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneRenewed {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    /// The reader's rail.
    pub(crate) rail: u8,
    /// Its bits per second, 0 if unknown.
    pub(crate) speed_bits: u64,
    pub(crate) address: LaneAddress,
    /// Receives posted.
    pub(crate) receives: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LaneRefused {
    pub(crate) lane: u16,
    pub(crate) epoch: u32,
    pub(crate) code: LaneRefusal,
    pub(crate) detail: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Goodbye {
    pub(crate) code: GoodbyeCode,
    pub(crate) detail: String,
}
