//! Memory windows of type 2: bound and taken back by requests on the queue pair of the lane they are for.
//!
//! Owned by the thread of its context. Binding and invalidating are posts (`IBV_WR_BIND_MW`, `IBV_WR_LOCAL_INV`;
//! `ibv_post_send(3)`) and wait for nothing. Windows that were taken back are kept and bound again under the next key
//! (`ibv_inc_rkey(3)`), so that only the first uses cost a system call each.
//!
//! # Lifetimes
//!
//! A window that is bound holds its memory region and its queue pair: deregistration is refused meanwhile, and a queue
//! pair must not be destroyed before the windows bound to it are gone. (Soft-RoCE would wait in vain for them to let
//! go of it and then free it under them.) So a lane's windows are freed after its queue pair has gone to the error
//! state and before that is destroyed.
//!
//! A window is invalidated at most once for each time it is bound: soft-RoCE follows a null pointer on the second
//! (`rxe_do_invalidate_mw`).

use std::collections::{BTreeMap, VecDeque};

use crate::fabric::{
    Access, FabricError, FabricErrorKind, LaneId, MrId, RemoteKey, Window, WindowBind, WindowCaps,
    WindowId,
};

use super::{
    error::Place,
    facts::DeviceCaps,
    lane::{Lane, LaneState},
    objects::ProtectionDomain,
    post::Poster,
    sys,
};

/// How often one window is bound before another takes its place: its key has only 8 bits that count.
const MOST_BINDS: u16 = 250;

/// Windows kept for later. Beyond that they are freed.
const MOST_IDLE: usize = 1024;

/// An allocated window (`ibv_alloc_mw(3)`) and how often it was bound.
struct Allocated {
    mw: *mut sys::ibv_mw,
    binds: u16,
}

/// A window with an identifier.
struct Bound {
    allocated: Allocated,
    lane: LaneId,
    mr: MrId,
    /// Its invalidation has been posted.
    ending: bool,
}

/// The windows of a context.
pub(super) struct Windows {
    max: u32,
    next: u64,
    live: BTreeMap<WindowId, Bound>,
    idle: Vec<Allocated>,
    /// Invalidations on send queues, by lane and sequence number.
    ending: VecDeque<(LaneId, u32, WindowId)>,
}

impl Windows {
    pub(super) fn new(caps: Option<WindowCaps>) -> Self {
        Self {
            max: caps.map_or(0, |caps| caps.max),
            next: 1,
            live: BTreeMap::new(),
            idle: Vec::new(),
            ending: VecDeque::new(),
        }
    }

    /// Whether there are windows into a registration.
    pub(super) fn are_into(&self, mr: MrId) -> bool {
        self.live.values().any(|window| window.mr == mr)
    }

    /// Posts the binding of a window to `lane`. `region` is the registration, live during the call.
    pub(super) fn bind(
        &mut self,
        place: &Place,
        domain: &ProtectionDomain,
        poster: &mut Poster,
        lane: &mut Lane,
        region: *mut sys::ibv_mr,
        bind: &WindowBind,
    ) -> Result<Window, FabricError> {
        const CALL: &str = "ibv_post_send(BIND_MW)";
        check(place, CALL, lane)?;
        place.limit(
            "ibv_alloc_mw",
            "number of windows",
            self.live.len() as u64 + 1,
            self.max.into(),
        )?;
        let mut allocated = match self.idle.pop() {
            Some(allocated) => allocated,
            // SAFETY: the domain is live, and the context, which holds it, frees all windows before it goes.
            None => match unsafe { sys::ibv_alloc_mw(domain.raw(), sys::IBV_MW_TYPE_2) } {
                Ok(mw) => Allocated { mw, binds: 0 },
                Err(errno) => return Err(place.os("ibv_alloc_mw", errno.code())),
            },
        };
        let mw = allocated.mw;
        // SAFETY: allocated windows are live.
        let key = sys::ibv_inc_rkey(unsafe { (*mw).rkey });
        let info = sys::ibv_mw_bind_info {
            mr: region,
            addr: bind.address,
            length: bind.length,
            mw_access_flags: access_flags(bind.access),
        };
        // SAFETY: window and region are live during the call; a request without gather list names no memory.
        let posted = unsafe {
            poster.post_local(place, CALL, lane, bind.id, |send| {
                send.opcode = sys::IBV_WR_BIND_MW;
                send.tail.bind_mw = sys::ibv_wr_bind_mw {
                    mw,
                    rkey: key,
                    bind_info: info,
                };
            })
        };
        if let Err(error) = posted {
            self.idle.push(allocated);
            return Err(error);
        }
        // Drivers read the present key from here and do not know when a posted binding has taken effect.
        // SAFETY: allocated windows are live, and only this thread uses them.
        unsafe { (*mw).rkey = key };
        allocated.binds += 1;
        let id = WindowId(self.next);
        self.next += 1;
        let window = Bound {
            allocated,
            lane: lane.id,
            mr: bind.mr,
            ending: false,
        };
        self.live.insert(id, window);
        Ok(Window {
            id,
            remote: RemoteKey(key),
        })
    }

