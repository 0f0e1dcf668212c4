//! Generates `header`: the whole verbs interface as bindgen reads it from the system's `<infiniband/verbs.h>`.
//!
//! `rdma-sys` writes fifteen types by hand, all that contain unions among them, so for those it is a second opinion,
//! not the header's. This module has every type from the header.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let out =
        PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("header.rs");
    bindgen::Builder::default()
        .header_contents("verbs.h", "#include <infiniband/verbs.h>\n")
        .allowlist_type("(ibv|verbs|ib_uverbs)_.*")
        .allowlist_function("_?ibv_.*")
        .allowlist_var("IBV_.*")
        .prepend_enum_name(false)
        .derive_debug(false)
        .layout_tests(false)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads <infiniband/verbs.h>; Debian has it in libibverbs-dev")
        .write_to_file(out)
        .expect("OUT_DIR is writable");
}
