//! One lane: its phase, its queues, and how it fails. Driven by the context's thread.

use std::{os::fd::OwnedFd, time::Instant};

use super::{
    super::{
        Completion, FabricErrorKind, LaneConfig, LaneId, Sge, Status, WorkRequest,
        software::{Failure, ReceiveQueue, Timing, after},
    },
    copier::{Copier, CopyFault},
    files::{Mappings, PeerFiles},
    memory::{Intent, MemoryView},
    notes::{self, Notes},
    requester::{Hold, Requester},
    responder::{MAX_MESSAGE, Responder, Round, Surroundings},
    ring::{Outbox, PeerBox, Word, Words, stride, word},
    sys::{self, Process},
    wire::{Address, End, Geometry, Hello, Location, Note, Refusal, Token},
};

/// Where a lane is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Created; the peer is not known.
    Idle,
    /// The peer is known and will connect.
    Awaiting,
    /// Connected and our hello sent; the peer's is awaited.
    Greeting,
    /// Requests flow.
    Live,
    /// The lane has failed.
    Failed,
}

/// What ends a lane while it is serviced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Fail it now.
    Fail(Failure),
    /// Refuse the peer's request and fail.
    Refuse {
        /// Its number.
        sequence: u64,
        /// Why.
        why: Refusal,
    },
    /// The peer has ended the lane; its state says why.
    Ended,
}

/// What a connected lane has of its peer.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: OwnedFd,
    /// The peer's process, if this process may read its memory.
    pub(super) process: Option<Process>,
    /// Its outbox, once its hello has come.
    pub(super) peer: Option<PeerBox>,
    /// Whether the peer can read this process's memory.
    reads_us: bool,
    files: PeerFiles,
    /// The sleep that the peer was last woken from.
    woken: u64,
}

impl Link {
    pub(super) fn new(socket: OwnedFd, process: Option<Process>) -> Self {
        Self {
            socket,
            process,
            peer: None,
            reads_us: false,
            files: PeerFiles::default(),
            woken: 0,
        }
    }
}

/// What all lanes of a context share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) memory: MemoryView,
    pub(super) copier: Copier,
    pub(super) mappings: Mappings,
    /// Bytes copied for a lane in one round.
    pub(super) slice: u32,
    pub(super) timing: Timing,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) id: LaneId,
    pub(super) token: Token,
    pub(super) peer_address: Option<Address>,
    pub(super) phase: Phase,
    pub(super) link: Option<Link>,
    pub(super) outbox: Outbox,
    pub(super) notes: Notes,
    requester: Requester,
    responder: Responder,
    receives: ReceiveQueue,
    /// The read that is being taken: where it is, and how much of it has been.
    reading: Option<(Location, u32)>,
    pub(super) failure: Option<Failure>,
    /// Edge-triggered readiness of the socket, valid until it says that it would block.
    pub(super) readable: bool,
    /// Whether the lane is in the context's list of lanes to look at.
    pub(super) is_hot: bool,
    /// Rounds without anything to do.
    pub(super) idle_rounds: u32,
    /// When connecting gives up.
    pub(super) deadline: Option<Instant>,
    /// When a wait for the peer's receives gives up.
    rnr_deadline: Option<Instant>,
    /// When to see whether the peer still makes progress, and how far it was.
    watch: Option<(Instant, (u64, u64))>,
}

/// Idle rounds after which a lane is left to sleep.
const PATIENCE: u32 = 4096;
/// Messages read from a socket in one round.
const NOTES: usize = 64;

