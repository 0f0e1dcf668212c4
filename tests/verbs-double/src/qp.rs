//! Queue pairs, shared receive queues, and posting to both.

use std::{
    collections::{HashMap, VecDeque},
    ffi::c_int,
    mem::zeroed,
    ptr::null_mut,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::{
    control,
    cq::{Cq, Entry},
    device::allows,
    fail, lock,
    sys::*,
};

/// Posted receives: their ids, oldest first, and how many there may be.
struct Receives {
    ids: Mutex<VecDeque<u64>>,
    depth: usize,
}

impl Receives {
    fn new(depth: u32) -> Arc<Self> {
        Arc::new(Self {
            ids: Mutex::new(VecDeque::with_capacity(depth as usize)),
            depth: depth as usize,
        })
    }

    /// Takes a chain of receives, as far as there is room.
    unsafe fn post(&self, mut wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
        let mut ids = lock(&self.ids);
        while !wr.is_null() {
            // SAFETY: a chain of valid requests; there is room for the one that is refused.
            unsafe {
                if ids.len() >= self.depth {
                    *bad = wr;
                    return libc::ENOMEM;
                }
                ids.push_back((*wr).wr_id);
                wr = (*wr).next;
            }
        }
        0
    }
}

/// What others need of a queue pair. It outlives the queue pair where somebody is connected to it.
struct Peer {
    number: u32,
    state: AtomicU32,
    receives: Arc<Receives>,
    /// The queue for its receives, as an address; none once the queue pair is gone. Held while something is delivered.
    queue: Mutex<Option<usize>>,
}

impl Peer {
    /// Takes a receive and completes it with `imm`, as it is on the wire. Returns what becomes of the request.
    fn deliver(&self, imm: u32, bytes: u32) -> ibv_wc_status {
        let queue = lock(&self.queue);
        let Some(queue) = *queue else {
            return IBV_WC_RETRY_EXC_ERR;
        };
        let Some(id) = lock(&self.receives.ids).pop_front() else {
            return IBV_WC_RNR_RETRY_EXC_ERR;
        };
        let mut wc = completion(id, IBV_WC_RECV_RDMA_WITH_IMM, self.number);
        wc.imm.imm_data = imm;
        wc.wc_flags = IBV_WC_WITH_IMM;
        wc.byte_len = bytes;
        // SAFETY: the queue lives as long as the queue pair, which cannot go while the lock is held.
        unsafe { &*(queue as *const Cq) }.push(Entry { wc, retires: None });
        IBV_WC_SUCCESS
    }

    fn answers(&self) -> bool {
        matches!(
            self.state.load(Ordering::Acquire),
            IBV_QPS_RTR | IBV_QPS_RTS
        )
    }
}

/// All queue pairs, by number.
static PEERS: OnceLock<Mutex<HashMap<u32, Arc<Peer>>>> = OnceLock::new();

fn peers() -> &'static Mutex<HashMap<u32, Arc<Peer>>> {
    PEERS.get_or_init(Mutex::default)
}

/// A queue pair. One thread posts and changes it.
#[repr(C)]
struct Qp {
    ibv: ibv_qp,
    this: Arc<Peer>,
    peer: Option<Arc<Peer>>,
    depth: u64,
    most_elements: c_int,
    posted: u64,
    /// Requests whose completions, or those of later ones, have been polled.
    retired: Arc<AtomicU64>,
}

#[repr(C)]
struct Srq {
    ibv: ibv_srq,
    receives: Arc<Receives>,
}

fn completion(id: u64, opcode: ibv_wc_opcode, number: u32) -> ibv_wc {
    // SAFETY: made of integers, which may be zero.
    let mut wc: ibv_wc = unsafe { zeroed() };
    wc.wr_id = id;
    wc.opcode = opcode;
    wc.qp_num = number;
    wc
}

/// `post_send` of the context.
pub(crate) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: every queue pair of the double is a `Qp`, and this one is live and used by this thread.
    let qp = unsafe { &mut *qp.cast::<Qp>() };
    let first = qp.posted;
    let mut result = 0;
    while !wr.is_null() {
        // SAFETY: a chain of valid requests.
        let request = unsafe { &*wr };
        result = qp.post(request);
        if result != 0 {
            // SAFETY: the caller has room for one.
            unsafe { *bad = wr };
            break;
        }
        wr = request.next;
    }
    control::posted(qp.posted - first);
    result
}

