//! Turns our requests into chains of `ibv_send_wr`, in memory that is allocated once per context.
//!
//! Owned by the thread of its context. No allocation, no lock and no system call: `ibv_post_send(3)` writes the
//! device's queue and rings its doorbell (on soft-RoCE the doorbell is a system call, once per chain).

use crate::fabric::{FabricError, FabricErrorKind, Opcode, PostError, Sge, WorkRequest};

use super::{
    error::Place,
    lane::{Lane, LaneState, WrId},
    sys::{self, Zeroable as _},
};

/// Requests handed to the device with one call.
const CHAIN: usize = 64;
/// Gather elements of one chain; at least what one request of any device may have.
const CHAIN_SGES: usize = 512;
/// Receives handed to the device with one call.
const RECEIVE_CHAIN: usize = 64;

/// Limits that each request is checked against before the device sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_message: u64,
    /// Scatter elements of a read; less than the gather elements of a write on some devices.
    pub(super) max_read_sge: u32,
}

/// Scratch memory for chains.
pub(super) struct Poster {
    sends: Box<[sys::ibv_send_wr]>,
    sges: Box<[sys::ibv_sge]>,
    receives: Box<[sys::ibv_recv_wr]>,
    limits: Limits,
}

// SAFETY: the pointers in the scratch memory are only read by the device's functions during a call made by the owner.
unsafe impl Send for Poster {}

