//! `cargo xtask oracle`: our verbs definitions against those bindgen makes from the system's own headers.
//!
//! The oracle is a crate outside of the workspace, because it links libibverbs and needs its headers and libclang,
//! which nothing else here does.

use std::path::Path;

use anyhow::{Result, bail};

use crate::{apt, process, workspace};

const HELP: &str = "\
cargo xtask oracle: compare our verbs definitions with the system's headers

USAGE
    cargo xtask oracle

Runs the tests of tests/oracle: size, field offset and value of every verbs structure and constant kvpush defines by
hand, against rdma-sys; and the devices it finds, against the ibverbs crate. Needs the headers of libibverbs and
librdmacm, and libclang; on Debian, run as root, installs them.
";

const PACKAGES: &[&str] = &[
    "cmake",
    "libclang-dev",
    "libibverbs-dev",
    "libnl-3-dev",
    "libnl-route-3-dev",
    "librdmacm-dev",
    "pkg-config",
];
const MANIFEST: &str = "tests/oracle/Cargo.toml";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    match args {
        [] => oracle(),
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            Ok(())
        }
        _ => bail!("`cargo xtask oracle` takes no arguments"),
    }
}

/// Installs what is missing and runs the oracle's tests.
pub(crate) fn oracle() -> Result<()> {
    let manifest = workspace::root().join(MANIFEST);
    if !Path::new(&manifest).exists() {
        bail!("{MANIFEST} does not exist");
    }
    apt::ensure(PACKAGES, "the verbs oracle")?;
    let mut command = process::cargo();
    command.args(["test", "--manifest-path"]).arg(&manifest);
    process::run(command.arg("--target-dir").arg(workspace::cache("oracle")?))
}
