//! Starting the tool, and reading what it leaves.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;

/// Ample; whoever waits so long has found a hang.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// A workload that takes no time.
pub(crate) const TINY: [&str; 10] = [
    "--fabric",
    "tcp",
    "--layers",
    "3",
    "--pages",
    "5",
    "--requests",
    "2",
    "--rounds",
    "2",
];

pub(crate) const KEY: [&str; 2] = ["--key", "a secret of these tests"];

/// What a run left.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Outcome {
    #[track_caller]
    pub(crate) fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "\n--- out\n{}\n--- err\n{}",
            self.out,
            self.err
        );
        self
    }

    #[track_caller]
    pub(crate) fn assert_err(&self, words: &[&str]) -> &Self {
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in\n{}", self.err);
        }
        self
    }
}

pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvpush-bench"));
    command
        .args(arguments)
        .env_remove("KVPUSH_KEY")
        .stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs it to its end, which must come.
pub(crate) fn run(arguments: &[&str]) -> Outcome {
    Running::start(arguments).wait(LONG)
}

/// A file name of its own for each caller; removed with the value.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(extension: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "bench-{}-{}.{extension}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().expect("a path of text")
    }

    pub(crate) fn text(&self) -> String {
        std::fs::read_to_string(&self.0).expect("the file was written")
    }

    pub(crate) fn rows(&self) -> Vec<Value> {
        match serde_json::from_str(&self.text()).expect("JSON") {
            Value::Array(rows) => rows,
            other => panic!("no array: {other}"),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A process under way; killed if it is forgotten.
pub(crate) struct Running {
    pub(crate) child: Child,
    out: BufReader<std::process::ChildStdout>,
    seen: String,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::of(command(arguments))
    }

    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command.spawn().expect("start the tool");
        let out = BufReader::new(child.stdout.take().expect("its output"));
        Self {
            child,
            out,
            seen: String::new(),
        }
    }

    /// The next line of its output that contains `word`.
    #[track_caller]
    pub(crate) fn line_with(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            if self.out.read_line(&mut line).expect("its output") == 0 {
                let mut err = String::new();
                self.child
                    .stderr
                    .take()
                    .expect("errors")
                    .read_to_string(&mut err)
                    .expect("errors");
                panic!("ended without {word:?}:\n{}{err}", self.seen);
            }
            self.seen.push_str(&line);
            if line.contains(word) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: a plain system call; the process is a child which has not been waited for, so the number is its own.
        let result = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(result, 0);
    }

    /// Waits for its end, which must come by `timeout`.
    #[track_caller]
    pub(crate) fn wait(mut self, timeout: Duration) -> Outcome {
        // Elsewhere, so that a full pipe holds nobody up.
        let mut err = self.child.stderr.take().expect("errors");
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            err.read_to_string(&mut text).expect("errors");
            text
        });
        let out = std::mem::replace(&mut self.out, BufReader::new(empty_output()));
        let output = std::thread::spawn(move || {
            let mut text = String::new();
            let mut out = out;
            out.read_to_string(&mut text).expect("output");
            text
        });
        let end = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            assert!(Instant::now() < end, "still running after {timeout:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let out = std::mem::take(&mut self.seen) + &output.join().expect("output");
        Outcome {
            status,
            out,
            err: errors.join().expect("errors"),
        }
    }
}

fn empty_output() -> std::process::ChildStdout {
    let mut child = Command::new("true")
        .stdout(Stdio::piped())
        .spawn()
        .expect("run true");
    let out = child.stdout.take().expect("its output");
    child.wait().expect("true ends");
    out
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server on a free port of this machine.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) address: String,
}

impl Server {
    pub(crate) fn start(more: &[&str]) -> Self {
        let arguments = [&["serve", "--bind", "127.0.0.1:0", "--fabric", "tcp"], more].concat();
        let mut running = Running::start(&arguments);
        let line = running.line_with("listening on ");
        let address = line
            .trim_start_matches("listening on ")
            .split(',')
            .next()
            .expect("an address")
            .to_owned();
        Self { running, address }
    }

    /// Arguments that push there.
    pub(crate) fn push<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["push", self.address.as_str()], &KEY[..], more].concat()
    }
}
