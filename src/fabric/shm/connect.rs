//! How two lanes become one: the end that was offered the lane connects to the other's socket, and both say hello.
//! Part of the context; its thread only.
//!
//! The *accepting* side of a session connects, because connecting tells at once whether both are on one host and may
//! share memory, and the accepting side can still refuse the offer then, so that the next fabric is tried.
//!
//! Strangers can hold at most [`ShmConfig::max_pending`](super::ShmConfig::max_pending) sockets, each for at most the
//! hello timeout, and newcomers push out the oldest that stays silent.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use mio::{Interest, Token as Key, unix::SourceFd};

use super::{
    super::{
        FabricError, FabricErrorKind, LaneId,
        software::{Failure, after, make_room},
    },
    context::{ShmContext, lane_key},
    lane::{Lane, Link, Phase},
    ring::PeerBox,
    sys::{self, Process},
    wire::{Address, Hello, same_token},
};

/// Most sockets accepted by one poll.
const POLL_ACCEPTS: usize = 32;
/// How long the listener rests when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An accepted socket that is no lane's yet.
#[derive(Debug)]
pub(super) struct Pending {
    socket: OwnedFd,
    /// A hello, and the outbox that came with it, whose lane is not connected on this side yet.
    hello: Option<(Hello, OwnedFd)>,
    pub(super) deadline: Option<Instant>,
}

/// What to do about memory that a peer may not read.
const READ_HINT: &str = "run both as one user with kernel.yama.ptrace_scope=0 and in one pid namespace, \
     or give CAP_SYS_PTRACE, or use only memory files (HostMemory::memfd)";
/// What to do about separate hosts.
const HOST_HINT: &str = "the next fabric that both have is tried";

impl ShmContext {
    /// Connects to the lane that the peer has offered.
    pub(super) fn connect(&mut self, id: LaneId, to: Address) -> Result<(), FabricError> {
        const OPERATION: &str = "connect_lane";
        let refuse = |text: String, hint| FabricError {
            hint: Some(hint),
            ..self
                .device
                .error(OPERATION, FabricErrorKind::Unavailable(text))
        };
        let own = self.device.host();
        if to.host.boot != own.boot {
            return Err(refuse("the peer is on another host".into(), HOST_HINT));
        }
        let socket = sys::connect(&socket_name(&to)).map_err(|error| {
            let other = to.host.net_namespace != own.net_namespace;
            let text = match (error.kind(), other) {
                (io::ErrorKind::ConnectionRefused, true) => {
                    "the peer is in another network namespace".to_owned()
                }
                _ => format!("the peer's socket: {error}"),
            };
            refuse(text, HOST_HINT)
        })?;
        let process = match self.process(&socket, &to) {
            Ok(process) => Some(process),
            // Then all it names must be in files.
            Err(_) if to.files_only() => None,
            Err(error) => {
                let text = if to.host.pid_namespace == own.pid_namespace {
                    format!("the peer's memory cannot be read: {error}")
                } else {
                    format!("the peer is in another pid namespace: {error}")
                };
                return Err(refuse(text, READ_HINT));
            }
        };
        let link = Link::new(socket, process);
        let Some(lane) = self.lanes.get_mut(&id) else {
            return Err(self.lane_state(OPERATION, id, "unknown"));
        };
        lane.greet(&link)
            .and_then(|()| {
                let interest = Interest::READABLE | Interest::WRITABLE;
                let fd = link.socket.as_raw_fd();
                self.poll
                    .registry()
                    .register(&mut SourceFd(&fd), lane_key(id), interest)
            })
            .map_err(|error| refuse(format!("the peer's socket: {error}"), HOST_HINT))?;
        lane.link = Some(link);
        lane.phase = Phase::Greeting;
        Ok(())
    }

    /// The process behind `socket`, if it is the one that the address tells of and its memory can be read: then the
    /// sixteen bytes that only it has are where it says.
    fn process(&self, socket: &OwnedFd, address: &Address) -> io::Result<Process> {
        if !self.device.config().read_process_memory {
            return Err(io::Error::other("switched off by the configuration"));
        }
        let process = Process::at(socket)?;
        let found = process.peek(address.beacon_address.get())?;
        if same_token(&found, &address.beacon) {
            Ok(process)
        } else {
            Err(io::Error::other("the socket belongs to another process"))
        }
    }

    /// Takes what has connected.
    pub(super) fn accept(&mut self) {
        for _ in 0..POLL_ACCEPTS {
            match sys::accept(&self.listener) {
                Ok(socket) => self.add_pending(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.listener_ready = false;
                    return;
                }
                Err(error) => {
                    // The connection died in the queue (accept(2)), or there are no descriptors: rest, then go on.
                    tracing::debug!(%error, "accept");
                    self.listener_ready = false;
                    self.listener_pause = after(ACCEPT_PAUSE);
                    self.schedule(self.listener_pause);
                    return;
                }
            }
        }
    }