    /// Posts the invalidation of a window to its lane.
    pub(super) fn invalidate(
        &mut self,
        place: &Place,
        poster: &mut Poster,
        lane: &mut Lane,
        id: u64,
        window: WindowId,
    ) -> Result<(), FabricError> {
        const CALL: &str = "ibv_post_send(LOCAL_INV)";
        check(place, CALL, lane)?;
        let found = self.live.get_mut(&window);
        let Some(bound) = found.filter(|bound| bound.lane == lane.id && !bound.ending) else {
            let kind = FabricErrorKind::Memory(format!("no window {}", window.0));
            return Err(place.error(CALL, kind));
        };
        // SAFETY: allocated windows are live.
        let key = unsafe { (*bound.allocated.mw).rkey };
        let sequence = lane.sent.sequence(0);
        // SAFETY: an invalidation names a key and no memory.
        unsafe {
            poster.post_local(place, CALL, lane, id, |send| {
                send.opcode = sys::IBV_WR_LOCAL_INV;
                send.imm.invalidate_rkey = key;
            })
        }?;
        bound.ending = true;
        self.ending.push_back((lane.id, sequence, window));
        Ok(())
    }

    /// A request of a send queue has completed.
    #[inline]
    pub(super) fn completed(&mut self, lane: LaneId, sequence: u32, success: bool) {
        if !self.ending.is_empty() {
            self.ended(lane, sequence, success);
        }
    }

    fn ended(&mut self, lane: LaneId, sequence: u32, success: bool) {
        let mut ending = self.ending.iter();
        let found = ending.position(|&(of, number, _)| of == lane && number == sequence);
        let Some((.., window)) = found.and_then(|at| self.ending.remove(at)) else {
            return;
        };
        if !success {
            // Its lane has failed; it is freed with that.
            return;
        }
        let Some(Bound { allocated, .. }) = self.live.remove(&window) else {
            return;
        };
        if allocated.binds < MOST_BINDS && self.idle.len() < MOST_IDLE {
            self.idle.push(allocated);
        } else if let Err(errno) = free(&allocated) {
            tracing::warn!(%errno, "ibv_dealloc_mw");
        }
    }

    /// Frees the windows of a lane whose queue pair is in the error state.
    pub(super) fn free_of(&mut self, place: &Place, lane: LaneId) -> Result<(), FabricError> {
        self.ending.retain(|(of, ..)| *of != lane);
        let mut result = Ok(());
        self.live.retain(|_, window| {
            if window.lane != lane {
                return true;
            }
            match free(&window.allocated) {
                Ok(()) => false,
                Err(errno) => {
                    result = Err(place.os("ibv_dealloc_mw", errno.code()));
                    true
                }
            }
        });
        result
    }

    /// Frees everything; the context goes.
    pub(super) fn free_all(&mut self) {
        let live = std::mem::take(&mut self.live);
        let live = live.into_values().map(|window| window.allocated);
        for allocated in live.chain(self.idle.drain(..)) {
            if let Err(errno) = free(&allocated) {
                tracing::warn!(%errno, "ibv_dealloc_mw");
            }
        }
    }
}

fn free(allocated: &Allocated) -> Result<(), sys::Errno> {
    // SAFETY: allocated windows are live; the callers forget one that was freed.
    unsafe { sys::ibv_dealloc_mw(allocated.mw) }
}

/// Posting to a failed queue pair would only flush, and leave windows whose state nobody knows.
fn check(place: &Place, operation: &'static str, lane: &Lane) -> Result<(), FabricError> {
    if lane.state == LaneState::Connected {
        return Ok(());
    }
    let kind = FabricErrorKind::LaneState {
        lane: lane.id,
        state: lane.state.word(),
    };
    Err(place.error(operation, kind))
}

fn access_flags(access: Access) -> u32 {
    let mut flags = 0;
    if access.remote_write {
        flags |= sys::IBV_ACCESS_REMOTE_WRITE;
    }
    if access.remote_read {
        flags |= sys::IBV_ACCESS_REMOTE_READ;
    }
    flags
}

/// What the windows of a device are good for. That it claims to have them is not believed: one is allocated to see.
pub(super) fn probe(domain: &ProtectionDomain, limits: &DeviceCaps) -> Option<WindowCaps> {
    if !limits.memory_window_type_2() {
        return None;
    }
    // SAFETY: the domain is live; the window is freed at once.
    let mw = unsafe { sys::ibv_alloc_mw(domain.raw(), sys::IBV_MW_TYPE_2) };
    match mw.and_then(|mw| free(&Allocated { mw, binds: 0 })) {
        Ok(()) => Some(WindowCaps {
            max: limits.max_mw,
            per_lane: limits.device_cap_flags & sys::IBV_DEVICE_MEM_WINDOW_TYPE_2B != 0,
            bounded: !limits.soft_roce(),
            final_when_done: !limits.soft_roce(),
        }),
        Err(errno) => {
            tracing::info!(%errno, "the device claims to have memory windows and gives none");
            None
        }
    }
}
