//! `cargo xtask sim`: whole endpoints under simulated time and random faults, many schedules at once.
//!
//! The schedules are a test of the library (`src/endpoint/core/tests/swarm/`), because they drive what is private. It
//! is built with the profile `sim` (optimised, with all checks), and run in one process for each job. Each process
//! tells on standard error, in lines that begin with `@`, what it is at; a process that dies or stands still names its
//! schedule by that.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::artifacts;

const HELP: &str = "\
cargo xtask sim: whole endpoints in simulated time, under faults

USAGE
    cargo xtask sim [--seeds N] [--start S] [--jobs J] [--json FILE]
    cargo xtask sim --seed X

Each seed is one schedule: several endpoints, some pushes, and a menu of faults of its own. Every invariant is checked
after every step. A schedule that fails is named, with the command that repeats it exactly; the exit status is 1 then.
So it is when a run of 1000 schedules or more has never met one of the faults or ends that it should.

OPTIONS
    --seeds N     How many schedules (default 10000)
    --start S     The first seed (default 0)
    --seed X      This one only, with everything that it prints
    --jobs J      Processes (default: as many as cores)
    --json FILE   Also write the result there
    -h, --help    Show this text
";

/// Schedules from which on everything must have occurred.
const WHOLE: u64 = 1000;
/// A schedule takes milliseconds; one that takes this long never ends.
const STUCK: Duration = Duration::from_secs(120);
const TEST: &str = "endpoint::core::tests::swarm::at_scale";

#[derive(Debug, PartialEq, Eq)]
struct Options {
    start: u64,
    seeds: u64,
    one: bool,
    jobs: u64,
    json: Option<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Option<Self>> {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let mut options = Self {
            start: 0,
            seeds: 10_000,
            one: false,
            jobs: cores,
            json: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if matches!(arg.as_str(), "-h" | "--help") {
                return Ok(None);
            }
            let value = args.next();
            let value = value.with_context(|| format!("{arg} needs a value; see --help"))?;
            let number = || {
                let parsed: Result<u64, _> = value.parse();
                parsed.with_context(|| format!("{arg} {value}: not a number"))
            };
            match arg.as_str() {
                "--seeds" => options.seeds = number()?,
                "--start" => options.start = number()?,
                "--seed" => {
                    (options.start, options.seeds, options.one) = (number()?, 1, true);
                }
                "--jobs" => options.jobs = number()?.max(1),
                "--json" => options.json = Some(value.clone()),
                other => bail!("unknown option {other:?}; see --help"),
            }
        }
        if options.seeds == 0 || options.start.checked_add(options.seeds).is_none() {
            bail!("no such seeds");
        }
        options.jobs = options.jobs.min(options.seeds);
        Ok(Some(options))
    }
}

/// What the jobs have told.
#[derive(Debug, Default)]
struct Outcome {
    passed: u64,
    failed: Vec<u64>,
    /// By name: how often, and whether a long run must have it.
    cover: BTreeMap<String, (u64, bool)>,
    /// The schedule that each job is at.
    at: BTreeMap<u64, u64>,
    ended: u64,
}

impl Outcome {
    /// Takes one line of a job. Returns whether it was meant for us.
    fn line(&mut self, job: u64, line: &str) -> bool {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
        match (words.first().copied(), number(1)) {
            (Some("@begin"), Some(seed)) => {
                self.at.insert(job, seed);
            }
            (Some("@passed"), Some(seed)) => {
                self.passed += 1;
                self.at.retain(|_, at| *at != seed);
            }
            (Some("@failed"), Some(seed)) => {
                self.failed.push(seed);
                self.at.retain(|_, at| *at != seed);
            }
            (Some("@cover"), Some(count)) if words.len() == 4 => {
                let entry = self.cover.entry(words[3].to_owned()).or_default();
                entry.0 += count;
                entry.1 |= words[2] == "true";
            }
            (Some("@end"), Some(_)) => self.ended += 1,
            _ => return false,
        }
        true
    }

    fn missing(&self) -> Vec<&str> {
        let missing = self
            .cover
            .iter()
            .filter(|(_, (count, must))| *must && *count == 0);
        missing.map(|(name, _)| name.as_str()).collect()
    }
}

/// `cargo xtask sim`.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let Some(options) = Options::parse(args)? else {
        print!("{HELP}");
        return Ok(());
    };
    let test = artifacts::library_test("kvpush", "sim")?;
    let (start, began) = (options.start, Instant::now());
    if options.one {
        println!("schedule {start}");
    } else {
        println!(
            "{} schedules from {start}, {} at once",
            options.seeds, options.jobs
        );
    }
    let outcome = run(&test.path, &test.package_dir, &options)?;
    let seconds = began.elapsed().as_secs_f64();
    report(&options, &outcome, seconds)?;
    if let Some(path) = &options.json {
        let cover: BTreeMap<_, _> = outcome
            .cover
            .iter()
            .map(|(name, (n, _))| (name, n))
            .collect();
        let summary = json!({
            "start": options.start,
            "schedules": options.seeds,
            "passed": outcome.passed,
            "failed": outcome.failed,
            "missing": outcome.missing(),
            "seconds": seconds,
            "occurred": cover,
        });
        std::fs::write(path, format!("{summary:#}\n"))
            .with_context(|| format!("writing {path}"))?;
    }
    let missing = outcome.missing();
    if !outcome.failed.is_empty() {
        bail!("{} schedules failed", outcome.failed.len());
    }
    if outcome.passed != options.seeds {
        bail!("{} of {} schedules have run", outcome.passed, options.seeds);
    }
    if options.seeds >= WHOLE && !missing.is_empty() {
        bail!(
            "the schedules have lost their teeth: never occurred: {}",
            missing.join(", ")
        );
    }
    Ok(())
}

