//! Queue pairs and shared receive queues. Errors and threads: see [`super`].

use std::ffi::c_int;

use super::super::inline::check;
use super::super::*;
use super::pointer;

impl Verbs {
    /// Creates a queue pair; `attr.cap` is updated to what was granted.
    ///
    /// # Errors
    ///
    /// The library's errno; `EINVAL` or `ENOMEM` for a size beyond the device's.
    ///
    /// # Safety
    ///
    /// `pd` and the queues in `attr` are live and outlive the queue pair.
    pub unsafe fn create_qp(
        &self,
        pd: *mut ibv_pd,
        attr: &mut ibv_qp_init_attr,
    ) -> Result<*mut ibv_qp, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_create_qp)(pd, attr) })
    }

    /// Changes attributes of a queue pair, those named by `mask` (`IBV_QP_*`).
    ///
    /// # Errors
    ///
    /// The library's errno; `EINVAL` for a transition that is not allowed.
    ///
    /// # Safety
    ///
    /// `qp` is live.
    pub unsafe fn modify_qp(
        &self,
        qp: *mut ibv_qp,
        attr: &mut ibv_qp_attr,
        mask: c_int,
    ) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_modify_qp)(qp, attr, mask) })
    }

    /// Attributes of a queue pair; fields not named by `mask` may or may not be filled in.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `qp` is live.
    pub unsafe fn query_qp(
        &self,
        qp: *mut ibv_qp,
        mask: c_int,
    ) -> Result<(ibv_qp_attr, ibv_qp_init_attr), Errno> {
        let mut attr = ibv_qp_attr::zeroed();
        let mut init = ibv_qp_init_attr::zeroed();
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_query_qp)(qp, &raw mut attr, mask, &raw mut init) })?;
        Ok((attr, init))
    }

    /// Whether data of operation `op` arrives in memory in order, as far as library and provider tell.
    ///
    /// # Safety
    ///
    /// `qp` is live.
    pub unsafe fn query_qp_data_in_order(&self, qp: *mut ibv_qp, op: ibv_wr_opcode) -> bool {
        // SAFETY: the caller's guarantee.
        self.ibv_query_qp_data_in_order
            .is_some_and(|query| unsafe { query(qp, op, 0) } == 1)
    }

    /// Destroys a queue pair; blocks until its asynchronous events are acknowledged.
    ///
    /// # Errors
    ///
    /// The library's errno; the queue pair is then still there.
    ///
    /// # Safety
    ///
    /// `qp` is live and not used again after success.
    pub unsafe fn destroy_qp(&self, qp: *mut ibv_qp) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_destroy_qp)(qp) })
    }

    /// Creates a shared receive queue; `attr.attr` is updated to what was granted.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` or `ENOSYS` where the provider has none, else its errno.
    ///
    /// # Safety
    ///
    /// `pd` is live and outlives the queue.
    pub unsafe fn create_srq(
        &self,
        pd: *mut ibv_pd,
        attr: &mut ibv_srq_init_attr,
    ) -> Result<*mut ibv_srq, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_create_srq)(pd, attr) })
    }

    /// Changes a shared receive queue's size or limit, as named by `mask` (`IBV_SRQ_*`).
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `srq` is live.
    pub unsafe fn modify_srq(
        &self,
        srq: *mut ibv_srq,
        attr: &mut ibv_srq_attr,
        mask: c_int,
    ) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_modify_srq)(srq, attr, mask) })
    }

    /// Attributes of a shared receive queue.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `srq` is live.
    pub unsafe fn query_srq(&self, srq: *mut ibv_srq) -> Result<ibv_srq_attr, Errno> {
        let mut attr = ibv_srq_attr::zeroed();
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_query_srq)(srq, &raw mut attr) })?;
        Ok(attr)
    }

    /// Destroys a shared receive queue.
    ///
    /// # Errors
    ///
    /// `EBUSY` while a queue pair uses it; it is then still there.
    ///
    /// # Safety
    ///
    /// `srq` is live and not used again after success.
    pub unsafe fn destroy_srq(&self, srq: *mut ibv_srq) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_destroy_srq)(srq) })
    }
}
