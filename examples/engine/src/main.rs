//! The command line of kvpush-engine.

use std::process::ExitCode;

use kvpush_engine::demo::{self, Chat};

const USAGE: &str = "usage: kvpush-engine demo [--model tiny|FILE] [--prefill-tp N] [--decode-tp N] [--fabric tcp|shm|verbs]
                          [--message TEXT] [--max-tokens N]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((first, rest)) if first == "demo" => run_demo(rest),
        // An engine of the demo, in a process of its own.
        Some((first, rest)) if first == "worker" => demo::worker::run(rest),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvpush-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_demo(arguments: &[String]) -> Result<(), String> {
    let chat = Chat::parse(arguments)?;
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let report = chat.run(&program, &mut std::io::stdout());
    let report = report.map_err(|error| error.to_string())?;
    println!("\n{report}");
    Ok(())
}
