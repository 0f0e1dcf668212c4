//! Methods of [`Verbs`] over its table: the same verbs, with errors as [`Errno`]s and absent functions as
//! `EOPNOTSUPP`.
//!
//! Error conventions of the library (rdma-core man pages and source): functions that return a pointer return null
//! and set `errno`; most that return an `int` return the errno itself; `ibv_query_gid`, `ibv_query_pkey`,
//! `ibv_get_cq_event` and `ibv_get_async_event` return -1 and set `errno`; `_ibv_query_gid_table` returns a negated
//! errno.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use super::inline::{check, query_device_ex_op, query_port_op};
use super::*;

const UNSUPPORTED: i32 = libc::EOPNOTSUPP;

fn pointer<T>(made: *mut T) -> Result<*mut T, Errno> {
    if made.is_null() {
        Err(Errno::last())
    } else {
        Ok(made)
    }
}

/// Devices and contexts.
impl Verbs {
    /// The devices present now: an array and its length, to be given back to
    /// [`free_device_list`](Self::free_device_list).
    ///
    /// # Errors
    ///
    /// The library's errno: `ENOSYS` without kernel support, `EPERM` without access to it.
    pub fn device_list(&self) -> Result<(*mut *mut ibv_device, usize), Errno> {
        let mut count: c_int = 0;
        // SAFETY: the function only writes the count.
        let list = pointer(unsafe { (self.ibv_get_device_list)(&raw mut count) })?;
        Ok((list, usize::try_from(count).unwrap_or(0)))
    }

    /// Frees a device list; devices that are open stay valid.
    ///
    /// # Safety
    ///
    /// `list` came from [`device_list`](Self::device_list) and is not used again.
    pub unsafe fn free_device_list(&self, list: *mut *mut ibv_device) {
        // SAFETY: the caller's guarantee.
        unsafe { (self.ibv_free_device_list)(list) }
    }

    /// The kernel's name of a device, or an empty string for one that is not UTF-8 or has none.
    ///
    /// # Safety
    ///
    /// `device` is of a list not yet freed, or of an open context; the string lives as long.
    pub unsafe fn device_name<'a>(&self, device: *mut ibv_device) -> &'a str {
        // SAFETY: the library returns the NUL-terminated array inside the device.
        unsafe { text((self.ibv_get_device_name)(device)) }
    }

    /// The node GUID of a device in host order, 0 when the kernel reports none.
    ///
    /// # Safety
    ///
    /// `device` is of a list not yet freed, or of an open context.
    pub unsafe fn device_guid(&self, device: *mut ibv_device) -> u64 {
        // SAFETY: the caller's guarantee.
        u64::from_be(unsafe { (self.ibv_get_device_guid)(device) })
    }

