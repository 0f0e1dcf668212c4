//! The command line of kvpush-engine.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::with_long_tp(std::env::args_os()));
    cli::logs::start(&cli.logs);
    let result = match cli.command {
        Command::Serve(args) => cli::serve::run(&args),
        Command::Info(args) => cli::info::run(&args),
        Command::Fetch => cli::fetch::run(),
        Command::Demo(args) => cli::demo::run(args),
        // An engine of the demo, in a process of its own.
        Command::Worker { arguments } => kvpush_engine::demo::worker::run(&arguments)
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kvpush-engine: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}
