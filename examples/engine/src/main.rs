//! The command line of kvpush-engine.

use std::process::ExitCode;

use kvpush_engine::demo;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        // An engine of the demo, in a process of its own.
        Some((first, rest)) if first == "worker" => demo::worker::run(rest),
        _ => Err("usage: kvpush-engine worker …".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvpush-engine: {error}");
            ExitCode::FAILURE
        }
    }
}