    /// Opens a device.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `device` is of a list not yet freed.
    pub unsafe fn open_device(&self, device: *mut ibv_device) -> Result<*mut ibv_context, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_open_device)(device) })
    }

    /// Closes a device.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live, every object made from it is destroyed, and it is not used again.
    pub unsafe fn close_device(&self, context: *mut ibv_context) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_close_device)(context) })
    }

    /// Attributes of a device.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_device(&self, context: *mut ibv_context) -> Result<ibv_device_attr, Errno> {
        let mut attr = ibv_device_attr::zeroed();
        // SAFETY: the caller's guarantee; `attr` has the layout that the function fills.
        check(unsafe { (self.ibv_query_device)(context, &raw mut attr) })?;
        Ok(attr)
    }

    /// Extended attributes of a device; all but `orig_attr` stay zero where the provider has only the plain ones.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_device_ex(
        &self,
        context: *mut ibv_context,
    ) -> Result<ibv_device_attr_ex, Errno> {
        let mut attr = ibv_device_attr_ex::zeroed();
        // SAFETY: the caller's guarantee.
        if let Some(query) = unsafe { query_device_ex_op(context) } {
            // SAFETY: as above; the size says how much of `attr` this crate knows.
            let rc = unsafe {
                query(
                    context,
                    ptr::null(),
                    &raw mut attr,
                    size_of::<ibv_device_attr_ex>(),
                )
            };
            match check(rc) {
                Err(errno) if errno.code() == libc::EOPNOTSUPP || errno.code() == libc::ENOSYS => {}
                result => return result.map(|()| attr),
            }
            attr = ibv_device_attr_ex::zeroed();
        }
        // SAFETY: the caller's guarantee.
        attr.orig_attr = unsafe { self.query_device(context) }?;
        Ok(attr)
    }

    /// Attributes of a port, counted from 1.
    ///
    /// The exported symbol fills in an older, shorter struct, so the provider's own function is preferred, as the C
    /// header does; fields that neither knows are zero.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_port(
        &self,
        context: *mut ibv_context,
        port: u8,
    ) -> Result<ibv_port_attr, Errno> {
        let mut attr = ibv_port_attr::zeroed();
        // SAFETY: the caller's guarantee; the size or the compat type says how much of `attr` may be written.
        let rc = unsafe {
            match query_port_op(context) {
                Some(query) => query(context, port, &raw mut attr, size_of::<ibv_port_attr>()),
                None => (self.ibv_query_port)(context, port, (&raw mut attr).cast()),
            }
        };
        check(rc)?;
        Ok(attr)
    }

    /// An entry of a port's GID table, without its type; all zero for an empty one.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_gid(
        &self,
        context: *mut ibv_context,
        port: u8,
        index: c_int,
    ) -> Result<ibv_gid, Errno> {
        let mut gid = ibv_gid::zeroed();
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_query_gid)(context, port, index, &raw mut gid) })?;
        Ok(gid)
    }

    /// An entry of a port's GID table with its type and network interface.
    ///
    /// # Errors
    ///
    /// `ENODATA` for an empty entry, `EOPNOTSUPP` for a library older than rdma-core 32, else the library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_gid_ex(
        &self,
        context: *mut ibv_context,
        port: u32,
        index: u32,
    ) -> Result<ibv_gid_entry, Errno> {
        let query = self._ibv_query_gid_ex.ok_or(Errno::new(UNSUPPORTED))?;
        let mut entry = ibv_gid_entry::zeroed();
        // SAFETY: the caller's guarantee; the size is that of `entry`.
        check(unsafe {
            query(
                context,
                port,
                index,
                &raw mut entry,
                0,
                size_of::<ibv_gid_entry>(),
            )
        })?;
        Ok(entry)
    }

    /// All valid GIDs of all ports of a device, as many as `entries` holds; returns how many were filled in.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` for a library older than rdma-core 32, `EINVAL` for too few `entries`, else the library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_gid_table(
        &self,
        context: *mut ibv_context,
        entries: &mut [ibv_gid_entry],
    ) -> Result<usize, Errno> {
        let query = self._ibv_query_gid_table.ok_or(Errno::new(UNSUPPORTED))?;
        // SAFETY: the caller's guarantee; the sizes are those of `entries`.
        let count = unsafe {
            query(
                context,
                entries.as_mut_ptr(),
                entries.len(),
                0,
                size_of::<ibv_gid_entry>(),
            )
        };
        usize::try_from(count)
            .map(|count| count.min(entries.len()))
            .map_err(|_| Errno::new(i32::try_from(count.unsigned_abs()).unwrap_or(libc::EIO)))
    }

    /// An entry of a port's partition key table, in host order.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live.
    pub unsafe fn query_pkey(
        &self,
        context: *mut ibv_context,
        port: u8,
        index: c_int,
    ) -> Result<u16, Errno> {
        let mut pkey = 0;
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_query_pkey)(context, port, index, &raw mut pkey) })?;
        Ok(u16::from_be(pkey))
    }

    /// Reads the next asynchronous event; blocks unless `async_fd` is non-blocking.
    ///
    /// # Errors
    ///
    /// `EAGAIN` when there is none on a non-blocking descriptor, `EINTR`, or the errno of the read.
    ///
    /// # Safety
    ///
    /// `context` is live. Every event must be acknowledged before the object it names is destroyed.
    pub unsafe fn get_async_event(
        &self,
        context: *mut ibv_context,
    ) -> Result<ibv_async_event, Errno> {
        let mut event = ibv_async_event::zeroed();
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_get_async_event)(context, &raw mut event) })?;
        Ok(event)
    }

    /// Acknowledges an asynchronous event.
    ///
    /// # Safety
    ///
    /// `event` came from [`get_async_event`](Self::get_async_event), is acknowledged once, and its object is live.
    pub unsafe fn ack_async_event(&self, mut event: ibv_async_event) {
        // SAFETY: the caller's guarantee.
        unsafe { (self.ibv_ack_async_event)(&raw mut event) }
    }

    /// Makes registered memory survive `fork` (`ibv_fork_init(3)`); before any other verb, or it fails.
    ///
    /// # Errors
    ///
    /// `EINVAL` when memory is registered already, `ENOSYS` without kernel support, `ENOMEM`.
    pub fn fork_init(&self) -> Result<(), Errno> {
        // SAFETY: takes nothing; synchronises itself.
        check(unsafe { (self.ibv_fork_init)() })
    }

    /// Whether `fork` is safe: `IBV_FORK_*`, or `None` for a library older than rdma-core 35.
    #[must_use]
    pub fn fork_status(&self) -> Option<ibv_fork_status> {
        // SAFETY: takes nothing; synchronises itself.
        self.ibv_is_fork_initialized
            .map(|status| unsafe { status() })
    }

    /// The library's words for a completion status.
    #[must_use]
    pub fn wc_status_str(&self, status: ibv_wc_status) -> &'static str {
        // SAFETY: takes any value and returns a static string; the library is never unloaded.
        unsafe { text((self.ibv_wc_status_str)(status)) }
    }

    /// The library's words for a port state.
    #[must_use]
    pub fn port_state_str(&self, state: ibv_port_state) -> &'static str {
        // SAFETY: as in `wc_status_str`.
        unsafe { text((self.ibv_port_state_str)(state)) }
    }

    /// The library's words for an asynchronous event.
    #[must_use]
    pub fn event_type_str(&self, event: ibv_event_type) -> &'static str {
        // SAFETY: as in `wc_status_str`.
        unsafe { text((self.ibv_event_type_str)(event)) }
    }
}

