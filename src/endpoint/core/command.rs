//! What goes into a core and how it talks to peers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{AccessEntry, ArrivalEntry, ConnectEntry, ExportRecord, PushEntry};
use crate::{
    endpoint::regions::Region,
    endpoint::{
        control::{CloseReason, ConnId},
        drain::DrainEntry,
        prepared::PageList,
        shared::PoolRecord,
    },
    wire::{GrantId, Incarnation, PoolId},
};

/// What callers ask for.
pub(crate) enum Command {
    /// A pool has been registered.
    AddPool(Arc<PoolRecord>),
    /// Nobody has the pool any more.
    ReleasePool(PoolId),
    /// A grant has been issued.
    AddGrant(Box<ArrivalEntry>),
    /// The pages are wanted back.
    Revoke(GrantId),
    /// A session is wanted before there is a push.
    Connect(ConnectEntry),
    /// A push begins.
    OpenPush(Box<PushEntry>),
    /// Source pages of one layer. Checked by the caller.
    Pages {
        push: u64,
        layer: u32,
        list: Arc<PageList>,
    },
    /// Everything has been handed over.
    Finish { push: u64, tail: Bytes },
    /// The push is not wanted any more.
    Cancel { push: u64 },
    /// A registration is not wanted any more.
    Deregister(Region),
    /// A region can be reached by its token.
    AddExport(Arc<ExportRecord>),
    /// It cannot any more.
    ReleaseExport(Arc<ExportRecord>),
    /// A one-sided access, or its opening.
    Access(Box<AccessEntry>),
    /// The sessions with this peer are not wanted any more.
    Disconnect(Incarnation),
    /// The endpoint is to go away in good order.
    Drain(DrainEntry),
}

/// What the control connections report.
#[derive(Debug)]
pub(crate) enum ControlEvent {
    /// A peer dialled and has authenticated.
    Accepted { conn: ConnId, peer: SocketAddr },
    /// A dialled peer has authenticated.
    Connected { conn: ConnId, peer: SocketAddr },
    /// A message.
    Message { conn: ConnId, bytes: Vec<u8> },
    /// The connection is gone, or could not be made.
    Closed { conn: ConnId, reason: CloseReason },
}

/// Control connections, as a core uses them. Calls do not block; what cannot be done is reported as
/// [`ControlEvent::Closed`].
pub(crate) trait Control: Send {
    /// Dials the first of `addresses` that answers.
    fn connect(&mut self, conn: ConnId, addresses: Vec<String>, timeout: Duration);

    /// Sends one message after those sent before.
    fn send(&mut self, conn: ConnId, message: Vec<u8>);

    /// Closes after what was sent has been flushed. An event that still follows finds no session.
    fn close(&mut self, conn: ConnId);
}
