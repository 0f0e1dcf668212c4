//! Completion channels and completion queues. Errors and threads: see [`super`].

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use super::super::inline::check;
use super::super::*;
use super::pointer;

impl Verbs {
    /// Creates a completion channel.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live and outlives the channel.
    pub unsafe fn create_comp_channel(
        &self,
        context: *mut ibv_context,
    ) -> Result<*mut ibv_comp_channel, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_create_comp_channel)(context) })
    }

    /// Destroys a completion channel.
    ///
    /// # Errors
    ///
    /// `EBUSY` while a completion queue uses it; it is then still there.
    ///
    /// # Safety
    ///
    /// `channel` is live and not used again after success.
    pub unsafe fn destroy_comp_channel(&self, channel: *mut ibv_comp_channel) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_destroy_comp_channel)(channel) })
    }

    /// Creates a completion queue of at least `cqe` entries; `channel` may be null.
    ///
    /// # Errors
    ///
    /// The library's errno; `EINVAL` for a size beyond the device's.
    ///
    /// # Safety
    ///
    /// `context` and `channel` are live and outlive the queue.
    pub unsafe fn create_cq(
        &self,
        context: *mut ibv_context,
        cqe: c_int,
        cq_context: *mut c_void,
        channel: *mut ibv_comp_channel,
        comp_vector: c_int,
    ) -> Result<*mut ibv_cq, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_create_cq)(context, cqe, cq_context, channel, comp_vector) })
    }

    /// Destroys a completion queue; blocks until its events are acknowledged.
    ///
    /// # Errors
    ///
    /// `EBUSY` while a queue pair uses it; it is then still there.
    ///
    /// # Safety
    ///
    /// `cq` is live and not used again after success.
    pub unsafe fn destroy_cq(&self, cq: *mut ibv_cq) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_destroy_cq)(cq) })
    }

    /// Reads the next completion event: the queue and its `cq_context`. Blocks unless the channel's descriptor is
    /// non-blocking.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is none on a non-blocking descriptor, `EINTR`, or the errno of the read.
    ///
    /// # Safety
    ///
    /// `channel` is live. Every event must be acknowledged before its queue is destroyed.
    pub unsafe fn get_cq_event(
        &self,
        channel: *mut ibv_comp_channel,
    ) -> Result<(*mut ibv_cq, *mut c_void), Errno> {
        let mut cq = ptr::null_mut();
        let mut cq_context = ptr::null_mut();
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_get_cq_event)(channel, &raw mut cq, &raw mut cq_context) })?;
        Ok((cq, cq_context))
    }

    /// Acknowledges `count` completion events of a queue; takes a mutex, so better once for many.
    ///
    /// # Safety
    ///
    /// `cq` is live and so many of its events were read and not yet acknowledged.
    pub unsafe fn ack_cq_events(&self, cq: *mut ibv_cq, count: c_uint) {
        // SAFETY: the caller's guarantee.
        unsafe { (self.ibv_ack_cq_events)(cq, count) }
    }
}