/// Memory.
impl Verbs {
    /// Allocates a protection domain.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// `context` is live and outlives the domain.
    pub unsafe fn alloc_pd(&self, context: *mut ibv_context) -> Result<*mut ibv_pd, Errno> {
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_alloc_pd)(context) })
    }

    /// Frees a protection domain.
    ///
    /// # Errors
    ///
    /// `EBUSY` while something uses it; it is then still allocated.
    ///
    /// # Safety
    ///
    /// `pd` is live and not used again after success.
    pub unsafe fn dealloc_pd(&self, pd: *mut ibv_pd) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_dealloc_pd)(pd) })
    }

    /// Registers memory under the addresses that remote peers use for it starting at `iova`.
    ///
    /// Flags in `IBV_ACCESS_OPTIONAL_RANGE` are hints: dropped where library or kernel do not know them.
    ///
    /// # Errors
    ///
    /// `ENOMEM` (often the memlock limit), `EINVAL`, `EOPNOTSUPP` when `iova` is not `addr` and the library is
    /// older than rdma-core 28, else the library's errno.
    ///
    /// # Safety
    ///
    /// `pd` is live. The memory stays mapped until the region is deregistered; with remote access flags the caller
    /// accepts that peers read and write it at any time in between.
    pub unsafe fn reg_mr(
        &self,
        pd: *mut ibv_pd,
        addr: *mut c_void,
        length: usize,
        iova: u64,
        access: c_uint,
    ) -> Result<*mut ibv_mr, Errno> {
        if let Some(reg) = self.ibv_reg_mr_iova2 {
            // SAFETY: the caller's guarantee.
            return pointer(unsafe { reg(pd, addr, length, iova, access) });
        }
        if iova != addr.addr() as u64 {
            return Err(Errno::new(UNSUPPORTED));
        }
        let access = c_int::try_from(access & !IBV_ACCESS_OPTIONAL_RANGE)
            .map_err(|_| Errno::new(libc::EINVAL))?;
        // SAFETY: the caller's guarantee.
        pointer(unsafe { (self.ibv_reg_mr)(pd, addr, length, access) })
    }

    /// Registers memory of another device through a dma-buf (`ibv_reg_dmabuf_mr(3)`). `offset` counts from the start
    /// of the dma-buf and agrees with `iova` modulo the page size; `fd` may be closed after success.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` where library, kernel or provider do not know it, else the library's errno.
    ///
    /// # Safety
    ///
    /// `pd` is live; `fd` is a dma-buf; the caller accepts that peers read and write the memory, as for
    /// [`reg_mr`](Self::reg_mr).
    pub unsafe fn reg_dmabuf_mr(
        &self,
        pd: *mut ibv_pd,
        offset: u64,
        length: usize,
        iova: u64,
        fd: c_int,
        access: c_uint,
    ) -> Result<*mut ibv_mr, Errno> {
        let reg = self.ibv_reg_dmabuf_mr.ok_or(Errno::new(UNSUPPORTED))?;
        let access = c_int::try_from(access).map_err(|_| Errno::new(libc::EINVAL))?;
        // SAFETY: the caller's guarantee.
        pointer(unsafe { reg(pd, offset, length, iova, fd, access) })
    }

    /// Deregisters memory. After success no NIC reaches it under this region's keys.
    ///
    /// # Errors
    ///
    /// `EBUSY` while a memory window is bound to it, else the library's errno; it is then still registered.
    ///
    /// # Safety
    ///
    /// `mr` is live and not used again after success.
    pub unsafe fn dereg_mr(&self, mr: *mut ibv_mr) -> Result<(), Errno> {
        // SAFETY: the caller's guarantee.
        check(unsafe { (self.ibv_dereg_mr)(mr) })
    }
}

/// Completion queues.
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

/// Queue pairs and shared receive queues.
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

/// A string of the library, or an empty one for null or not UTF-8.
///
/// # Safety
///
/// `string` is null or NUL-terminated and lives for `'a`.
unsafe fn text<'a>(string: *const c_char) -> &'a str {
    if string.is_null() {
        return "";
    }
    // SAFETY: the caller's guarantee.
    unsafe { CStr::from_ptr(string) }.to_str().unwrap_or("")
}
