//! The protocol as pure state machines: no I/O, no clock, no memory of the fabric. Time is an argument and actions are
//! return values, so every schedule can be tried in a test.
//!
//! | Machine | One for each | Decides |
//! |---|---|---|
//! | [`PushMachine`] | push (writer) | when a push has ended, and how |
//! | [`ArrivalMachine`] | grant (reader) | when an arrival has ended, when the peer must be fenced |
//! | [`LaneLedger`] | lane (writer) | which posted requests a completion retires |
//! | [`ReplayLedger`] | lane (writer) | what must be sent again if it fails |
//! | [`Backoff`] | lane (writer) | when a failed lane is made again |
//! | [`SendCredits`] | lane (writer) | how many requests may be posted |
//! | [`ReceiveCredits`] | lane (reader) | when consumed receives are replenished and announced |
//! | [`Blocks`], [`PartMap`] | grant (both) | what is counted: idempotently, and in any order |

mod arrival;
mod backoff;
mod credits;
mod ledger;
mod parts;
mod push;
mod replay;
mod time;

pub(crate) use arrival::{ArrivalAction, ArrivalEnd, ArrivalMachine};
pub(crate) use backoff::Backoff;
pub(crate) use credits::{ReceiveCredits, SendCredits};
pub(crate) use ledger::{Batch, LaneLedger};
pub(crate) use parts::{Blocks, PartMap, PartOutcome};
pub(crate) use push::{PushAction, PushEnd, PushMachine};
pub(crate) use replay::{Progress, ReplayLedger};
pub(crate) use time::Time;