impl Poster {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            sends: vec![sys::ibv_send_wr::zeroed(); CHAIN].into(),
            sges: vec![sys::ibv_sge::zeroed(); CHAIN_SGES].into(),
            receives: vec![sys::ibv_recv_wr::zeroed(); RECEIVE_CHAIN].into(),
            limits,
        }
    }

    /// Posts `requests` to `lane`, in order. A failed lane takes them, too, and its device flushes them.
    ///
    /// # Safety
    ///
    /// As for [`crate::fabric::Context::post`].
    pub(super) unsafe fn post(
        &mut self,
        place: &Place,
        lane: &mut Lane,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> Result<(), PostError> {
        if !matches!(lane.state, LaneState::Connected | LaneState::Failed) {
            let source = place.error(
                "ibv_post_send",
                FabricErrorKind::LaneState {
                    lane: lane.id,
                    state: lane.state.word(),
                },
            );
            return Err(PostError { posted: 0, source });
        }
        let mut posted = 0;
        while let Some(rest) = requests.get(posted..).filter(|rest| !rest.is_empty()) {
            let (filled, refused) = self.fill(place, lane, rest, sges);
            if filled > 0 {
                // SAFETY: a connected or failed lane's queue pair is live; `fill` has just linked the first `filled`
                // requests into a chain that ends in null and whose gather lists lie in `self.sges`. What those name
                // is for the caller to answer for: the driver copies inline elements by address, the device checks
                // the keys of all others.
                let result = unsafe { sys::ibv_post_send(lane.qp, self.sends.as_mut_ptr()) };
                let accepted = match &result {
                    Ok(()) => filled,
                    Err(error) => accepted(self.sends.as_ptr(), error.bad, filled),
                };
                for request in rest.iter().take(accepted) {
                    lane.sent.push(request.id);
                }
                posted += accepted;
                if let Err(error) = result {
                    let source = match error.errno.code() {
                        libc::ENOMEM => place.error(
                            "ibv_post_send",
                            FabricErrorKind::QueueFull {
                                queue: "send queue",
                                depth: lane.sent.depth(),
                            },
                        ),
                        errno => place.os("ibv_post_send", errno),
                    };
                    return Err(PostError { posted, source });
                }
            }
            if let Some(source) = refused {
                return Err(PostError { posted, source });
            }
        }
        Ok(())
    }

    /// Posts one request that moves no bytes, signalled. `fill` sets its opcode and what belongs to it.
    ///
    /// # Safety
    ///
    /// The objects that `fill` names are live during the call.
    pub(super) unsafe fn post_local(
        &mut self,
        place: &Place,
        operation: &'static str,
        lane: &mut Lane,
        id: u64,
        fill: impl FnOnce(&mut sys::ibv_send_wr),
    ) -> Result<(), FabricError> {
        let full = |depth| {
            let queue = "send queue";
            place.error(operation, FabricErrorKind::QueueFull { queue, depth })
        };
        let Some(send) = self.sends.first_mut() else {
            return Ok(());
        };
        if lane.sent.room() == 0 {
            return Err(full(lane.sent.depth()));
        }
        // Nothing is left of an earlier request: rxe's provider refuses a binding that has an immediate.
        *send = sys::ibv_send_wr::zeroed();
        send.wr_id = WrId::Send {
            lane: lane.id,
            sequence: lane.sent.sequence(0),
        }
        .encode();
        send.send_flags = sys::IBV_SEND_SIGNALED;
        fill(send);
        // SAFETY: callers post to connected lanes, whose queue pairs are live; a chain of one without gather list.
        match unsafe { sys::ibv_post_send(lane.qp, send) } {
            Ok(()) => {
                lane.sent.push(id);
                Ok(())
            }
            Err(error) if error.errno.code() == libc::ENOMEM => Err(full(lane.sent.depth())),
            Err(error) => Err(place.os(operation, error.errno.code())),
        }
    }

    /// Links as many of `requests` as fit into one chain; the error, if any, is why the next one must not be posted.
    fn fill(
        &mut self,
        place: &Place,
        lane: &Lane,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> (usize, Option<FabricError>) {
        let mut filled = 0;
        let mut used = 0;
        let mut refused = None;
        let room = lane.sent.room() as usize;
        for request in requests {
            if filled == self.sends.len() {
                break;
            }
            if filled == room {
                // Only the reason for this request; those before it are posted.
                refused = Some(place.error(
                    "ibv_post_send",
                    FabricErrorKind::QueueFull {
                        queue: "send queue",
                        depth: lane.sent.depth(),
                    },
                ));
                break;
            }
            let gather = match self.check(place, lane, request, sges) {
                Ok(gather) => gather,
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            };
            let Some(slots) = self.sges.get_mut(used..used + gather.len()) else {
                break; // the next chain has room
            };
            for (slot, sge) in slots.iter_mut().zip(gather) {
                *slot = sys::ibv_sge {
                    addr: sge.address,
                    length: sge.length,
                    lkey: sge.key.0,
                };
            }
            let list = if gather.is_empty() {
                std::ptr::null_mut()
            } else {
                slots.as_mut_ptr()
            };
            used += gather.len();
            let sequence = lane.sent.sequence(filled as u32);
            if let Some(send) = self.sends.get_mut(filled) {
                send.wr_id = WrId::Send {
                    lane: lane.id,
                    sequence,
                }
                .encode();
                send.sg_list = list;
                send.num_sge = gather.len() as i32;
                send.send_flags = if request.signaled {
                    sys::IBV_SEND_SIGNALED
                } else {
                    0
                } | if request.inline {
                    sys::IBV_SEND_INLINE
                } else {
                    0
                };
                send.opcode = match request.opcode {
                    Opcode::Write => sys::IBV_WR_RDMA_WRITE,
                    Opcode::WriteImm(imm) => {
                        send.imm.imm_data = imm.to_be();
                        sys::IBV_WR_RDMA_WRITE_WITH_IMM
                    }
                    Opcode::Read => sys::IBV_WR_RDMA_READ,
                };
                send.wr.rdma = sys::ibv_wr_rdma {
                    remote_addr: request.remote_address,
                    rkey: request.remote_key.0,
                };
            }
            filled += 1;
        }
        let base = self.sends.as_mut_ptr();
        for (index, send) in self.sends.iter_mut().enumerate().take(filled) {
            send.next = if index + 1 == filled {
                std::ptr::null_mut()
            } else {
                base.wrapping_add(index + 1)
            };
        }
        (filled, refused)
    }

    /// The gather list of `request`, if the device may see it.
    fn check<'a>(
        &self,
        place: &Place,
        lane: &Lane,
        request: &WorkRequest,
        sges: &'a [Sge],
    ) -> Result<&'a [Sge], FabricError> {
        const CALL: &str = "ibv_post_send";
        let first = request.first_sge as usize;
        let gather = first
            .checked_add(request.sge_count as usize)
            .and_then(|end| sges.get(first..end))
            .ok_or_else(|| {
                let what = format!(
                    "gather elements {first}..+{} of {}",
                    request.sge_count,
                    sges.len()
                );
                place.error(CALL, FabricErrorKind::Memory(what))
            })?;
        let (what, most) = match request.opcode {
            Opcode::Read => (
                "number of scatter elements of a read",
                lane.config.max_sge.min(self.limits.max_read_sge),
            ),
            _ => ("number of gather elements", lane.config.max_sge),
        };
        place.limit(CALL, what, u64::from(request.sge_count), u64::from(most))?;
        let bytes: u64 = gather.iter().map(|sge| u64::from(sge.length)).sum();
        place.limit(CALL, "message length", bytes, self.limits.max_message)?;
        if request.inline {
            if request.opcode == Opcode::Read {
                return Err(place.error(
                    CALL,
                    FabricErrorKind::Memory("a read cannot be inline".into()),
                ));
            }
            place.limit(
                CALL,
                "inline payload",
                bytes,
                u64::from(lane.config.max_inline),
            )?;
        }
        Ok(gather)
    }

    /// Posts up to `count` empty receives to `queue` and says how many it took; fewer only with an errno.
    pub(super) fn post_receives(
        &mut self,
        queue: ReceiveQueue,
        count: u32,
    ) -> (u32, Result<(), i32>) {
        let id = match queue {
            ReceiveQueue::Lane(lane, _) => WrId::Receive { lane: Some(lane) },
            ReceiveQueue::Shared(_) => WrId::Receive { lane: None },
        }
        .encode();
        let mut posted = 0;
        while posted < count {
            let chain = (count - posted).min(RECEIVE_CHAIN as u32) as usize;
            let base = self.receives.as_mut_ptr();
            for (index, receive) in self.receives.iter_mut().enumerate().take(chain) {
                // No scatter list: a write with immediate brings its payload's address along.
                receive.wr_id = id;
                receive.next = if index + 1 == chain {
                    std::ptr::null_mut()
                } else {
                    base.wrapping_add(index + 1)
                };
            }
            // SAFETY: the queue is live by `ReceiveQueue`'s contract; the chain ends in null.
            let result = unsafe {
                match queue {
                    ReceiveQueue::Lane(_, qp) => sys::ibv_post_recv(qp, base),
                    ReceiveQueue::Shared(srq) => sys::ibv_post_srq_recv(srq, base),
                }
            };
            match result {
                Ok(()) => posted += chain as u32,
                Err(error) => {
                    posted += accepted(base.cast_const(), error.bad, chain) as u32;
                    return (posted, Err(error.errno.code()));
                }
            }
        }
        (posted, Ok(()))
    }
}

/// Where receives go. The pointer must be to a live object of the context.
#[derive(Clone, Copy)]
pub(super) enum ReceiveQueue {
    Lane(crate::fabric::LaneId, *mut sys::ibv_qp),
    Shared(*mut sys::ibv_srq),
}

/// How many requests of a chain of `filled` at `base` were taken, when the device refused the one at `bad`. A driver
/// that names none of the chain has taken none.
fn accepted<T>(base: *const T, bad: *mut T, filled: usize) -> usize {
    (bad as usize)
        .checked_sub(base as usize)
        .map(|bytes| bytes / size_of::<T>())
        .filter(|index| *index < filled)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bad_request_tells_how_many_were_taken() {
        let mut chain = [0u64; 4];
        let base = chain.as_mut_ptr();
        for index in 0..4 {
            assert_eq!(
                accepted(base.cast_const(), base.wrapping_add(index), 4),
                index
            );
        }
        assert_eq!(accepted(base.cast_const(), base.wrapping_add(4), 4), 0);
        assert_eq!(accepted(base.cast_const(), std::ptr::null_mut(), 4), 0);
    }
}
