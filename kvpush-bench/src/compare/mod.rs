//! `kvpush-bench compare`: other people's programs beside our own rows, in one run, and what comes of it as ratios.
//!
//! Each repetition measures the reference and then kvpush, for one size after the other, so that whatever else the
//! machine does meets both. A ratio is of two neighbours; the median of them is what counts.
//!
//! | file | holds |
//! |---|---|
//! | `tools` | starting other programs, and ending them |
//! | `iperf3`, `perftest` | their command lines and outputs |
//! | `memcpy` | the reference for shared memory |
//! | `table` | medians, ratios, table |

mod iperf3;
mod memcpy;
mod perftest;
mod table;
mod tools;

use clap::Parser;
use kvpush::{
    Auth,
    fabric::verbs::{PortState, inventory},
};

use self::table::{Line, Unit, table};
use crate::{
    cli::{Cli, CompareArgs, FabricArgs, FabricChoice, MemoryChoice, Op, PollingChoice, RunArgs},
    content::Random,
    error::{Context, Error, Result},
    local::{self, Decode},
    measure::bytes_text,
    out,
    push::Session,
    signals,
    workload::{LARGE_BATCH, Workload},
};

/// Bytes of the writes whose latency is compared.
const SMALL: u64 = 64;

/// How many of them a measurement takes.
const SMALL_COUNT: u32 = 1000;

/// Most bytes that one round moves: pools are a little more than twice as large.
const ROUND: u64 = 64 << 20;

/// Neighbours in a run of pages that can be merged.
const RUN: u32 = 16;

/// What kvpush is compared with.
#[derive(Clone, Debug)]
enum Reference {
    Iperf3,
    Perftest(perftest::Devices),
    Memcpy,
}

impl Reference {
    fn name(&self) -> &'static str {
        match self {
            Self::Iperf3 => iperf3::PROGRAM,
            Self::Perftest(_) => perftest::BANDWIDTH,
            Self::Memcpy => "memcpy",
        }
    }

    /// What is missing for it, and how to get it.
    fn missing(&self) -> Option<String> {
        let (programs, package): (&[&str], _) = match self {
            Self::Iperf3 => (&[iperf3::PROGRAM], "iperf3"),
            Self::Perftest(_) => (&[perftest::BANDWIDTH, perftest::LATENCY], "perftest"),
            Self::Memcpy => return None,
        };
        let missing = programs.iter().find(|name| !tools::is_installed(name))?;
        Some(format!(
            "{missing} is not installed: `apt-get install {package}` (Debian, Ubuntu) or `dnf install {package}` (RHEL, Fedora)"
        ))
    }

    /// GB/s of `pages` messages of `size` bytes.
    fn bandwidth(&self, size: u64, pages: u64, lanes: u16, seed: u64) -> Result<f64> {
        let bytes = size.saturating_mul(pages);
        match self {
            Self::Iperf3 => iperf3::bandwidth(size, bytes, lanes),
            Self::Perftest(devices) => devices.bandwidth(size, bytes, lanes),
            Self::Memcpy => {
                let pages = (ROUND / size.max(1)).clamp(1, pages.max(1));
                memcpy::bandwidth(size, u32::try_from(pages).unwrap_or(u32::MAX), seed)
            }
        }
    }
}

/// One fabric and its reference.
struct Contest {
    fabric: FabricArgs,
    /// The decode side's, which may use another device.
    peer: FabricArgs,
    reference: Reference,
}

/// Runs it.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    args.fabric.check()?;
    if let Some(path) = &args.json {
        crate::report::check_path(path)?;
    }
    let contests = contests(args)?;
    let (mut lines, mut missing, mut failures) = (Vec::new(), Vec::new(), Vec::new());
    for contest in &contests {
        let absent = contest.reference.missing();
        match &absent {
            Some(text) => out::note(format_args!("kvpush-bench: {text}")),
            None => {
                if let Some(version) = tools::version(contest.reference.name()) {
                    out::say(format_args!("{}: {version}", contest.reference.name()));
                }
            }
        }
        let result = compare(args, contest, absent.is_none(), &mut lines);
        missing.extend(absent);
        if let Err(error) = result {
            out::note(format_args!(
                "kvpush-bench: {}: {error}",
                local::fabric_name(contest.fabric.fabric)
            ));
            failures.push(error.to_string());
        }
        signals::check()?;
    }
    out::say(table(&lines));
    out::say(
        "ratio: kvpush by the reference, of each repetition's neighbours; median (least..most). GB/s: more is better, µs: less",
    );
    if let Some(path) = &args.json {
        let lines: Result<Vec<_>, _> = lines.iter().map(serde_json::to_string).collect();
        let text = format!("[\n{}\n]\n", lines.context("encode the lines")?.join(",\n"));
        std::fs::write(path, text).context(format_args!("cannot write {}", path.display()))?;
    }
    let bad = lines.iter().filter(|line| !line.verified).count();
    match (failures.first(), bad, missing.len()) {
        (Some(failure), ..) => Err(Error::failed(failure.clone())),
        (None, 1.., _) => Err(Error::failed(format!("{bad} lines did not verify"))),
        (None, 0, 1..) => Err(Error::Incomplete(format!(
            "every byte was verified, but there was nothing to compare with: {}",
            missing.join("; ")
        ))),
        (None, 0, 0) => Ok(()),
    }
}

