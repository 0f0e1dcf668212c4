//! The main job: the decode side as a child process, the prefill side here.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kvpush::Auth;

use crate::{
    cases,
    cli::{FabricArgs, FabricChoice, MemoryChoice, PollingChoice, RunArgs},
    error::{Context, Error, Result},
    measure, out,
    push::Session,
    serve::CHILD_KEY,
    wire::to_hex,
    workload::Side,
};

/// `kvpush-bench` without a command.
pub(crate) fn run(args: &RunArgs) -> Result<()> {
    args.fabric.check()?;
    let both = [Side::Prefill, Side::Decode];
    let cases = cases::select(&args.workload, &[(&both, measure::available_memory())])?;
    let mut key = [0; 32];
    random_bytes(&mut key)?;
    let key = to_hex(&key);
    let mut decode = Decode::start(&args.fabric, args.memory.memory, &key)?;
    out::say(format_args!(
        "prefill: process {}; decode: process {}",
        std::process::id(),
        decode.child.id()
    ));
    let address = decode.address.clone();
    Session::open(&address, args, Auth::passphrase(&key))
        .and_then(|mut session| session.run_all(&cases))
        .map_err(|error| decode.explain(error))
}

/// Fills `bytes` from the operating system.
pub(crate) fn random_bytes(bytes: &mut [u8]) -> Result<()> {
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(bytes))
        .context("/dev/urandom")
}

/// The child; it ends with this value.
pub(crate) struct Decode {
    child: Child,
    address: String,
}

impl Decode {
    /// Starts it.
    pub(crate) fn start(fabric: &FabricArgs, memory: MemoryChoice, key: &str) -> Result<Self> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        // In the environment, where other users do not see it, unlike arguments.
        command
            .env(CHILD_KEY, key)
            .arg("decode")
            .args(arguments(fabric))
            .args(["--memory".to_owned(), memory.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start the decode process")?;
        let mut line = String::new();
        let read = match child.stdout.take() {
            Some(stdout) => BufReader::new(stdout).read_line(&mut line),
            None => Ok(0),
        };
        let mut decode = Self {
            child,
            address: line.trim().to_owned(),
        };
        match read {
            Ok(1..) => Ok(decode),
            _ => Err(decode.explain(Error::failed("the decode process did not start"))),
        }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Adds how the child has ended, if it has.
    pub(crate) fn explain(&mut self, error: Error) -> Error {
        // If it has just died, the news takes a moment.
        std::thread::sleep(Duration::from_millis(50));
        match (error, self.child.try_wait()) {
            (Error::Failed(text), Ok(Some(status))) => {
                Error::failed(format!("{text} (the decode process has ended: {status})"))
            }
            (error, _) => error,
        }
    }
}

impl Drop for Decode {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It had its time; nothing else is left to do about a failure here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As the command line has it.
pub(crate) fn fabric_name(fabric: FabricChoice) -> &'static str {
    match fabric {
        FabricChoice::Auto => "auto",
        FabricChoice::Tcp => "tcp",
        FabricChoice::Shm => "shm",
        FabricChoice::Verbs => "verbs",
    }
}

/// The child's command line.
fn arguments(fabric: &FabricArgs) -> Vec<String> {
    let choice = fabric_name(fabric.fabric);
    let mut arguments = vec!["--fabric".to_owned(), choice.to_owned()];
    if fabric.polling == PollingChoice::Busy {
        arguments.extend(["--polling".to_owned(), "busy".to_owned()]);
    }
    if !fabric.devices.is_empty() {
        arguments.extend(["--devices".to_owned(), fabric.devices.join(",")]);
    }
    for (name, value) in [
        ("--gid-index", fabric.gid_index),
        ("--traffic-class", fabric.traffic_class),
        ("--ack-timeout", fabric.ack_timeout),
    ] {
        arguments.extend(
            value
                .into_iter()
                .flat_map(|value| [name.to_owned(), value.to_string()]),
        );
    }
    arguments
}
