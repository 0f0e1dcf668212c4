//! The layers of `docs/architecture.md`, held against the sources: what each may name of this crate.

use std::{fs, path::Path};

/// Each layer, and those it may use beside itself.
const LAYERS: [(&str, &[&str]); 7] = [
    ("kv", &[]),
    ("wire", &["kv"]),
    ("protocol", &[]),
    ("memory", &[]),
    ("topology", &["memory"]),
    ("fabric", &["wire", "memory"]),
    (
        "endpoint",
        &["kv", "wire", "protocol", "memory", "topology", "fabric"],
    ),
];

fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("the sources are here") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push((
                path.display().to_string(),
                fs::read_to_string(&path).expect("text"),
            ));
        }
    }
}

/// The layers that `text` names: by `crate::layer`, or inside of `use crate::{ … }`, which rustfmt breaks into lines.
fn named(text: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
    {
        inside = (inside || line.ends_with("use crate::{")) && !line.ends_with("};");
        for (layer, _) in LAYERS {
            let direct = format!("crate::{layer}");
            let mut uses = line.split(&direct).skip(1);
            let is_direct = uses.any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()));
            if is_direct || inside && line.starts_with(&format!("    {layer}::")) {
                found.push(layer);
            }
        }
    }
    found
}

#[test]
fn no_layer_names_one_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (layer, allowed) in LAYERS {
        let mut files = Vec::new();
        sources(&root.join(layer), &mut files);
        assert!(!files.is_empty(), "{layer} has no sources");
        for (path, text) in files.iter().filter(|(path, _)| !path.contains("tests")) {
            for used in named(text).into_iter().filter(|used| *used != layer) {
                assert!(
                    allowed.contains(&used),
                    "{path}: {layer} must not use {used}"
                );
            }
        }
    }
}

#[test]
fn a_forbidden_name_is_found() {
    let found = named;
    assert_eq!(found("use crate::endpoint::Push;"), ["endpoint"]);
    assert_eq!(found("use crate::{\n    fabric::Device,\n};"), ["fabric"]);
    assert_eq!(found("// crate::endpoint is not code"), Vec::<&str>::new());
}
