//! `cargo xtask mutants`: breaks the code that keeps an invariant, on purpose, and sees whether a test notices.
//!
//! The mutations are named and few (`table.rs`), one idea each; they are not made by a tool, so each is a mistake that
//! somebody could make. Each is applied in a copy of the working tree below the target folder, never in the tree
//! itself.

mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use self::table::{MUTATIONS, Mutation};
use crate::{process, workspace};

const HELP: &str = "\
cargo xtask mutants: does a test notice when an invariant's code is broken?

USAGE
    cargo xtask mutants [--list] [NAME...]

Applies one mutation at a time to a copy of the working tree, builds the library's tests and runs those that should
notice. A mutation that no test notices has survived; the exit status is 1 then. So it is when one cannot be applied or
does not compile, because then nothing has been shown. About a minute each.

OPTIONS
    NAME          Only the mutations whose names contain one of these
    --list        Name them
    -h, --help    Show this text
";

/// What became of a mutation.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// By these tests.
    Caught(Vec<String>),
    Survived,
}

/// `cargo xtask mutants`.
pub(crate) fn main(args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "-h" || arg == "--help") {
        print!("{HELP}");
        return Ok(());
    }
    if args.iter().any(|arg| arg == "--list") {
        for mutation in MUTATIONS {
            println!(
                "{}  {}  ({})",
                mutation.invariant, mutation.name, mutation.file
            );
        }
        return Ok(());
    }
    if let Some(option) = args.iter().find(|arg| arg.starts_with('-')) {
        bail!("unknown option {option:?}; see --help");
    }
    let chosen: Vec<&Mutation> = MUTATIONS
        .iter()
        .filter(|m| args.is_empty() || args.iter().any(|part| m.name.contains(part.as_str())))
        .collect();
    if chosen.is_empty() {
        bail!("no mutation of that name; see --list");
    }
    let copy = workspace::cache("mutants")?.join("source");
    let _lock = workspace::lock("mutants.lock")?;
    copy_tree(&copy)?;
    println!("unchanged: what must fail later must pass now");
    let filters: Vec<&str> = chosen.iter().flat_map(|m| m.tests).copied().collect();
    let output = test(&copy, &filters)?;
    if !output.status.success() {
        show(&output);
        bail!("the tests fail without any mutation");
    }
    let mut survivors = Vec::new();
    for mutation in &chosen {
        let began = Instant::now();
        let verdict = try_one(&copy, mutation)?;
        let seconds = began.elapsed().as_secs_f64();
        match verdict {
            Verdict::Caught(tests) => {
                println!("caught    {} ({seconds:.0} s), by", mutation.name);
                tests
                    .iter()
                    .for_each(|test| println!("              {test}"));
            }
            Verdict::Survived => {
                println!("SURVIVED  {} ({seconds:.0} s)", mutation.name);
                survivors.push(mutation.name);
            }
        }
    }
    println!(
        "\n{} passed, {} failed",
        chosen.len() - survivors.len(),
        survivors.len()
    );
    if !survivors.is_empty() {
        bail!("no test notices: {}", survivors.join(", "));
    }
    Ok(())
}

fn try_one(copy: &Path, mutation: &Mutation) -> Result<Verdict> {
    let path = copy.join(mutation.file);
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mutated = apply(&text, mutation)?;
    std::fs::write(&path, mutated).with_context(|| format!("writing {}", path.display()))?;
    let output = test(copy, mutation.tests);
    // Before anything else can fail.
    std::fs::write(&path, text).with_context(|| format!("restoring {}", path.display()))?;
    let output = output?;
    let verdict = judge(
        &String::from_utf8_lossy(&output.stdout),
        output.status.success(),
    );
    if verdict.is_none() {
        show(&output);
    }
    verdict.with_context(|| format!("{}: no test has run", mutation.name))
}

fn apply(text: &str, mutation: &Mutation) -> Result<String> {
    let found = text.matches(mutation.find).count();
    if found != 1 {
        bail!(
            "{}: what it changes occurs {found} times in {}, not once: the code has moved on, and the mutation must \
             follow it (xtask/src/mutants/table.rs)",
            mutation.name,
            mutation.file
        );
    }
    Ok(text.replacen(mutation.find, mutation.replace, 1))
}

/// What the output of the tests says; nothing if they have not run at all.
fn judge(stdout: &str, success: bool) -> Option<Verdict> {
    let mut ran = false;
    let mut failed = Vec::new();
    for line in stdout.lines() {
        let Some(rest) = line.strip_prefix("test ") else {
            continue;
        };
        if let Some(name) = rest.strip_suffix(" ... FAILED") {
            failed.push(name.to_owned());
        }
        ran |= rest.ends_with(" ... ok") || rest.ends_with(" ... FAILED");
    }
    match (success, failed.is_empty()) {
        (false, false) => Some(Verdict::Caught(failed)),
        (true, true) if ran => Some(Verdict::Survived),
        // An abort leaves no verdict of its test, but is noticed all the same.
        (false, true) if ran => Some(Verdict::Caught(vec!["(the process died)".to_owned()])),
        _ => None,
    }
}

fn test(copy: &Path, filters: &[&str]) -> Result<Output> {
    // A target folder of the same name: what does not belong to the workspace is not built again.
    let mut command: Command = process::cargo();
    command
        .current_dir(copy)
        .args(["test", "--package", "kvpush", "--lib", "--"])
        .args(filters)
        .env("RUST_BACKTRACE", "0");
    command.output().context("starting cargo")
}

fn show(output: &Output) {
    eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes `copy` what the working tree is, and touches only what differs.
fn copy_tree(copy: &Path) -> Result<()> {
    let root = workspace::root();
    let mut git = Command::new("git");
    git.current_dir(&root).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let listed = process::output(&mut git)?;
    for name in listed
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let name = PathBuf::from(String::from_utf8_lossy(name).into_owned());
        let from = root.join(&name);
        if !from.is_file() {
            continue;
        }
        let bytes = std::fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
        let to = copy.join(&name);
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        if let Some(folder) = to.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("creating {}", folder.display()))?;
        }
        std::fs::write(&to, bytes).with_context(|| format!("writing {}", to.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In every `cargo test`, so that a mutation cannot silently fall behind the code.
    #[test]
    fn every_mutation_still_applies() {
        for mutation in MUTATIONS {
            let path = workspace::root().join(mutation.file);
            let text = std::fs::read_to_string(&path).unwrap();
            let mutated = apply(&text, mutation).unwrap();
            assert_ne!(text, mutated, "{}", mutation.name);
            assert!(!mutation.tests.is_empty(), "{}", mutation.name);
        }
        let mut names: Vec<_> = MUTATIONS.iter().map(|mutation| mutation.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MUTATIONS.len(), "a name twice");
        assert!(names.len() >= 10);
    }

    #[test]
    fn verdicts() {
        let caught = "running 2 tests\ntest a::b ... FAILED\ntest c ... ok\n";
        assert_eq!(
            judge(caught, false),
            Some(Verdict::Caught(vec!["a::b".to_owned()]))
        );
        assert_eq!(judge("test c ... ok\n", true), Some(Verdict::Survived));
        assert_eq!(judge("running 0 tests\n", true), None, "nothing was shown");
        assert_eq!(judge("", false), None, "it does not compile");
        assert!(matches!(
            judge("test c ... ok\n", false),
            Some(Verdict::Caught(_))
        ));
    }
}
