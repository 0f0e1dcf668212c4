//! One lane: its phase, its queues, and how it fails. Driven by the context's thread.

use std::{
    os::fd::{AsRawFd, RawFd},
    time::Instant,
};

use mio::net::TcpStream;

use super::{
    super::{
        Completion, LaneConfig, LaneId, Status,
        software::{Failure, ReceiveQueue, Timing, after},
    },
    greet::Greeting,
    memory::MemoryView,
    receive::Receiver,
    send::SendQueue,
    transmit::Transmitter,
    wire::{Hello, Refusal, Token},
};

/// Where a lane is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Created; the peer is not known.
    Idle,
    /// The peer is known and will dial.
    Awaiting,
    /// The socket is connecting.
    Connecting,
    /// Connected and our hello sent; the peer's is awaited.
    Greeting,
    /// Frames flow.
    Live,
    /// A request of the peer was refused. Nothing is received any more; the refusal is being sent.
    Refusing,
    /// The lane has failed and its completions may be taken. The socket is kept only until the peer has seen the
    /// refusal: closing it with unread bytes would reset it and could destroy the refusal on its way.
    Lingering,
    /// The lane has failed and has no socket.
    Failed,
}

/// What ends a lane while it is serviced.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Fail it now.
    Fail(Failure),
    /// Refuse the peer's request `sequence` and fail.
    Refuse { sequence: u64, why: Refusal },
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) id: LaneId,
    pub(super) token: Token,
    pub(super) peer_token: Token,
    pub(super) phase: Phase,
    pub(super) stream: Option<TcpStream>,
    /// Edge-triggered readiness, valid until the socket says it would block.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The peer's end is known to be closed, so a short read does not mean that the socket is drained.
    pub(super) hangup: bool,
    /// Whether the lane is in the context's ready list.
    pub(super) queued: bool,
    pub(super) send: SendQueue,
    pub(super) receives: ReceiveQueue,
    /// The last credit told to the peer.
    pub(super) advertised: u64,
    pub(super) transmitter: Transmitter,
    pub(super) receiver: Receiver,
    /// The acceptor's hello, on the dialling side.
    pub(super) greeting: Greeting,
    pub(super) failure: Option<Failure>,
    /// When the present phase gives up.
    pub(super) deadline: Option<Instant>,
    /// When a wait for the peer's receives gives up.
    pub(super) rnr_deadline: Option<Instant>,
}

impl Lane {
    pub(super) fn new(id: LaneId, token: Token, config: &LaneConfig, max_message: u64) -> Self {
        Self {
            id,
            token,
            peer_token: [0; 16],
            phase: Phase::Idle,
            stream: None,
            readable: false,
            writable: false,
            hangup: false,
            queued: false,
            send: SendQueue::new(config, max_message),
            receives: ReceiveQueue::new(config.receive_depth),
            advertised: config.receive_depth.into(),
            transmitter: Transmitter::new(),
            receiver: Receiver::new(),
            greeting: Greeting::new(),
            failure: None,
            deadline: None,
            rnr_deadline: None,
        }
    }

    pub(super) fn fd(&self) -> Option<RawFd> {
        self.stream.as_ref().map(|stream| stream.as_raw_fd())
    }

    /// Whether the peer should be told of new receives by a frame of its own.
    pub(super) fn is_credit_due(&self) -> bool {
        credit_due(&self.receives, self.advertised)
    }

    /// Our first bytes to the peer.
    pub(super) fn hello(&mut self) -> Hello {
        self.advertised = self.receives.granted();
        Hello::new(self.peer_token, self.token, self.receives.granted())
    }

    /// The peer's hello has been checked: frames may flow.
    pub(super) fn go_live(&mut self, hello: &Hello) {
        self.transmitter.credit = hello.credit.get();
        self.transmitter.dirty = true;
        self.phase = Phase::Live;
        self.deadline = None;
    }

