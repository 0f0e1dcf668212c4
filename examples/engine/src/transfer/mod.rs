//! Pages from one engine to another.
//!
//! A decode engine *reserves*: its blocks are granted to the prefill engine's ranks, and the grants of all ranks make a
//! [`Ticket`]. A prefill engine that has the ticket *pushes*: layer by layer, while it computes.
//!
//! The engine thread drives this through [`Transfers`]; nothing here blocks it.
//!
//! | File | Does |
//! |---|---|
//! | `over_kvpush` | [`KvPush`]: the transfers of one engine over one kvpush endpoint, a pool for each rank |
//! | `incoming`, `outgoing` | a reservation, and a push: state machines over the ends of kvpush's grants and pushes |
//! | `ticket`, `codec` | what a decode engine says to a prefill engine, as bytes |
//! | `ready` | who is to be looked at: wakers of futures, and times |
//! | `links` | what all of them share |

mod codec;
mod incoming;
mod links;
mod outgoing;
mod over_kvpush;
mod ready;
pub mod ticket;

use std::ops::Range;

pub use self::over_kvpush::{KvPush, SetupError};
use crate::request::BlockId;

/// The right to push a prompt's pages to a decode engine: what [`Transfers::reserve`] returns, encoded for the way
/// through gateways. Versioned and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket(pub Vec<u8>);

/// A push or a reservation, by the request's number in its engine.
pub type RequestNumber = u64;

/// What a reservation is for.
#[derive(Clone, Debug)]
pub struct Reserve<'a> {
    /// The request.
    pub request: RequestNumber,
    /// Its id, which both sides' logs show.
    pub id: &'a str,
    /// The prompt's blocks, in order.
    pub blocks: &'a [BlockId],
    /// How many of them, from the first on, are here already (prefix hit) and are not granted. Fewer than all: a
    /// decode engine that holds every block still needs the last, whose last token the prefill engine computes.
    pub held: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Digest of the prompt's tokens: the other side must have the same.
    pub digest: [u8; 32],
    /// Ranks of the prefill engine.
    pub prefill_tp: u32,
    /// How long the pages may take.
    pub deadline: std::time::Duration,
}

/// What happened to a transfer. Each reservation ends with one of the first two, each push with one of the last two.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Every page of every rank has arrived, and the tail of rank 0: the first token, as the prefill engine encoded it.
    Arrived {
        /// The reservation.
        request: RequestNumber,
        /// What came with the pages.
        tail: Vec<u8>,
        /// Bytes that arrived.
        bytes: u64,
    },
    /// It did not arrive. The blocks are safe to use again only if `is_fenced`.
    NotArrived {
        /// The reservation.
        request: RequestNumber,
        /// Why.
        error: TransferError,
        /// Whether no write can land any more. If not, the blocks are lost until the process ends.
        is_fenced: bool,
    },
    /// Every page is at the other side. The source blocks are free.
    Pushed {
        /// The push.
        request: RequestNumber,
        /// Bytes pushed.
        bytes: u64,
    },
    /// The push has failed. The source blocks are free only if `is_fenced`.
    NotPushed {
        /// The push.
        request: RequestNumber,
        /// Why.
        error: TransferError,
        /// Whether no device reads the source blocks any more. If not, they must not change until the process ends.
        is_fenced: bool,
    },
}

/// How pages travel, as the engine thread sees it. No call blocks.
pub trait Transfers: Send {
    /// Grants the blocks that are not held. The reservation ends by an [`Outcome`]; after an error nothing is granted,
    /// and there is none.
    fn reserve(&mut self, what: &Reserve<'_>) -> Result<Ticket, TransferError>;
    /// Opens a push to where `ticket` says. `tokens` and `digest` are this side's, and must be the ticket's.
    /// Returns how many blocks the other side holds already, which are not pushed. The push ends by an [`Outcome`]; after
    /// an error there is none, and the ticket is rejected.
    fn open(
        &mut self,
        request: RequestNumber,
        ticket: &Ticket,
        tokens: usize,
        digest: [u8; 32],
        deadline: std::time::Duration,
    ) -> Result<usize, TransferError>;
    /// The blocks of `positions` (a range of the prompt's blocks; `blocks` has one for each) have all their keys and
    /// values of `layer`, on all ranks. Each layer's positions come in order and each once, those found in this side's
    /// prefix cache too. Pushed as soon as the push is open; positions that the other side holds are left out, and need
    /// not be given. After an error the push is cancelled by the caller, and its outcome still comes.
    fn layer(
        &mut self,
        request: RequestNumber,
        layer: usize,
        positions: Range<usize>,
        blocks: &[BlockId],
    ) -> Result<(), TransferError>;
    /// Everything has been handed over: sends the tail and ends the push. After an error the push is cancelled by the
    /// caller, and its outcome still comes.
    fn finish(&mut self, request: RequestNumber, tail: &[u8]) -> Result<(), TransferError>;
    /// Tells who has issued `ticket` that nothing will come, for a request that is refused here before
    /// [`Transfers::open`]. Has no outcome; a ticket that makes no sense is left alone, and its issuer's deadline ends it.
    fn reject(&mut self, ticket: &Ticket);
    /// Gives up a reservation (revoke) or a push (cancel). Its outcome still comes, and only then the blocks are free.
    fn cancel(&mut self, request: RequestNumber);
    /// What has ended since the last call.
    fn poll(&mut self, out: &mut Vec<Outcome>);
    /// Calls `waker` from any thread whenever `poll` may have something.
    fn on_ready(&mut self, waker: Box<dyn Fn() + Send + Sync>);
}

/// Why pages did not travel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TransferError {
    /// What happened: peer, rank, reason.
    pub message: String,
    /// Whether the same may work later.
    pub is_retryable: bool,
}
