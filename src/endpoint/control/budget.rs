//! Back-pressure from the driver to the sockets: a connection is not read while the driver has too much of it in
//! hand. Messages give their bytes back when they are dropped, on whatever thread that is.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{Command, ConnId, Mailbox};

/// What a message costs beyond its bytes.
const OVERHEAD: usize = 64;

/// Bytes of one connection that the driver has not consumed.
pub(super) struct Budget {
    conn: ConnId,
    limit: usize,
    outstanding: AtomicUsize,
    /// Whether the control thread waits for a [`Command::Resume`].
    paused: AtomicBool,
    mailbox: Mailbox,
}

impl Budget {
    pub(super) fn new(conn: ConnId, limit: usize, mailbox: Mailbox) -> Arc<Self> {
        Arc::new(Self {
            conn,
            limit,
            outstanding: AtomicUsize::new(0),
            paused: AtomicBool::new(false),
            mailbox,
        })
    }

    /// Wraps a message that goes to the driver.
    pub(super) fn charge(self: &Arc<Self>, bytes: Vec<u8>) -> Received {
        let cost = bytes.len() + OVERHEAD;
        self.outstanding.fetch_add(cost, Ordering::SeqCst);
        Received {
            bytes,
            cost,
            budget: Arc::clone(self),
        }
    }

    /// Whether the socket must not be read now. If so, a [`Command::Resume`] will come.
    pub(super) fn is_exhausted(&self) -> bool {
        if self.outstanding.load(Ordering::SeqCst) <= self.limit {
            return false;
        }
        self.paused.store(true, Ordering::SeqCst);
        // The driver may have consumed everything between the two lines above and not have seen the flag. If it has
        // seen it, a resume is on its way and does no harm.
        if self.outstanding.load(Ordering::SeqCst) <= self.limit / 2 {
            self.paused.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    fn refund(&self, cost: usize) {
        let before = self.outstanding.fetch_sub(cost, Ordering::SeqCst);
        let low = before.saturating_sub(cost) <= self.limit / 2;
        if low && self.paused.swap(false, Ordering::SeqCst) {
            self.mailbox.post(Command::Resume(self.conn));
        }
    }
}

/// A message from a peer. Consume it soon: the connection is not read while too much of it is held.
pub(crate) struct Received {
    bytes: Vec<u8>,
    cost: usize,
    budget: Arc<Budget>,
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.budget.refund(self.cost);
    }
}

impl fmt::Debug for Received {
    // The content may hold a region's secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Received({} bytes)", self.bytes.len())
    }
}
