//! The completion queue of one context, and what wakes its owner.
//!
//! Completions of one work queue (the send or the receive queue of one lane) are delivered in the order in which they
//! were made. Nothing orders those of different work queues, and a seeded choice makes sure that nobody relies on it.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use super::rng::Rng;
use crate::fabric::{Completion, CompletionKind, LaneId};

/// How far ahead of the oldest completion another may be delivered.
const REORDER_WINDOW: usize = 32;

pub(super) struct Entry {
    pub(super) completion: Completion,
    /// How many slots of its work queue are free once it has been polled.
    pub(super) frees: u32,
}

impl Entry {
    fn work_queue(&self) -> (LaneId, bool) {
        let sent = matches!(self.completion.kind, CompletionKind::Sent { .. });
        (self.completion.lane, sent)
    }
}

pub(super) struct CompletionQueue {
    entries: VecDeque<Entry>,
    pub(super) depth: u32,
    pub(super) armed: bool,
    pub(super) waker: Arc<Waker>,
}

impl CompletionQueue {
    pub(super) fn new(depth: u32, waker: Arc<Waker>) -> Self {
        Self {
            entries: VecDeque::new(),
            depth,
            armed: false,
            waker,
        }
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends a completion and wakes the owner. False if there is no room.
    pub(super) fn push(&mut self, entry: Entry) -> bool {
        if self.len() >= self.depth {
            return false;
        }
        self.entries.push_back(entry);
        self.wake();
        true
    }

    pub(super) fn wake(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.waker.wake();
        }
    }

    pub(super) fn pop(&mut self, reorder: bool, rng: &mut Rng) -> Option<Entry> {
        if !reorder {
            return self.entries.pop_front();
        }
        let chosen = rng.below(self.entries.len().min(REORDER_WINDOW));
        let queue = self.entries.get(chosen)?.work_queue();
        let oldest = self
            .entries
            .iter()
            .position(|entry| entry.work_queue() == queue)?;
        self.entries.remove(oldest)
    }

    pub(super) fn discard(&mut self, lane: LaneId) {
        self.entries.retain(|entry| entry.completion.lane != lane);
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}

/// An eventfd.
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: eventfd(2) has just made `fd`, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Makes the descriptor readable. The only possible failure is a counter at its limit, which is readable.
    pub(super) fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is 8 readable bytes.
        unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes it unreadable. The only possible failure is that it is already.
    pub(super) fn drain(&self) {
        let mut count = [0u8; 8];
        // SAFETY: `count` is 8 writable bytes.
        unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}
