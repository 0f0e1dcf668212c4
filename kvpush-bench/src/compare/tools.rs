//! Other people's programs: whether they are there, and running a server and a client of one beside each other.
//!
//! Invariant: no process outlives the value that holds it.

use std::{
    io::Read,
    net::TcpListener,
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    error::{Context, Error, Result},
    signals,
};

/// How long a server may take until it listens.
const STARTING: Duration = Duration::from_secs(30);

/// How long one measurement may take. Emulated machines are slow.
const LONGEST: Duration = Duration::from_secs(300);

/// How often it is looked whether a program has ended.
const TICK: Duration = Duration::from_millis(20);

/// Whether `program` is found and can be started.
pub(super) fn is_installed(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version");
    let output = command.stdin(Stdio::null()).output();
    output.is_ok()
}

/// The first line of what `program --version` prints, for the record.
pub(super) fn version(program: &str) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.to_owned())
}

/// A TCP port that was free a moment ago.
pub(super) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("0.0.0.0", 0)).context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.port())
}

/// What a program printed, and how it ended.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) status: ExitStatus,
    pub(super) text: String,
    /// Its errors.
    pub(super) errors: String,
}

impl Output {
    /// The end of what it said, for an error message.
    fn last_words(&self) -> String {
        let all = format!("{}\n{}", self.text, self.errors);
        let lines: Vec<_> = all.lines().filter(|line| !line.trim().is_empty()).collect();
        let from = lines.len().saturating_sub(4);
        lines.get(from..).unwrap_or_default().join(" | ")
    }
}

/// A program that runs.
struct Running {
    child: Child,
    name: String,
    text: Option<JoinHandle<String>>,
    errors: Option<JoinHandle<String>>,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context(format_args!("start {name}"))?;
        let text = child.stdout.take().map(reader);
        let errors = child.stderr.take().map(reader);
        Ok(Self {
            child,
            name,
            text,
            errors,
        })
    }

    fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context(&self.name)
    }

    fn wait(&mut self, deadline: Instant) -> Result<Output> {
        let status = loop {
            if let Some(status) = self.has_ended()? {
                break status;
            }
            signals::check()?;
            if Instant::now() >= deadline {
                return Err(Error::failed(format!(
                    "{} did not end within {LONGEST:?}",
                    self.name
                )));
            }
            std::thread::sleep(TICK);
        };
        let join = |thread: Option<JoinHandle<String>>| {
            thread.map_or_else(String::new, |thread| thread.join().unwrap_or_default())
        };
        Ok(Output {
            status,
            text: join(self.text.take()),
            errors: join(self.errors.take()),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended in most cases; nothing is left to do about a failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn reader(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is worth having.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Starts `server`, runs `client` until it has found it (`refused` says of an output that nobody listened yet), and
/// returns what the client printed.
pub(super) fn pair(
    server: &mut Command,
    client: &mut Command,
    refused: impl Fn(&Output) -> bool,
) -> Result<Output> {
    let mut server = Running::start(server)?;
    let started = Instant::now();
    loop {
        let mut running = Running::start(client)?;
        let output = running.wait(Instant::now() + LONGEST)?;
        if output.status.success() {
            return Ok(output);
        }
        if let Some(status) = server.has_ended()? {
            let server = server.wait(Instant::now())?;
            return Err(Error::failed(format!(
                "{}: the server ended with {status}: {}; the client: {}",
                running.name,
                server.last_words(),
                output.last_words()
            )));
        }
        if !refused(&output) || started.elapsed() > STARTING {
            return Err(Error::failed(format!(
                "{} ended with {}: {}",
                running.name,
                output.status,
                output.last_words()
            )));
        }
        std::thread::sleep(5 * TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_is_not_there_is_not_installed() {
        assert!(!is_installed("kvpush-has-no-such-program"));
    }

    #[test]
    fn a_client_is_tried_again_until_the_server_listens() {
        let file = std::env::temp_dir().join(format!("kvpush-pair-{}", std::process::id()));
        let name = file.display();
        let server = &mut shell(&format!("sleep 0.2; touch {name}; sleep 30"));
        let client = &mut shell(&format!("test -e {name} && echo found || exit 7"));
        let output = pair(server, client, |output| output.status.code() == Some(7)).unwrap();
        assert_eq!(output.text, "found\n");
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn failures_say_what_the_programs_said() {
        let error = pair(
            &mut shell("sleep 30"),
            &mut shell("echo no luck; exit 3"),
            |_| false,
        );
        assert!(error.unwrap_err().to_string().contains("no luck"));
        let server = &mut shell("echo gone >&2; exit 1");
        let error = pair(server, &mut shell("sleep 0.2; exit 7"), |_| true);
        assert!(error.unwrap_err().to_string().contains("gone"));
    }
}
