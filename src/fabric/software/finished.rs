//! In which order what was posted to a lane completes: oldest first, and nothing with success after a failure.

use std::collections::VecDeque;

use super::{
    super::{Completion, CompletionKind, FabricErrorKind, LaneId, Status},
    Failure,
};

/// The end of a send queue at which completions are taken.
///
/// Requests are numbered as they are posted; the queue itself knows which of them have been executed.
#[derive(Debug)]
pub(in crate::fabric) struct Finished {
    /// The oldest request whose completion has not been taken.
    head: u64,
    /// Bindings and invalidations of windows, done and not yet taken. They share the slots with the requests.
    local: VecDeque<u64>,
    /// Whether a failed request has been taken; all later ones are flushed, whether executed or not.
    broken: bool,
}

impl Finished {
    pub(in crate::fabric) fn new(depth: usize) -> Self {
        Self {
            head: 0,
            local: VecDeque::with_capacity(depth),
            broken: false,
        }
    }

    /// The oldest request whose completion has not been taken.
    pub(in crate::fabric) fn head(&self) -> u64 {
        self.head
    }

    /// An error if each of `depth` slots is in use, `posted` requests having been posted.
    pub(in crate::fabric) fn check_room(
        &self,
        posted: u64,
        depth: usize,
    ) -> Result<(), FabricErrorKind> {
        let used = posted - self.head + self.local.len() as u64;
        if used < depth as u64 {
            return Ok(());
        }
        Err(FabricErrorKind::QueueFull {
            queue: "send queue",
            depth: depth as u32,
        })
    }

    /// Takes a slot, which must be free, for something that is done already.
    pub(in crate::fabric) fn push_done(&mut self, id: u64) {
        self.local.push_back(id);
    }

    /// Whether something is done that was never a request.
    pub(in crate::fabric) fn has_local(&self) -> bool {
        !self.local.is_empty()
    }

    /// Appends what was done at once to `out` while it is shorter than `limit`.
    pub(in crate::fabric) fn take_local(
        &mut self,
        lane: LaneId,
        out: &mut Vec<Completion>,
        limit: usize,
    ) {
        while out.len() < limit
            && let Some(id) = self.local.pop_front()
        {
            out.push(Completion {
                lane,
                kind: CompletionKind::Sent { id },
                status: Status::Success,
                vendor_error: 0,
            });
        }
    }

    /// Appends the completion of the oldest request, named `id`, to `out` if it has one. Once the lane has failed,
    /// `failure` holds the reason for the first unfinished request, and [`Status::Flushed`] after it was given out.
    /// Returns `false` if the request is neither done nor failed.
    pub(in crate::fabric) fn take_oldest(
        &mut self,
        lane: LaneId,
        (id, signaled, is_done): (u64, bool, bool),
        failure: Option<&mut Failure>,
        out: &mut Vec<Completion>,
    ) -> bool {
        let (status, vendor_error) = if !self.broken && is_done {
            (Status::Success, 0)
        } else if let Some(failure) = failure {
            self.broken = true;
            let first = std::mem::replace(failure, Failure::new(Status::Flushed));
            (first.status, first.vendor)
        } else {
            return false;
        };
        self.head += 1;
        if signaled || status != Status::Success {
            out.push(Completion {
                lane,
                kind: CompletionKind::Sent { id },
                status,
                vendor_error,
            });
        }
        true
    }
}
