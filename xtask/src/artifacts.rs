//! Builds executables and finds where cargo put them, from the messages cargo writes as JSON.
//!
//! Format: the Cargo book, "External tools", section "JSON messages".

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;

/// An executable cargo has built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// Name of its target: of a test file without `.rs`, or of a binary.
    pub(crate) name: String,
    /// `test`, `bin`, `lib`, …
    pub(crate) kind: String,
    pub(crate) path: PathBuf,
    /// Folder of its package, which is where `cargo test` runs tests.
    pub(crate) package_dir: PathBuf,
}

/// Builds every test of the workspace, running none.
pub(crate) fn tests(release: bool) -> Result<Vec<Executable>> {
    build(&["test", "--workspace", "--no-run"], release)
}

/// Builds every test of a package outside of the workspace, running none.
pub(crate) fn tests_of(manifest: &Path, target_dir: &Path) -> Result<Vec<Executable>> {
    let (manifest, target_dir) = (manifest.to_string_lossy(), target_dir.to_string_lossy());
    let arguments = [
        "test",
        "--no-run",
        "--manifest-path",
        &manifest,
        "--target-dir",
        &target_dir,
    ];
    build(&arguments, false)
}

/// Builds one binary of the workspace; the package has the same name.
pub(crate) fn binary(name: &str, release: bool) -> Result<Executable> {
    let built = build(&["build", "--package", name, "--bin", name], release)?;
    let found = built
        .into_iter()
        .find(|executable| executable.kind == "bin" && executable.name == name);
    found.with_context(|| format!("cargo built no binary {name:?}"))
}

/// Builds one benchmark of the library, running none.
pub(crate) fn bench(name: &str) -> Result<Executable> {
    let arguments = ["bench", "--no-run", "--package", "kvpush", "--bench", name];
    let found = build(&arguments, false)?
        .into_iter()
        .find(|executable| executable.kind == "bench" && executable.name == name);
    found.with_context(|| format!("cargo built no benchmark {name:?}"))
}

/// Builds the double of libibverbs, optimised, and says where it is.
pub(crate) fn verbs_double() -> Result<PathBuf> {
    let arguments = ["build", "--release", "--package", "kvpush-verbs-double"];
    process::run(process::cargo().args(arguments))?;
    let path = crate::workspace::target_dir().join("release/libkvpush_verbs_double.so");
    if !path.is_file() {
        bail!("cargo has not built {}", path.display());
    }
    Ok(path)
}

/// Builds the tests inside the library of `package` with a profile of its own, running none.
pub(crate) fn library_test(package: &str, profile: &str) -> Result<Executable> {
    let arguments = [
        "test",
        "--no-run",
        "--package",
        package,
        "--lib",
        "--profile",
        profile,
    ];
    let found = build(&arguments, false)?
        .into_iter()
        .find(|executable| executable.kind == "lib" && executable.name == package);
    found.with_context(|| format!("cargo built no tests of {package:?}"))
}

fn build(arguments: &[&str], release: bool) -> Result<Vec<Executable>> {
    let mut command = process::cargo();
    command
        .args(arguments)
        .arg("--message-format=json-render-diagnostics");
    if release {
        command.arg("--release");
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("`cargo {}` failed: {}", arguments.join(" "), output.status);
    }
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

fn executables(messages: &str) -> Vec<Executable> {
    messages.lines().filter_map(executable).collect()
}

fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let mut package_dir = PathBuf::from(text(&message["manifest_path"])?);
    package_dir.pop();
    Some(Executable {
        name: text(&message["target"]["name"])?,
        kind: text(&message["target"]["kind"][0])?,
        path: text(&message["executable"])?.into(),
        package_dir,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_other_messages() {
        let messages = r#"
{"reason":"compiler-artifact","manifest_path":"/w/Cargo.toml","target":{"kind":["lib"],"name":"kv"},"executable":null}
{"reason":"build-script-executed","package_id":"x"}
{"reason":"compiler-artifact","manifest_path":"/w/Cargo.toml","target":{"kind":["test"],"name":"rxe_a"},"executable":"/t/rxe_a-1"}
not json
{"reason":"build-finished","success":true}
"#;
        let found = executables(messages);
        let expected = Executable {
            name: "rxe_a".into(),
            kind: "test".into(),
            path: "/t/rxe_a-1".into(),
            package_dir: "/w".into(),
        };
        assert_eq!(found, [expected]);
    }
}