impl Qp {
    /// Does one request; returns an errno.
    #[inline]
    fn post(&mut self, request: &ibv_send_wr) -> c_int {
        let state = self.this.state.load(Ordering::Relaxed);
        if !matches!(state, IBV_QPS_RTS | IBV_QPS_ERR) || request.num_sge > self.most_elements {
            return libc::EINVAL;
        }
        let opcode = match request.opcode {
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => IBV_WC_RDMA_WRITE,
            IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
            _ => return libc::EINVAL,
        };
        if self.posted - self.retired.load(Ordering::Relaxed) >= self.depth {
            return libc::ENOMEM;
        }
        self.posted += 1;
        let status = match &self.peer {
            _ if state == IBV_QPS_ERR => IBV_WC_WR_FLUSH_ERR,
            Some(peer) if peer.answers() => execute(peer, request),
            _ => IBV_WC_RETRY_EXC_ERR,
        };
        if status != IBV_WC_SUCCESS || request.send_flags & IBV_SEND_SIGNALED != 0 {
            let mut wc = completion(request.wr_id, opcode, self.ibv.qp_num);
            wc.status = status;
            let retires = Some((Arc::clone(&self.retired), self.posted));
            // SAFETY: the queue outlives the queue pair.
            unsafe { &*self.ibv.send_cq.cast::<Cq>() }.push(Entry { wc, retires });
        }
        if status != IBV_WC_SUCCESS {
            self.this.state.store(IBV_QPS_ERR, Ordering::Release);
        }
        0
    }
}

#[inline]
fn execute(peer: &Peer, request: &ibv_send_wr) -> ibv_wc_status {
    let mut bytes = 0;
    // Drivers copy inline payload when it is posted, and the library's tails are inline.
    if control::moves() || request.send_flags & IBV_SEND_INLINE != 0 {
        // SAFETY: the request is one-sided, and its elements are as `ibv_post_send` asks.
        match unsafe { transfer(request) } {
            Ok(moved) => bytes = moved,
            Err(status) => return status,
        }
    }
    if request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM {
        // SAFETY: the opcode says that the field is an immediate.
        return peer.deliver(unsafe { request.imm.imm_data }, bytes as u32);
    }
    IBV_WC_SUCCESS
}

/// Moves the payload of a one-sided request, if the keys allow it; returns how much that was.
unsafe fn transfer(request: &ibv_send_wr) -> Result<u64, ibv_wc_status> {
    let is_read = request.opcode == IBV_WR_RDMA_READ;
    // SAFETY: as the caller promises.
    let (elements, rdma) = unsafe {
        let elements = match request.num_sge {
            0 => &[],
            count => std::slice::from_raw_parts(request.sg_list, count as usize),
        };
        (elements, request.wr.rdma)
    };
    let total: u64 = elements.iter().map(|sge| u64::from(sge.length)).sum();
    let wanted = if is_read {
        IBV_ACCESS_REMOTE_READ
    } else {
        IBV_ACCESS_REMOTE_WRITE
    };
    if total > 0 && !allows(rdma.rkey, rdma.remote_addr, total, wanted as c_int) {
        return Err(IBV_WC_REM_ACCESS_ERR);
    }
    let mut remote = rdma.remote_addr;
    for sge in elements {
        let local = if is_read {
            IBV_ACCESS_LOCAL_WRITE as c_int
        } else {
            0
        };
        let is_inline = request.send_flags & IBV_SEND_INLINE != 0;
        if !is_inline && !allows(sge.lkey, sge.addr, sge.length.into(), local) {
            return Err(IBV_WC_LOC_PROT_ERR);
        }
        let (theirs, ours) = (remote as *mut u8, sge.addr as *mut u8);
        let (to, from) = if is_read {
            (ours, theirs)
        } else {
            (theirs, ours)
        };
        // SAFETY: both ranges are registered, hence mapped; the inline one is the caller's promise.
        unsafe { std::ptr::copy(from, to, sge.length as usize) };
        remote += u64::from(sge.length);
    }
    Ok(total)
}

/// `post_recv` of the context.
pub(crate) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as for `post_send`.
    unsafe {
        let qp = &*qp.cast::<Qp>();
        qp.this.receives.post(wr, bad)
    }
}

