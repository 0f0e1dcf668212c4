//! `cargo xtask test` and `cargo xtask ci`: the stages, in order. The first that fails ends the run.

use anyhow::{Result, bail};

use crate::process::{self, stage};
use crate::{audit, fuzz, gpu_libs, instructions, loom, oracle, rxe, sim};

const TEST_HELP: &str = "\
cargo xtask test: every test there is

USAGE
    cargo xtask test [--no-rxe]

STAGES
    1. cargo test --workspace    unit, property, simulated and two-process tests, then the documentation's examples
    2. cargo xtask sim           10,000 schedules of whole endpoints in simulated time, under faults
    3. cargo xtask gpu-libs      the GPU bindings against Debian's ROCm libraries and headers, where this is Debian
    4. cargo xtask rxe           the RDMA suites and kvpush-bench over soft-RoCE, in QEMU guests

Stage 4 needs Debian on x86_64 with the packages it names; run as root it installs what is missing. If it cannot run,
`cargo xtask test` fails: RDMA that was not tested is not known to work.

OPTIONS
    --no-rxe      Leave stage 4 out
    -h, --help    Show this text
";

const CI_HELP: &str = "\
cargo xtask ci: what the CI runs

USAGE
    cargo xtask ci [--no-rxe]

STAGES
    cargo fmt --check; cargo clippy and cargo doc, warnings being errors; cargo xtask audit; cargo xtask oracle;
    cargo xtask loom; cargo xtask fuzz; cargo xtask instructions; cargo xtask test

OPTIONS
    --no-rxe      Leave the soft-RoCE guests out (see `cargo xtask test --help`)
    -h, --help    Show this text
";

/// `cargo xtask test`.
pub(crate) fn test(args: &[String]) -> Result<()> {
    match Choice::parse(args)? {
        Choice::Help => print!("{TEST_HELP}"),
        Choice::All => test_stages(true)?,
        Choice::WithoutRxe => test_stages(false)?,
    }
    Ok(())
}

/// `cargo xtask ci`.
pub(crate) fn ci(args: &[String]) -> Result<()> {
    let with_rxe = match Choice::parse(args)? {
        Choice::Help => {
            print!("{CI_HELP}");
            return Ok(());
        }
        Choice::All => true,
        Choice::WithoutRxe => false,
    };
    let start = std::time::Instant::now();
    stage("format", || {
        process::run(process::cargo().args(["fmt", "--all", "--check"]))
    })?;
    stage("clippy", || {
        let arguments = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ];
        process::run(process::cargo().args(arguments))
    })?;
    stage("documentation", || {
        let mut command = process::cargo();
        process::run(
            command
                .args(["doc", "--workspace", "--no-deps"])
                .env("RUSTDOCFLAGS", "-Dwarnings"),
        )
    })?;
    stage("audit", audit::audit)?;
    stage("oracle", || oracle::oracle(true))?;
    stage("loom", || loom::loom(&[]))?;
    stage("fuzzing", || fuzz::main(&[]))?;
    stage("instructions for each page", || instructions::main(&[]))?;
    test_stages(with_rxe)?;
    println!(
        "\n==== ci: passed after {:.0} s",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn test_stages(with_rxe: bool) -> Result<()> {
    let all_targets = [
        "test",
        "--workspace",
        "--lib",
        "--bins",
        "--tests",
        "--examples",
    ];
    stage("unit, property, simulated and two-process tests", || {
        process::run(process::cargo().args(all_targets))
    })?;
    stage("documentation's examples", || {
        process::run(process::cargo().args(["test", "--workspace", "--doc"]))
    })?;
    stage("simulated schedules", || sim::main(&[]))?;
    stage("GPU bindings against real libraries", gpu_libs::gpu_libs)?;
    if with_rxe {
        return stage("soft-RoCE", || rxe::main(&[]));
    }
    println!("\n****************************************************************************");
    println!("**** NOT TESTED: RDMA. --no-rxe left out everything that needs a device ****");
    println!("****************************************************************************");
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    All,
    WithoutRxe,
    Help,
}

impl Choice {
    fn parse(args: &[String]) -> Result<Self> {
        let mut choice = Self::All;
        for arg in args {
            match arg.as_str() {
                "--no-rxe" => choice = Self::WithoutRxe,
                "-h" | "--help" => return Ok(Self::Help),
                other => bail!("unknown option {other:?}; see --help"),
            }
        }
        Ok(choice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_the_known_options_is_taken() {
        let parse = |word: &str| Choice::parse(&[word.to_owned()]);
        assert_eq!(Choice::parse(&[]).unwrap(), Choice::All);
        assert_eq!(parse("--no-rxe").unwrap(), Choice::WithoutRxe);
        assert_eq!(parse("-h").unwrap(), Choice::Help);
        assert!(parse("--norxe").is_err());
    }
}
