//! The embedded fabric over TCP sockets, for hosts without an RDMA device.
//!
//! One socket carries one lane. A peer's payload is read by `readv(2)` from the socket straight into the destination
//! page, and is gathered by `sendmsg(2)` straight from the source page: user space never copies it. The semantics are
//! those of [`Context`](super::Context): in-order placement, completions that mean "placed at the peer", receives
//! that are consumed one by one, failed lanes that flush.
//!
//! # Frames
//!
//! Both directions are a sequence of *trains*: up to 64 headers, then the payloads of those headers in
//! the same order. Because the receiver knows all headers of a train before the first payload byte, it can aim one
//! `readv` at many pages. Long messages are cut into segments of at most 512 KiB, so that
//! acknowledgements and read responses are never stuck behind one; the first segment announces the whole range, which
//! is checked before a byte is placed.
//!
//! # Flow control
//!
//! Every header carries two cumulative counters of the other direction: requests executed (the acknowledgement) and
//! receives posted (the credit, as in the AETH of InfiniBand, vol. 1, 9.7.7.2). A sender without credit holds back its
//! next write with immediate and everything behind it; after [`TcpConfig::rnr_timeout`] the lane fails with
//! [`Status::RnrRetryExceeded`](super::Status). The socket itself is never left unread, so acknowledgements flow even
//! while both directions wait for receives.
//!
//! # Trust
//!
//! The stream is neither encrypted nor authenticated beyond the random lane tokens that travel on the (authenticated)
//! control channel. Everything a peer sends is checked before use: token, header, sequence, key, range, permission,
//! credit. Run it on networks that are trusted as an RDMA network is.

mod accept;
mod context;
mod device;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod greet;
mod lane;
mod receive;
mod send;
mod sys;
mod transmit;
mod wire;

use super::registry as memory;
pub use device::{TcpConfig, TcpDevice};

#[cfg(test)]
mod tests;