fn run(test: &Path, folder: &Path, options: &Options) -> Result<Outcome> {
    let (sender, lines) = mpsc::channel();
    let mut jobs = Vec::new();
    for job in 0..options.jobs {
        let mut command = Command::new(test);
        command
            .args(["--exact", "--ignored", "--nocapture", TEST])
            .current_dir(folder)
            .env("KVPUSH_SWARM_START", (options.start + job).to_string())
            .env(
                "KVPUSH_SWARM_END",
                (options.start + options.seeds).to_string(),
            )
            .env("KVPUSH_SWARM_STEP", options.jobs.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("starting the schedules")?;
        let Some(stderr) = child.stderr.take() else {
            bail!("a job without standard error");
        };
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send((job, line)).is_err() {
                    return;
                }
            }
        });
        jobs.push(child);
    }
    drop(sender);
    let mut outcome = Outcome::default();
    let began = Instant::now();
    let mut shown = Instant::now();
    let stuck = loop {
        match lines.recv_timeout(STUCK) {
            Ok((job, line)) => {
                if !outcome.line(job, &line) && !line.is_empty() {
                    eprintln!("{line}");
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break false,
            Err(mpsc::RecvTimeoutError::Timeout) => break true,
        }
        if std::io::stdout().is_terminal() && shown.elapsed() > Duration::from_millis(200) {
            shown = Instant::now();
            bar(
                outcome.passed + outcome.failed.len() as u64,
                options.seeds,
                began,
            );
        }
    };
    for job in &mut jobs {
        end(job, stuck)?;
    }
    // Whoever has begun a schedule and not ended it has died in it, or was ended by us.
    let lost: Vec<u64> = outcome.at.values().copied().collect();
    for seed in lost {
        let how = if stuck {
            "never ended"
        } else {
            "ended its process"
        };
        eprintln!("schedule {seed} {how}");
        outcome.failed.push(seed);
    }
    if outcome.ended != options.jobs && outcome.failed.is_empty() {
        bail!("a job has not run the test {TEST}");
    }
    outcome.failed.sort_unstable();
    Ok(outcome)
}

fn end(job: &mut Child, stuck: bool) -> Result<()> {
    if stuck {
        // It may have ended in this moment, which is as well.
        let _ = job.kill();
    }
    job.wait().context("waiting for a job")?;
    Ok(())
}

fn bar(done: u64, of: u64, began: Instant) {
    let width = 40;
    let full = (done * width / of.max(1)) as usize;
    let rate = done as f64 / began.elapsed().as_secs_f64().max(0.001);
    let bar: String = (0..width as usize)
        .map(|at| if at < full { '#' } else { '.' })
        .collect();
    print!("\r[{bar}] {done}/{of}, {rate:.0}/s ");
    // A bar that cannot be drawn is none.
    let _ = std::io::stdout().flush();
}

fn report(options: &Options, outcome: &Outcome, seconds: f64) -> Result<()> {
    if std::io::stdout().is_terminal() {
        println!();
    }
    if !options.one {
        println!("\nOccurred in {} schedules:", options.seeds);
        for (name, (count, must)) in &outcome.cover {
            let note = if *must { "" } else { "  (not asked for)" };
            println!("{count:>10}  {name}{note}");
        }
    }
    println!(
        "\n{} passed, {} failed, {seconds:.1} s, {:.0} schedules/s",
        outcome.passed,
        outcome.failed.len(),
        outcome.passed as f64 / seconds.max(0.001)
    );
    for seed in &outcome.failed {
        println!("FAILED: repeat it with `cargo xtask sim --seed {seed}`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Options>> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&words)
    }

    #[test]
    fn options() {
        let options = parse("--seeds 5 --start 7 --jobs 9").unwrap().unwrap();
        assert_eq!((options.start, options.seeds, options.jobs), (7, 5, 5));
        let one = parse("--seed 3").unwrap().unwrap();
        assert_eq!((one.start, one.seeds, one.one), (3, 1, true));
        assert!(parse("--help").unwrap().is_none());
        for wrong in ["--seeds", "--seeds x", "--seeds 0", "--often 3"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_job_that_dies_names_its_schedule() {
        let mut outcome = Outcome::default();
        assert!(outcome.line(0, "@begin 4"));
        assert!(outcome.line(1, "@begin 5"));
        assert!(outcome.line(0, "@passed 4 00ff"));
        assert!(!outcome.line(1, "thread panicked"));
        assert!(outcome.line(0, "@begin 6"));
        assert!(outcome.line(0, "@failed 6"));
        let at: Vec<u64> = outcome.at.values().copied().collect();
        assert_eq!(
            (outcome.passed, outcome.failed.as_slice(), at.as_slice()),
            (1, &[6][..], &[5][..])
        );
    }

    #[test]
    fn what_never_occurred_is_missing() {
        let mut outcome = Outcome::default();
        for line in ["@cover 0 true a: b", "@cover 2 true c", "@cover 0 false d"] {
            assert!(outcome.line(0, line));
        }
        assert_eq!(outcome.missing(), ["a: b"]);
        assert!(outcome.line(1, "@cover 1 true a: b"));
        assert!(outcome.missing().is_empty());
    }
}
