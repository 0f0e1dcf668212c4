//! Lanes that end: by failure, by a fence.
//!
//! After [`Context::fence_lane`](crate::fabric::Context::fence_lane) no write of the peer may land. The queue pair is
//! first moved to the error state, where packets that arrive are discarded (InfiniBand Architecture Specification,
//! vol. 1, 10.3.1), and then destroyed. The first alone is not enough: it says nothing about a packet whose payload is
//! being placed at that moment, and soft-RoCE returns from `ibv_modify_qp(3)` once it has told its tasks, which may
//! still be copying (`rxe_qp_error`). Destroying a queue pair returns only when the device has let go of it: hardware
//! has finished its transactions, for its resources are freed then (10.2.4), and soft-RoCE waits for its tasks.
//!
//! What the device has not reported until then, the lane reports itself as flushed, in order; until it is destroyed it
//! stays as a tombstone that flushes what is posted.

use std::ptr;

use crate::fabric::{Completion, CompletionKind, FabricError, LaneId, Status};

use super::{
    super::{
        attributes::{error_attributes, modify},
        lane::LaneState,
        poll::BATCH,
    },
    VerbsContext,
};

impl VerbsContext {
    /// Finishes off the lanes that the last batch showed to have failed.
    pub(super) fn settle_failures(&mut self) -> Result<(), FabricError> {
        while let Some(id) = self.failing.pop() {
            self.fail_lane(id)?;
        }
        Ok(())
    }

    /// Moves a lane to the error state, so that everything outstanding flushes.
    pub(super) fn fail_lane(&mut self, id: LaneId) -> Result<(), FabricError> {
        let Some(lane) = self.index(id).and_then(|index| self.lanes.get_mut(index)) else {
            return Ok(());
        };
        if matches!(lane.state, LaneState::Failed | LaneState::Fenced) {
            return Ok(());
        }
        lane.state = LaneState::Failed;
        let (qp, qpn) = (lane.qp, lane.qpn);
        tracing::debug!(lane = %id, qpn, device = %self.place().device, "lane failed");
        // SAFETY: a lane that is not fenced has a live queue pair.
        let moved = unsafe {
            modify(
                self.device.lib(),
                qp,
                error_attributes(),
                "ibv_modify_qp(ERR)",
                self.place(),
            )
        };
        if let Err(error) = moved {
            // Then the device is in trouble, and fencing will tell.
            tracing::warn!(%error, "a failed lane does not go to the error state");
        }
        if self.srq.is_some() {
            self.drain_to_stash()?;
            self.flush_receives(id);
        }
        Ok(())
    }

    /// Takes everything off the completion queue. Completions of lanes that fail meanwhile stay in `failing`.
    pub(super) fn drain_to_stash(&mut self) -> Result<(), FabricError> {
        let mut stash = std::mem::take(&mut self.stash);
        let mut result = Ok(());
        // Bounded, should a device produce completions as fast as they are taken.
        for _ in 0..4096 {
            match self.poll_device(&mut stash) {
                Ok(BATCH) => {}
                Ok(_) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.stash = stash;
        result
    }

    /// Reports all receives still posted to a lane as flushed.
    pub(super) fn flush_receives(&mut self, id: LaneId) {
        let Some(lane) = self.index(id).and_then(|index| self.lanes.get_mut(index)) else {
            return;
        };
        let flushed = Completion {
            lane: id,
            kind: CompletionKind::Received { imm: 0 },
            status: Status::Flushed,
            vendor_error: 0,
        };
        let count = std::mem::take(&mut lane.receives) as usize;
        self.stash.extend(std::iter::repeat_n(flushed, count));
    }

    /// Reports all requests still posted to a lane as flushed, oldest first.
    pub(super) fn flush_sends(&mut self, id: LaneId) {
        let Some(lane) = self.index(id).and_then(|index| self.lanes.get_mut(index)) else {
            return;
        };
        while let Some(request) = lane.sent.pop() {
            self.stash.push_back(Completion {
                lane: id,
                kind: CompletionKind::Sent { id: request },
                status: Status::Flushed,
                vendor_error: 0,
            });
        }
    }

    /// Ends the queue pair of the lane at `index`; see the module's documentation.
    pub(super) fn fence(&mut self, index: usize) -> Result<(), FabricError> {
        let Some(lane) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        if lane.state == LaneState::Fenced {
            return Ok(());
        }
        let (id, qp, qpn) = (lane.id, lane.qp, lane.qpn);
        if lane.state != LaneState::Failed {
            lane.state = LaneState::Failed;
            // SAFETY: a lane that is not fenced has a live queue pair.
            let moved = unsafe {
                modify(
                    self.device.lib(),
                    qp,
                    error_attributes(),
                    "ibv_modify_qp(ERR)",
                    self.place(),
                )
            };
            if let Err(error) = moved {
                // Destroying it does the same and more.
                tracing::debug!(%error, "fence");
            }
        }
        // What has succeeded is reported as that: some drivers drop a queue pair's completions along with it.
        let drained = self.drain_to_stash();
        // They hold the queue pair.
        self.windows.free_of(self.device.place(), id)?;
        // SAFETY: as above; the lane forgets it below.
        unsafe { self.device.lib().destroy_qp(qp) }
            .map_err(|errno| self.place().os("ibv_destroy_qp", errno.code()))?;
        // And some do not; they must be out of the queue before the number is used again.
        let drained = drained.and_then(|()| self.drain_to_stash());
        self.flush_sends(id);
        self.flush_receives(id);
        self.numbers.retain(|(number, _)| *number != qpn);
        if let Some(lane) = self.lanes.get_mut(index) {
            lane.state = LaneState::Fenced;
            lane.qp = ptr::null_mut();
        }
        // A broken completion queue is for the next poll to report: the lane itself is fenced.
        if let Err(error) = drained.and_then(|()| self.settle_failures()) {
            tracing::warn!(%error, "fence");
        }
        Ok(())
    }
}
