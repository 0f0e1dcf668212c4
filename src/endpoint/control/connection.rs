//! One socket: its phase, its stream and its outgoing queue. Only the control thread touches it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use mio::net::TcpStream;

use super::budget::Budget;
use super::dial::{Candidate, Dial, DialError, errno};
use super::reactor::Sink;
use super::{CloseReason, ConnId, ControlConfig, ControlEvent};
use crate::wire::Channel;

/// Reads of one turn, so that a busy peer cannot starve the others.
const READS_PER_TURN: usize = 4;
/// An idle queue keeps no more memory than this.
const KEEP: usize = 64 << 10;

/// Who began, and what is left to try if this attempt fails.
pub(super) enum Origin {
    Accepted,
    Dialed { dial: Dial, current: Candidate },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Dialled, no answer yet.
    Connecting,
    /// The channel is not established.
    Handshaking,
    Open,
    /// Closed by the driver, but not all is sent.
    Flushing,
    /// The driver has had its last event. What was queued goes out, the peer's end of the stream is awaited, and what
    /// comes is thrown away: closing a socket with unread bytes would make the system take back what was sent.
    Lingering,
}

/// What became of a connection in one turn.
pub(super) enum Turn {
    /// Waits for the socket.
    Wait,
    /// Has more to do.
    Again,
    /// Nothing is left of it.
    Gone,
    /// This address failed; the next may do better.
    NextAddress(DialError),
    /// Over.
    Close(CloseReason),
}

pub(super) struct Connection {
    pub(super) id: ConnId,
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) origin: Origin,
    pub(super) phase: Phase,
    pub(super) deadline: Option<Instant>,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Whether it is already in the loop's list of those with something to do.
    pub(super) scheduled: bool,
    /// Messages that wait for the handshake. They are not in the channel, because another address has another.
    pub(super) early: Early,
    pub(super) budget: Arc<Budget>,
    pub(super) channel: Channel,
    out: Vec<u8>,
    sent: usize,
    finished_writing: bool,
}

/// Messages sent before the connection was established.
#[derive(Default)]
pub(super) struct Early {
    messages: Vec<Vec<u8>>,
    size: usize,
}

impl Early {
    pub(super) fn push(&mut self, message: Vec<u8>, limit: usize) -> Result<(), CloseReason> {
        let queued = self.size.saturating_add(message.len()).saturating_add(16);
        if queued > limit {
            return Err(CloseReason::Overflow { queued, limit });
        }
        self.size = queued;
        self.messages.push(message);
        Ok(())
    }
}

impl Connection {
    pub(super) fn new(
        id: ConnId,
        socket: TcpStream,
        peer: SocketAddr,
        origin: Origin,
        channel: Channel,
        budget: Arc<Budget>,
        deadline: Instant,
    ) -> Self {
        let phase = match origin {
            Origin::Accepted => Phase::Handshaking,
            Origin::Dialed { .. } => Phase::Connecting,
        };
        Self {
            id,
            socket,
            peer,
            origin,
            phase,
            deadline: Some(deadline),
            readable: false,
            writable: false,
            scheduled: false,
            early: Early::default(),
            budget,
            channel,
            out: Vec::new(),
            sent: 0,
            finished_writing: false,
        }
    }

    /// Whether the driver knows it and is owed a last event.
    pub(super) fn is_announced(&self) -> bool {
        match self.phase {
            Phase::Connecting | Phase::Handshaking => matches!(self.origin, Origin::Dialed { .. }),
            Phase::Open | Phase::Flushing => true,
            Phase::Lingering => false,
        }
    }

    /// Queues a message.
    pub(super) fn send(
        &mut self,
        message: Vec<u8>,
        config: &ControlConfig,
    ) -> Result<(), CloseReason> {
        match self.phase {
            Phase::Connecting | Phase::Handshaking => self.early.push(message, config.max_outgoing),
            Phase::Open => {
                let limit = config.max_outgoing;
                if self.queued() + message.len() > limit {
                    // A burst is not a peer that does not read: see what the socket takes first. An error of it
                    // will show in the next turn.
                    let _ = self.flush();
                }
                let queued = self.queued() + message.len();
                if queued > limit {
                    return Err(CloseReason::Overflow { queued, limit });
                }
                Ok(self.channel.write(&message, &mut self.out)?)
            }
            Phase::Flushing | Phase::Lingering => Ok(()),
        }
    }

