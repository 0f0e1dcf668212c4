//! GPU memory over the double of HIP, HSA and CUDA (`tests/gpu-double`): what goes well, and every way to fail.
//!
//! The double is built by the first test that needs it. All its scripts are of the calling thread, so the tests run side
//! by side.

#[path = "gpu_suite/copier.rs"]
mod copier;
#[path = "gpu_suite/double.rs"]
mod double;
#[path = "gpu_suite/export.rs"]
mod export;
#[path = "gpu_suite/flush.rs"]
mod flush;
#[path = "gpu_suite/memory.rs"]
mod memory;
#[path = "gpu_suite/push.rs"]
mod push;
#[path = "gpu_suite/real.rs"]
mod real;
#[path = "gpu_suite/report.rs"]
mod report;
