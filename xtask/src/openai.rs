//! `cargo xtask openai`: the engine's API by the `openai` Python client.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{apt, process, workspace};

const HELP: &str = "\
cargo xtask openai: every endpoint of kvpush-engine, by the `openai` Python client

USAGE
    cargo xtask openai [ARGUMENTS OF `kvpush-engine serve`...]

Builds kvpush-engine, makes a virtual environment with the client below the target folder, and runs
examples/engine/tests/openai/script.py, which starts the engine with its tiny built-in model (or what the arguments
say). Needs python3 with venv (on Debian, run as root, it is installed) and a package index that pip can reach.

EXAMPLE
    cargo xtask openai --model smollm2 -tp 3
";

/// The client that the script was written for; a new one is a decision.
const CLIENT: &str = "openai==3.54.0";
const SCRIPT: &str = "examples/engine/tests/openai/script.py";

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    if let [help] = args
        && (help == "--help" || help == "-h")
    {
        print!("{HELP}");
        return Ok(());
    }
    openai(args)
}

/// Runs the script, with these arguments for the engine.
pub(crate) fn openai(args: &[String]) -> Result<()> {
    process::run(process::cargo().args([
        "build",
        "-p",
        "kvpush-engine",
        "--bin",
        "kvpush-engine",
    ]))?;
    let engine = workspace::target_dir().join("debug/kvpush-engine");
    let python = environment()?;
    let mut script = Command::new(python);
    script.arg(workspace::root().join(SCRIPT)).arg(engine);
    process::run(script.args(args))
}

/// The Python of an environment that has the client.
fn environment() -> Result<PathBuf> {
    let folder = workspace::cache("openai-client")?;
    let python = folder.join("bin/python");
    let mark = folder.join("installed");
    if std::fs::read_to_string(&mark).is_ok_and(|installed| installed == CLIENT) {
        return Ok(python);
    }
    make(&folder)?;
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        CLIENT,
    ];
    process::run(Command::new(&python).args(install))?;
    std::fs::write(&mark, CLIENT).with_context(|| format!("writing {}", mark.display()))?;
    Ok(python)
}

fn make(folder: &Path) -> Result<()> {
    let has_venv = |python: &Path| {
        let check = Command::new(python)
            .args(["-c", "import ensurepip, venv"])
            .output();
        check.is_ok_and(|output| output.status.success())
    };
    let usable = process::find_program("python3").filter(|python| has_venv(python));
    let python = match usable {
        Some(python) => python,
        None => {
            apt::ensure(&["python3", "python3-venv"], "the openai client")?;
            match process::find_program("python3") {
                Some(python) => python,
                None => bail!(
                    "there is no python3, so the engine's API cannot be tested with the openai client"
                ),
            }
        }
    };
    process::run(
        Command::new(python)
            .args(["-m", "venv", "--clear"])
            .arg(folder),
    )
}
