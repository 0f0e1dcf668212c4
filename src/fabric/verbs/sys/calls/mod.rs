//! Methods of [`Verbs`](super::Verbs) over its table: the same verbs, with errors as [`Errno`]s and absent functions as
//! `EOPNOTSUPP`.
//!
//! Error conventions of the library (rdma-core man pages and source): functions that return a pointer return null
//! and set `errno`; most that return an `int` return the errno itself; `ibv_query_gid`, `ibv_query_pkey`,
//! `ibv_get_cq_event` and `ibv_get_async_event` return -1 and set `errno`; `_ibv_query_gid_table` returns a negated
//! errno.

use std::ffi::{CStr, c_char};

use super::Errno;

mod cq;
mod device;
mod memory;
mod qp;

const UNSUPPORTED: i32 = libc::EOPNOTSUPP;

fn pointer<T>(made: *mut T) -> Result<*mut T, Errno> {
    if made.is_null() {
        Err(Errno::last())
    } else {
        Ok(made)
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
