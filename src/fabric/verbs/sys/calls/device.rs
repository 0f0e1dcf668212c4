//! Devices, ports, GIDs and asynchronous events. Errors and threads: see [`super`].

use std::ffi::c_int;
use std::ptr;

use super::super::inline::{check, query_device_ex_op, query_port_op};
use super::super::*;
use super::{UNSUPPORTED, pointer, text};

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
