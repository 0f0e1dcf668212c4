//! What the operating system says about RDMA, with or without the library: sysfs, device nodes, limits, modules.
//!
//! Any thread may call.

use std::{fs, path::Path};

use super::{
    error::memlock,
    facts::{HostFacts, KernelModule, UverbsNode},
};

/// What the operating system says.
pub(super) fn host() -> HostFacts {
    let names = |directory: &str| {
        let mut names: Vec<String> = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    };
    let uverbs = names("/dev/infiniband")
        .into_iter()
        .filter(|name| name.starts_with("uverbs"))
        .map(|name| {
            let path = format!("/dev/infiniband/{name}");
            let refused = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .err()
                .map(|error| error.raw_os_error().unwrap_or(libc::EIO));
            UverbsNode { path, refused }
        })
        .collect();
    HostFacts {
        sysfs_infiniband: Path::new("/sys/class/infiniband").is_dir(),
        sysfs_devices: names("/sys/class/infiniband"),
        uverbs,
        memlock: memlock(),
        ipc_lock: has_ipc_lock(),
        modules: modules(),
        container: container(),
    }
}

/// `CAP_IPC_LOCK` is bit 14 of the effective set (`capabilities(7)`).
fn has_ipc_lock() -> bool {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("CapEff:"))?;
            u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()
        })
        .is_some_and(|set| set & (1 << 14) != 0)
}

fn modules() -> Vec<KernelModule> {
    const NAMES: [&str; 7] = [
        "ib_core",
        "ib_uverbs",
        "rdma_rxe",
        "mlx5_ib",
        "bnxt_re",
        "ionic_rdma",
        "irdma",
    ];
    let on_disk = fs::read_to_string("/proc/sys/kernel/osrelease")
        .ok()
        .and_then(|release| {
            let base = format!("/lib/modules/{}", release.trim());
            let listed = fs::read_to_string(format!("{base}/modules.dep")).ok()?;
            let built_in =
                fs::read_to_string(format!("{base}/modules.builtin")).unwrap_or_default();
            Some(listed + &built_in)
        });
    NAMES
        .into_iter()
        .map(|name| KernelModule {
            name,
            loaded: Path::new("/sys/module").join(name).is_dir(),
            on_disk: on_disk
                .as_ref()
                .map(|list| list.contains(&format!("/{name}.ko"))),
        })
        .collect()
}

fn container() -> Option<String> {
    ["/.dockerenv", "/run/.containerenv"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .map(str::to_owned)
        .or_else(|| {
            std::env::var("KUBERNETES_SERVICE_HOST")
                .ok()
                .map(|_| "KUBERNETES_SERVICE_HOST".to_owned())
        })
        .or_else(|| std::env::var("container").ok())
}