    fn add_pending(&mut self, socket: OwnedFd) {
        let most = self.device.config().max_pending;
        if !make_room(&mut self.pending, most, |pending| pending.hello.is_none()) {
            return;
        }
        let key = self.next_pending;
        self.next_pending += 1;
        let fd = socket.as_raw_fd();
        let registered =
            self.poll
                .registry()
                .register(&mut SourceFd(&fd), Key(key), Interest::READABLE);
        if let Err(error) = registered {
            tracing::debug!(%error, "accepted socket");
            return;
        }
        let deadline = after(self.common.timing.hello);
        let pending = Pending {
            socket,
            hello: None,
            deadline,
        };
        self.pending.insert(key, pending);
        self.schedule(deadline);
        self.read_pending(key);
    }

    /// Reads the hello of an accepted socket and finds its lane.
    pub(super) fn read_pending(&mut self, key: usize) {
        let Some(pending) = self.pending.get_mut(&key) else {
            return;
        };
        if pending.hello.is_some() {
            // More messages, or the end; the lane will read them.
            return;
        }
        let hello = match receive_hello(&pending.socket) {
            Ok(hello) => hello,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::debug!(%error, "accepted socket");
                self.pending.remove(&key);
                return;
            }
        };
        let to = hello.0.to;
        pending.hello = Some(hello);
        // Every lane is compared, so that time tells nothing about the tokens.
        let mut named = None;
        for lane in self.lanes.values() {
            let waits = matches!(lane.phase, Phase::Idle | Phase::Awaiting);
            if same_token(&lane.token, &to) & waits {
                named = Some((lane.id, lane.phase));
            }
        }
        match named {
            // This side has not connected its lane yet; connect_lane will look here.
            Some((_, Phase::Idle)) => {}
            Some((id, _)) => self.adopt(id, key),
            None => drop(self.pending.remove(&key)),
        }
    }

    /// The accepted socket that names the lane of `token`, if it has come already.
    pub(super) fn pending_for(&self, lane: &Lane) -> Option<usize> {
        self.pending.iter().find_map(|(key, pending)| {
            let (hello, _) = pending.hello.as_ref()?;
            same_token(&hello.to, &lane.token).then_some(*key)
        })
    }

    /// Gives the accepted socket to the lane it names, if the peer is the one that was announced.
    pub(super) fn adopt(&mut self, id: LaneId, key: usize) {
        let Some(pending) = self.pending.remove(&key) else {
            return;
        };
        let Some((hello, file)) = pending.hello else {
            return;
        };
        let Some(address) = self.lanes.get(&id).and_then(|lane| lane.peer_address) else {
            return;
        };
        if !same_token(&address.token, &hello.from) {
            return;
        }
        // Without it the peer can still read what this side names; only its own requests must then name files.
        let process = self.process(&pending.socket, &address);
        if let Err(error) = &process {
            tracing::debug!(lane = id.0, %error, "the peer's memory cannot be read");
        }
        let link = Link::new(pending.socket, process.ok());
        let fd = link.socket.as_raw_fd();
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registered =
            self.poll
                .registry()
                .reregister(&mut SourceFd(&fd), lane_key(id), interest);
        let Some(lane) = self.lanes.get_mut(&id) else {
            return;
        };
        let result = registered
            .and_then(|()| lane.greet(&link))
            .and_then(|()| PeerBox::new(&file, hello.geometry()));
        match result {
            Ok(Some(peer)) => lane.go_live(link, peer, &hello),
            Ok(None) => lane.fail(Failure::protocol()),
            Err(error) => lane.fail(Failure::lost(error.raw_os_error().unwrap_or(libc::EIO))),
        }
        self.enqueue(id);
    }

    /// The peer's hello, on the side that connected.
    pub(super) fn read_greeting(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.get_mut(&id) else {
            return;
        };
        let (Some(link), Some(address)) = (lane.link.take(), lane.peer_address) else {
            return;
        };
        let known = |hello: &Hello| {
            same_token(&hello.to, &lane.token) && same_token(&hello.from, &address.token)
        };
        match receive_hello(&link.socket) {
            Ok((hello, file)) if known(&hello) => match PeerBox::new(&file, hello.geometry()) {
                Ok(Some(peer)) => lane.go_live(link, peer, &hello),
                Ok(None) => lane.fail(Failure::protocol()),
                Err(error) => lane.fail(Failure::lost(error.raw_os_error().unwrap_or(libc::EIO))),
            },
            Ok(_) => lane.fail(Failure::protocol()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                lane.link = Some(link);
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                lane.fail(Failure::protocol());
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::ECONNRESET);
                lane.fail(Failure::lost(errno));
            }
        }
        self.enqueue(id);
    }
}

/// The name of a device's socket.
pub(super) fn socket_name(address: &Address) -> Vec<u8> {
    listener_name(&address.listener)
}

/// The name of the socket with this number.
pub(super) fn listener_name(number: &[u8; 16]) -> Vec<u8> {
    let hex = number.iter().flat_map(|byte| {
        let digit = |n: u8| char::from_digit(n.into(), 16).unwrap_or('0') as u8;
        [digit(byte >> 4), digit(byte & 15)]
    });
    b"kvpush-".iter().copied().chain(hex).collect()
}

/// One message, which must be a hello with an outbox.
fn receive_hello(socket: &OwnedFd) -> io::Result<(Hello, OwnedFd)> {
    let mut room = [0; Hello::BYTES + 1];
    let (n, fd) = sys::receive(socket, &mut room)?;
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match (room.get(..n).and_then(Hello::decode), fd) {
        (Some(hello), Some(fd)) => Ok((hello, fd)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
