//! `cargo xtask fuzz`: a run of the fuzz targets in `fuzz/`, from the seeds in `fuzz/corpus`.
//!
//! The targets are those of cargo-fuzz, but neither it nor a nightly compiler is needed: what cargo-fuzz adds is a set
//! of compiler options, and the stable compiler knows them when `RUSTC_BOOTSTRAP=1` allows it to. libFuzzer itself
//! comes with the crate libfuzzer-sys, whose build needs a C++ compiler.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

const HELP: &str = "\
cargo xtask fuzz: the decoders under libFuzzer and the address sanitizer

USAGE
    cargo xtask fuzz [--seconds N] [TARGET...]

Builds the targets and runs each of them from its seeds. An input that breaks a property is written to the folder that
is named then, and the exit status is 1. Repeat it with the command that is printed.

OPTIONS
    TARGET         Only these (default: all in fuzz/fuzz_targets)
    --seconds N    For all of them together (default 70)
    -h, --help     Show this text
";

/// What cargo-fuzz passes to the compiler, too: counters for each edge, comparisons traced, and the sanitizer.
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Zsanitizer=address",
];
/// Named, so that build scripts and macros are not instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// `cargo xtask fuzz`.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let mut seconds = 70u64;
    let mut chosen = Vec::new();
    let mut words = args.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-h" | "--help" => {
                print!("{HELP}");
                return Ok(());
            }
            "--seconds" => {
                let value = words.next().context("--seconds needs a number")?;
                seconds = value
                    .parse()
                    .with_context(|| format!("--seconds {value}"))?;
            }
            option if option.starts_with('-') => bail!("unknown option {option:?}; see --help"),
            target => chosen.push(target.to_owned()),
        }
    }
    fuzz(seconds, chosen)
}

/// Runs the targets named, or all, for `seconds` in all.
pub(crate) fn fuzz(seconds: u64, chosen: Vec<String>) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = chosen.iter().find(|name| !all.contains(name)) {
        bail!("no target {unknown:?}; there are: {}", all.join(", "));
    }
    let chosen = if chosen.is_empty() { all } else { chosen };
    if process::find_program("c++").is_none() {
        bail!(
            "there is no C++ compiler (c++), which libFuzzer is built with; on Debian: apt-get install g++"
        );
    }
    let target_dir = workspace::cache("fuzz")?;
    let manifest = workspace::root().join("fuzz/Cargo.toml");
    let mut build = process::cargo();
    build
        .args(["build", "--release", "--target", TRIPLE, "--manifest-path"])
        .arg(&manifest)
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    process::run(&mut build)?;
    let each = (seconds / chosen.len().max(1) as u64).max(1);
    let mut failed = Vec::new();
    for name in &chosen {
        let program = target_dir.join(TRIPLE).join("release").join(name);
        let began = Instant::now();
        match run(&program, name, each)? {
            Some(inputs) => println!(
                "{name}: passed, {inputs} inputs in {:.0} s",
                began.elapsed().as_secs_f64()
            ),
            None => failed.push(name.as_str()),
        }
    }
    println!(
        "{} passed, {} failed",
        chosen.len() - failed.len(),
        failed.len()
    );
    if !failed.is_empty() {
        bail!("broken: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs one target. Returns how many inputs it has tried, or nothing if one broke it.
fn run(program: &Path, name: &str, seconds: u64) -> Result<Option<u64>> {
    let found = workspace::cache(&format!("fuzz/corpus/{name}"))?;
    let artifacts = workspace::cache(&format!("fuzz/artifacts/{name}"))?;
    let seeds = workspace::root().join("fuzz/corpus").join(name);
    let mut command = std::process::Command::new(program);
    command
        .arg(&found)
        .arg(&seeds)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096"]);
    let output = command
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("{told}");
        eprintln!(
            "{name}: BROKEN; repeat it with `{} FILE`, the file being named above",
            program.display()
        );
        return Ok(None);
    }
    let inputs = executed(&told)
        .with_context(|| format!("{name} does not say what it has done:\n{told}"))?;
    // A handshake for each input takes its time under the sanitizer, but these are none at all.
    if inputs < 20 {
        bail!("{name} has tried only {inputs} inputs");
    }
    Ok(Some(inputs))
}

fn executed(told: &str) -> Option<u64> {
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    line.trim().parse().ok()
}

fn targets() -> Result<Vec<String>> {
    let folder: PathBuf = workspace::root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in
        std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
    {
        let path = entry?.path();
        if let (Some(name), Some("rs")) = (
            path.file_stem().and_then(|name| name.to_str()),
            path.extension().and_then(|extension| extension.to_str()),
        ) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says() {
        let told =
            "#7\tDONE\nstat::number_of_executed_units: 4711\nstat::average_exec_per_sec: 1\n";
        assert_eq!(executed(told), Some(4711));
        assert_eq!(executed("#7 DONE"), None);
    }

    #[test]
    fn the_targets_are_found() {
        assert!(targets().unwrap().contains(&"message".to_owned()));
        assert!(fuzz(1, vec!["nothing".to_owned()]).is_err());
    }
}