impl Lane {
    pub(super) fn new(id: LaneId, token: Token, config: &LaneConfig) -> std::io::Result<Self> {
        let geometry = Geometry {
            depth: config.send_depth.max(1),
            stride: stride(config.max_sge, config.max_inline),
        };
        let receives = ReceiveQueue::new(config.receive_depth);
        let outbox = Outbox::new(geometry)?;
        outbox.store(Word::Credit, receives.granted());
        Ok(Self {
            id,
            token,
            peer_address: None,
            phase: Phase::Idle,
            link: None,
            outbox,
            notes: Notes::default(),
            requester: Requester::new(config, MAX_MESSAGE),
            responder: Responder::default(),
            receives,
            reading: None,
            failure: None,
            readable: false,
            is_hot: false,
            idle_rounds: 0,
            deadline: None,
            rnr_deadline: None,
            watch: None,
        })
    }

    /// Our first message to the peer.
    pub(super) fn greet(&self, link: &Link) -> std::io::Result<()> {
        use std::os::fd::AsFd;
        use zerocopy::IntoBytes;
        let to = self.peer_address.map_or([0; 16], |address| address.token);
        let reads = link.process.is_some();
        let hello = Hello::new(to, self.token, self.outbox.geometry(), reads);
        let file = self.outbox.file().as_fd();
        sys::send(&link.socket, hello.as_bytes(), Some(file))
    }

    /// The peer's hello has been checked, and `peer` is its outbox: requests may flow.
    pub(super) fn go_live(&mut self, mut link: Link, peer: PeerBox, hello: &Hello) {
        link.peer = Some(peer);
        link.reads_us = hello.reads_process();
        self.link = Some(link);
        self.phase = Phase::Live;
        self.deadline = None;
        self.readable = true;
        self.idle_rounds = 0;
    }

    /// Ends the lane: nothing more is copied for the peer, and nothing that it copies counts. What is outstanding
    /// completes, the first unfinished request with `failure`. Does nothing if the lane has failed before.
    pub(super) fn fail(&mut self, failure: Failure) {
        self.end(failure, End::Closed);
    }

    fn end(&mut self, failure: Failure, end: End) {
        if self.failure.is_none() {
            tracing::debug!(lane = self.id.0, ?failure, ?end, phase = ?self.phase, "shm lane failed");
            self.failure = Some(failure);
        }
        self.outbox.end(end.encode());
        if let Some(link) = self.link.take() {
            // Also if a forked process has inherited the socket.
            sys::shut_down(&link.socket);
        }
        self.phase = Phase::Failed;
        self.deadline = None;
        self.rnr_deadline = None;
        self.watch = None;
        self.readable = false;
    }

    /// The peer has hung up, or has ended the lane: takes over what it had done, and fails.
    pub(super) fn peer_left(&mut self, errno: i32) {
        let words = self.link.as_ref().and_then(|link| link.peer.as_ref());
        let mut failure = Failure::lost(errno);
        if let Some(words) = words.map(PeerBox::words) {
            self.requester.take_last(word(&words, Word::Executed));
            if let Some(End::Refused { sequence, why }) = End::decode(word(&words, Word::State)) {
                failure = if self.requester.refused_at(sequence) {
                    Failure::new(match why {
                        Refusal::Access => Status::RemoteAccess,
                        Refusal::NoReceive => Status::RnrRetryExceeded,
                        Refusal::Source => Status::LocalProtection,
                    })
                } else {
                    Failure::protocol()
                };
            }
        }
        self.fail(failure);
    }

