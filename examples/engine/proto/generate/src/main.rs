//! Writes the Rust code of the engine's gRPC service. `cargo xtask proto` calls this.

use std::{error::Error, fs, path::Path};

use sha2::{Digest, Sha256};

fn main() -> Result<(), Box<dyn Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let source = fs::read(proto.join("engine.proto"))?;
    let descriptors = protox::compile(["engine.proto"], [&proto])?;
    let scratch = tempdir()?;
    tonic_prost_build::configure()
        .build_transport(true)
        .out_dir(&scratch)
        .compile_fds(descriptors)?;
    let code = fs::read_to_string(scratch.join("kvpush.engine.v1.rs"))?;
    fs::remove_dir_all(&scratch)?;
    let digest: String = Sha256::digest(&source)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let header = format!(
        "// From proto/engine.proto by `cargo xtask proto`; do not edit.\n// sha256 of that file: {digest}\n"
    );
    let target = proto.join("../src/serve/grpc/generated.rs");
    fs::write(&target, format!("{header}{code}"))?;
    println!("wrote {}", target.canonicalize()?.display());
    Ok(())
}

fn tempdir() -> std::io::Result<std::path::PathBuf> {
    let path = std::env::temp_dir().join(format!("kvpush-engine-proto-{}", std::process::id()));
    fs::create_dir_all(&path)?;
    Ok(path)
}
