//! The receives of a lane and the immediates that consumed them.

use std::collections::VecDeque;

use super::super::{Completion, CompletionKind, LaneId, Status};

/// See the module's description.
#[derive(Debug)]
pub(in crate::fabric) struct ReceiveQueue {
    depth: u32,
    /// Posted and not consumed.
    posted: u32,
    /// Posted ever: the peer's credit.
    granted: u64,
    imms: VecDeque<u32>,
}

impl ReceiveQueue {
    pub(in crate::fabric) fn new(depth: u32) -> Self {
        Self {
            depth,
            posted: depth,
            granted: depth.into(),
            imms: VecDeque::with_capacity(depth as usize),
        }
    }

    /// Most receives.
    pub(in crate::fabric) fn depth(&self) -> u32 {
        self.depth
    }

    /// Posted and not consumed.
    pub(in crate::fabric) fn posted(&self) -> u32 {
        self.posted
    }

    /// Posted ever: the peer's credit.
    pub(in crate::fabric) fn granted(&self) -> u64 {
        self.granted
    }

    /// Adds receives; the depth if there is no room for them.
    pub(in crate::fabric) fn post(&mut self, count: u32) -> Result<(), u32> {
        let used = self.posted as usize + self.imms.len();
        if used + count as usize > self.depth as usize {
            return Err(self.depth);
        }
        self.posted += count;
        self.granted += u64::from(count);
        Ok(())
    }

    /// Consumes one receive; `false` if none is posted.
    pub(in crate::fabric) fn consume(&mut self, imm: u32) -> bool {
        let Some(left) = self.posted.checked_sub(1) else {
            return false;
        };
        self.posted = left;
        self.imms.push_back(imm);
        true
    }

    /// Whether [`ReceiveQueue::take`] would make progress. A lane that has failed flushes what is posted.
    pub(in crate::fabric) fn has_finished(&self, failed: bool) -> bool {
        !self.imms.is_empty() || (failed && self.posted > 0)
    }

    /// Appends completions to `out` while it is shorter than `limit`.
    pub(in crate::fabric) fn take(
        &mut self,
        lane: LaneId,
        failed: bool,
        out: &mut Vec<Completion>,
        limit: usize,
    ) {
        while out.len() < limit {
            let (imm, status) = if let Some(imm) = self.imms.pop_front() {
                (imm, Status::Success)
            } else if failed && self.posted > 0 {
                self.posted -= 1;
                (0, Status::Flushed)
            } else {
                return;
            };
            out.push(Completion {
                lane,
                kind: CompletionKind::Received { imm },
                status,
                vendor_error: 0,
            });
        }
    }
}
