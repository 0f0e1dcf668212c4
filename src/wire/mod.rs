//! The wire: control messages, grants and the authenticated stream that carries the messages.
//!
//! Pure: no I/O, no clock, no threads; any thread may call anything. Everything is little-endian, versioned and
//! bounded. A decoder returns a typed error for every input that an encoder cannot produce, allocates no more than
//! the limits stated next to the types, and never panics.
//!
//! Roles are fixed for a session, which is one control connection: the *dialer* is the writer (prefill), the
//! *acceptor* is the reader (decode).

mod auth;
mod channel;
mod codec;
mod envelope;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod grant;
mod ids;
mod imm;
mod layout;
mod message;
mod message_codec;
mod names;
mod pages;
mod pool;
mod token;
mod windows;

#[cfg(test)]
mod tests;

pub use auth::Auth;
pub(crate) use channel::Channel;
pub use channel::ChannelError;
pub use codec::{WireError, WireErrorKind};
pub use envelope::GrantError;
pub use grant::Grant;
pub(crate) use grant::GrantFields;
pub use ids::{Digest, GrantId, Incarnation, PoolId};
pub(crate) use ids::{Nonce, random_nonce};
pub(crate) use imm::{Imm, TailHeader};
pub(crate) use message::MAX_LANES;
pub(crate) use message::{
    Accept, Cancel, Credits, Goodbye, Hello, HelloAck, HelloReject, LaneAnswer, LaneDown,
    LaneFenced, LaneLost, LaneOffer, LaneRefusal, LaneRefused, LaneRenew, LaneRenewed, Message,
    Open, OpenRegion, RailOffer, Refuse, RegionAccept, RegionRefuse, Revoke, TailTarget,
};
pub use message::{GoodbyeCode, RefuseCode, RejectCode, RevokeReason};
pub use names::{FabricKind, LaneAddress, RemoteKey};
pub(crate) use pool::{MAX_EXTENTS, PoolDescriptor, RegionDescriptor, RegionKey};
pub use token::RegionToken;
pub(crate) use token::RegionTokenFields;
pub(crate) use windows::{GrantWindows, LaneWindows, MAX_WINDOWS, WindowRange};

/// The protocol version both sides of a control connection must share.
pub(crate) const PROTOCOL_VERSION: u16 = 1;
/// Most bytes of one encoded [`Message`].
pub(crate) const MAX_MESSAGE: usize = 4 << 20;
