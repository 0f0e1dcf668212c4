//! A stand-in for libamdhip64, libhsa-runtime64 and libcuda, opened by the tests as all three.
//!
//! Device memory is a memory file (`memfd_create(2)`) mapped into the process, so a pointer of the device is an address
//! that the tests can look at, and an export is a real descriptor of the very same memory.
//!
//! Tests steer it by the functions `double_*` (`control`): any call can be made to fail, devices and version can be
//! set, and every call is logged. All of that is of the calling thread, as the current device is with the real
//! libraries, so tests run side by side. Allocations are of the process.
//!
//! What is not like the real thing: a memory file is no dmabuf, so a NIC cannot register it; and copies are done when
//! they are started, unless the test holds events back.

#![allow(non_snake_case, reason = "names are those of the C headers")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contracts are those of the C headers"
)]

mod control;
mod cuda;
mod hip;
mod hsa;
mod memory;
