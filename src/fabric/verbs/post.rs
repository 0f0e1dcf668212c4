//! Turns our requests into chains of `ibv_send_wr`, in memory that is allocated once per context.
//!
//! Owned by the thread of its context. No allocation, no lock and no system call: `ibv_post_send(3)` writes the
//! device's queue and rings its doorbell (on soft-RoCE the doorbell is a system call, once per chain).
//!
//! Gather lists are not copied: an [`Sge`] has the layout of an `ibv_sge`, so a work request points to the caller's.

use crate::fabric::{
    FabricError, FabricErrorKind, LaneConfig, Opcode, PostError, Sge, WorkRequest,
};

use super::{
    error::Place,
    lane::{Lane, LaneState, WrId},
    sys::{self, Zeroable as _},
};

/// Requests handed to the device with one call.
const CHAIN: usize = 64;
/// Receives handed to the device with one call.
const RECEIVE_CHAIN: usize = 64;

// `fill` hands the caller's elements to the device.
const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Sge>() == size_of::<sys::ibv_sge>());
    assert!(align_of::<Sge>() == align_of::<sys::ibv_sge>());
    assert!(offset_of!(Sge, address) == offset_of!(sys::ibv_sge, addr));
    assert!(offset_of!(Sge, length) == offset_of!(sys::ibv_sge, length));
    assert!(offset_of!(Sge, key) == offset_of!(sys::ibv_sge, lkey));
};

/// Limits that each request is checked against before the device sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) max_message: u64,
    /// Scatter elements of a read; less than the gather elements of a write on some devices.
    pub(super) max_read_sge: u32,
}

/// The limits of one lane.
#[derive(Clone, Copy)]
struct LaneLimits {
    max_message: u64,
    max_sge: u32,
    max_read_sge: u32,
    max_inline: u32,
}

impl Limits {
    fn of(&self, config: &LaneConfig) -> LaneLimits {
        LaneLimits {
            max_message: self.max_message,
            max_sge: config.max_sge,
            max_read_sge: config.max_sge.min(self.max_read_sge),
            max_inline: config.max_inline,
        }
    }
}

impl LaneLimits {
    /// The gather list of `request`, if the device may see it.
    #[inline]
    fn gather<'a>(&self, request: &WorkRequest, sges: &'a [Sge]) -> Option<&'a [Sge]> {
        let first = request.first_sge as usize;
        let gather = sges.get(first..first + request.sge_count as usize)?;
        let bytes = match gather {
            [sge] => u64::from(sge.length),
            several => several.iter().map(|sge| u64::from(sge.length)).sum(),
        };
        let is_read = matches!(request.opcode, Opcode::Read);
        let fits = request.sge_count <= self.max_sge
            && bytes <= self.max_message
            && (!(is_read || request.inline) || self.fits_specially(request, is_read, bytes));
        fits.then_some(gather)
    }

    /// What reads and inline writes need besides.
    #[inline(never)]
    fn fits_specially(&self, request: &WorkRequest, is_read: bool, bytes: u64) -> bool {
        let inline = !is_read && bytes <= u64::from(self.max_inline);
        (!is_read || request.sge_count <= self.max_read_sge) && (!request.inline || inline)
    }

    /// Why there is none.
    #[cold]
    fn refusal(&self, place: &Place, request: &WorkRequest, sges: &[Sge]) -> FabricError {
        const CALL: &str = "ibv_post_send";
        let memory = |what| place.error(CALL, FabricErrorKind::Memory(what));
        let (first, count) = (request.first_sge as usize, request.sge_count as usize);
        let Some(gather) = sges.get(first..first + count) else {
            return memory(format!(
                "gather elements {first}..+{count} of {}",
                sges.len()
            ));
        };
        let is_read = request.opcode == Opcode::Read;
        if request.inline && is_read {
            return memory("a read cannot be inline".to_owned());
        }
        let elements = match is_read {
            true => ("number of scatter elements of a read", self.max_read_sge),
            false => ("number of gather elements", self.max_sge),
        };
        let bytes: u64 = gather.iter().map(|sge| u64::from(sge.length)).sum();
        let within = place
            .limit(CALL, elements.0, count as u64, elements.1.into())
            .and_then(|()| place.limit(CALL, "message length", bytes, self.max_message));
        match within {
            Err(error) => error,
            Ok(()) => {
                let kind = FabricErrorKind::Limit {
                    what: "inline payload",
                    value: bytes,
                    limit: self.max_inline.into(),
                };
                place.error(CALL, kind)
            }
        }
    }
}

#[cold]
fn full(place: &Place, lane: &Lane) -> FabricError {
    let (queue, depth) = ("send queue", lane.sent.depth());
    place.error("ibv_post_send", FabricErrorKind::QueueFull { queue, depth })
}

/// Scratch memory for chains.
pub(super) struct Poster {
    sends: Box<[sys::ibv_send_wr]>,
    receives: Box<[sys::ibv_recv_wr]>,
    limits: Limits,
}

// SAFETY: the pointers in the scratch memory are only read by the device's functions during a call made by the owner.
unsafe impl Send for Poster {}

impl Poster {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            sends: vec![sys::ibv_send_wr::zeroed(); CHAIN].into(),
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
                // requests into a chain that ends in null and whose gather lists lie in `sges`, which are only read.
                // What those name is for the caller to answer for: the driver copies inline elements by address, the
                // device checks the keys of all others.
                let result = unsafe { sys::ibv_post_send(lane.qp, self.sends.as_mut_ptr()) };
                let accepted = match &result {
                    Ok(()) => filled,
                    Err(error) => accepted(self.sends.as_ptr(), error.bad, filled),
                };
                lane.sent.advance(accepted as u32);
                posted += accepted;
                if let Err(error) = result {
                    let source = match error.errno.code() {
                        libc::ENOMEM => full(place, lane),
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

    /// Links as many of `requests` as fit into one chain, and notes their ids; the error, if any, is why the next one
    /// must not be posted.
    fn fill(
        &mut self,
        place: &Place,
        lane: &mut Lane,
        requests: &[WorkRequest],
        sges: &[Sge],
    ) -> (usize, Option<FabricError>) {
        let room = lane.sent.room() as usize;
        let first = WrId::first_send(lane.id);
        let limits = self.limits.of(&lane.config);
        let base = self.sends.as_mut_ptr();
        let mut filled = 0;
        let mut refused = None;
        for (request, send) in requests.iter().zip(&mut self.sends) {
            if filled == room {
                // Only the reason for this request; those before it are posted.
                refused = Some(full(place, lane));
                break;
            }
            let Some(gather) = limits.gather(request, sges) else {
                refused = Some(limits.refusal(place, request, sges));
                break;
            };
            let ahead = filled as u32;
            send.wr_id = first | u64::from(lane.sent.sequence(ahead));
            filled += 1;
            send.next = base.wrapping_add(filled);
            // An empty list is not looked at.
            send.sg_list = gather.as_ptr().cast_mut().cast();
            send.num_sge = gather.len() as i32;
            send.send_flags = (u32::from(request.signaled) * sys::IBV_SEND_SIGNALED)
                | (u32::from(request.inline) * sys::IBV_SEND_INLINE);
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
            lane.sent.note(ahead, request.id);
        }
        if let Some(last) = filled.checked_sub(1)
            && let Some(last) = self.sends.get_mut(last)
        {
            last.next = std::ptr::null_mut();
        }
        (filled, refused)
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
