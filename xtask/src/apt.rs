//! Debian packages: which are missing, and installing just those.
//!
//! Only ever adds packages, from the sources this machine's own apt configuration names. On another system, or without
//! the right to install, it changes nothing and says what to install.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process;

/// Installs those of `packages` which are missing. `purpose` completes the sentence "needed for …".
pub(crate) fn ensure(packages: &[&str], purpose: &str) -> Result<()> {
    let debian =
        Path::new("/etc/debian_version").exists() && process::find_program("dpkg-query").is_some();
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !debian || !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !debian {
        bail!(
            "{purpose} needs what Debian packages as: {list}\nThis is not a Debian system, and only there can the \
               guests be built: their kernel comes from apt"
        );
    }
    if !is_root() {
        bail!(
            "{purpose} needs packages which are not installed. As root, run:\n    apt-get install {list}"
        );
    }
    println!("installing for {purpose}: {list}");
    // Without package lists (a fresh container) or with outdated ones the first attempt fails; refreshing them first
    // every time would need the network on every run.
    if install(&missing).is_err() {
        update()?;
        install(&missing)?;
    }
    Ok(())
}

/// Refreshes the package lists.
pub(crate) fn update() -> Result<()> {
    if !is_root() {
        bail!("the package lists are missing or outdated. As root, run:\n    apt-get update");
    }
    process::output(Command::new("apt-get").args(["update", "-q"]))
        .context("refreshing the package lists")?;
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args([
            "install",
            "--yes",
            "--quiet",
            "--no-install-recommends",
            "-o",
            "Dpkg::Use-Pty=0",
        ])
        .args(packages);
    process::output(&mut command).map(|_| ())
}

fn is_installed(package: &str) -> bool {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Abbrev}", package])
        .stderr(Stdio::null())
        .output();
    // The second letter is the package's actual state; the first is what is wanted of it ("hold" is fine, too).
    output.is_ok_and(|output| output.status.success() && output.stdout.get(1) == Some(&b'i'))
}

fn is_root() -> bool {
    // SAFETY: geteuid(2) takes no argument, touches no memory of ours and cannot fail.
    unsafe { libc::geteuid() == 0 }
}
