//! Whether NICs can take a GPU's own addresses: whether a *peer memory* client is there that hands them out.
//!
//! Peer memory is no part of the mainline kernel. Its traces differ between vendors and distributions, so that a trace
//! proves that it is there, and no trace proves nothing; then the reason names all that was looked for.

use std::path::Path;

use super::{GpuError, Runtime};

/// Files that tell of a peer-memory client. The folder `memory_peers` has moved between releases of the module that
/// makes it.
fn traces(runtime: Runtime) -> &'static [&'static str] {
    match runtime {
        Runtime::Hip | Runtime::Hsa => &[
            "kernel/mm/memory_peers/amdkfd/version",
            "kernel/memory_peers/amdkfd/version",
            "memory_peers/amdkfd/version",
        ],
        Runtime::Cuda => &[
            "module/nvidia_peermem/version",
            "module/nvidia_peermem",
            "module/nv_peer_mem",
            "kernel/mm/memory_peers/nv_mem/version",
            "kernel/mm/memory_peers/nvidia-peermem/version",
        ],
    }
}

/// Whether `sysfs`, usually `/sys`, shows a peer-memory client for memory of `runtime`.
///
/// # Errors
///
/// [`GpuError::NoPeerMemory`] with what was looked for.
pub fn peer_memory(sysfs: &Path, runtime: Runtime) -> Result<(), GpuError> {
    let names = traces(runtime);
    if names.iter().any(|name| sysfs.join(name).exists()) {
        return Ok(());
    }
    let hint = match runtime {
        Runtime::Hip | Runtime::Hsa if !sysfs.join("module/amdgpu").exists() => {
            "the amdgpu driver is not loaded"
        }
        Runtime::Hip | Runtime::Hsa => {
            "amdgpu is loaded, but has not registered with a peer-memory module (ib_peer_mem, or that of MLNX_OFED)"
        }
        Runtime::Cuda if !sysfs.join("module/nvidia").exists() => "the nvidia driver is not loaded",
        Runtime::Cuda => "load it with: modprobe nvidia-peermem",
    };
    Err(GpuError::NoPeerMemory {
        runtime,
        reason: format!(
            "none of {} is in {}; {hint}",
            names.join(", "),
            sysfs.display()
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::PathBuf,
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    /// A sysfs of our own, gone with the value.
    struct Tree(PathBuf);

    impl Tree {
        fn with(files: &[&str]) -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!(
                "kvpush-peer-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let root = std::env::temp_dir().join(name);
            fs::create_dir_all(&root).unwrap();
            for file in files {
                let path = root.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "1.0\n").unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn each_trace_is_enough() {
        for runtime in [Runtime::Hip, Runtime::Hsa, Runtime::Cuda] {
            for trace in traces(runtime) {
                assert_eq!(peer_memory(&Tree::with(&[trace]).0, runtime), Ok(()));
            }
        }
    }

    #[test]
    fn the_reason_says_what_is_missing() {
        let reason = |files: &[&str], runtime| {
            let tree = Tree::with(files);
            peer_memory(&tree.0, runtime).unwrap_err().to_string()
        };
        assert!(reason(&[], Runtime::Hip).contains("amdgpu driver is not loaded"));
        assert!(reason(&["module/amdgpu/version"], Runtime::Hip).contains("ib_peer_mem"));
        assert!(reason(&[], Runtime::Cuda).contains("nvidia driver is not loaded"));
        assert!(reason(&["module/nvidia/version"], Runtime::Cuda).contains("modprobe"));
        // One vendor's client does nothing for the other's memory.
        let amd = Tree::with(traces(Runtime::Hip));
        assert!(peer_memory(&amd.0, Runtime::Cuda).is_err());
        let nvidia = Tree::with(&["module/nvidia_peermem/version"]);
        assert!(peer_memory(&nvidia.0, Runtime::Hip).is_err());
    }
}
