//! `cargo xtask oracle`: our verbs definitions against those bindgen makes from the system's own headers.
//!
//! The oracle is a crate outside of the workspace, because it links libibverbs and needs its headers and libclang,
//! which nothing else here does.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::{apt, artifacts, process, rxe, workspace};

const HELP: &str = "\
cargo xtask oracle: compare our verbs definitions with the system's headers

USAGE
    cargo xtask oracle [--no-guest]

Runs the tests of tests/oracle: size, field offset and value of every verbs structure and constant kvpush defines by
hand, against rdma-sys; and the devices it finds, against the ibverbs crate. Needs the headers of libibverbs and
librdmacm, and libclang; on Debian, run as root, installs them.

Few machines have RDMA devices, so the comparison of the devices is run once more in a guest that has (see `cargo xtask
rxe --help`); --no-guest leaves that out.
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
/// The test of the oracle that compares devices.
const DEVICES_TEST: &str = "inventory";
const MANIFEST: &str = "tests/oracle/Cargo.toml";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    match args {
        [] => oracle(true),
        [no_guest] if no_guest == "--no-guest" => oracle(false),
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            Ok(())
        }
        _ => bail!("unknown arguments; see `cargo xtask oracle --help`"),
    }
}

/// Installs what is missing and runs the oracle's tests, and that of the devices in a guest, too.
pub(crate) fn oracle(guest: bool) -> Result<()> {
    let manifest = workspace::root().join(MANIFEST);
    if !Path::new(&manifest).exists() {
        bail!("{MANIFEST} does not exist");
    }
    apt::ensure(PACKAGES, "the verbs oracle")?;
    let mut command = process::cargo();
    command.args(["test", "--manifest-path"]).arg(&manifest);
    let target_dir = workspace::cache("oracle")?;
    process::run(command.arg("--target-dir").arg(&target_dir))?;
    if !guest {
        println!("NOT RUN: the comparison of devices in a guest that has some (--no-guest)");
        return Ok(());
    }
    let tests = artifacts::tests_of(&manifest, &target_dir)?;
    let inventory = tests.iter().find(|test| test.name == DEVICES_TEST);
    let inventory =
        inventory.with_context(|| format!("the oracle has no test {DEVICES_TEST:?}"))?;
    let path = inventory.path.to_string_lossy().into_owned();
    rxe::main(&["--guests", "1", "--", &path].map(str::to_owned))
}
