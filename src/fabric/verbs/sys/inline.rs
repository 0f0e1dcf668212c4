//! The verbs that the C header defines as `static inline`: calls through the provider's function table.
//!
//! They need no [`Verbs`](super::Verbs): the object passed in leads to its context and that to the provider. These
//! are the hot path; none allocates, locks (beyond what the provider does) or makes a system call of its own.

use std::ffi::c_int;
use std::mem::{offset_of, size_of};

use super::*;

/// Turns a provider's return code into a result: 0 is success, a positive value is an errno, -1 means that `errno`
/// has it, another negative value is a negated errno. The man pages promise the second; some providers do the others.
#[inline]
pub(super) fn check(rc: c_int) -> Result<(), Errno> {
    match rc {
        0 => Ok(()),
        -1 => Err(Errno::last()),
        rc => Err(Errno::new(rc.saturating_abs())),
    }
}

/// Posts a chain of send work requests (`ibv_post_send(3)`).
///
/// # Errors
///
/// [`PostError`] with the first request that was not posted.
///
/// # Safety
///
/// `qp` is a live queue pair. `wr` heads a chain of valid requests ended by a null `next`, each with `num_sge` valid
/// elements at `sg_list`; the chain is only read during the call. The memory named by the elements stays registered
/// under their lkeys until the request completes, or with `IBV_SEND_INLINE` is readable during the call.
#[inline]
pub unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
) -> Result<(), PostError<ibv_send_wr>> {
    let mut bad = wr;
    // SAFETY: a live queue pair points to its live context.
    let Some(post) = (unsafe { (*(*qp).context).ops.post_send }) else {
        return Err(PostError {
            errno: Errno::new(libc::EOPNOTSUPP),
            bad,
        });
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { post(qp, wr, &raw mut bad) }).map_err(|errno| PostError { errno, bad })
}

/// Posts a chain of receive work requests to a queue pair (`ibv_post_recv(3)`).
///
/// # Errors
///
/// [`PostError`] with the first request that was not posted.
///
/// # Safety
///
/// As [`ibv_post_send`]; `qp` has no shared receive queue.
#[inline]
pub unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
) -> Result<(), PostError<ibv_recv_wr>> {
    let mut bad = wr;
    // SAFETY: a live queue pair points to its live context.
    let Some(post) = (unsafe { (*(*qp).context).ops.post_recv }) else {
        return Err(PostError {
            errno: Errno::new(libc::EOPNOTSUPP),
            bad,
        });
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { post(qp, wr, &raw mut bad) }).map_err(|errno| PostError { errno, bad })
}

/// Posts a chain of receive work requests to a shared receive queue (`ibv_post_srq_recv(3)`).
///
/// # Errors
///
/// [`PostError`] with the first request that was not posted.
///
/// # Safety
///
/// As [`ibv_post_send`], with a live shared receive queue.
#[inline]
pub unsafe fn ibv_post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
) -> Result<(), PostError<ibv_recv_wr>> {
    let mut bad = wr;
    // SAFETY: a live shared receive queue points to its live context.
    let Some(post) = (unsafe { (*(*srq).context).ops.post_srq_recv }) else {
        return Err(PostError {
            errno: Errno::new(libc::EOPNOTSUPP),
            bad,
        });
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { post(srq, wr, &raw mut bad) }).map_err(|errno| PostError { errno, bad })
}

/// Takes completions off a queue and returns how many of `wc`'s entries were filled (`ibv_poll_cq(3)`).
///
/// # Errors
///
/// The errno, or `EIO` where the provider gives none: the queue is broken (an overrun, for example).
///
/// # Safety
///
/// `cq` is a live completion queue.
#[inline]
pub unsafe fn ibv_poll_cq(cq: *mut ibv_cq, wc: &mut [ibv_wc]) -> Result<usize, Errno> {
    let room = c_int::try_from(wc.len()).unwrap_or(c_int::MAX);
    // SAFETY: a live completion queue points to its live context.
    let Some(poll) = (unsafe { (*(*cq).context).ops.poll_cq }) else {
        return Err(Errno::new(libc::EOPNOTSUPP));
    };
    // SAFETY: the provider's own function; it fills at most `room` entries, which `wc` has.
    let count = unsafe { poll(cq, room, wc.as_mut_ptr()) };
    // Providers return small private negatives here, not errnos, so the value says nothing more.
    usize::try_from(count)
        .map_err(|_| Errno::new(libc::EIO))
        .map(|count| count.min(wc.len()))
}

/// Asks for one event on the completion channel at the next completion, or at the next solicited or failed one
/// (`ibv_req_notify_cq(3)`). Completions already queued raise none: poll once more after this.
///
/// # Errors
///
/// The provider's errno.
///
/// # Safety
///
/// `cq` is a live completion queue.
#[inline]
pub unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: bool) -> Result<(), Errno> {
    // SAFETY: a live completion queue points to its live context.
    let Some(arm) = (unsafe { (*(*cq).context).ops.req_notify_cq }) else {
        return Err(Errno::new(libc::EOPNOTSUPP));
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { arm(cq, c_int::from(solicited_only)) })
}

