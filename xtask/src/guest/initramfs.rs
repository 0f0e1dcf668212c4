//! The guest's initramfs: busybox, the modules and [`INIT`]; everything else comes from the host's root.
//!
//! Not compressed: it is some 6 MB, and unpacking in emulation costs more than loading.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::process;

const INIT: &str = include_str!("init.sh");

/// Finds the initramfs in the kernel's cache folder, or builds it.
pub(crate) fn prepare(kernel: &Kernel) -> Result<PathBuf> {
    let busybox = process::find_program("busybox")
        .context("busybox is not installed (Debian: busybox-static)")?;
    let busybox = fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;

    let mut archive = Archive::default();
    for directory in [
        "bin", "dev", "host", "modules", "proc", "root", "scratch", "sys",
    ] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", &busybox);
    archive.file("init", INIT.as_bytes());
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module
            .file_name()
            .and_then(|name| name.to_str())
            .context("a module without a name")?;
        archive.file(&format!("modules/{name}"), &fs::read(module)?);
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());

    let bytes = archive.finish();
    let path = kernel
        .dir
        .join(format!("initramfs-{}", super::key_of(&bytes)));
    if !path.exists() {
        let partial = path.with_extension(format!("part-{}", std::process::id()));
        fs::write(&partial, bytes)?;
        fs::rename(partial, &path)?;
    }
    Ok(path)
}
