//! Running other programs, and telling the developer which stage is running and how long it took.

use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The cargo that called us (the toolchain the developer chose), or the one on PATH; with our own target folder, from
/// wherever it is called.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(crate::workspace::root())
        .env("CARGO_TARGET_DIR", crate::workspace::target_dir());
    command
}

/// Runs `command` with our own stdin, stdout and stderr; fails when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = describe(command);
    let status = command
        .status()
        .with_context(|| format!("starting `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed: {status}");
    }
    Ok(())
}

/// Runs `command` and returns what it wrote to stdout; its stderr is shown only when it fails.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let shown = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting `{shown}`"))?;
    if !output.status.success() {
        bail!(
            "`{shown}` failed: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(output.stdout)
}

/// As [`output`], as text.
pub(crate) fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// Whether a program of this name is on PATH, or in the administrator's folders which a user's PATH may lack.
pub(crate) fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(std::path::PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// Runs one stage between a header and a line with the time it took.
pub(crate) fn stage(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("\n==== {name}");
    let start = Instant::now();
    let result = body().with_context(|| format!("stage {name:?}"));
    let outcome = if result.is_ok() { "passed" } else { "FAILED" };
    println!(
        "==== {name}: {outcome} after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    result
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
