//! No struct or union of the binding escapes the layout tests: each one defined in the sources is named in both.
//!
//! Constants, functions and fields need no such test: theirs refuse what is not listed.

use std::fs;
use std::path::{Path, PathBuf};

/// Declared without fields on purpose: only pointed to.
const OPAQUE: &[&str] = &["_compat_ibv_port_attr"];
/// Files of the binding that define no C types; neither do those of `calls/`.
const NOT_LAYOUTS: &[&str] = &["error.rs", "table.rs"];

fn sources() -> Vec<PathBuf> {
    let sys = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src/fabric/verbs/sys");
    let entries = fs::read_dir(&sys).unwrap_or_else(|error| panic!("{}: {error}", sys.display()));
    let paths = entries.map(|entry| entry.expect("a directory entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

fn types() -> Vec<String> {
    let mut names = Vec::new();
    for path in sources() {
        if NOT_LAYOUTS.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a source file");
        for line in text.lines() {
            let rest = line
                .strip_prefix("pub struct ")
                .or_else(|| line.strip_prefix("pub union "));
            if let Some(name) = rest.and_then(|rest| rest.split_whitespace().next()) {
                names.push(name.to_owned());
            }
        }
    }
    names
}

#[test]
fn every_type_is_compared_with_both() {
    let types = types();
    assert!(
        types.iter().any(|name| name == "ibv_send_wr"),
        "the sources were not understood: {types:?}"
    );
    for (file, text) in [
        ("layout_header.rs", include_str!("layout_header.rs")),
        ("layout_rdma_sys.rs", include_str!("layout_rdma_sys.rs")),
    ] {
        let words: Vec<&str> = text
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        for name in types.iter().filter(|name| !OPAQUE.contains(&name.as_str())) {
            let listed = words
                .windows(3)
                .any(|three| three[0] == "ours" && three[2] == name);
            assert!(listed, "{name} is not compared in {file}");
        }
    }
}
