//! Completion queues and channels.

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    mem::zeroed,
    ptr::null_mut,
    sync::{
        Arc, Mutex,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
};

use crate::{control, eventfd, fail, lock, sys::*};

/// A channel, which one queue may use.
#[repr(C)]
struct Channel {
    ibv: ibv_comp_channel,
    cq: AtomicPtr<ibv_cq>,
}

/// A completion, and what polling it retires: the queue pair's count of retired requests and its new value.
pub(crate) struct Entry {
    pub(crate) wc: ibv_wc,
    pub(crate) retires: Option<(Arc<AtomicU64>, u64)>,
}

#[derive(Default)]
struct Ring {
    entries: VecDeque<Entry>,
    is_armed: bool,
    is_broken: bool,
}

/// A queue.
#[repr(C)]
pub(crate) struct Cq {
    ibv: ibv_cq,
    /// What `ring` holds, so that an empty queue is polled without a lock.
    length: AtomicUsize,
    ring: Mutex<Ring>,
}

impl Cq {
    /// Adds a completion, and wakes whoever has armed the queue.
    pub(crate) fn push(&self, entry: Entry) {
        control::completed();
        let mut ring = lock(&self.ring);
        if ring.entries.len() >= self.ibv.cqe as usize {
            ring.is_broken = true;
        } else {
            ring.entries.push_back(entry);
        }
        // A broken queue must be polled to be found out.
        self.length
            .store(ring.entries.len().max(1), Ordering::Release);
        if std::mem::take(&mut ring.is_armed) && !self.ibv.channel.is_null() {
            let one = 1u64;
            // SAFETY: the channel outlives its queue; eight bytes are written from a value of eight bytes.
            unsafe { libc::write((*self.ibv.channel).fd, (&raw const one).cast(), 8) };
        }
    }
}

/// `poll_cq` of the context.
pub(crate) unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, room: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: every queue of the double is a `Cq`, and this one is live.
    let cq = unsafe { &*cq.cast::<Cq>() };
    if cq.length.load(Ordering::Acquire) == 0 {
        return 0;
    }
    let mut ring = lock(&cq.ring);
    if ring.is_broken {
        return -1;
    }
    let count = ring.entries.len().min(room.max(0) as usize);
    for (index, entry) in ring.entries.drain(..count).enumerate() {
        // SAFETY: the caller has room for that many.
        unsafe { wc.add(index).write(entry.wc) };
        if let Some((retired, count)) = entry.retires {
            retired.store(count, Ordering::Release);
        }
    }
    cq.length.store(ring.entries.len(), Ordering::Release);
    count as c_int
}

/// `req_notify_cq` of the context.
pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, _solicited_only: c_int) -> c_int {
    // SAFETY: as above.
    let cq = unsafe { &*cq.cast::<Cq>() };
    lock(&cq.ring).is_armed = true;
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    _comp_vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: made of integers, raw pointers and pthread objects, which may be zero.
    let mut ibv: ibv_cq = unsafe { zeroed() };
    ibv.context = context;
    ibv.channel = channel;
    ibv.cq_context = cq_context;
    ibv.cqe = cqe;
    let ring = Ring {
        entries: VecDeque::with_capacity((cqe as usize).min(4096)),
        ..Ring::default()
    };
    let cq: *mut ibv_cq = Box::into_raw(Box::new(Cq {
        ibv,
        length: AtomicUsize::new(0),
        ring: Mutex::new(ring),
    }))
    .cast();
    if !channel.is_null() {
        // SAFETY: every channel of the double is a `Channel`, and this one is live.
        unsafe { &*channel.cast::<Channel>() }
            .cq
            .store(cq, Ordering::Release);
    }
    cq
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: made by `ibv_create_cq`; the caller does not use it again.
    drop(unsafe { Box::from_raw(cq.cast::<Cq>()) });
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_create_comp_channel(
    context: *mut ibv_context,
) -> *mut ibv_comp_channel {
    let fd = eventfd();
    if fd < 0 {
        return null_mut();
    }
    let ibv = ibv_comp_channel {
        context,
        fd,
        refcnt: 0,
    };
    let cq = AtomicPtr::default();
    Box::into_raw(Box::new(Channel { ibv, cq })).cast()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: made by `ibv_create_comp_channel`; the caller does not use it again.
    let channel = unsafe { Box::from_raw(channel.cast::<Channel>()) };
    // SAFETY: the descriptor is the channel's own.
    unsafe { libc::close(channel.ibv.fd) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: every channel of the double is a `Channel`, and this one is live.
    let channel = unsafe { &*channel.cast::<Channel>() };
    let mut value = 0u64;
    // SAFETY: eight bytes are read into a value of eight bytes.
    if unsafe { libc::read(channel.ibv.fd, (&raw mut value).cast(), 8) } != 8 {
        return -1; // with its errno
    }
    let found = channel.cq.load(Ordering::Acquire);
    if found.is_null() {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller has room for both; the queue that rang is live.
    unsafe {
        *cq = found;
        *cq_context = (*found).cq_context;
    }
    0
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_ack_cq_events(_cq: *mut ibv_cq, _count: c_uint) {}
