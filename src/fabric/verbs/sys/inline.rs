//! The verbs that the C header defines as `static inline`: calls through the provider's function table.
//!
//! They need no [`Verbs`]: the object passed in leads to its context and that to the provider. These
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
    // Fields are counted from the end: the library's struct must reach back at least to this one.
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

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    /// A context whose provider is the functions below. `sz` and `abi_compat` decide what is visible of it.
    fn provider() -> Box<verbs_context> {
        // SAFETY: made of integers, raw pointers, `Option`s of functions and a pthread mutex, all valid when zero.
        let mut whole: Box<verbs_context> = unsafe { Box::new(std::mem::zeroed()) };
        whole.sz = size_of::<verbs_context>();
        whole.query_port = Some(query_port);
        whole.context.abi_compat = ptr::without_provenance_mut(usize::MAX);
        whole.context.ops.post_send = Some(post_send);
        whole.context.ops.poll_cq = Some(poll_cq);
        whole
    }

    fn context(whole: &mut Box<verbs_context>) -> *mut ibv_context {
        let whole: *mut verbs_context = &raw mut **whole;
        // SAFETY: in bounds; derived from the whole, as the library's own pointer is.
        unsafe { &raw mut (*whole).context }
    }

    unsafe extern "C" fn query_port(
        _: *mut ibv_context,
        port: u8,
        attr: *mut ibv_port_attr,
        len: usize,
    ) -> c_int {
        assert_eq!(len, size_of::<ibv_port_attr>());
        // SAFETY: the caller passes a whole struct.
        unsafe { (*attr).lid = u16::from(port) };
        0
    }

    /// Refuses the second request of a chain.
    unsafe extern "C" fn post_send(
        _: *mut ibv_qp,
        wr: *mut ibv_send_wr,
        bad: *mut *mut ibv_send_wr,
    ) -> c_int {
        // SAFETY: the test passes a chain.
        unsafe {
            if (*wr).next.is_null() {
                return 0;
            }
            *bad = (*wr).next;
        }
        libc::ENOMEM
    }

    /// Fills one entry, or fails with a provider's private code when there is no room.
    unsafe extern "C" fn poll_cq(_: *mut ibv_cq, room: c_int, wc: *mut ibv_wc) -> c_int {
        if room == 0 {
            return -2;
        }
        // SAFETY: there is room for one.
        unsafe { (*wc).wr_id = 7 };
        1
    }

    fn qp(context: *mut ibv_context) -> ibv_qp {
        // SAFETY: as in `provider`.
        let mut qp: ibv_qp = unsafe { std::mem::zeroed() };
        qp.context = context;
        qp
    }

    #[test]
    fn return_codes_of_all_conventions() {
        assert_eq!(check(0), Ok(()));
        assert_eq!(check(libc::ENOMEM), Err(Errno::new(libc::ENOMEM)));
        assert_eq!(check(-libc::ENOMEM), Err(Errno::new(libc::ENOMEM)));
        // SAFETY: closing a descriptor that cannot exist only sets errno.
        let rc = unsafe { libc::close(-1) };
        assert_eq!(check(rc), Err(Errno::new(libc::EBADF)));
    }

    #[test]
    fn a_refused_post_names_the_request() {
        let mut whole = provider();
        let mut qp = qp(context(&mut whole));
        let mut second = ibv_send_wr::zeroed();
        let mut first = ibv_send_wr::zeroed();
        // SAFETY: a queue pair of the provider above and a chain of one, then of two.
        let (one, two) = unsafe {
            let one = ibv_post_send(&raw mut qp, &raw mut first);
            first.next = &raw mut second;
            (one, ibv_post_send(&raw mut qp, &raw mut first))
        };
        assert!(one.is_ok());
        let error = two.expect_err("the second is refused");
        assert_eq!(
            (error.errno.code(), error.bad),
            (libc::ENOMEM, &raw mut second)
        );
    }

    #[test]
    fn a_verb_that_the_provider_lacks_is_unsupported() {
        let mut whole = provider();
        let mut qp = qp(context(&mut whole));
        let mut wr = ibv_recv_wr::zeroed();
        // SAFETY: a queue pair of the provider above and a chain of one.
        let error = unsafe { ibv_post_recv(&raw mut qp, &raw mut wr) }.expect_err("no post_recv");
        assert_eq!(
            (error.errno.code(), error.bad),
            (libc::EOPNOTSUPP, &raw mut wr)
        );
    }

    #[test]
    fn polling_counts_or_fails() {
        let mut whole = provider();
        // SAFETY: as in `provider`.
        let mut cq: ibv_cq = unsafe { std::mem::zeroed() };
        cq.context = context(&mut whole);
        let mut wc = [ibv_wc::zeroed(); 2];
        // SAFETY: a completion queue of the provider above.
        let (some, none) = unsafe {
            (
                ibv_poll_cq(&raw mut cq, &mut wc),
                ibv_poll_cq(&raw mut cq, &mut []),
            )
        };
        assert_eq!((some, wc[0].wr_id), (Ok(1), 7));
        assert_eq!(none, Err(Errno::new(libc::EIO)));
    }

    #[test]
    fn the_extended_context_is_used_only_where_it_exists() {
        let mut whole = provider();
        let ctx = context(&mut whole);
        // SAFETY: `ctx` is a context inside a `verbs_context`, as the library makes them.
        unsafe {
            let query = query_port_op(ctx).expect("present");
            let mut attr = ibv_port_attr::zeroed();
            assert_eq!(
                (
                    query(ctx, 3, &raw mut attr, size_of::<ibv_port_attr>()),
                    attr.lid
                ),
                (0, 3)
            );
            assert!(query_device_ex_op(ctx).is_none(), "null in the table");
        }

        // A library from before `query_port`: its struct begins one field later.
        whole.sz = size_of::<verbs_context>() - size_of::<UnusedOp>();
        let ctx = context(&mut whole);
        // SAFETY: as above.
        assert!(unsafe { query_port_op(ctx) }.is_none());

        // A library from before extensions has no struct around the context at all.
        whole.sz = size_of::<verbs_context>();
        whole.context.abi_compat = ptr::null_mut();
        let ctx = context(&mut whole);
        // SAFETY: as above.
        assert!(unsafe { query_port_op(ctx) }.is_none());
    }

    #[test]
    fn window_keys_count_in_their_low_byte() {
        assert_eq!(ibv_inc_rkey(0x1234_5600), 0x1234_5601);
        assert_eq!(ibv_inc_rkey(0x1234_56ff), 0x1234_5600);
    }
}