    /// Ends the lane: no byte of the peer is placed from here on. What is outstanding completes, the first unfinished
    /// request with `failure`. Does nothing if the lane has failed before.
    pub(super) fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            tracing::debug!(lane = self.id.0, ?failure, phase = ?self.phase, "tcp lane failed");
            self.failure = Some(failure);
        }
        self.close();
    }

    fn close(&mut self) {
        // Dropping the socket closes it, which also removes it from the epoll set.
        self.stream = None;
        self.transmitter.abandon();
        self.phase = Phase::Failed;
        self.deadline = None;
        self.rnr_deadline = None;
        self.readable = false;
        self.writable = false;
    }

    /// Makes bounded progress on the socket. `linger` bounds how long a refusal may take.
    pub(super) fn service(&mut self, memory: &mut MemoryView, timing: &Timing) {
        let mut result = Ok(());
        if self.phase == Phase::Connecting && self.writable {
            result = self.finish_connect();
        }
        if result.is_ok() && self.phase == Phase::Greeting && self.readable {
            result = self.read_greeting();
        }
        if result.is_ok() && self.phase == Phase::Live {
            result = self.receive(memory);
        }
        if result.is_ok() && matches!(self.phase, Phase::Live | Phase::Refusing) {
            result = self.flush(memory, timing, SERVICE_TRAINS);
        }
        if result.is_ok() && self.phase == Phase::Lingering && self.readable {
            self.discard();
        }
        self.settle_fault(result, memory, timing);
    }

    /// Transmits what has just been posted, as far as the socket takes it at once.
    pub(super) fn flush_posted(&mut self, memory: &mut MemoryView, timing: &Timing) {
        self.transmitter.dirty = true;
        if self.phase == Phase::Live {
            let result = self.flush(memory, timing, POST_TRAINS);
            self.settle_fault(result, memory, timing);
        }
    }

    fn settle_fault(
        &mut self,
        result: Result<(), Fault>,
        memory: &mut MemoryView,
        timing: &Timing,
    ) {
        match result {
            Ok(()) => {}
            Err(Fault::Fail(failure)) => self.fail(failure),
            Err(Fault::Refuse { sequence, why }) => {
                tracing::debug!(
                    lane = self.id.0,
                    sequence,
                    ?why,
                    "refused a request of the peer"
                );
                self.phase = Phase::Refusing;
                self.rnr_deadline = None;
                self.deadline = after(timing.peer);
                self.transmitter.refuse(sequence, why);
                if let Err(Fault::Fail(failure)) = self.flush(memory, timing, SERVICE_TRAINS) {
                    self.fail(failure);
                }
            }
        }
    }

    /// Gives up what has taken too long.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            match self.phase {
                Phase::Lingering => self.close(),
                Phase::Refusing => self.fail(Failure::new(Status::Flushed)),
                _ => self.fail(Failure::lost(libc::ETIMEDOUT)),
            }
        }
        if self.rnr_deadline.is_some_and(|deadline| deadline <= now) {
            self.rnr_deadline = None;
            // If an earlier request has no answer either, the peer is not merely short of receives.
            self.fail(if self.send.all_sent_done() {
                Failure::new(Status::RnrRetryExceeded)
            } else {
                Failure::lost(libc::ETIMEDOUT)
            });
        }
    }

    /// The next instant at which [`Lane::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.deadline, self.rnr_deadline]
            .into_iter()
            .flatten()
            .min()
    }

    /// Appends completions while `out` is shorter than `limit`.
    pub(super) fn take_completions(&mut self, out: &mut Vec<Completion>, limit: usize) {
        self.send.take(self.id, self.failure.as_mut(), out, limit);
        let failed = self.failure.is_some();
        self.receives.take(self.id, failed, out, limit);
    }

    /// Whether the next poll has something to do here.
    pub(super) fn has_work(&self) -> bool {
        let failed = self.failure.is_some();
        let completions = self.send.has_finished(failed) || self.receives.has_finished(failed);
        completions
            || match self.phase {
                Phase::Connecting => self.writable,
                Phase::Greeting | Phase::Lingering => self.readable,
                Phase::Live => self.readable || (self.writable && self.transmitter.wants()),
                Phase::Refusing => self.writable && self.transmitter.wants(),
                Phase::Idle | Phase::Awaiting | Phase::Failed => false,
            }
    }
}

/// Whether the peer, which was last told of `advertised` receives, should be told of new ones by a frame of its own: it
/// may be waiting, or a fair part of the queue is news to it.
pub(super) fn credit_due(receives: &ReceiveQueue, advertised: u64) -> bool {
    let news = receives.granted() - advertised;
    let consumed = receives.granted() - u64::from(receives.posted());
    news > 0 && (advertised == consumed || news >= u64::from(receives.depth() / 4).max(1))
}

/// Trains sent in one service of a lane, so that lanes share the thread fairly.
const SERVICE_TRAINS: usize = 4;
/// Trains sent from within a post.
const POST_TRAINS: usize = 4;
