//! The raw binding to libibverbs: C layouts, constants, and a table of functions opened at run time.
//!
//! Nothing here decides anything: no retries, no ownership, no defaults. The layers above own objects and choose
//! values; this one only makes the C interface callable and turns its three error conventions into one
//! ([`Errno`]).
//!
//! Invariants:
//! - Only what kvpush uses is defined. Every size, offset, constant and signature is compared with the system's
//!   `<infiniband/verbs.h>` by `tests/oracle`; a definition that is not listed there is not allowed here.
//! - C enums are integers, never Rust enums: the library and the device may return values this crate does not know.
//! - Names are those of the C header, so the man pages (`ibv_post_send(3)` and so on) are the reference.
//!
//! Any thread may call [`Verbs::open`] and any function of the table; verbs objects are thread-safe by the
//! `libibverbs` contract, except that destroying one must not race with another use of it.
//!
//! Why not an existing crate: `docs/adr/0001-verbs-binding.md`.

#![allow(dead_code, reason = "a binding defines what its users may need next")]
#![allow(
    unused_imports,
    reason = "re-exports are for the layers above and the oracle"
)]
#![allow(non_camel_case_types, reason = "names are those of the C header")]
#![allow(
    unreachable_pub,
    reason = "reachable only with the `oracle` feature, through a glob re-export"
)]
#![allow(
    missing_docs,
    reason = "fields are documented by the verbs man pages under the same names"
)]

mod calls;
mod consts;
mod cq;
mod device;
mod error;
mod inline;
mod mr;
mod qp;
mod table;
mod wr;

pub use consts::*;
pub use cq::*;
pub use device::*;
pub use error::{Attempt, Errno, OpenError, PostError};
pub use inline::*;
pub use mr::*;
pub use qp::*;
pub use table::{LIBRARY_NAMES, Symbol, Verbs};
pub use wr::*;

/// Types of which the all-zero bit pattern is a valid value.
///
/// # Safety
///
/// Implementors are `#[repr(C)]` and made only of integers, raw pointers, `Option`s of function pointers, and arrays,
/// unions and structs of those.
pub unsafe trait Zeroable: Sized {
    /// The all-zero value, which C callers make with `memset`; padding is zero too.
    #[must_use]
    fn zeroed() -> Self {
        // SAFETY: the implementor vouches that all-zero is a valid value of `Self`.
        unsafe { std::mem::zeroed() }
    }
}

macro_rules! zeroable {
    ($($t:ty),* $(,)?) => {
        $(
            // SAFETY: a `repr(C)` struct or union of integers, raw pointers and arrays of those.
            unsafe impl Zeroable for $t {}
        )*
    };
}

zeroable!(
    ibv_gid,
    ibv_gid_entry,
    ibv_device_attr,
    ibv_device_attr_ex,
    ibv_port_attr,
    ibv_async_event,
    ibv_mw_bind,
    ibv_mw_bind_info,
    ibv_global_route,
    ibv_ah_attr,
    ibv_qp_cap,
    ibv_qp_init_attr,
    ibv_qp_attr,
    ibv_srq_attr,
    ibv_srq_init_attr,
    ibv_wc,
    ibv_sge,
    ibv_send_wr,
    ibv_recv_wr,
);
