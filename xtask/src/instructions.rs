//! `cargo xtask instructions`: how many instructions a page costs, counted by valgrind, against bounds in the repository.
//!
//! Each case runs `benches/verbs_null` twice under callgrind, with few and with many rounds, so that what a program does
//! once cancels out. Instructions of the double itself do not count: it stands for the device. Times vary with the
//! machine and its load; instructions hardly do, so this is what a change is held against.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{apt, artifacts, process, workspace};

const HELP: &str = "\
cargo xtask instructions: instructions per page of the verbs path, over the double of libibverbs

USAGE
    cargo xtask instructions [--write]

Needs valgrind, which it installs where this is Debian and it runs as root. Prints a table, and fails when a figure is
above its bound in benches/instructions.txt.

OPTIONS
    --write       Write the bounds anew: what is counted now, and a tenth
    -h, --help    Show this text
";

/// Where the bounds are.
const BOUNDS: &str = "benches/instructions.txt";

/// What is counted: arguments of the program before the number of rounds, rounds few and many, and pages of a round.
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    rounds: (u64, u64),
    pages: u64,
    /// Whose instructions, if not everybody's.
    of: Of,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    /// The caller's thread and the writer's driver.
    Writer,
    /// The reader's driver.
    Reader,
    Everybody,
}

/// Layers of a push of `verbs_null`.
const LAYERS: u64 = 16;

const CASES: [Case; 8] = [
    Case {
        name: "plan",
        arguments: &["plan", "10000"],
        rounds: (1, 11),
        pages: 10_000,
        of: Of::Everybody,
    },
    Case {
        name: "post",
        arguments: &["post"],
        rounds: (10, 510),
        pages: 64,
        of: Of::Everybody,
    },
    push("writer, each layer planned", "push", Of::Writer),
    push("writer, prepared", "prepared", Of::Writer),
    push("reader", "push", Of::Reader),
    Case {
        name: "arrival of a part",
        arguments: &["arrive"],
        rounds: (10, 510),
        pages: 64,
        of: Of::Everybody,
    },
    Case {
        name: "writer, layers of 100 pages",
        arguments: &["push", "100"],
        rounds: (5, 35),
        pages: LAYERS * 100,
        of: Of::Writer,
    },
    Case {
        name: "writer, layers of 1 page",
        arguments: &["push", "1"],
        rounds: (10, 110),
        pages: LAYERS,
        of: Of::Writer,
    },
];

const fn push(name: &'static str, mode: &'static str, of: Of) -> Case {
    Case {
        name,
        arguments: match mode.len() {
            4 => &["push", "10000"],
            _ => &["prepared", "10000"],
        },
        rounds: (1, 3),
        pages: LAYERS * 10_000,
        of,
    }
}

/// `cargo xtask instructions`.
pub(crate) fn main(args: &[String]) -> Result<()> {
    let writes = match args {
        [] => false,
        [word] if word == "--write" => true,
        [word] if word == "-h" || word == "--help" => {
            print!("{HELP}");
            return Ok(());
        }
        _ => bail!("see --help"),
    };
    apt::ensure(&["valgrind"], "counting instructions")?;
    let double = artifacts::verbs_double()?;
    let program = artifacts::bench("verbs_null")?;
    let mut counts = Counts {
        program: &program.path,
        double: &double,
        folder: workspace::cache("instructions")?,
        known: BTreeMap::new(),
    };
    let mut figures = Vec::new();
    for case in &CASES {
        figures.push((case.name, counts.per_page(case)?));
    }
    let path = workspace::root().join(BOUNDS);
    if writes {
        fs::write(&path, render(&figures))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    compare(&figures, &parse_bounds(&text)?)
}

/// Prints the table, and fails if a figure is above its bound or has none.
fn compare(figures: &[(&str, f64)], bounds: &BTreeMap<String, f64>) -> Result<()> {
    let mut above = Vec::new();
    println!(
        "{:<32} {:>14} {:>10}",
        "instructions per page", "counted", "bound"
    );
    for &(name, counted) in figures {
        let bound = *bounds
            .get(name)
            .with_context(|| format!("{BOUNDS} has no bound for {name:?}"))?;
        println!("{name:<32} {counted:>14.1} {bound:>10}");
        if counted > bound {
            above.push(format!("{name}: {counted:.1} is above {bound}"));
        }
    }
    ensure!(
        above.is_empty(),
        "{}\nEither make it cheaper, or say in the commit why it costs more and run `cargo xtask instructions --write`",
        above.join("\n")
    );
    Ok(())
}

/// One bound a line: a number, and what it is for. `#` begins a comment.
fn parse_bounds(text: &str) -> Result<BTreeMap<String, f64>> {
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (bound, name) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
            let bound: f64 = bound.parse().with_context(|| format!("{line:?}"))?;
            Ok((name.trim().to_owned(), bound))
        })
        .collect()
}

fn render(figures: &[(&str, f64)]) -> String {
    let mut text = String::from(
        "# The most instructions that a page may cost: see `cargo xtask instructions --help`.\n\
         # For `post` and `arrival of a part`, a request; the double of libibverbs does not count.\n",
    );
    for (name, counted) in figures {
        text += &format!("{:<6} {name}\n", (counted * 1.1).ceil());
    }
    text
}

/// Instructions of the threads of one run, in the order in which they were started.
type Threads = Vec<u64>;

struct Counts<'a> {
    program: &'a Path,
    double: &'a Path,
    folder: PathBuf,
    known: BTreeMap<Vec<String>, Threads>,
}

