//! `cargo xtask rxe`: programs over soft-RoCE, in one guest and in two.

mod plan;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Choice, Guest, Outcome, perftest};
use crate::process::stage;

const HELP: &str = "\
cargo xtask rxe: run programs over soft-RoCE in QEMU guests

Boots Debian's kernel in QEMU (emulated, so neither KVM nor an RDMA device is needed), with this machine's root file
system read-only below a scratch layer, and runs this machine's own programs in it, at their own paths.

USAGE
    cargo xtask rxe [OPTIONS]                    the RDMA test suites in one guest, kvpush-bench beside perftest in one,
                                                 kvpush-bench between two, and the tests with real dmabufs in one guest with a newer kernel
    cargo xtask rxe [OPTIONS] --dmabuf           the tests with real dmabufs only
    cargo xtask rxe [OPTIONS] --compare          kvpush-bench beside perftest only
    cargo xtask rxe [OPTIONS] --perftest         ib_write_bw instead
    cargo xtask rxe [OPTIONS] -- COMMAND ARGS…   your command instead (in every guest)
    cargo xtask rxe [OPTIONS] --shell-script F   your bash script instead (in every guest)

OPTIONS
    --guests 1|2|both    How many guests [default: both; 1 with a command or a script]
                           1: devices rxe0 (10.78.0.1) and rxe1 (10.78.0.2), joined by a virtual cable
                           2: guests a (10.77.0.1) and b (10.77.0.2), each with a device rxe0, joined by a network
    --rails N            Networks between two guests, each with an RDMA device (rxe0, rxe1, …) [default: 1]
    --perftest           Measure with perftest's ib_write_bw
    --dmabuf             Boot a kernel that has /dev/udmabuf and /dev/dma_heap (6.12 or newer; of the mirror's
                         backports where the release's own is older); without a command, run the tests that need them
    --release            Build tests and kvpush-bench with --release
    --timeout SECONDS    For each guest, from power-on to power-off [default: 3000]
    --memory MIB         Of each guest [default: 2048]
    --cpus N             Of each guest [default: 2]
    --count-instructions The guests' clocks count instructions, one for a nanosecond: figures repeat, whatever else this
                         machine does. Processors take turns, so it shows what costs how much work, not how fast it is
    --update-kernel      Ask apt for the current kernel, rather than use the one in target/rxe/kernel
    -h, --help           Show this text

IN A GUEST
    Of two guests each knows KVPUSH_GUEST_ADDR and KVPUSH_GUEST_PEER. Files written to /out are found in target/rxe/runs/*/*/out afterwards, beside the logs; all
    other writes are lost. Scripts may call wait_for_tcp HOST PORT, wait_for_listener PORT and, in guest b,
    serve_until_stopped COMMAND….

ENVIRONMENT
    KVPUSH_GUEST_ACCEL    QEMU's -accel [default: tcg,thread=multi]; \"kvm\" is much faster where it works
    KVPUSH_GUEST_KERNEL   Another kernel package, together with --update-kernel

EXAMPLES
    cargo xtask rxe
    cargo xtask rxe --guests 2 --perftest
    cargo xtask rxe -- ibv_devinfo -v
    cargo xtask rxe --guests 2 --timeout 60 -- rdma link show
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guests {
    One,
    Two,
    Both,
}

impl Guests {
    fn one(self) -> bool {
        self != Self::Two
    }

    fn two(self) -> bool {
        self != Self::One
    }
}

#[derive(Debug, Default)]
struct Options {
    help: bool,
    guests: Option<Guests>,
    perftest: bool,
    dmabuf: bool,
    compare: bool,
    release: bool,
    update_kernel: bool,
    count_instructions: bool,
    script_file: Option<PathBuf>,
    command: Option<Vec<String>>,
    timeout: Option<u64>,
    memory_mib: Option<u32>,
    cpus: Option<u32>,
    rails: Option<u8>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || {
                args.next()
                    .with_context(|| format!("{arg} needs a value; see `cargo xtask rxe --help`"))
            };
            match arg.as_str() {
                "-h" | "--help" => options.help = true,
                "--guests" => {
                    options.guests = Some(match value()?.as_str() {
                        "1" => Guests::One,
                        "2" => Guests::Two,
                        "both" => Guests::Both,
                        other => bail!("--guests is 1, 2 or both, not {other:?}"),
                    });
                }
                "--perftest" => options.perftest = true,
                "--compare" => options.compare = true,
                "--dmabuf" => options.dmabuf = true,
                "--release" => options.release = true,
                "--count-instructions" => options.count_instructions = true,
                "--update-kernel" => options.update_kernel = true,
                "--shell-script" => options.script_file = Some(value()?.into()),
                "--timeout" => {
                    options.timeout = Some(value()?.parse().context("--timeout takes seconds")?)
                }
                "--memory" => {
                    options.memory_mib = Some(value()?.parse().context("--memory takes MiB")?)
                }
                "--cpus" => options.cpus = Some(value()?.parse().context("--cpus takes a number")?),
                "--rails" => {
                    options.rails = Some(value()?.parse().context("--rails takes a number")?)
                }
                "--" => options.command = Some(args.by_ref().cloned().collect()),
                other => bail!("unknown option {other:?}; see `cargo xtask rxe --help`"),
            }
        }
        let tasks = [
            options.perftest,
            options.script_file.is_some(),
            options.command.is_some(),
        ];
        if tasks.into_iter().filter(|task| *task).count() > 1 {
            bail!("--perftest, --shell-script and a command exclude each other");
        }
        let stages = [options.perftest, options.dmabuf, options.compare];
        if stages.into_iter().filter(|stage| *stage).count() > 1 {
            bail!("--perftest, --dmabuf and --compare exclude each other");
        }
        if options.rails == Some(0) {
            bail!("two guests are joined by at least one rail");
        }
        if options.command.as_ref().is_some_and(Vec::is_empty) {
            bail!("a command should follow `--`");
        }
        Ok(options)
    }

    /// The kernel that was asked for.
    fn kernel(&self) -> Choice {
        match self.dmabuf {
            true => Choice::Dmabuf,
            false => Choice::Current,
        }
    }

    fn rails(&self) -> usize {
        self.rails.unwrap_or(1).into()
    }

    /// Applies what was asked for guests in general.
    fn configure(&self, guest: Guest) -> Guest {
        guest
            .memory_mib(self.memory_mib.unwrap_or(2048))
            // Processors that take turns would wait for each other.
            .cpus(
                self.cpus
                    .unwrap_or(if self.count_instructions { 1 } else { 2 }),
            )
            .counted_time(self.count_instructions)
            .timeout(Duration::from_secs(self.timeout.unwrap_or(3000)))
    }
}

