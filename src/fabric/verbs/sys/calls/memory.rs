//! Protection domains and memory regions. Errors and threads: see [`super`].

use std::ffi::{c_int, c_uint, c_void};

use super::super::inline::check;
use super::super::*;
use super::{UNSUPPORTED, pointer};

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
