//! The control connections of an endpoint: one thread that owns every socket and nothing else.
//!
//! The driver (the thread that runs the protocol) talks to it only through [`ControlHandle`] and the event queue, so
//! the protocol never waits for a socket and a socket never waits for the protocol. The thread sleeps in `epoll` and
//! has no timer unless something has a deadline.
//!
//! What a peer can make this side hold is bounded: before it is authenticated next to nothing (see
//! [`Channel`](crate::wire::Channel)) on at most [`ControlConfig::max_unauthenticated`] connections for at most
//! [`ControlConfig::handshake_timeout`]; afterwards, in each connection, [`ControlConfig::max_outgoing`] bytes that
//! the peer does not read and about [`ControlConfig::max_incoming`] bytes that the driver has not yet consumed.
//! Any thread may call the handle.

mod budget;
mod connection;
mod dial;
mod reactor;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
#[cfg(test)]
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use mio::Waker;

pub(crate) use budget::Received;
pub use dial::{DialError, DialFailure};

use crate::wire::{Auth, ChannelError};

/// A control connection. Never reused; those that were accepted have the highest bit set, those the driver dials
/// must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnId(pub(crate) u64);

impl ConnId {
    const ACCEPTED: u64 = 1 << 63;
    /// The greatest number the driver may choose.
    pub(crate) const MAX_DIALED: u64 = (1 << 48) - 1;

    /// Whether the peer dialled.
    #[cfg(test)]
    pub(crate) const fn is_accepted(self) -> bool {
        self.0 & Self::ACCEPTED != 0
    }
}

/// Bounds and times.
#[derive(Clone, Debug)]
pub(crate) struct ControlConfig {
    /// For an accepted peer to authenticate itself.
    pub(crate) handshake_timeout: Duration,
    /// Accepted connections that are not yet authenticated. A further one takes the place of the oldest.
    pub(crate) max_unauthenticated: usize,
    /// Accepted and dialled connections; further peers are turned away.
    pub(crate) max_connections: usize,
    /// Bytes of one connection that wait for the peer to read.
    pub(crate) max_outgoing: usize,
    /// Bytes of one connection that wait for the driver. Beyond it the socket is not read until half is consumed.
    pub(crate) max_incoming: usize,
    /// For a closed connection to get its last bytes across.
    pub(crate) linger: Duration,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            max_unauthenticated: 64,
            max_connections: 4096,
            max_outgoing: 8 << 20,
            max_incoming: 8 << 20,
            linger: Duration::from_secs(1),
        }
    }
}

/// What the driver learns.
#[derive(Debug)]
pub(crate) enum ControlEvent {
    /// A peer dialled and has authenticated itself.
    Accepted { conn: ConnId, peer: SocketAddr },
    /// A connection dialled by the driver is established and the peer authenticated.
    Connected { conn: ConnId, peer: SocketAddr },
    /// One message; empty ones are possible.
    Message { conn: ConnId, bytes: Received },
    /// The last event of a connection.
    Closed { conn: ConnId, reason: CloseReason },
}

/// Why a control connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// No address of the peer could be reached.
    #[error("cannot connect: {}", dial::list(attempts))]
    Dial {
        /// What happened at each address.
        attempts: Vec<DialFailure>,
    },
    /// The peer is not who it should be, or broke the rules of the stream.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The peer closed the connection.
    #[error("the peer closed the control connection")]
    PeerClosed,
    /// The connection broke; the value is an errno.
    #[error("the control connection broke: {}", dial::os(*_0))]
    Io(i32),
    /// The peer does not read.
    #[error(
        "the peer does not read its control connection: {queued} bytes wait, the limit is {limit}"
    )]
    Overflow {
        /// Bytes that would wait.
        queued: usize,
        /// Most that may.
        limit: usize,
    },
    /// Closed by this side.
    #[error("closed by this endpoint")]
    Local,
}

impl CloseReason {
    /// Whether dialling again can help without a change of configuration.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Dial { .. } | Self::PeerClosed | Self::Io(_) | Self::Overflow { .. }
        )
    }
}

