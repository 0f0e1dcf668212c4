//! The control thread's loop: sockets, commands and deadlines.
//!
//! Sockets are watched edge-triggered: `readable` and `writable` of a connection stay set until the system says
//! otherwise, and whoever has something left to do is in `ready`. Deadlines are in a heap whose stale entries are
//! dropped before the loop sleeps, so a loop without deadlines sleeps for ever.

mod accepting;
mod dialing;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use super::budget::Budget;
use super::connection::{Connection, Early, Origin, Phase, Turn};
use super::dial::{Dial, DialError, Resolver};
use super::{CloseReason, Command, ConnId, ControlConfig, ControlEvent, Counters, Mailbox};
use crate::wire::{Auth, Channel};

// Connection numbers serve as tokens.
const _: () = assert!(size_of::<usize>() == size_of::<u64>());
const WAKER: Token = Token(usize::MAX);
const LISTENER: Token = Token(usize::MAX - 1);
/// Not a connection: the timer of the listener.
const ACCEPT_TIMER: ConnId = ConnId(u64::MAX - 1);
const SCRATCH: usize = 64 << 10;
/// Commands of one turn, so that a busy driver cannot starve the sockets.
const COMMANDS_PER_TURN: usize = 1024;

/// Where events go.
pub(super) struct Sink {
    events: Sender<ControlEvent>,
    wake: Arc<dyn Fn() + Send + Sync>,
    counters: Arc<Counters>,
    pending: bool,
}

impl Sink {
    pub(super) fn new(
        events: Sender<ControlEvent>,
        wake: Arc<dyn Fn() + Send + Sync>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            events,
            wake,
            counters,
            pending: false,
        }
    }

    pub(super) fn emit(&mut self, event: ControlEvent) {
        // Nobody listens any more only if the driver is gone, and then a shutdown follows.
        self.pending |= self.events.send(event).is_ok();
    }

    fn wake(&mut self) {
        if std::mem::take(&mut self.pending) {
            (self.wake)();
        }
    }
}

pub(super) struct Reactor {
    poll: Poll,
    listener: Option<TcpListener>,
    accept_at: Option<Instant>,
    auth: Auth,
    config: ControlConfig,
    sink: Sink,
    mailbox: Mailbox,
    inbox: Receiver<Command>,
    resolver: Resolver,
    /// Dials whose names are being resolved.
    resolving: HashMap<ConnId, (Dial, Early)>,
    connections: HashMap<ConnId, Connection>,
    /// Accepted and not yet authenticated, oldest first.
    strangers: BTreeSet<ConnId>,
    ready: VecDeque<ConnId>,
    deadlines: BinaryHeap<Reverse<(Instant, ConnId)>>,
    accepted: u64,
    shutdown: Option<Instant>,
    scratch: Vec<u8>,
}

