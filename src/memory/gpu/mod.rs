//! Memory of GPUs: AMD's through HIP and HSA, NVIDIA's through the CUDA driver.
//!
//! The runtimes are opened when first asked for, never linked: without them, everything here returns an error that
//! says what was tried. A runtime that the process has loaded already, an engine's, is the one that is used.
//!
//! # Which library
//!
//! [`Libraries`] names them explicitly; [`Hip::shared`] and [`Cuda::shared`] take the environment's (`KVPUSH_HIP_LIBRARY`,
//! `KVPUSH_HSA_LIBRARY`, `KVPUSH_CUDA_LIBRARY`: paths), or else the usual names.
//!
//! # When is a NIC's write visible?
//!
//! That an arrival is complete means that the NIC has placed its bytes. A kernel that runs *already* may have older
//! bytes in its caches, and nothing on the host can change that: order kernels behind the arrival, by starting them
//! after it, or by a stream that waits. For kernels started *afterwards*, [`DeviceMemory::flush`] does what the device
//! needs, which [`DeviceMemory::visibility`] tells:
//!
//! | Device | Rule | Certain? |
//! |---|---|---|
//! | NVIDIA, writes ordered for the owner (`GPU_DIRECT_RDMA_WRITES_ORDERING` ≥ 100) | nothing | yes: the attribute promises it |
//! | NVIDIA, `FLUSH_WRITES_OPTIONS` has HOST | `cuFlushGPUDirectRDMAWrites`, scope: owner | yes: the call promises it |
//! | NVIDIA, neither | a byte is read back through the copy engine | no promise; NCCL lets the NIC read instead |
//! | AMD, runtime has `hipDeviceFlushGPUDirectRDMAWrites` | that call, scope: owner | yes: the call promises it |
//! | AMD, the HDP register is mapped | 1 is written to it and it is read back, as that call does | what AMD's runtime does; outside of the HSA memory model |
//! | AMD, neither (virtual functions, large host pages) | a byte is read back through the copy engine | no promise |
//!
//! Memory that AMD's runtime calls *fine-grained* (`hipExtMallocWithFlags`) is not cached across kernels, ordinary
//! *coarse-grained* memory is coherent at the start of kernels only. Both are flushed alike.
//!
//! Invariants:
//! - The device that is current for the calling thread is the same before and after each call, also after a failure.
//! - Managed memory, host memory and another device's memory are refused when memory is wrapped, not when it is used.
//! - No offset is guessed: see [`offsets`].
//!
//! Any thread may call. A [`Copier`] belongs to one thread at a time.
//!
//! [`DeviceMemory::flush`]: crate::memory::DeviceMemory::flush
//! [`DeviceMemory::visibility`]: crate::memory::DeviceMemory::visibility
//! [`Copier`]: crate::memory::Copier

mod buffer;
mod copier;
mod cuda;
mod driver;
mod error;
mod hip;
pub mod offsets;
mod peer;
mod probe;
pub(crate) mod sys;
mod version;

use std::{fmt, path::PathBuf};

pub use buffer::{CudaMemory, GpuMemory, HipMemory};
pub use cuda::Cuda;
#[doc(hidden)]
pub use driver::Driver;
pub use error::{Attempt, GpuError};
pub use hip::Hip;
pub use peer::peer_memory;
pub use probe::{CudaReport, DeviceReport, HipReport, HsaReport, Report, probe, probe_with};
pub use version::RocmVersion;

/// A GPU runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// AMD's libamdhip64.
    Hip,
    /// AMD's libhsa-runtime64, below HIP.
    Hsa,
    /// NVIDIA's libcuda.
    Cuda,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hip => "HIP",
            Self::Hsa => "HSA",
            Self::Cuda => "CUDA",
        })
    }
}

impl Runtime {
    fn install_hint(self) -> &'static str {
        match self {
            Self::Hip => "install ROCm's HIP runtime (AMD: hip-runtime-amd, Debian: libamdhip64-5)",
            Self::Hsa => "install ROCm's HSA runtime (AMD: hsa-rocr, Debian: libhsa-runtime64-1)",
            Self::Cuda => "install NVIDIA's driver",
        }
    }

    fn malloc(self) -> &'static str {
        match self {
            Self::Hip | Self::Hsa => "hipMalloc",
            Self::Cuda => "cudaMalloc or cuMemAlloc",
        }
    }
}

/// Paths of the runtimes' libraries; `None` is the usual names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Libraries {
    /// libamdhip64.
    pub hip: Option<PathBuf>,
    /// libhsa-runtime64.
    pub hsa: Option<PathBuf>,
    /// libcuda.
    pub cuda: Option<PathBuf>,
}

impl Libraries {
    /// Those that the environment names: `KVPUSH_HIP_LIBRARY`, `KVPUSH_HSA_LIBRARY`, `KVPUSH_CUDA_LIBRARY`.
    pub fn from_env() -> Self {
        let path = |name| std::env::var_os(name).filter(|path| !path.is_empty());
        Self {
            hip: path("KVPUSH_HIP_LIBRARY").map(PathBuf::from),
            hsa: path("KVPUSH_HSA_LIBRARY").map(PathBuf::from),
            cuda: path("KVPUSH_CUDA_LIBRARY").map(PathBuf::from),
        }
    }

    /// One file that has all three, as the double of the tests.
    pub fn all_in(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            hip: Some(path.clone()),
            hsa: Some(path.clone()),
            cuda: Some(path),
        }
    }
}