/// The fabrics that were asked for, or all that this machine has.
fn contests(args: &CompareArgs) -> Result<Vec<Contest>> {
    let plain = |fabric| FabricArgs {
        fabric,
        devices: Vec::new(),
        gid_index: None,
        traffic_class: None,
        ack_timeout: None,
        polling: args.fabric.polling,
    };
    let simple = |fabric, reference| Contest {
        fabric: plain(fabric),
        peer: plain(fabric),
        reference,
    };
    let verbs = || -> Result<Option<Contest>> {
        let active: Vec<String> = inventory()
            .devices
            .iter()
            .filter(|device| {
                let mut ports = device.ports.iter();
                ports.any(|port| port.state == PortState::Active)
            })
            .map(|device| device.name.clone())
            .collect();
        let client = args.fabric.devices.first().or(active.first()).cloned();
        let Some(client) = client else {
            return Ok(None);
        };
        let server = match (&args.peer_device, args.fabric.devices.is_empty()) {
            (Some(device), _) => device.clone(),
            (None, true) => active.get(1).unwrap_or(&client).clone(),
            (None, false) => client.clone(),
        };
        let on = |device: &String| FabricArgs {
            fabric: FabricChoice::Verbs,
            devices: vec![device.clone()],
            ..args.fabric.clone()
        };
        Ok(Some(Contest {
            fabric: on(&client),
            peer: on(&server),
            reference: Reference::Perftest(perftest::Devices {
                client,
                server,
                gid_index: args.fabric.gid_index,
                ack_timeout: args.fabric.ack_timeout,
            }),
        }))
    };
    Ok(match args.fabric.fabric {
        FabricChoice::Tcp => vec![simple(FabricChoice::Tcp, Reference::Iperf3)],
        FabricChoice::Shm => vec![simple(FabricChoice::Shm, Reference::Memcpy)],
        FabricChoice::Verbs => {
            let why = || Error::failed(format!("no RDMA: {}", crate::host::why_no_rdma()));
            vec![verbs()?.ok_or_else(why)?]
        }
        FabricChoice::Auto => {
            let mut all = vec![
                simple(FabricChoice::Tcp, Reference::Iperf3),
                simple(FabricChoice::Shm, Reference::Memcpy),
            ];
            match verbs()? {
                Some(contest) => all.push(contest),
                None => out::note(format_args!(
                    "kvpush-bench: verbs is left out: {}",
                    crate::host::why_no_rdma()
                )),
            }
            all
        }
    })
}

/// A line under construction.
struct Entry {
    workload: Workload,
    line: Line,
    theirs: Vec<f64>,
    ours: Vec<f64>,
}

/// Runs one contest and adds its lines, those that were measured before a failure included.
fn compare(
    args: &CompareArgs,
    contest: &Contest,
    with_reference: bool,
    lines: &mut Vec<Line>,
) -> Result<()> {
    let mut key = [0; 32];
    local::random_bytes(&mut key)?;
    let key = crate::wire::to_hex(&key);
    let memory = MemoryChoice::for_fabric(contest.fabric.fabric);
    let mut decode = Decode::start(&contest.peer, memory, &key)?;
    let address = decode.address().to_owned();
    let mut entries = entries(args, contest);
    let result = repeat(
        args,
        contest,
        with_reference,
        &address,
        &key,
        memory,
        &mut entries,
    );
    for mut entry in entries.into_iter().filter(|entry| !entry.ours.is_empty()) {
        entry.line.fill(&entry.theirs, &entry.ours);
        lines.push(entry.line);
    }
    result.map_err(|error| decode.explain(error))
}

