//! `kvpush-bench`: how fast KV pages move here, whether every byte arrives, and what is wrong if not.
//!
//! | file | holds |
//! |---|---|
//! | `cli` | the command line |
//! | `workload`, `cases` | what is moved: plain data, its limits and its memory; which workloads an invocation runs |
//! | `content` | the byte formula, pools filled by it, and their verification |
//! | `wire` | messages between pusher and server |
//! | `push`, `serve`, `local` | the three ways to run: against a server, as one, and both here |
//! | `compare` | iperf3, perftest and memcpy beside our own rows |
//! | `report` | table, JSON rows, plot |
//! | `out`, `signals`, `measure` | words for people; Ctrl-C; CPU time, memory |
//! | `host` | what this host has: `devices`, `doctor`, and why the better fabric was not used |
//!
//! Exit codes: 0 everything verified, 1 something failed, 2 the command line makes no sense, 3 (`compare`) everything
//! verified but a program to compare with is not installed.

mod cases;
mod cli;
mod compare;
mod content;
mod error;
mod fabric;
mod host;
mod local;
mod measure;
mod out;
mod push;
mod report;
mod serve;
mod signals;
mod wire;
mod workload;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::{
    cli::{Cli, Command},
    error::{Error, Result},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Usage(text)) => {
            // Prints as clap prints its own, and exits with 2.
            Cli::command()
                .error(clap::error::ErrorKind::ValueValidation, text)
                .exit()
        }
        Err(error) => {
            out::note(format_args!("kvpush-bench: {error}"));
            match error {
                Error::Incomplete(_) => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    signals::catch()?;
    match cli.command {
        None => local::run(&cli.run),
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Push(args)) => push::run(&args),
        Some(Command::Compare(args)) => compare::run(&args),
        Some(Command::Devices(args)) => host::devices(&args),
        Some(Command::Doctor(args)) => host::doctor(&args),
        Some(Command::Decode(args)) => serve::run_child(&args),
    }
}