impl Reactor {
    pub(super) fn new(
        listener: Option<std::net::TcpListener>,
        auth: Auth,
        config: ControlConfig,
        sink: Sink,
        commands: Sender<Command>,
        inbox: Receiver<Command>,
    ) -> io::Result<(Self, Mailbox)> {
        let poll = Poll::new()?;
        let mailbox = Mailbox {
            commands,
            waker: Arc::new(Waker::new(poll.registry(), WAKER)?),
        };
        let mut listener = match listener {
            Some(listener) => {
                listener.set_nonblocking(true)?;
                Some(TcpListener::from_std(listener))
            }
            None => None,
        };
        if let Some(listener) = &mut listener {
            poll.registry()
                .register(listener, LISTENER, Interest::READABLE)?;
        }
        let reactor = Self {
            poll,
            listener,
            accept_at: None,
            auth,
            config,
            sink,
            resolver: Resolver::new(mailbox.clone()),
            mailbox: mailbox.clone(),
            inbox,
            resolving: HashMap::new(),
            connections: HashMap::new(),
            strangers: BTreeSet::new(),
            ready: VecDeque::new(),
            deadlines: BinaryHeap::new(),
            accepted: 0,
            shutdown: None,
            scratch: vec![0; SCRATCH],
        };
        Ok((reactor, mailbox))
    }

    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(256);
        while !self.is_finished() {
            let timeout = self.timeout();
            if let Err(error) = self.poll.poll(&mut events, timeout) {
                if error.kind() != io::ErrorKind::Interrupted {
                    tracing::error!(%error, "the control thread cannot wait for its sockets");
                    break;
                }
                events.clear();
            }
            let counters = &self.sink.counters;
            counters.wakeups.fetch_add(1, Ordering::Relaxed);
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => self.accept_at = Some(Instant::now()),
                    Token(number) => {
                        let id = ConnId(number as u64);
                        if let Some(connection) = self.connections.get_mut(&id) {
                            // Errors and ends of stream show in the next read.
                            connection.readable |=
                                event.is_readable() || event.is_error() || event.is_read_closed();
                            connection.writable |= event.is_writable() || event.is_error();
                            schedule(&mut self.ready, connection);
                        }
                    }
                }
            }
            self.expire(Instant::now());
            self.commands();
            for _ in 0..self.ready.len() {
                if let Some(id) = self.ready.pop_front() {
                    self.turn(id);
                }
            }
            self.sink.wake();
        }
        for id in self.connections.keys().copied().collect::<Vec<_>>() {
            self.close(id, CloseReason::Local);
        }
        self.sink.wake();
    }

    fn is_finished(&self) -> bool {
        self.shutdown
            .is_some_and(|deadline| self.connections.is_empty() || Instant::now() >= deadline)
    }

    /// How long the loop may sleep: for ever if nothing has a deadline.
    fn timeout(&mut self) -> Option<Duration> {
        if !self.ready.is_empty() || !self.inbox.is_empty() {
            return Some(Duration::ZERO);
        }
        while let Some(Reverse((at, id))) = self.deadlines.peek() {
            if self.deadline_of(*id) == Some(*at) {
                break;
            }
            self.deadlines.pop();
        }
        let next = self.deadlines.peek().map(|Reverse((at, _))| *at);
        let next = next.into_iter().chain(self.shutdown).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn deadline_of(&self, id: ConnId) -> Option<Instant> {
        if id == ACCEPT_TIMER {
            return self.accept_at;
        }
        match self.connections.get(&id) {
            Some(connection) => connection.deadline,
            None => self.resolving.get(&id).map(|(dial, _)| dial.deadline),
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.deadlines.peek().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop();
            if self.deadline_of(id) != Some(at) {
                continue;
            }
            if let Some((mut dial, _)) = self.resolving.remove(&id) {
                dial.fail("name resolution", None, DialError::Timeout);
                self.failed(id, dial);
                continue;
            }
            match self.connections.get(&id).map(|c| (c.phase, &c.origin)) {
                Some((Phase::Connecting | Phase::Handshaking, Origin::Dialed { .. })) => {
                    self.next_address(id, DialError::Timeout);
                }
                Some((Phase::Lingering, _)) => self.forget(id),
                Some((Phase::Flushing, _)) => {
                    self.close(id, CloseReason::Local);
                    self.forget(id);
                }
                Some(_) => {
                    self.close(id, CloseReason::Io(libc::ETIMEDOUT));
                    self.forget(id);
                }
                None => {}
            }
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            self.accept();
        }
    }

    fn commands(&mut self) {
        for _ in 0..COMMANDS_PER_TURN {
            let Ok(command) = self.inbox.try_recv() else {
                return;
            };
            match command {
                Command::Connect {
                    conn,
                    addresses,
                    timeout,
                } => self.connect(conn, addresses, timeout),
                Command::Resolved(resolved) => {
                    self.resolver.finished();
                    self.resolved(resolved);
                }
                Command::Send { conn, message } => self.send(conn, message),
                Command::Close(conn) => self.close_gently(conn),
                Command::Resume(conn) => self.wake_up(conn),
                Command::Shutdown => self.begin_shutdown(),
            }
        }
    }

    fn register(&self, mut socket: TcpStream, id: ConnId) -> io::Result<TcpStream> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let token = Token(id.0 as usize);
        self.poll
            .registry()
            .register(&mut socket, token, interest)?;
        Ok(socket)
    }

    fn connection(
        &mut self,
        id: ConnId,
        socket: TcpStream,
        peer: SocketAddr,
        origin: Origin,
        channel: Channel,
        deadline: Instant,
    ) -> Connection {
        self.deadlines.push(Reverse((deadline, id)));
        let budget = Budget::new(id, self.config.max_incoming, self.mailbox.clone());
        Connection::new(id, socket, peer, origin, channel, budget, deadline)
    }

    fn send(&mut self, conn: ConnId, message: Vec<u8>) {
        if let Some((_, early)) = self.resolving.get_mut(&conn) {
            if let Err(reason) = early.push(message, self.config.max_outgoing) {
                self.resolving.remove(&conn);
                self.sink.emit(ControlEvent::Closed { conn, reason });
            }
            return;
        }
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if let Err(reason) = connection.send(message, &self.config) {
            self.close(conn, reason);
        } else if connection.writable {
            schedule(&mut self.ready, connection);
        }
    }

    fn close_gently(&mut self, conn: ConnId) {
        if self.resolving.remove(&conn).is_some() {
            let reason = CloseReason::Local;
            return self.sink.emit(ControlEvent::Closed { conn, reason });
        }
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        match connection.phase {
            Phase::Connecting | Phase::Handshaking => {
                self.close(conn, CloseReason::Local);
                self.forget(conn);
            }
            Phase::Open => {
                connection.phase = Phase::Flushing;
                let deadline = Instant::now() + self.config.linger;
                connection.deadline = Some(deadline);
                self.deadlines.push(Reverse((deadline, conn)));
                schedule(&mut self.ready, connection);
            }
            Phase::Flushing | Phase::Lingering => {}
        }
    }

    fn begin_shutdown(&mut self) {
        self.shutdown = Some(Instant::now() + self.config.linger);
        self.listener = None;
        self.accept_at = None;
        let resolving = self.resolving.keys();
        for id in resolving
            .chain(self.connections.keys())
            .copied()
            .collect::<Vec<_>>()
        {
            self.close_gently(id);
        }
    }

    fn wake_up(&mut self, id: ConnId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            schedule(&mut self.ready, connection);
        }
    }

    fn turn(&mut self, id: ConnId) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.scheduled = false;
        let result = connection.turn(&mut self.scratch, &mut self.sink);
        if !matches!(connection.phase, Phase::Handshaking | Phase::Lingering) {
            self.strangers.remove(&id);
        }
        match result {
            Turn::Wait => {}
            Turn::Again => self.wake_up(id),
            Turn::Gone => self.forget(id),
            Turn::NextAddress(error) => self.next_address(id, error),
            Turn::Close(reason) => self.close(id, reason),
        }
    }

    /// Tells the driver, and lets the socket end in its own time.
    fn close(&mut self, id: ConnId, reason: CloseReason) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let announced = connection.is_announced();
        let (was, peer) = (connection.phase, connection.peer);
        let gone = matches!(reason, CloseReason::PeerClosed | CloseReason::Io(_));
        let deadline = Instant::now() + self.config.linger;
        connection.linger(deadline);
        self.deadlines.push(Reverse((deadline, id)));
        if announced {
            self.sink.emit(ControlEvent::Closed { conn: id, reason });
        } else if was != Phase::Lingering {
            self.refuse(peer, &reason);
        }
        if gone {
            self.forget(id);
        } else {
            self.wake_up(id);
        }
    }

    fn forget(&mut self, id: ConnId) {
        self.connections.remove(&id);
        self.strangers.remove(&id);
    }
}

/// Gives `connection` a turn, once however often it is asked for.
fn schedule(ready: &mut VecDeque<ConnId>, connection: &mut Connection) {
    if !std::mem::replace(&mut connection.scheduled, true) {
        ready.push_back(connection.id);
    }
}