/// The command.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if options.help {
        print!("{HELP}");
        return Ok(());
    }
    if let Some(script) = own_script(&options)? {
        return run_script(&options, &script);
    }
    if options.dmabuf {
        return dmabuf(&options);
    }
    let guests = options.guests.unwrap_or(Guests::Both);
    let machine = guest::prepare(Choice::Current, options.update_kernel)?;
    if options.perftest {
        if guests.one() {
            stage("rxe: ib_write_bw in one guest", || {
                perftest::one_guest(&machine).map(|_| ())
            })?;
        }
        if guests.two() {
            stage("rxe: ib_write_bw between two guests", || {
                perftest::two_guests(&machine).map(|_| ())
            })?;
        }
        return Ok(());
    }
    if options.compare {
        return stage("rxe: kvpush-bench compare in one guest", || {
            plan::compare_in_one_guest(&options, &machine)
        });
    }
    if guests.one() {
        stage("rxe: test suites in one guest", || {
            plan::suites_in_one_guest(&options, &machine)
        })?;
        stage("rxe: kvpush-bench compare in one guest", || {
            plan::compare_in_one_guest(&options, &machine)
        })?;
    }
    if guests.two() {
        stage("rxe: kvpush-bench between two guests", || {
            plan::bench_between_two_guests(&options, &machine)
        })?;
        stage("rxe: ib_write_bw between two guests, to compare", || {
            perftest::two_guests(&machine).map(|_| ())
        })?;
    }
    // One xtask at a time has the cache, and one machine of an xtask.
    drop(machine);
    match guests.one() {
        true => dmabuf(&options),
        false => Ok(()),
    }
}

/// The tests with real dmabufs, in a guest whose kernel makes them.
fn dmabuf(options: &Options) -> Result<()> {
    stage("rxe: real dmabufs in one guest", || {
        let machine = guest::prepare(Choice::Dmabuf, options.update_kernel)?;
        plan::dmabufs_in_one_guest(options, &machine)
    })
}

/// The developer's own script or command, as a script.
fn own_script(options: &Options) -> Result<Option<String>> {
    if let Some(file) = &options.script_file {
        let script =
            std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        return Ok(Some(script));
    }
    let words = options.command.as_ref();
    Ok(words.map(|words| {
        words
            .iter()
            .map(|word| guest::quote(word))
            .collect::<Vec<_>>()
            .join(" ")
    }))
}

fn run_script(options: &Options, script: &str) -> Result<()> {
    let machine = guest::prepare(options.kernel(), options.update_kernel)?;
    let guests = options.guests.unwrap_or(Guests::One);
    let mut outcomes = Vec::new();
    if guests.one() {
        outcomes.extend(guest::run(
            "script",
            &machine,
            vec![options.configure(Guest::alone(script))],
        )?);
    }
    if guests.two() {
        let pair =
            Guest::pair(options.rails(), script, script)?.map(|guest| options.configure(guest));
        outcomes.extend(guest::run("script-pair", &machine, pair.into())?);
    }
    report(&outcomes)
}

/// Says how guests ended; fails when a program did.
fn report(outcomes: &[Outcome]) -> Result<()> {
    for outcome in outcomes {
        println!(
            "[{}] status {}; booted in {:.1} s, off after {:.1} s; files in {}",
            outcome.name,
            outcome.status,
            outcome.boot.as_secs_f64(),
            outcome.total.as_secs_f64(),
            outcome.out.display()
        );
    }
    outcomes.iter().try_for_each(Outcome::success)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(
            &line
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn all_after_two_dashes_is_the_command() {
        let options = parse("--guests 2 -- ls --help").unwrap();
        assert_eq!(options.guests, Some(Guests::Two));
        assert!(!options.help);
        assert_eq!(own_script(&options).unwrap().unwrap(), "ls --help");
    }

    #[test]
    fn bad_options_are_refused() {
        for line in [
            "--guests",
            "--guests 3",
            "--nonsense",
            "--",
            "--perftest -- ls",
            "--perftest --dmabuf",
            "--compare --dmabuf",
            "--timeout soon",
            "--rails 0",
            "ls",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
