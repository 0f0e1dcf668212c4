//! Errors of GPU runtimes. Each says which runtime, which call and which device, and what can be done about it.

use std::fmt;

use super::Runtime;

/// One name tried for a library, and why the loader refused it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The name given to `dlopen`.
    pub name: String,
    /// The loader's text.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Why a GPU's memory could not be had, exported, copied or flushed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No library was found under any name.
    #[error("{runtime} cannot be opened ({}); {}", join(tried), runtime.install_hint())]
    NoLibrary {
        /// The runtime.
        runtime: Runtime,
        /// Every name tried, in order.
        tried: Vec<Attempt>,
    },
    /// A library was found, but lacks a function that kvpush cannot do without.
    #[error(
        "{library} has no usable {symbol} ({reason}): it is too old, or not the {runtime} library"
    )]
    NoSymbol {
        /// The runtime.
        runtime: Runtime,
        /// The name under which the library was opened.
        library: String,
        /// The missing function.
        symbol: &'static str,
        /// The loader's text.
        reason: String,
    },
    /// A call of the runtime failed.
    #[error(
        "{call}{}: {name} ({runtime} error {code}){}",
        device.map(|d| format!(" on device {d}")).unwrap_or_default(),
        hint.map(|h| format!("; {h}")).unwrap_or_default()
    )]
    Call {
        /// The runtime.
        runtime: Runtime,
        /// The function.
        call: &'static str,
        /// The runtime's code.
        code: i32,
        /// The runtime's name of the code.
        name: String,
        /// The device it was about, if one.
        device: Option<u32>,
        /// What the operator can do about it.
        hint: Option<&'static str>,
    },
    /// The runtime works, but has no such device.
    #[error("there is no {runtime} device {device}: {count} found")]
    NoDevice {
        /// The runtime.
        runtime: Runtime,
        /// The number asked for.
        device: u32,
        /// How many there are.
        count: u32,
    },
    /// The memory moves between host and device by itself, so that no NIC can know where it is.
    #[error(
        "{address:#x} is managed memory, which the driver moves between host and device; no NIC can be given it: \
         allocate with {}", runtime.malloc()
    )]
    Managed {
        /// The runtime.
        runtime: Runtime,
        /// The address looked at.
        address: u64,
    },
    /// The address is not of a device's memory.
    #[error("{address:#x} is not memory of a {runtime} device, but {found}")]
    NotDeviceMemory {
        /// The runtime.
        runtime: Runtime,
        /// The address looked at.
        address: u64,
        /// What it is.
        found: &'static str,
    },
    /// The memory is another device's.
    #[error("{address:#x} is memory of {runtime} device {owner}, not of device {device}")]
    OtherDevice {
        /// The runtime.
        runtime: Runtime,
        /// The address looked at.
        address: u64,
        /// The device given.
        device: u32,
        /// The device that has it.
        owner: i32,
    },
    /// The memory cannot be exported as a dmabuf.
    #[error("{length} bytes at {address:#x} cannot be exported as a dmabuf: {}", reasons.join("; "))]
    NoExport {
        /// The first byte.
        address: u64,
        /// Bytes.
        length: u64,
        /// Why not, one for each way that was tried.
        reasons: Vec<String>,
    },
    /// No module lets NICs take the memory's addresses.
    #[error("NICs cannot take addresses of {runtime} memory: {reason}")]
    NoPeerMemory {
        /// The runtime.
        runtime: Runtime,
        /// Why not.
        reason: String,
    },
    /// Addresses, offsets or lengths that do not fit together.
    #[error("{what}: {address:#x} +{length:#x}")]
    BadRange {
        /// What is wrong.
        what: &'static str,
        /// The first byte.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// An earlier failure left the copier unable to say what has been copied.
    #[error("the copier failed before: {0}")]
    Broken(Box<GpuError>),
}

/// `hipErrorOutOfMemory` and `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;

impl GpuError {
    /// Whether the same call can succeed later without a change of configuration: only if memory was short.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Call { runtime, code, .. }
            if *code == OUT_OF_MEMORY && *runtime != Runtime::Hsa)
    }

    /// The runtime's code, if a call failed.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }
}

fn join(tried: &[Attempt]) -> String {
    let texts: Vec<String> = tried.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(runtime: Runtime, code: i32) -> GpuError {
        GpuError::Call {
            runtime,
            call: "hipMalloc",
            code,
            name: "hipErrorOutOfMemory".into(),
            device: Some(3),
            hint: Some("free some"),
        }
    }

    #[test]
    fn a_failed_call_says_what_where_and_why() {
        assert_eq!(
            failed(Runtime::Hip, 2).to_string(),
            "hipMalloc on device 3: hipErrorOutOfMemory (HIP error 2); free some"
        );
    }

    #[test]
    fn only_a_lack_of_memory_passes() {
        assert!(failed(Runtime::Hip, 2).is_retryable() && failed(Runtime::Cuda, 2).is_retryable());
        assert!(!failed(Runtime::Hip, 1).is_retryable() && !failed(Runtime::Hsa, 2).is_retryable());
    }
}