    /// Accepts one request.
    ///
    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`] of this request.
    pub(super) unsafe fn push(
        &mut self,
        request: &WorkRequest,
        sges: &[Sge],
        memory: &mut MemoryView,
    ) -> Result<(), FabricErrorKind> {
        let (requester, notes) = (&mut self.requester, &mut self.notes);
        // SAFETY: the caller's promise.
        unsafe {
            requester.push(request, sges, memory, &self.outbox, |file| {
                notes.announce(file)
            })
        }
    }

    /// Whether windows can be bound for it, or what its state is instead.
    pub(super) fn check_windows(&self) -> Result<Result<(), FabricErrorKind>, &'static str> {
        match self.phase {
            Phase::Idle => Err("not connected"),
            Phase::Failed => Err("failed"),
            _ => Ok(self.requester.check_room()),
        }
    }

    /// Reports what was asked of a window as done.
    pub(super) fn window_done(&mut self, id: u64) {
        self.requester.push_done(id);
    }

    /// Adds receives, of which the peer is told; the depth if there is no room for them.
    pub(super) fn post_receives(&mut self, count: u32) -> Result<(), u32> {
        self.receives.post(count)?;
        self.outbox.store(Word::Credit, self.receives.granted());
        self.wake_peer();
        Ok(())
    }

    /// Whether a request in the queue names memory of `region`, or the peer is reading it.
    pub(super) fn touches(&self, region: &super::memory::Region) -> bool {
        self.failure.is_none() && self.requester.touches(region)
    }

    /// The peer must not use the file any more.
    pub(super) fn forget_file(&mut self, number: u32) {
        self.notes.forget(number);
        self.requester.forget_file();
    }

    /// Publishes what has been posted.
    pub(super) fn flush_posted(&mut self, timing: &Timing) {
        if self.phase == Phase::Live {
            match self.publish(timing) {
                Ok(true) => self.wake_peer(),
                Ok(false) => {}
                Err(fault) => self.settle(fault),
            }
        }
    }

    /// Makes bounded progress. Returns whether there was anything to do.
    pub(super) fn service(&mut self, common: &mut Common) -> bool {
        if self.phase != Phase::Live {
            return false;
        }
        match self.round(common) {
            Ok(moved) => moved,
            Err(fault) => {
                self.settle(fault);
                true
            }
        }
    }

    fn settle(&mut self, fault: Fault) {
        match fault {
            Fault::Fail(failure) => self.fail(failure),
            Fault::Ended => self.peer_left(libc::ECONNRESET),
            Fault::Refuse { sequence, why } => {
                // Our own requests are over, too; the peer has its answer in our outbox.
                let end = End::Refused { sequence, why };
                self.end(Failure::new(Status::Flushed), end);
            }
        }
    }

    fn round(&mut self, common: &mut Common) -> Result<bool, Fault> {
        let mut moved = false;
        if self.readable {
            moved |= self.read_notes(&mut common.mappings)?;
        }
        let Some(words) = self.peer_words() else {
            return Ok(moved);
        };
        if word(&words, Word::State) != 0 {
            return Err(Fault::Ended);
        }
        let (executed, credit) = (word(&words, Word::Executed), word(&words, Word::Credit));
        let news = self.requester.take_counters(executed, credit);
        moved |= news.ok_or(Fault::Fail(Failure::protocol()))?;
        moved |= self.respond(common, &words)?;
        // Only what the peer may wait for: it is not woken for the progress of requests that it does not.
        let mut changed = self.responder.take_awaited();
        changed |= self.take_reads(common, word(&words, Word::Answered))?;
        // What was answered, and what could not be published before, if the peer knows the files by now.
        if self.flush_notes()? {
            let answered = self.responder.answered();
            if answered != self.outbox.load(Word::Answered) {
                self.outbox.store(Word::Answered, answered);
                changed = true;
            }
            changed |= self.publish(&common.timing)?;
        }
        if changed {
            self.wake_peer();
        }
        Ok(moved || changed)
    }

    /// Whether the peer can read this process's memory.
    fn peer_reads_us(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.reads_us)
    }

    fn peer_words(&self) -> Option<Words> {
        let peer = self.link.as_ref()?.peer.as_ref()?;
        Some(peer.words())
    }

    fn flush_notes(&mut self) -> Result<bool, Fault> {
        match &self.link {
            Some(link) if self.notes.is_waiting() => self
                .notes
                .flush(&link.socket)
                .map_err(|e| Fault::Fail(Failure::lost(e.raw_os_error().unwrap_or(libc::EPIPE)))),
            _ => Ok(true),
        }
    }

    /// Executes what the peer has published.
    fn respond(&mut self, common: &mut Common, words: &Words) -> Result<bool, Fault> {
        let (published, taken) = (word(words, Word::Published), word(words, Word::Taken));
        let mut looked = false;
        loop {
            let Some(link) = &mut self.link else {
                return Ok(false);
            };
            let Some(peer) = &link.peer else {
                return Ok(false);
            };
            let mut around = Surroundings {
                lane: self.id,
                memory: &mut common.memory,
                copier: &mut common.copier,
                files: &mut link.files,
                process: link.process.as_ref(),
                peer,
                outbox: &self.outbox,
                receives: &mut self.receives,
                notes: &mut self.notes,
            };
            let round = self
                .responder
                .run(&mut around, published, taken, common.slice);
            if round.is_err() {
                common.copier.clear();
            }
            match round? {
                Round::Idle => return Ok(false),
                Round::Moved => return Ok(true),
                Round::UnknownFile if looked && !self.readable => {
                    return Err(Fault::Fail(Failure::protocol()));
                }
                // The socket has more than one round reads; go on in the next.
                Round::UnknownFile if looked => return Ok(true),
                Round::UnknownFile => {
                    looked = true;
                    self.readable = true;
                    self.read_notes(&mut common.mappings)?;
                }
            }
        }
    }

    /// Copies what our reads have been answered with.
    fn take_reads(&mut self, common: &mut Common, answered: u64) -> Result<bool, Fault> {
        if answered < self.requester.reads_taken() || answered > self.requester.reads_published() {
            return Err(Fault::Fail(Failure::protocol()));
        }
        let before = (self.requester.reads_taken(), self.reading);
        let mut budget = common.slice;
        while self.requester.reads_taken() < answered && budget > 0 {
            let result = self.take_read(common, &mut budget);
            match result {
                Ok(()) => {}
                Err(ReadStop::Fault(fault)) => {
                    common.copier.clear();
                    return Err(fault);
                }
                // Announced, but the socket has not been read to its end yet, or not at all.
                Err(ReadStop::UnknownFile) => {
                    let known = self.readable;
                    self.readable = true;
                    let news = self.read_notes(&mut common.mappings)?;
                    if !known && !news && !self.readable {
                        // It was announced and is not there (any more): the registration has ended meanwhile.
                        return Err(Fault::Fail(Failure::new(Status::RemoteAccess)));
                    }
                    break;
                }
            }
        }
        let process = self.link.as_ref().and_then(|link| link.process.as_ref());
        if let Err(fault) = common.copier.flush(process) {
            return Err(read_fault(fault));
        }
        let taken = self.requester.reads_taken();
        if taken != before.0 {
            self.outbox.store(Word::Taken, taken);
        }
        Ok(before != (taken, self.reading))
    }

    /// Copies more of the oldest read.
    fn take_read(&mut self, common: &mut Common, budget: &mut u32) -> Result<(), ReadStop> {
        let (Some(link), Some((length, list))) = (&mut self.link, self.requester.next_read())
        else {
            return Err(ReadStop::Fault(Fault::Fail(Failure::protocol())));
        };
        let Some(peer) = &link.peer else {
            return Ok(());
        };
        let taken = self.requester.reads_taken();
        let (start, mut done) = *self.reading.get_or_insert_with(|| (peer.answer(taken), 0));
        let mut skip = done;
        for sge in list {
            if skip >= sge.length {
                skip -= sge.length;
                continue;
            }
            let piece = (sge.length - skip).min(*budget);
            if piece == 0 {
                break;
            }
            let address = sge.address + u64::from(skip);
            let found = common
                .memory
                .local(sge.key, address, piece.into(), Intent::LocalWrite);
            let Some(to) = found else {
                let failure = Failure::new(Status::LocalProtection);
                return Err(ReadStop::Fault(Fault::Fail(failure)));
            };
            let from = Location {
                place: start.place.wrapping_add(done.into()),
                ..start
            };
            let (copier, files) = (&mut common.copier, &mut link.files);
            // SAFETY: the destination lies in a live registration of our own for local writing, which the poster of
            // the read keeps and does not refer to until the request has ended; it is flushed before that.
            let copied =
                unsafe { copier.copy(0, files, link.process.as_ref(), (from, &to), piece) };
            match copied {
                Ok(()) => {}
                Err(CopyFault::UnknownFile) => return Err(ReadStop::UnknownFile),
                Err(fault) => return Err(ReadStop::Fault(read_fault(fault))),
            }
            *budget -= piece;
            done += piece;
            self.reading = Some((start, done));
            if piece < sge.length - skip {
                break;
            }
            skip = 0;
        }
        if done == length {
            self.reading = None;
            self.requester.read_taken();
        }
        Ok(())
    }

    /// Publishes what can go, and keeps the timers that go with it. Returns whether anything was published.
    fn publish(&mut self, timing: &Timing) -> Result<bool, Fault> {
        if !self.requester.has_held_back() {
            self.rnr_deadline = None;
            return Ok(false);
        }
        if !self.flush_notes()? {
            return Ok(false);
        }
        let reads_us = self.peer_reads_us();
        let (hold, moved) = self.requester.publish(&self.outbox, reads_us);
        match hold {
            Hold::Receive => {
                if moved || self.rnr_deadline.is_none() {
                    self.rnr_deadline = after(timing.rnr);
                }
            }
            Hold::Refused if self.requester.is_quiet() => {
                return Err(Fault::Fail(Failure::new(Status::LocalProtection)));
            }
            Hold::Refused | Hold::Reads | Hold::Nothing => self.rnr_deadline = None,
        }
        if moved && self.watch.is_none() {
            self.watch = after(timing.peer).map(|at| (at, (u64::MAX, 0)));
        }
        Ok(moved)
    }

    /// Reads messages of the socket. Returns whether there were any.
    fn read_notes(&mut self, mappings: &mut Mappings) -> Result<bool, Fault> {
        let mut any = false;
        for _ in 0..NOTES {
            let Some(link) = &mut self.link else {
                return Ok(any);
            };
            let mut room = [0; Note::BYTES + 1];
            let (n, fd) = match sys::receive(&link.socket, &mut room) {
                Ok((0, _)) => return Err(Fault::Ended),
                Ok(message) => message,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        self.readable = false;
                        return Ok(any);
                    }
                    Some(libc::EINTR) => continue,
                    _ => return Err(Fault::Ended),
                },
            };
            any = true;
            let note = room.get(..n).and_then(Note::decode);
            let accepted = match (note, fd) {
                (Some(Note::Wake), None) => true,
                (Some(Note::File { file, length }), Some(fd)) => match mappings.map(&fd, length) {
                    Ok(mapping) => link.files.add(file, mapping),
                    Err(error) => {
                        tracing::warn!(lane = self.id.0, %error, "a peer's memory file");
                        false
                    }
                },
                (Some(Note::Forget { file }), None) => link.files.forget(file),
                _ => false,
            };
            if !accepted {
                return Err(Fault::Fail(Failure::protocol()));
            }
        }
        Ok(any)
    }

    /// Wakes the peer if it sleeps. Call after what it shall see has been published.
    fn wake_peer(&mut self) {
        let Some(link) = &mut self.link else { return };
        let Some(peer) = &link.peer else { return };
        // Either the peer, which looks once more after it has announced its sleep, sees what was published before this
        // fence, or we see its announcement (Dekker's argument, as in `endpoint/wake.rs`).
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let sleep = peer.word(Word::Sleep);
        if sleep % 2 == 1 && sleep != link.woken {
            link.woken = sleep;
            notes::wake(&link.socket);
        }
    }

    /// Announces that this side sleeps, unless there is something to do: then `false`, and it does not sleep.
    pub(super) fn go_to_sleep(&mut self) -> bool {
        if self.has_work() {
            return false;
        }
        if self.phase != Phase::Live {
            return true;
        }
        let sleep = self.outbox.load(Word::Sleep) | 1;
        self.outbox.store(Word::Sleep, sleep);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let asleep = !self.has_news();
        if !asleep {
            self.wake_up();
        }
        asleep
    }

    /// Announces that this side is awake.
    pub(super) fn wake_up(&mut self) {
        let sleep = self.outbox.load(Word::Sleep);
        self.outbox.store(Word::Sleep, sleep + sleep % 2);
        self.idle_rounds = 0;
    }

    /// Whether the peer's outbox has something that was not taken yet.
    fn has_news(&self) -> bool {
        let Some(words) = self.peer_words() else {
            return false;
        };
        let requester = &self.requester;
        word(&words, Word::State) != 0
            || self
                .responder
                .has_news(word(&words, Word::Published), word(&words, Word::Taken))
            || word(&words, Word::Answered) != requester.reads_taken()
            || requester.is_news(word(&words, Word::Executed), word(&words, Word::Credit))
    }

    /// Whether the next poll has something to do here, as far as is known without looking at the peer's outbox.
    pub(super) fn has_work(&self) -> bool {
        let failed = self.failure.is_some();
        self.requester.has_finished(failed)
            || self.receives.has_finished(failed)
            || (self.phase == Phase::Live
                && (self.readable
                    || self.responder.is_busy()
                    || self.reading.is_some()
                    || self.requester.is_doomed(self.peer_reads_us())))
    }

    /// Whether it has been idle for so long that it should not be looked at any more.
    pub(super) fn is_tired(&self) -> bool {
        self.idle_rounds >= PATIENCE
    }

    /// Gives up what has taken too long.
    pub(super) fn expire(&mut self, now: Instant, timing: &Timing) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.fail(Failure::lost(libc::ETIMEDOUT));
        }
        if self.rnr_deadline.is_some_and(|deadline| deadline <= now) {
            self.rnr_deadline = None;
            // If an earlier request has no answer either, the peer is not merely short of receives.
            self.fail(if self.requester.is_quiet() {
                Failure::new(Status::RnrRetryExceeded)
            } else {
                Failure::lost(libc::ETIMEDOUT)
            });
        }
        if let Some((at, before)) = self.watch
            && at <= now
        {
            let words = self.peer_words().unwrap_or_default();
            let mark = (
                word(&words, Word::Executed).max(self.requester.done()),
                word(&words, Word::Rounds),
            );
            if self.requester.is_quiet() {
                self.watch = None;
            } else if mark == before {
                self.fail(Failure::lost(libc::ETIMEDOUT));
            } else {
                self.watch = after(timing.peer).map(|at| (at, mark));
            }
        }
    }

    /// The next instant at which [`Lane::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let watch = self.watch.map(|(at, _)| at);
        [self.deadline, self.rnr_deadline, watch]
            .into_iter()
            .flatten()
            .min()
    }

    /// Appends completions while `out` is shorter than `limit`.
    pub(super) fn take_completions(&mut self, out: &mut Vec<Completion>, limit: usize) {
        self.requester
            .take(self.id, self.failure.as_mut(), out, limit);
        let failed = self.failure.is_some();
        self.receives.take(self.id, failed, out, limit);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Before anybody may use the memory of its requests again.
        self.end(Failure::new(Status::Flushed), End::Closed);
    }
}

/// Why taking a read stops.
enum ReadStop {
    Fault(Fault),
    UnknownFile,
}

fn read_fault(fault: CopyFault) -> Fault {
    Fault::Fail(match fault {
        CopyFault::UnknownFile => Failure::protocol(),
        CopyFault::Missing { .. } => Failure::new(Status::RemoteAccess),
        CopyFault::Gone => Failure::lost(libc::ESRCH),
        CopyFault::NotAllowed(errno) | CopyFault::Exporter(errno) => Failure::os(errno),
    })
}
