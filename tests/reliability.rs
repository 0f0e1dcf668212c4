//! The fault matrix in `docs/reliability.md` names tests. Each of them must exist, so that the page cannot rot.

use std::{collections::BTreeSet, fs, path::Path};

fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("the sources are here") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("text");
            for rest in text.split("fn ").skip(1) {
                let name = rest
                    .split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next();
                found.extend(name.map(str::to_owned));
            }
        }
    }
}

/// What stands in backquotes in the last column of the rows.
fn named(page: &str) -> Vec<(String, Vec<String>)> {
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains('`'));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let tests = cells.last().copied().unwrap_or_default();
        let names = tests.split('`').skip(1).step_by(2);
        (row.to_owned(), names.map(str::to_owned).collect())
    })
    .collect()
}

#[test]
fn every_test_of_the_fault_matrix_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/reliability.md")).expect("the page");
    let mut known = BTreeSet::new();
    functions(&root.join("src"), &mut known);
    functions(&root.join("tests"), &mut known);
    let rows = named(&page);
    assert!(rows.len() >= 20, "{} rows: is this the matrix?", rows.len());
    for (row, names) in rows {
        assert!(!names.is_empty(), "no test: {row}");
        for name in names {
            let function = name.rsplit("::").next().unwrap_or(&name);
            assert!(known.contains(function), "no test {name:?}: {row}");
        }
    }
}

#[test]
fn a_name_that_does_not_exist_is_found_out() {
    let rows = named("| a fault | sim | an end | 1 ms | `no_such_test` |\n| --- |\ntext `x`\n");
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].1, ["no_such_test"]);
}
