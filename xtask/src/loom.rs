//! `cargo xtask loom` and `cargo xtask miri`.

use anyhow::{Result, bail};

use crate::{process, workspace};

const LOOM_HELP: &str = "\
cargo xtask loom: every order of memory accesses in the lock-free parts of the library (tests/loom)

USAGE
    cargo xtask loom
";

const MIRI_HELP: &str = "\
cargo xtask miri: the tests of the pure layers (kv, wire, protocol) under miri

USAGE
    cargo xtask miri

Needs a toolchain with the component miri. Without it the command says so and fails: it has shown nothing then.
";

/// What has no foreign functions, and is small enough.
const PURE: [&str; 3] = ["protocol::", "kv::", "wire::imm"];

/// `cargo xtask loom`.
pub(crate) fn loom(args: &[String]) -> Result<()> {
    match args {
        [] => {}
        [help] if help == "-h" || help == "--help" => {
            print!("{LOOM_HELP}");
            return Ok(());
        }
        _ => bail!("it takes no arguments; see --help"),
    }
    let mut command = process::cargo();
    command
        .args(["test", "--manifest-path"])
        .arg(workspace::root().join("tests/loom/Cargo.toml"))
        .env("CARGO_TARGET_DIR", workspace::cache("loom")?)
        .env("RUSTFLAGS", "--cfg loom")
        // All orders with at most three forced switches of threads, which finds all that is known to be found.
        .env("LOOM_MAX_PREEMPTIONS", "3");
    process::run(&mut command)
}

/// `cargo xtask miri`.
pub(crate) fn miri(args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "-h" || arg == "--help") {
        print!("{MIRI_HELP}");
        return Ok(());
    }
    let mut probe = process::cargo();
    if process::output(probe.args(["miri", "--version"])).is_err() {
        bail!(
            "not run: this toolchain has no miri (`cargo miri --version` fails; it comes with nightly toolchains: \
             `rustup component add miri`). It would run the library's tests of {}",
            PURE.join(", ")
        );
    }
    let mut command = process::cargo();
    command
        .args(["miri", "test", "--package", "kvpush", "--lib", "--"])
        .args(PURE)
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .env("PROPTEST_CASES", "4");
    process::run(&mut command)
}