/// What is measured over a fabric.
fn entries(args: &CompareArgs, contest: &Contest) -> Vec<Entry> {
    let entry = |workload: Workload, what, unit, reference: &str| Entry {
        line: Line {
            fabric: local::fabric_name(contest.fabric.fabric).to_owned(),
            what,
            size: workload.page_bytes(),
            lanes: workload.lanes,
            unit,
            reference: reference.to_owned(),
            theirs: None,
            ours: table::Figures::default(),
            ratio: None,
            verified: true,
        },
        workload,
        theirs: Vec::new(),
        ours: Vec::new(),
    };
    let mut entries = Vec::new();
    for &size in &args.sizes.0 {
        let mut apart = Workload::raw(Op::Push, size);
        apart.lanes = args.lanes;
        let round = args.moved.min(ROUND);
        let pages = u64::from(LARGE_BATCH / size.max(1)).clamp(8, 512);
        apart.pages = pages as u32;
        apart.requests = (round / (pages * u64::from(size))).clamp(1, 4096) as u32;
        let mut merged = apart.clone();
        merged.run_length = RUN;
        let (unit, name) = (Unit::GigabytesPerSecond, contest.reference.name());
        entries.push(entry(apart, "push, pages apart", unit, name));
        entries.push(entry(merged, "push, runs of 16", unit, name));
    }
    if let Reference::Perftest(_) = contest.reference {
        let mut small = Workload::raw(Op::Write, SMALL as u32);
        (small.lanes, small.pages, small.requests) = (1, 1, SMALL_COUNT);
        let unit = Unit::Microseconds;
        entries.push(entry(small, "write, polling", unit, perftest::LATENCY));
    }
    entries
}

fn repeat(
    args: &CompareArgs,
    contest: &Contest,
    with_reference: bool,
    address: &str,
    key: &str,
    memory: MemoryChoice,
    entries: &mut [Entry],
) -> Result<()> {
    let mut random = Random::new(args.seed.unwrap_or(1));
    let runs = entries
        .iter()
        .map(|entry| run_args(args, contest, memory, entry))
        .collect::<Result<Vec<_>>>()?;
    let Some(first) = runs.first() else {
        return Ok(());
    };
    // One conversation, because the server serves one workload at a time.
    let mut session = Session::open(address, first, Auth::passphrase(key))?;
    for repetition in 0..args.repeat {
        for (entry, run) in entries.iter_mut().zip(&runs) {
            signals::check()?;
            let (workload, line) = (&entry.workload, &mut entry.line);
            let is_small = line.unit == Unit::Microseconds;
            let theirs = match (&contest.reference, with_reference) {
                (_, false) => None,
                (Reference::Perftest(devices), true) if is_small => {
                    Some(devices.latency(line.size, SMALL_COUNT)?)
                }
                (reference, true) => {
                    let round = u64::from(workload.requests) * u64::from(workload.pages);
                    let pages = round.saturating_mul(run.workload.rounds.into());
                    let seed = random.next();
                    Some(reference.bandwidth(line.size, pages, args.lanes, seed)?)
                }
            };
            let row = session.measure(run, workload, random.next())?;
            let ours = match line.unit {
                Unit::GigabytesPerSecond => row.gb_per_s,
                Unit::Microseconds => row.p50_us,
            };
            if let (false, Some(failure)) = (row.verified, &row.failure) {
                out::note(format_args!("NOT VERIFIED: {}: {failure}", line.what));
            }
            line.verified &= row.verified;
            let beside = theirs.map_or(String::new(), |theirs| {
                format!(", {} {theirs:.4}", line.reference)
            });
            out::note(format_args!(
                "{} of {}: {} {} {}: kvpush {ours:.4}{beside}",
                repetition + 1,
                args.repeat,
                line.fabric,
                line.what,
                bytes_text(line.size),
            ));
            entry.theirs.extend(theirs);
            entry.ours.push(ours);
        }
    }
    Ok(())
}

/// The arguments of a run of our own: those that an empty command line gives, and what is compared.
fn run_args(
    args: &CompareArgs,
    contest: &Contest,
    memory: MemoryChoice,
    entry: &Entry,
) -> Result<RunArgs> {
    let cli = Cli::try_parse_from(["kvpush-bench"]).context("the arguments of a run")?;
    let mut run = cli.run;
    run.fabric = contest.fabric.clone();
    run.memory.memory = memory;
    match entry.line.unit {
        Unit::GigabytesPerSecond => {
            let moved = entry.workload.round_bytes(entry.workload.requests)?;
            let rounds = args.moved.div_ceil(moved.max(1)).clamp(1, 10_000);
            (run.workload.rounds, run.workload.in_flight) = (rounds as u32, 4);
        }
        Unit::Microseconds => {
            (run.workload.rounds, run.workload.in_flight) = (1, 1);
            run.fabric.polling = PollingChoice::Busy;
        }
    }
    Ok(run)
}
