//! The raw bindings to the GPU runtimes: C types, constants, and a table of functions for each library.
//!
//! Nothing here decides anything; see `fabric/verbs/sys` for the same over libibverbs. Only what kvpush uses is
//! defined. C enums are integers, because a newer library may return values that are unknown here. Names are those of
//! the C headers. `tests/oracle` compares every signature, structure and constant: HIP and HSA with Debian's headers,
//! CUDA with the bindings of `cudarc`, and what is newer than Debian's with those of `cubecl-hip-sys`.
//!
//! Why not an existing crate: `docs/adr/0010-gpu-runtimes.md`.

#![allow(dead_code, reason = "some of it is there for the oracle only")]
#![allow(non_camel_case_types, reason = "names are those of the C headers")]
#![allow(
    non_snake_case,
    non_upper_case_globals,
    reason = "names are those of the C headers"
)]
#![allow(
    unreachable_pub,
    reason = "reachable only with the `oracle` feature, through a re-export"
)]
#![allow(
    missing_docs,
    reason = "functions are documented by the headers under the same names"
)]

pub mod cuda;
pub mod hip;
pub mod hsa;
pub mod library;
