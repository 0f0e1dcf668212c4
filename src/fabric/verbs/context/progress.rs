//! What the device reports: completions and asynchronous events, accounted to their lanes.
//!
//! Owned by the thread of its context.

use crate::fabric::{Completion, CompletionKind, FabricError, FabricErrorKind, RailEvent, Status};

use super::{
    super::{
        events::{Event, next_event},
        lane::{LaneState, WrId},
        link::PortState,
        poll::WorkCompletion,
        post::ReceiveQueue,
        sys,
    },
    VerbsContext,
};

impl VerbsContext {
    /// Takes one batch off the completion queue and says how many it was.
    pub(super) fn poll_device(
        &mut self,
        out: &mut impl Extend<Completion>,
    ) -> Result<usize, FabricError> {
        let Some(completions) = &self.completions else {
            return Ok(0);
        };
        // SAFETY: the completion queue is live.
        let count = match unsafe { sys::ibv_poll_cq(completions.cq(), &mut self.batch[..]) } {
            Ok(count) => count,
            Err(errno) => {
                let what = format!("the completion queue is broken: {errno}");
                self.fatal = Some(what.clone());
                return Err(self
                    .place()
                    .error("ibv_poll_cq", FabricErrorKind::Fatal(what)));
            }
        };
        for index in 0..count {
            let Some(wc) = self.batch.get(index).map(WorkCompletion::read) else {
                break;
            };
            out.extend(self.translate(wc));
        }
        self.replace_overdrawn()?;
        Ok(count)
    }

    /// Puts back what lanes took from the shared queue beyond their share, so that it is not the others' loss.
    pub(super) fn replace_overdrawn(&mut self) -> Result<(), FabricError> {
        let count = std::mem::take(&mut self.overdrawn);
        let (Some(shared), 1..) = (&self.srq, count) else {
            return Ok(());
        };
        match self
            .poster
            .post_receives(ReceiveQueue::Shared(shared.srq), count)
            .1
        {
            Ok(()) | Err(libc::ENOMEM) => Ok(()),
            Err(errno) => Err(self.place().os("ibv_post_srq_recv", errno)),
        }
    }

    /// Accounts for one work completion. `None` if its lane is gone.
    pub(super) fn translate(&mut self, wc: WorkCompletion) -> Option<Completion> {
        let named = match wc.id {
            WrId::Send { lane, .. } | WrId::Receive { lane: Some(lane) } => Some(lane),
            WrId::Receive { lane: None } => self
                .numbers
                .binary_search_by_key(&wc.qpn, |(number, _)| *number)
                .ok()
                .and_then(|found| self.numbers.get(found))
                .map(|(_, lane)| *lane),
        };
        let index = self.index(named?)?;
        let lane = self.lanes.get_mut(index)?;
        let mut status = wc.status;
        let kind = match wc.id {
            WrId::Send { sequence, .. } => {
                self.windows
                    .completed(lane.id, sequence, status == Status::Success);
                CompletionKind::Sent {
                    id: lane.sent.retire(sequence)?,
                }
            }
            WrId::Receive { .. } => {
                // After the lane has reported its receives as flushed there is none left to complete.
                let Some(left) = lane.receives.checked_sub(1) else {
                    self.overdrawn += 1;
                    if lane.state == LaneState::Connected {
                        tracing::warn!(lane = %lane.id, "the peer sent more immediates than it was allowed");
                        self.failing.push(lane.id);
                    }
                    return None;
                };
                lane.receives = left;
                if status == Status::Success && wc.imm.is_none() {
                    // A plain send, which no peer of ours posts.
                    status = Status::Other(sys::IBV_WC_GENERAL_ERR);
                }
                CompletionKind::Received {
                    imm: wc.imm.unwrap_or(0),
                }
            }
        };
        if status != Status::Success && lane.state == LaneState::Connected {
            self.failing.push(lane.id);
        }
        Some(Completion {
            lane: lane.id,
            kind,
            status,
            vendor_error: wc.vendor_error,
        })
    }

    fn report(&mut self, event: RailEvent) {
        // An engine that does not ask needs no more than the latest.
        if self.events.len() >= 1024 {
            self.events.clear();
        }
        self.events.push(event);
    }

    /// Handles asynchronous events.
    pub(super) fn handle_events(&mut self) -> Result<(), FabricError> {
        // Bounded, should events come as fast as they are taken.
        for _ in 0..256 {
            match next_event(&self.device)? {
                None => break,
                Some(Event::Lane(qp, what)) => {
                    let found = self.lanes.iter().find(|lane| lane.qp == qp);
                    if let Some(id) = found.map(|lane| lane.id) {
                        tracing::debug!(lane = %id, what, "queue pair event");
                        self.fail_lane(id)?;
                        self.report(RailEvent::LaneFailed(id));
                    }
                }
                Some(Event::Port(port)) if port == i32::from(self.place().port) => {
                    let place = |this: &Self| {
                        let address = this.device.lane_address(0, 0);
                        let gid = (address.gid, this.device.gid_index());
                        (this.device.port_state(), address.lid, gid)
                    };
                    let before = place(self);
                    self.device.refresh_port();
                    let after = place(self);
                    let active = |state| state == PortState::Active;
                    match (active(before.0), active(after.0)) {
                        (true, false) => {
                            let device = &self.place().device;
                            tracing::warn!(%device, port, state = %after.0, "the port is no longer active");
                            self.report(RailEvent::PortDown);
                        }
                        (false, true) => self.report(RailEvent::PortActive),
                        _ => {}
                    }
                    if (before.1, before.2) != (after.1, after.2) {
                        self.report(RailEvent::AddressChanged);
                    }
                }
                Some(Event::Fatal(what)) => {
                    tracing::error!(device = %self.place().device, what, "device failed");
                    self.fatal = Some(what.to_owned());
                }
                Some(Event::Port(_) | Event::Other) => {}
            }
        }
        Ok(())
    }
}
