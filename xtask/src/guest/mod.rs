//! Linux guests in QEMU which have soft-RoCE devices, for machines whose own kernel has none.
//!
//! A guest boots Debian's kernel under software emulation (TCG; no KVM needed). Its root is this machine's root file
//! system, read-only over 9p, with a scratch layer on top: programs run at the paths they were built at, may write
//! anywhere, and change nothing here. What is to survive goes to `/out`, a folder shared with the host.
//!
//! - [`kernel`] downloads and unpacks the kernel, [`sources`] says from where, [`modules`] orders its modules, [`bzimage`] unpacks its image
//! - [`initramfs`] packs the guest's first process (`init.sh`) with [`cpio`]
//! - [`builder`] says what a guest is, [`qemu`] starts it, [`supervise`] runs a group of them to the end
//! - [`console`] reads what they report; [`perftest`] runs and reads `ib_write_bw`
//!
//! Emulation makes everything some twenty times slower than real hardware: trust results and ratios, not speeds.

mod builder;
mod bzimage;
mod console;
mod cpio;
mod initramfs;
mod kernel;
mod modules;
pub(crate) mod perftest;
mod qemu;
mod sources;
mod supervise;

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::Hasher;
use std::path::PathBuf;

use anyhow::Result;

pub(crate) use builder::{Guest, quote};
pub(crate) use kernel::Choice;
pub(crate) use supervise::{Outcome, run};

use crate::{apt, workspace};

/// What the guests need on the host. Most of it is used inside of them, from the host's root.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "xz-utils",
    "zstd",
    "iproute2",
    "rdma-core",
    "ibverbs-providers",
    "ibverbs-utils",
    "perftest",
];

/// What guests boot from.
#[derive(Debug)]
pub(crate) struct Machine {
    kernel: PathBuf,
    initramfs: PathBuf,
    version: String,
    /// One xtask at a time: the cache and the folders of the runs have fixed names.
    _lock: File,
}

/// Installs and downloads what is missing and returns what guests boot from.
pub(crate) fn prepare(choice: Choice, update_kernel: bool) -> Result<Machine> {
    apt::ensure(PACKAGES, "running soft-RoCE guests")?;
    workspace::cache("rxe")?;
    let lock = workspace::lock("rxe/lock")?;
    let kernel = kernel::prepare(choice, update_kernel)?;
    let initramfs = initramfs::prepare(&kernel)?;
    Ok(Machine {
        kernel: kernel.image,
        initramfs,
        version: kernel.version,
        _lock: lock,
    })
}

/// A short name for content, to tell cached files apart. Not for anything an attacker may choose.
fn key_of(content: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    format!("{:016x}", hasher.finish())
}
