//! `cargo xtask audit`: the dependency tree against `deny.toml`, by cargo-deny.
//!
//! Licences, sources and bans need nothing but the tree. Security advisories come from a database that is fetched with
//! git: where it cannot be, that is said and the other checks count; where it can, an advisory that hits fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

const HELP: &str = "\
cargo xtask audit: check the dependency tree with cargo-deny

USAGE
    cargo xtask audit

Checks licences, sources and bans as deny.toml says, then known security advisories. The advisory database is fetched
with git; when that is impossible (no network), this is said loudly and is no failure. An advisory that hits is.
cargo-deny is taken from PATH, or built once into target/tools (about two minutes).
";

/// The version to build. One on PATH is used from 0.18 on; older ones cannot read what today's cargo tells them.
const CARGO_DENY: &str = "0.20.2";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    match args {
        [] => audit(),
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            Ok(())
        }
        _ => bail!("`cargo xtask audit` takes no arguments"),
    }
}

/// Installs cargo-deny when it is missing and runs all checks.
pub(crate) fn audit() -> Result<()> {
    let deny = cargo_deny()?;
    process::run(check(&deny).args(["bans", "licenses", "sources"]))?;

    let fetched = Command::new(&deny)
        .current_dir(workspace::root())
        .args(["--workspace", "fetch", "db"])
        .stdin(Stdio::null())
        .output()
        .context("starting cargo-deny")?;
    if !fetched.status.success() {
        let reason = String::from_utf8_lossy(&fetched.stderr);
        println!(
            "NOT CHECKED: security advisories, because their database cannot be fetched here:"
        );
        println!(
            "    {}",
            reason
                .lines()
                .rfind(|line| !line.trim().is_empty())
                .unwrap_or("(no reason given)")
                .trim()
        );
        return Ok(());
    }
    process::run(check(&deny).arg("advisories"))
}

fn check(deny: &Path) -> Command {
    let mut command = Command::new(deny);
    command
        .current_dir(workspace::root())
        .args(["--workspace", "--all-features", "check"]);
    command
}

fn cargo_deny() -> Result<PathBuf> {
    let root = workspace::cache("tools/cargo-deny")?;
    let installed = root.join("bin/cargo-deny");
    if let Some(found) = process::find_program("cargo-deny").filter(|path| works(path)) {
        return Ok(found);
    }
    if !works(&installed) {
        println!("building cargo-deny {CARGO_DENY} (once)");
        let mut command = process::cargo();
        // Without optimisation it is built in a third of the time, and it has little to do.
        command
            .args([
                "install",
                "--quiet",
                "--debug",
                "--locked",
                "cargo-deny",
                "--version",
                CARGO_DENY,
                "--root",
            ])
            .arg(&root)
            .env("CARGO_TARGET_DIR", root.join("build"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        process::run(&mut command)?;
        let _ = std::fs::remove_dir_all(root.join("build"));
    }
    Ok(installed)
}

/// Whether this is a cargo-deny new enough: old ones panic on what today's cargo tells them.
fn works(path: &Path) -> bool {
    let version = process::text(Command::new(path).arg("--version")).unwrap_or_default();
    is_recent(&version)
}

fn is_recent(version: &str) -> bool {
    let number = version
        .trim()
        .strip_prefix("cargo-deny ")
        .unwrap_or_default();
    let mut parts = number.split('.').map_while(|part| part.parse::<u32>().ok());
    matches!(
        (parts.next(), parts.next()),
        (Some(1..), _) | (Some(0), Some(18..))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unreadable_versions_are_not_used() {
        assert!(
            is_recent("cargo-deny 0.18.3\n")
                && is_recent("cargo-deny 0.20.0")
                && is_recent("cargo-deny 1.0.0")
        );
        assert!(!is_recent("cargo-deny 0.14.2") && !is_recent("") && !is_recent("error"));
    }
}
