//! `cargo xtask`: everything a developer or the CI does besides plain `cargo build`.
//!
//! One file per command. A command returns `Ok(())` only when everything it promises has been done and has passed;
//! nothing is skipped without a loud line saying so.

mod apt;
mod artifacts;
mod audit;
mod checks;
mod fuzz;
mod gpu_libs;
mod guest;
mod instructions;
mod loom;
mod mutants;
mod oracle;
mod process;
mod rxe;
mod sim;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
cargo xtask: developer tasks of kvpush

USAGE
    cargo xtask <COMMAND> [OPTIONS]        (each command has its own --help)

COMMANDS
    test      Every test there is: unit, property, simulated and two-process tests, doc tests, then soft-RoCE guests
    ci        What the CI runs: fmt, clippy, docs, audit, oracle, then `test`
    rxe       Run the RDMA tests, kvpush-bench, perftest or your own command over soft-RoCE in QEMU guests
    sim       Thousands of schedules of whole endpoints in simulated time, under faults
    fuzz      Run the fuzz targets from their seeds: every decoder, with libFuzzer and the address sanitizer
    loom      Every order of memory accesses in the lock-free parts
    miri      The tests of the pure layers under miri, where the toolchain has it
    instructions  Count the instructions that a page costs, over a null device, against bounds in the repository
    mutants   Break the code of an invariant on purpose, one mutation at a time, and see a test notice
    audit     Check the dependency tree with cargo-deny: licences, sources, bans, security advisories
    gpu-libs  Our GPU bindings against the real ROCm libraries and headers (Debian's), and cuda.h where there is one
    oracle    Compare our hand-made verbs definitions with the ones bindgen makes from the system's headers
    help      Show this text

EXAMPLES
    cargo xtask test                       # all of it; installs what the guests need (Debian, root)
    cargo xtask test --no-rxe              # on a machine which cannot run QEMU
    cargo xtask rxe -- ibv_devinfo -v      # one command in a guest with two RDMA devices
    cargo xtask rxe --guests 2 --perftest  # ib_write_bw between two guests
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: ERROR: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &[String]) -> Result<()> {
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", args),
    };
    match command {
        "test" => checks::test(rest),
        "ci" => checks::ci(rest),
        "rxe" => rxe::main(rest),
        "sim" => sim::main(rest),
        "fuzz" => fuzz::main(rest),
        "loom" => loom::loom(rest),
        "miri" => loom::miri(rest),
        "instructions" => instructions::main(rest),
        "mutants" => mutants::main(rest),
        "audit" => audit::main(rest),
        "gpu-libs" => gpu_libs::main(rest),
        "oracle" => oracle::main(rest),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => bail!("there is no command {other:?}; `cargo xtask help` lists them"),
    }
}
