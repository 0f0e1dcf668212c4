//! The table in `src/lib.rs`, held against the sources: what each module may name of this crate.

use std::{fs, path::Path};

/// Each module, and those it may use beside itself.
const LAYERS: [(&str, &[&str]); 5] = [
    ("request", &[]),
    ("model", &["request"]),
    ("transfer", &["request", "model"]),
    ("engine", &["request", "model", "transfer"]),
    ("serve", &["request", "model", "transfer", "engine"]),
];

/// Modules that put the others together. None of the layers may use them.
const TOP: [&str; 3] = ["runtime", "demo", "cli"];

fn sources(path: &Path, found: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("the sources are here") {
            sources(&entry.expect("an entry").path(), found);
        }
    } else if path.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
        let text = fs::read_to_string(path).expect("text");
        found.push((path.display().to_string(), text));
    }
}

/// The modules that `text` names: by `crate::module`, or inside of `use crate::{ … }`, which rustfmt breaks into lines.
fn named(text: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
    {
        inside = (inside || line.ends_with("use crate::{")) && !line.ends_with("};");
        for module in LAYERS.iter().map(|(layer, _)| *layer).chain(TOP) {
            let direct = format!("crate::{module}");
            let mut uses = line.split(&direct).skip(1);
            let is_direct = uses.any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()));
            let starts = |end| line.trim_start().starts_with(&format!("{module}{end}"));
            if is_direct || inside && (starts("::") || starts(",")) {
                found.push(module);
            }
        }
    }
    found
}

#[test]
fn no_module_names_one_that_it_must_not_know() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (layer, allowed) in LAYERS {
        let mut files = Vec::new();
        sources(&root.join(layer), &mut files);
        sources(&root.join(format!("{layer}.rs")), &mut files);
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
    assert_eq!(named("use crate::serve::Server;"), ["serve"]);
    assert_eq!(
        named("use crate::{\n    demo::Demo,\n    runtime,\n};"),
        ["demo", "runtime"]
    );
    assert_eq!(named("let x = crate::engine::Engine;"), ["engine"]);
    assert_eq!(named("// crate::engine is not code"), Vec::<&str>::new());
    assert_eq!(named("use crate::requested;"), Vec::<&str>::new());
}