impl Counts<'_> {
    fn per_page(&mut self, case: &Case) -> Result<f64> {
        let (few, many) = case.rounds;
        let (first, second) = (self.run(case, few)?, self.run(case, many)?);
        let more = select(&second, case.of)? as f64 - select(&first, case.of)? as f64;
        Ok(more / ((many - few) * case.pages) as f64)
    }

    fn run(&mut self, case: &Case, rounds: u64) -> Result<Threads> {
        let mut arguments: Vec<String> = case.arguments.iter().map(|&word| word.into()).collect();
        arguments.push(rounds.to_string());
        if let Some(known) = self.known.get(&arguments) {
            return Ok(known.clone());
        }
        let stem = arguments.join("-");
        for file in self.files(&stem)? {
            fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
        }
        let mut command = Command::new("valgrind");
        command
            .args(["--tool=callgrind", "--separate-threads=yes", "--quiet"])
            .arg(format!(
                "--callgrind-out-file={}",
                self.folder.join(&stem).display()
            ))
            .arg(self.program)
            .args(&arguments)
            .env("KVPUSH_VERBS_DOUBLE", self.double);
        process::output(&mut command)?;
        let double = self
            .double
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let threads: Threads = self
            .files(&stem)?
            .iter()
            .map(|file| {
                let text = fs::read_to_string(file)
                    .with_context(|| format!("reading {}", file.display()))?;
                own_instructions(&text, &double)
            })
            .collect::<Result<_>>()?;
        ensure!(
            !threads.is_empty(),
            "callgrind has written nothing for {stem}"
        );
        self.known.insert(arguments, threads.clone());
        Ok(threads)
    }

    /// The files of a run, one for each thread (`stem-01` and so on), by number.
    fn files(&self, stem: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let thread = name
                .strip_prefix(stem)
                .and_then(|rest| rest.strip_prefix('-'));
            if thread.is_some_and(|thread| thread.len() == 2 && thread.parse::<u8>().is_ok()) {
                files.push(self.folder.join(name));
            }
        }
        files.sort();
        Ok(files)
    }
}

/// `verbs_null` starts the writer first, and an endpoint its control thread before its driver.
fn select(threads: &Threads, of: Of) -> Result<u64> {
    if of == Of::Everybody {
        return Ok(threads.iter().sum());
    }
    let [caller, _, writer, _, reader] = threads[..] else {
        bail!(
            "{} threads, and not a caller and two endpoints",
            threads.len()
        );
    };
    ensure!(
        writer > reader,
        "a writer that does less than its reader: the order of threads has changed"
    );
    Ok(match of {
        Of::Reader => reader,
        _ => caller + writer,
    })
}

/// The instructions in a callgrind profile that are not of object `without`. Format: the valgrind manual, "Callgrind
/// Format Specification".
fn own_instructions(profile: &str, without: &str) -> Result<u64> {
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut is_counted = true;
    let mut is_call = false;
    let mut sum = 0;
    for line in profile.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            // `(7) name` the first time, then `(7)`.
            let (number, name) = object.split_once(' ').unwrap_or((object, ""));
            if !name.is_empty() {
                names.insert(number, name);
            }
            let name = names.get(number).copied().unwrap_or(object);
            is_counted = !name.ends_with(without);
        } else if let Some(object) = line.strip_prefix("cob=") {
            if let Some((number, name)) = object.split_once(' ') {
                names.insert(number, name);
            }
        } else if line.starts_with("calls=") {
            is_call = true;
        } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
            // Of a call, that is what the function called has cost, which is counted there.
            if !std::mem::take(&mut is_call) && is_counted {
                let cost = line.split(' ').nth(1).unwrap_or("0");
                sum += cost.parse::<u64>().with_context(|| format!("{line:?}"))?;
            }
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_its_bound_fails() {
        let bounds = parse_bounds("# words\n\n30 plan\n400    the whole path\n").unwrap();
        assert!(compare(&[("plan", 30.0), ("the whole path", 1.5)], &bounds).is_ok());
        let error = compare(&[("plan", 30.1), ("the whole path", 1.5)], &bounds).unwrap_err();
        assert!(
            error.to_string().contains("plan: 30.1 is above 30"),
            "{error}"
        );
        assert!(compare(&[("another", 1.0)], &bounds).is_err());
        assert!(parse_bounds("many plan").is_err());
    }

    #[test]
    fn what_is_written_is_a_bound_for_it() {
        let figures = [("plan", 30.0), ("post", 0.4)];
        let bounds = parse_bounds(&render(&figures)).unwrap();
        assert_eq!(bounds["plan"], 33.0);
        assert!(compare(&figures, &bounds).is_ok());
    }

    #[test]
    fn calls_and_the_double_do_not_count() {
        let profile = "events: Ir\n\nob=(1) /bin/program\nfl=(1) a.rs\nfn=(1) main\n10 5\n+1 7\n\
                       cob=(2) /lib/double.so\ncfn=(2) post_send\ncalls=3 20\n* 900\n* 1\n\n\
                       ob=(2)\nfn=(2)\n20 600\n20 300\n\nob=(1)\nfn=(3) other\n-2 100\nsummary: 1013\n";
        assert_eq!(own_instructions(profile, "double.so").unwrap(), 113);
        assert_eq!(own_instructions(profile, "none").unwrap(), 1013);
    }

    #[test]
    fn threads_are_told_apart_by_their_order() {
        let threads = vec![1, 20, 300, 40, 50];
        assert_eq!(select(&threads, Of::Writer).unwrap(), 301);
        assert_eq!(select(&threads, Of::Reader).unwrap(), 50);
        assert_eq!(select(&vec![7], Of::Everybody).unwrap(), 7);
        assert!(select(&vec![1, 20, 30, 40, 50], Of::Writer).is_err());
        assert!(select(&vec![1, 2, 3], Of::Reader).is_err());
    }
}
