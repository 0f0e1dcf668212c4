//! The raw bindings to the GPU runtimes: C types, constants, and a table of functions for each library.
//!
//! Nothing here decides anything; see `fabric/verbs/sys` for the same over libibverbs. Only what kvpush uses is
//! defined. C enums are integers, because a newer library may return values that are unknown here. Names are those of
//! the C headers. `headers_tests.rs` lets the C compiler compare every signature, structure and constant with them,
//! where they are: `cargo xtask gpu-libs` brings Debian's of HIP and HSA.
//!
//! Why not an existing crate: `docs/adr/0010-gpu-runtimes.md`.

#![allow(dead_code, reason = "some of it is there for comparisons only")]
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

#[cfg(test)]
mod headers_tests;
