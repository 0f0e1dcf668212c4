//! Runs a group of guests to the end and says how each ended.
//!
//! One thread per guest reads what its program writes; all else happens on the calling thread, which must be the main
//! one (see [`qemu::start`]). An error means that a guest did not do its part: it panicked, hung, or never reported. A
//! program that ran and failed is no error here, but an [`Outcome`] with its status.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Machine;
use super::builder::{Guest, Role};
use super::console::{Marker, parse_line};
use super::qemu::{self, CONSOLE_LOG, OUT, QEMU_LOG};
use crate::workspace;

/// How long a guest may take to power off after its program has ended, and a server to end after the others.
const GRACE: Duration = Duration::from_secs(20);

/// How a guest's program ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    /// Exit status of the script.
    pub(crate) status: i32,
    /// From power-on until the devices were there.
    pub(crate) boot: Duration,
    /// From power-on to power-off.
    pub(crate) total: Duration,
    /// What the guest left in `/out`.
    pub(crate) out: PathBuf,
    /// All the script wrote.
    pub(crate) output: String,
}

impl Outcome {
    /// An error unless the script succeeded.
    pub(crate) fn success(&self) -> Result<()> {
        if self.status != 0 {
            bail!(
                "guest {:?}: its program ended with status {}",
                self.name,
                self.status
            );
        }
        Ok(())
    }
}

/// Runs `guests` together. Their files are kept in `target/rxe/runs/<label>/<guest>/` until the next run of that label.
pub(crate) fn run(label: &str, machine: &Machine, guests: Vec<Guest>) -> Result<Vec<Outcome>> {
    let dir = workspace::cache("rxe/runs")?.join(label);
    let _ = fs::remove_dir_all(&dir);
    let nonce = nonce()?;
    let names: Vec<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
    println!(
        "[{label}] starting {} with {}",
        names.join(" and "),
        machine.version
    );

    let (events, inbox) = mpsc::channel();
    let mut group = Vec::new();
    for (index, guest) in guests.into_iter().enumerate() {
        group.push(Running::start(
            machine,
            guest,
            &dir,
            &nonce,
            index,
            events.clone(),
        )?);
    }
    drop(events);

    let mut stopping = false;
    while !group.iter().all(Running::has_ended) {
        match inbox.recv_timeout(Duration::from_millis(100)) {
            Ok((index, event)) => group[index].on_event(event, &nonce),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            // All outputs are closed: only the ends of the processes are left to wait for.
            Err(mpsc::RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(20)),
        }
        for guest in &mut group {
            guest.check().map_err(|reason| guest.failure(&reason))?;
        }
        let all_main_done = group
            .iter()
            .all(|guest| guest.guest.role != Role::Main || guest.exit.is_some());
        if all_main_done && !stopping {
            stopping = true;
            group.iter_mut().try_for_each(Running::stop_server)?;
        }
    }
    group.into_iter().map(Running::outcome).collect()
}

enum Event {
    Line(String),
    Closed,
}

/// A guest that has been started. Dropping it kills it.
struct Running {
    guest: Guest,
    child: Child,
    dir: PathBuf,
    started: Instant,
    deadline: Instant,
    boot: Option<Duration>,
    exit: Option<i32>,
    broken: Option<String>,
    output: String,
    output_closed: bool,
    ended: Option<Duration>,
}

