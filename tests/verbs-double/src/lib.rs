//! A stand-in for libibverbs with a *null device*: what is posted has completed when the post returns.
//!
//! It measures what the verbs path costs without a device, and lets its tests run where there is none. The library opens
//! libibverbs as it always does: the double carries its soname, so once a process has loaded it by path, that name leads
//! to it. Nothing in the library knows of it.
//!
//! Queue pairs of one process reach each other by their number, over any number of contexts. What a device is strict
//! about, the double is, too: a send queue holds `max_send_wr` requests until their completions have been polled, a
//! completion queue that overflows is broken, a write with immediate that meets no receive fails the queue pair, a queue
//! pair in the error state flushes. Only signalled requests make completions, and those that fail.
//!
//! Bytes are not moved, and keys are not looked at, but for inline payload, or when `control::double_move_bytes` asks
//! for both: that is how a test shows that the requests would have done what they should.
//!
//! What is not there: memory windows, dmabufs, asynchronous events, sends other than one-sided writes and reads.
//!
//! | file | holds |
//! |---|---|
//! | `device` | devices, ports, protection domains, memory regions |
//! | `cq` | completion queues and channels |
//! | `qp` | queue pairs, shared receive queues, posting |
//! | `control` | what tests can ask for |
//! | `sys` | the C layouts |

#![allow(non_camel_case_types, reason = "names are those of the C header")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contracts are those of the C header"
)]

mod control;
mod cq;
mod device;
mod qp;
mod sys;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; nobody panics with a lock held.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd.
fn eventfd() -> i32 {
    // SAFETY: a plain system call.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE) }
}

/// Sets `errno`.
fn fail(errno: i32) -> i32 {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}
