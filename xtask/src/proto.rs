//! `cargo xtask proto`: the engine's gRPC code from its `.proto`.

use anyhow::{Result, bail};

use crate::{process, workspace};

const HELP: &str = "\
cargo xtask proto: write the code of the engine's gRPC service

USAGE
    cargo xtask proto

Builds examples/engine/proto/generate (a crate outside of the workspace; no protoc is needed) and writes
examples/engine/src/serve/grpc/generated.rs from examples/engine/proto/engine.proto. A test of kvpush-engine fails when
that has not been done after a change.
";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    match args {
        [] => {}
        [help] if help == "--help" || help == "-h" => {
            print!("{HELP}");
            return Ok(());
        }
        _ => bail!("unknown arguments; see `cargo xtask proto --help`"),
    }
    let manifest = workspace::root().join("examples/engine/proto/generate/Cargo.toml");
    let mut command = process::cargo();
    command
        .args(["run", "--quiet", "--manifest-path"])
        .arg(manifest);
    process::run(command.arg("--target-dir").arg(workspace::cache("proto")?))
}