impl Running {
    fn start(
        machine: &Machine,
        mut guest: Guest,
        dir: &Path,
        nonce: &str,
        index: usize,
        events: mpsc::Sender<(usize, Event)>,
    ) -> Result<Self> {
        let dir = dir.join(&guest.name);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let mut child = qemu::start(machine, &guest, &dir, nonce)?;
        // QEMU has its own copies; closing ours lets each guest notice when the other is gone.
        guest.links.clear();
        let stdout = child.stdout.take().context("QEMU has no stdout")?;
        thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                let text = String::from_utf8_lossy(&line).into_owned();
                if events.send((index, Event::Line(text))).is_err() {
                    return;
                }
                line.clear();
            }
            let _ = events.send((index, Event::Closed));
        });
        let started = Instant::now();
        let deadline = started + guest.timeout;
        Ok(Self {
            guest,
            child,
            dir,
            started,
            deadline,
            boot: None,
            exit: None,
            broken: None,
            output: String::new(),
            output_closed: false,
            ended: None,
        })
    }

    fn on_event(&mut self, event: Event, nonce: &str) {
        let line = match event {
            Event::Line(line) => parse_line(&line, nonce),
            Event::Closed => {
                self.output_closed = true;
                return;
            }
        };
        if let Some(text) = line.text {
            println!("[{}] {text}", self.guest.name);
            let _ = std::io::stdout().flush();
            self.output.push_str(&text);
            self.output.push('\n');
        }
        match line.marker {
            Some(Marker::Ready) => {
                let boot = self.started.elapsed();
                println!(
                    "[{}] booted in {:.1} s",
                    self.guest.name,
                    boot.as_secs_f64()
                );
                self.boot = Some(boot);
            }
            Some(Marker::Exit(status)) => {
                self.exit = Some(status);
                self.deadline = Instant::now() + GRACE;
            }
            Some(Marker::Broken(why)) => self.broken = Some(why),
            None => {}
        }
    }

    /// Looks whether the guest has ended or is overdue. `Err` says why its run is worth nothing.
    fn check(&mut self) -> Result<(), String> {
        if self.has_ended() {
            return Ok(());
        }
        if let Some(why) = &self.broken {
            return Err(format!("it could not be prepared: {why}"));
        }
        let overdue = Instant::now() > self.deadline;
        if overdue && self.exit.is_some() {
            // The program has ended and reported; that the machine does not power off changes nothing.
            let _ = self.child.kill();
        } else if overdue {
            return Err(format!(
                "it did not end within {} s",
                self.started.elapsed().as_secs()
            ));
        }
        let process_ended = self
            .child
            .try_wait()
            .map_err(|error| error.to_string())?
            .is_some();
        if !process_ended || !self.output_closed {
            return Ok(());
        }
        let shared = fs::read_to_string(self.dir.join(OUT).join(".guest/status")).ok();
        self.exit = Some(reconcile(self.exit, shared.as_deref())?);
        self.ended = Some(self.started.elapsed());
        Ok(())
    }

    fn stop_server(&mut self) -> Result<()> {
        if self.guest.role == Role::Server && self.exit.is_none() {
            fs::write(self.dir.join(OUT).join(".guest/stop"), "")
                .context("telling a server to stop")?;
            self.deadline = self.deadline.min(Instant::now() + GRACE);
        }
        Ok(())
    }

    fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn failure(&self, reason: &str) -> anyhow::Error {
        let mut text = format!("guest {:?}: {reason}", self.guest.name);
        let console = fs::read(self.dir.join(CONSOLE_LOG)).unwrap_or_default();
        let qemu = fs::read(self.dir.join(QEMU_LOG)).unwrap_or_default();
        for (title, content) in [
            ("its program's output", self.output.as_str()),
            (
                "its kernel's console",
                from_crash(&String::from_utf8_lossy(&console)),
            ),
            ("QEMU's messages", &String::from_utf8_lossy(&qemu)),
        ] {
            let tail = tail(content, 30);
            if !tail.is_empty() {
                text.push_str(&format!("\n---- end of {title}\n{tail}"));
            }
        }
        text.push_str(&format!("\n---- all of it is in {}", self.dir.display()));
        anyhow::Error::msg(text)
    }

    fn outcome(mut self) -> Result<Outcome> {
        let (status, total) = (
            self.exit.context("no status")?,
            self.ended.context("still running")?,
        );
        let output = std::mem::take(&mut self.output);
        fs::write(self.dir.join("output.log"), &output)?;
        Ok(Outcome {
            name: self.guest.name.clone(),
            status,
            boot: self.boot.unwrap_or(total),
            total,
            out: self.dir.join(OUT),
            output,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The status a guest reported over its console, and the one it wrote to its output folder. Either is enough.
fn reconcile(console: Option<i32>, shared: Option<&str>) -> Result<i32, String> {
    let shared = match shared.map(|text| text.trim().parse::<i32>()) {
        None => None,
        Some(Ok(status)) => Some(status),
        // Written in part: the guest died while it was at it.
        Some(Err(_)) => None,
    };
    match (console, shared) {
        (Some(one), Some(other)) if one != other => Err(format!(
            "it reported status {one} on its console and {other} in its output folder"
        )),
        (Some(status), _) | (None, Some(status)) => Ok(status),
        (None, None) => {
            Err("it ended without a report (a kernel panic, or QEMU itself failed)".into())
        }
    }
}

/// A kernel's console from where it says why it crashes, without the end of the trace that follows; or all of it.
fn from_crash(console: &str) -> &str {
    let crash = ["BUG: ", "Oops: ", "Kernel panic"]
        .iter()
        .filter_map(|word| console.find(word))
        .min();
    let Some(crash) = crash else { return console };
    let end = console[crash..]
        .match_indices('\n')
        .nth(25)
        .map_or(console.len(), |(length, _)| crash + length);
    &console[crash..end]
}

/// The last `count` lines, each of bounded length.
fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(count));
    shown
        .map(|line| line.chars().take(300).collect::<String>())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Sixteen digits nobody else has.
fn nonce() -> Result<String> {
    let mut bytes = [0_u8; 8];
    let mut random = fs::File::open("/dev/urandom").context("opening /dev/urandom")?;
    std::io::Read::read_exact(&mut random, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_report_is_enough_and_two_must_agree() {
        assert_eq!(reconcile(Some(3), Some("3\n")), Ok(3));
        assert_eq!(reconcile(Some(3), None), Ok(3));
        assert_eq!(reconcile(None, Some("0\n")), Ok(0));
        assert_eq!(reconcile(Some(1), Some("")), Ok(1));
        assert!(reconcile(Some(0), Some("1\n")).is_err());
    }

    #[test]
    fn no_report_is_no_success() {
        assert!(reconcile(None, None).is_err());
        assert!(reconcile(None, Some("")).is_err());
        assert!(reconcile(None, Some("garbage")).is_err());
    }

    #[test]
    fn a_crash_is_shown_from_its_cause() {
        let trace = "[7] a trace line\n".repeat(100);
        let console = format!("boot\n[7] Kernel panic - not syncing: why\n{trace}");
        let shown = from_crash(&console);
        assert!(
            shown.starts_with("Kernel panic - not syncing: why\n"),
            "{shown}"
        );
        assert_eq!(tail(shown, 30).lines().next(), shown.lines().next());
        assert_eq!(from_crash("all is well\n"), "all is well\n");
    }

    #[test]
    fn tail_keeps_the_last_lines() {
        assert_eq!(tail("a\n\nb\r\nc\n", 2), "b\nc");
        assert_eq!(tail("", 2), "");
    }
}
