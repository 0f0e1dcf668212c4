//! Compares kvpush's HIP definitions (`kvpush::oracle::gpu::hip`) with those of `hip-sys`, which bindgen made from the
//! headers of HIP 5.4.
//!
//! Does nothing without the feature `hip-sys`:
//!
//! ```text
//! HIP_PATH=/opt/rocm cargo test --manifest-path tests/hip-sys-check/Cargo.toml --features hip-sys
//! ```