enum Command {
    Connect {
        conn: ConnId,
        addresses: Vec<String>,
        timeout: Duration,
    },
    Resolved(dial::Resolved),
    Send {
        conn: ConnId,
        message: Vec<u8>,
    },
    Close(ConnId),
    /// The driver has consumed enough of this connection's messages.
    Resume(ConnId),
    Shutdown,
}

/// Commands with the means to wake the thread.
#[derive(Clone)]
struct Mailbox {
    commands: Sender<Command>,
    waker: Arc<Waker>,
}

impl Mailbox {
    fn post(&self, command: Command) {
        // Either fails only when the thread is gone, and with it every connection.
        if self.commands.send(command).is_ok() {
            let _ = self.waker.wake();
        }
    }
}

/// What the thread counts for its handle.
#[derive(Default)]
struct Counters {
    refused: AtomicU64,
    wakeups: AtomicU64,
}

/// Starts control threads.
pub(crate) struct ControlThread;

impl ControlThread {
    /// Starts the thread on `listener`, if there is one (an endpoint that only writes needs none). `wake` is called
    /// on the control thread after events were queued and must not block.
    pub(crate) fn spawn(
        listener: Option<TcpListener>,
        auth: Auth,
        config: ControlConfig,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<(ControlHandle, Receiver<ControlEvent>)> {
        let (commands, inbox) = unbounded();
        let (events, outbox) = unbounded();
        let counters = Arc::new(Counters::default());
        let (reactor, mailbox) = reactor::Reactor::new(
            listener,
            auth,
            config,
            reactor::Sink::new(events, wake, Arc::clone(&counters)),
            commands,
            inbox,
        )?;
        let thread = std::thread::Builder::new()
            .name("kvpush-control".into())
            .spawn(move || reactor.run())?;
        let handle = ControlHandle {
            mailbox,
            counters,
            thread: Some(thread),
        };
        Ok((handle, outbox))
    }
}

/// The driver's side of the control thread. Dropping it closes every connection as [`ControlHandle::shutdown`] does.
pub(crate) struct ControlHandle {
    mailbox: Mailbox,
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests look at it"))]
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl ControlHandle {
    /// Dials the addresses (`host:port`) in turn until one is an authenticated peer, all within `timeout`. Ends in
    /// [`ControlEvent::Connected`] or [`ControlEvent::Closed`]. `conn` must be new and at most
    /// [`ConnId::MAX_DIALED`].
    pub(crate) fn connect(&self, conn: ConnId, addresses: Vec<String>, timeout: Duration) {
        self.mailbox.post(Command::Connect {
            conn,
            addresses,
            timeout,
        });
    }

    /// Queues a message, in order; before the connection is established it waits for that. Nothing happens if the
    /// connection has ended, whose [`ControlEvent::Closed`] is then on its way.
    pub(crate) fn send(&self, conn: ConnId, message: Vec<u8>) {
        self.mailbox.post(Command::Send { conn, message });
    }

    /// Sends what is queued, then closes. No message of the connection is delivered afterwards, except those already
    /// in the event queue; [`ControlEvent::Closed`] with [`CloseReason::Local`] follows.
    pub(crate) fn close(&self, conn: ConnId) {
        self.mailbox.post(Command::Close(conn));
    }

    /// Accepted connections that ended before the peer had authenticated itself.
    #[cfg(test)]
    pub(crate) fn refused(&self) -> u64 {
        self.counters.refused.load(Ordering::Relaxed)
    }

    /// How often the thread has woken up. It does not grow while nothing happens.
    #[cfg(test)]
    pub(crate) fn wakeups(&self) -> u64 {
        self.counters.wakeups.load(Ordering::Relaxed)
    }

    /// Closes every connection, sending what is queued for at most [`ControlConfig::linger`], and ends the thread.
    #[cfg(test)]
    pub(crate) fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.mailbox.post(Command::Shutdown);
            if thread.join().is_err() {
                tracing::error!("the control thread had panicked");
            }
        }
    }
}

impl Drop for ControlHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