/// `post_srq_recv` of the context.
pub(crate) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: every shared queue of the double is an `Srq`, and this one is live.
    unsafe {
        let srq = &*srq.cast::<Srq>();
        srq.receives.post(wr, bad)
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_create_qp(
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> *mut ibv_qp {
    static NEXT: AtomicU32 = AtomicU32::new(0x11);
    // SAFETY: the caller's attributes, whose objects are live.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let refused = init.qp_type != IBV_QPT_RC
        || init.send_cq.is_null()
        || init.recv_cq.is_null()
        || init.cap.max_send_wr > 1 << 15
        || init.cap.max_send_sge > 30
        || init.cap.max_inline_data > 256;
    if refused {
        fail(libc::EINVAL);
        return null_mut();
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let receives = if init.srq.is_null() {
        Receives::new(init.cap.max_recv_wr)
    } else {
        // SAFETY: every shared queue of the double is an `Srq`, and this one is live.
        Arc::clone(unsafe { &(*init.srq.cast::<Srq>()).receives })
    };
    let this = Arc::new(Peer {
        number,
        state: AtomicU32::new(IBV_QPS_RESET),
        receives,
        queue: Mutex::new(Some(init.recv_cq as usize)),
    });
    lock(peers()).insert(number, Arc::clone(&this));
    // SAFETY: made of integers, raw pointers and pthread objects, which may be zero.
    let mut ibv: ibv_qp = unsafe { zeroed() };
    ibv.context = context;
    ibv.qp_context = init.qp_context;
    ibv.pd = pd;
    ibv.send_cq = init.send_cq;
    ibv.recv_cq = init.recv_cq;
    ibv.srq = init.srq;
    ibv.qp_num = number;
    ibv.qp_type = init.qp_type;
    let qp = Qp {
        ibv,
        this,
        peer: None,
        depth: init.cap.max_send_wr.into(),
        most_elements: init.cap.max_send_sge as c_int,
        posted: 0,
        retired: Arc::default(),
    };
    Box::into_raw(Box::new(qp)).cast()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_modify_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: c_int,
) -> c_int {
    // SAFETY: as for `post_send`; the caller's attributes.
    let (qp, attr) = unsafe { (&mut *qp.cast::<Qp>(), &*attr) };
    if mask & IBV_QP_DEST_QPN != 0 {
        qp.peer = lock(peers()).get(&attr.dest_qp_num).cloned();
    }
    if mask & IBV_QP_STATE != 0 {
        let from = qp.this.state.load(Ordering::Acquire);
        let allowed = match attr.qp_state {
            IBV_QPS_INIT => from == IBV_QPS_RESET,
            IBV_QPS_RTR => from == IBV_QPS_INIT,
            IBV_QPS_RTS => from == IBV_QPS_RTR,
            IBV_QPS_ERR => true,
            _ => false,
        };
        if !allowed {
            return libc::EINVAL;
        }
        qp.ibv.state = attr.qp_state;
        qp.this.state.store(attr.qp_state, Ordering::Release);
    }
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    _init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: as for `post_send`; the caller has room for the attributes.
    unsafe {
        let qp = &*qp.cast::<Qp>();
        (*attr).qp_state = qp.this.state.load(Ordering::Acquire);
    }
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: made by `ibv_create_qp`; the caller does not use it again.
    let qp = unsafe { Box::from_raw(qp.cast::<Qp>()) };
    qp.this.state.store(IBV_QPS_ERR, Ordering::Release);
    *lock(&qp.this.queue) = None;
    lock(peers()).remove(&qp.this.number);
    0
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_create_srq(
    pd: *mut ibv_pd,
    init: *mut ibv_srq_init_attr,
) -> *mut ibv_srq {
    // SAFETY: made of integers, raw pointers and pthread objects, which may be zero.
    let mut ibv: ibv_srq = unsafe { zeroed() };
    // SAFETY: the domain is live; the caller's attributes.
    let depth = unsafe {
        ibv.context = (*pd).context;
        (*init).attr.max_wr
    };
    ibv.pd = pd;
    let receives = Receives::new(depth);
    Box::into_raw(Box::new(Srq { ibv, receives })).cast()
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_modify_srq(
    _srq: *mut ibv_srq,
    _attr: *mut ibv_srq_attr,
    _mask: c_int,
) -> c_int {
    libc::EOPNOTSUPP
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ibv_query_srq(_srq: *mut ibv_srq, _attr: *mut ibv_srq_attr) -> c_int {
    libc::EOPNOTSUPP
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: made by `ibv_create_srq`; the caller does not use it again.
    drop(unsafe { Box::from_raw(srq.cast::<Srq>()) });
    0
}
