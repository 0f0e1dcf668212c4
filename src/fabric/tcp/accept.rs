//! Accepted sockets until they have named a lane that waits for them. Part of the context; its thread only.
//!
//! Strangers can hold at most [`TcpConfig::max_pending`](super::TcpConfig::max_pending) sockets, each for at most the
//! hello timeout, and newcomers push out the oldest that stays silent.

use std::{io, os::fd::AsRawFd, time::Duration};

use mio::{Interest, Token as Key, net::TcpStream};

use super::{
    super::{
        LaneId,
        software::{Failure, after, make_room},
    },
    context::{TcpContext, lane_key},
    greet::{Greeting, Pending, Progress},
    lane::Phase,
    sys,
    wire::{Hello, same_token},
};

/// Most sockets accepted by one poll.
const POLL_ACCEPTS: usize = 32;
/// How long the listener rests when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl TcpContext {
    /// Takes what has connected.
    pub(super) fn accept(&mut self) {
        for _ in 0..POLL_ACCEPTS {
            match self.listener.accept() {
                Ok((stream, _)) => self.add_pending(stream),
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

    fn add_pending(&mut self, mut stream: TcpStream) {
        let most = self.device.config().max_pending;
        if !make_room(&mut self.pending, most, |pending| pending.hello.is_none()) {
            return;
        }
        let key = self.next_pending;
        self.next_pending += 1;
        if let Err(error) = self.tune(&stream).and_then(|()| {
            let interest = Interest::READABLE;
            self.poll
                .registry()
                .register(&mut stream, Key(key), interest)
        }) {
            tracing::debug!(%error, "accepted socket");
            return;
        }
        let deadline = after(self.timing.hello);
        let pending = Pending {
            stream,
            greeting: Greeting::new(),
            hello: None,
            deadline,
        };
        self.pending.insert(key, pending);
        self.schedule(deadline);
        self.read_pending(key);
    }

    /// Sets the options of a new socket.
    pub(super) fn tune(&self, stream: &TcpStream) -> io::Result<()> {
        let config = self.device.config();
        let (send, receive) = (config.send_buffer, config.receive_buffer);
        sys::tune_socket(stream.as_raw_fd(), send, receive, config.peer_timeout)
    }

    /// Reads the hello of an accepted socket and finds its lane.
    pub(super) fn read_pending(&mut self, key: usize) {
        let Some(pending) = self.pending.get_mut(&key) else {
            return;
        };
        if pending.hello.is_some() {
            // More bytes, or the end; the lane will read them.
            return;
        }
        let hello = match pending.greeting.read(&mut pending.stream) {
            Ok(Progress::Partial) => return,
            Ok(Progress::Done(hello)) => hello,
            Ok(Progress::Refused) | Err(_) => {
                self.pending.remove(&key);
                return;
            }
        };
        pending.hello = Some(hello);
        // Every lane is compared, so that time tells nothing about the tokens.
        let mut named = None;
        for lane in self.lanes.values() {
            let waits = matches!(lane.phase, Phase::Idle | Phase::Awaiting);
            if same_token(&lane.token, &hello.to) & waits {
                named = Some((lane.id, lane.phase));
            }
        }
        match named {
            // This side has not connected its lane yet; connect_lane will look here.
            Some((_, Phase::Idle)) => {}
            Some((id, _)) => self.adopt(id, key, &hello),
            None => drop(self.pending.remove(&key)),
        }
    }

    /// Gives the accepted socket to the lane it names, if the peer is the one that was announced.
    pub(super) fn adopt(&mut self, id: LaneId, key: usize, hello: &Hello) {
        let Some(pending) = self.pending.remove(&key) else {
            return;
        };
        let mut stream = pending.stream;
        let Some(lane) = self.lanes.get_mut(&id) else {
            return;
        };
        if !same_token(&lane.peer_token, &hello.from) {
            return;
        }
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registered = self
            .poll
            .registry()
            .reregister(&mut stream, lane_key(id), interest);
        match registered {
            Ok(()) => lane.adopt(stream, hello),
            Err(error) => lane.fail(Failure::lost(error.raw_os_error().unwrap_or(libc::EIO))),
        }
        self.enqueue(id);
    }
}