    /// Does what the socket allows.
    pub(super) fn turn(&mut self, scratch: &mut [u8], sink: &mut Sink) -> Turn {
        if self.phase == Phase::Connecting {
            match self.connected() {
                Ok(true) => self.phase = Phase::Handshaking,
                Ok(false) => return Turn::Wait,
                Err(error) => return Turn::NextAddress(DialError::Os(errno(&error))),
            }
        }
        self.out.append(&mut self.channel.take_output());
        let mut result = self.read(scratch, sink);
        if matches!(result, Turn::Wait | Turn::Again)
            && let Err(error) = self.flush()
        {
            result = self.broken(&error);
        }
        if self.phase == Phase::Flushing
            && matches!(result, Turn::Wait | Turn::Again)
            && self.is_flushed()
        {
            return Turn::Close(CloseReason::Local);
        }
        result
    }

    /// The driver has had its last event: from here on only what is queued matters.
    pub(super) fn linger(&mut self, deadline: Instant) {
        self.phase = Phase::Lingering;
        self.deadline = Some(deadline);
        // The notice of a failed handshake, if there is one.
        self.out.append(&mut self.channel.take_output());
    }

    fn queued(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }

    fn is_flushed(&self) -> bool {
        self.queued() == 0
    }

    /// Whether a dialled socket is connected.
    fn connected(&mut self) -> io::Result<bool> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        match self.socket.peer_addr() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(false),
            Err(error) => return Err(error),
        }
        self.socket.set_nodelay(true)?;
        Ok(true)
    }

    fn read(&mut self, scratch: &mut [u8], sink: &mut Sink) -> Turn {
        let mut messages = Vec::new();
        for _ in 0..READS_PER_TURN {
            if !self.readable || (self.phase == Phase::Open && self.budget.is_exhausted()) {
                return Turn::Wait;
            }
            let bytes = match self.socket.read(scratch) {
                Ok(0) => return self.ended(),
                Ok(size) => scratch.get(..size).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Turn::Wait;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.broken(&error),
            };
            if matches!(self.phase, Phase::Flushing | Phase::Lingering) {
                continue;
            }
            let mut result = self.channel.read(bytes, &mut messages);
            if self.phase == Phase::Handshaking && self.channel.is_established() {
                result = result.and_then(|()| self.established(sink));
            }
            for message in messages.drain(..) {
                sink.emit(ControlEvent::Message {
                    conn: self.id,
                    bytes: self.budget.charge(message),
                });
            }
            self.out.append(&mut self.channel.take_output());
            if let Err(error) = result {
                return Turn::Close(error.into());
            }
        }
        Turn::Again
    }

    fn established(&mut self, sink: &mut Sink) -> Result<(), crate::wire::ChannelError> {
        self.phase = Phase::Open;
        self.deadline = None;
        let (conn, peer) = (self.id, self.peer);
        sink.emit(match self.origin {
            Origin::Accepted => ControlEvent::Accepted { conn, peer },
            Origin::Dialed { .. } => ControlEvent::Connected {
                conn,
                peer,
                // Fails only if the connection has broken meanwhile, which the next read will tell.
            },
        });
        for message in std::mem::take(&mut self.early).messages {
            self.channel.write(&message, &mut self.out)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.writable && self.phase != Phase::Connecting && !self.is_flushed() {
            match self
                .socket
                .write(self.out.get(self.sent..).unwrap_or_default())
            {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EPIPE)),
                Ok(size) => self.sent += size,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.is_flushed() {
            self.out.clear();
            self.out.shrink_to(KEEP);
            self.sent = 0;
        } else if self.sent >= KEEP && self.sent >= self.out.len() / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        if self.phase == Phase::Lingering && self.is_flushed() && !self.finished_writing {
            self.finished_writing = true;
            self.socket.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// The peer's end of the stream.
    fn ended(&self) -> Turn {
        match (self.phase, &self.origin) {
            (Phase::Lingering, _) => Turn::Gone,
            (Phase::Flushing, _) => Turn::Close(CloseReason::Local),
            (Phase::Handshaking, Origin::Dialed { .. }) => Turn::NextAddress(DialError::Closed),
            _ => Turn::Close(CloseReason::PeerClosed),
        }
    }

    fn broken(&self, error: &io::Error) -> Turn {
        let errno = errno(error);
        match (self.phase, &self.origin) {
            (Phase::Lingering, _) => Turn::Gone,
            (Phase::Handshaking, Origin::Dialed { .. }) => Turn::NextAddress(DialError::Os(errno)),
            _ => Turn::Close(CloseReason::Io(errno)),
        }
    }
}