/// Allocates a memory window (`ibv_alloc_mw(3)`).
///
/// # Errors
///
/// `EOPNOTSUPP` where the provider has none, else its errno.
///
/// # Safety
///
/// `pd` is a live protection domain; it outlives the window.
pub unsafe fn ibv_alloc_mw(pd: *mut ibv_pd, kind: ibv_mw_type) -> Result<*mut ibv_mw, Errno> {
    // SAFETY: a live protection domain points to its live context.
    let Some(alloc) = (unsafe { (*(*pd).context).ops.alloc_mw }) else {
        return Err(Errno::new(libc::EOPNOTSUPP));
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    let mw = unsafe { alloc(pd, kind) };
    if mw.is_null() {
        Err(Errno::last())
    } else {
        Ok(mw)
    }
}

/// Binds a type 1 memory window (`ibv_bind_mw(3)`). Type 2 windows are bound by a posted `IBV_WR_BIND_MW`.
///
/// # Errors
///
/// `EINVAL` for a window of type 2 or a length without region, `EPERM` for a region of another protection domain,
/// else the provider's errno.
///
/// # Safety
///
/// `qp` and `mw` are live, `bind.bind_info.mr` is null or live and covers the range bound.
pub unsafe fn ibv_bind_mw(
    qp: *mut ibv_qp,
    mw: *mut ibv_mw,
    bind: &mut ibv_mw_bind,
) -> Result<(), Errno> {
    let info = bind.bind_info;
    // SAFETY: the caller vouches for `mw` and, when not null, `mr`; a live window points to its live context.
    let (kind, other_pd, op) = unsafe {
        let other_pd = !info.mr.is_null() && (*mw).pd != (*info.mr).pd;
        ((*mw).r#type, other_pd, (*(*mw).context).ops.bind_mw)
    };
    if kind != IBV_MW_TYPE_1 || (info.mr.is_null() && (info.addr != 0 || info.length != 0)) {
        return Err(Errno::new(libc::EINVAL));
    }
    if other_pd {
        return Err(Errno::new(libc::EPERM));
    }
    let Some(op) = op else {
        return Err(Errno::new(libc::EOPNOTSUPP));
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { op(qp, mw, bind) })
}

/// Frees a memory window (`ibv_dealloc_mw(3)`).
///
/// # Errors
///
/// The provider's errno; the window is then still allocated.
///
/// # Safety
///
/// `mw` is live and not used again after success.
pub unsafe fn ibv_dealloc_mw(mw: *mut ibv_mw) -> Result<(), Errno> {
    // SAFETY: a live window points to its live context.
    let Some(dealloc) = (unsafe { (*(*mw).context).ops.dealloc_mw }) else {
        return Err(Errno::new(libc::EOPNOTSUPP));
    };
    // SAFETY: the provider's own function, with the caller's guarantees.
    check(unsafe { dealloc(mw) })
}

/// The key of a type 2 window after its next bind: the low byte counts, the rest stays (`ibv_inc_rkey(3)`).
#[must_use]
pub fn ibv_inc_rkey(rkey: u32) -> u32 {
    (rkey & !0xff) | (rkey.wrapping_add(1) & 0xff)
}

/// The extended context around `context` when it is large enough to hold the field at `offset` of [`verbs_context`].
///
/// # Safety
///
/// `context` is a live context of the library.
unsafe fn extended(context: *mut ibv_context, offset: usize) -> Option<*mut verbs_context> {
    // SAFETY: the context is live.
    let marker = unsafe { (*context).abi_compat };
    if marker.addr() != usize::MAX {
        return None;
    }
    let whole = context
        .wrapping_byte_sub(offset_of!(verbs_context, context))
        .cast::<verbs_context>();
    // SAFETY: the marker says that the library allocated this context inside a `verbs_context`; `sz` lies right
    // before the context in every release.
    let size = unsafe { (&raw const (*whole).sz).read() };
    // Fields are counted from the end: the library's struct must reach back at least to ours.
    (size >= size_of::<verbs_context>() - offset).then_some(whole)
}

/// The provider's `query_port`, when the library is new enough (rdma-core 17) to have one.
///
/// # Safety
///
/// `context` is a live context of the library.
pub(super) unsafe fn query_port_op(
    context: *mut ibv_context,
) -> Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int> {
    // SAFETY: the caller's guarantee; `extended` has checked that the field exists.
    unsafe {
        extended(context, offset_of!(verbs_context, query_port))
            .and_then(|whole| (*whole).query_port)
    }
}

/// The provider's `query_device_ex`, when it has one.
///
/// # Safety
///
/// `context` is a live context of the library.
#[allow(clippy::type_complexity, reason = "the C signature")]
pub(super) unsafe fn query_device_ex_op(
    context: *mut ibv_context,
) -> Option<
    unsafe extern "C" fn(
        *mut ibv_context,
        *const ibv_query_device_ex_input,
        *mut ibv_device_attr_ex,
        usize,
    ) -> c_int,
> {
    // SAFETY: as in `query_port_op`.
    unsafe {
        extended(context, offset_of!(verbs_context, query_device_ex))
            .and_then(|whole| (*whole).query_device_ex)
    }
}
