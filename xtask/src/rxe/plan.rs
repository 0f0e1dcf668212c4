//! What runs in the guests when no command is given: the one place with the names of the tests and the command lines.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Options, report};
use crate::artifacts::{self, Executable};
use crate::guest::{self, Guest, Machine, quote};

/// Test targets which must run in a guest. One of these that does not exist is an error, so that a renamed suite
/// cannot drop out of the RDMA tests without notice.
const GUEST_TESTS: &[&str] = &["fabric_suite", "endpoint_suite"];

/// Test targets whose names start so run in a guest, too.
const GUEST_TEST_PREFIX: &str = "rxe_";

/// Arguments of the tests. The suites share two emulated devices, and each test of theirs uses threads of its own.
const TEST_ARGUMENTS: &str = "--test-threads=1 --include-ignored verbs";

/// For one suite, in seconds. Emulation is slow; a suite which hangs should still not take the others with it.
const SUITE_TIMEOUT: u32 = 600;

/// The bench's default port, on which its server listens.
const BENCH_PORT: u16 = 7700;

/// Where the bench leaves its rows.
const BENCH_ROWS: &str = "bench.json";

/// What both guests know; the network between them has nobody else on it.
const BENCH_KEY: &str = "between-two-guests";

/// Grouped-query attention and MLA, with more ranks on either side, over two lanes; small, because emulation is slow.
const BENCH_WORKLOAD: &str = "--fabric verbs --lanes 2 --model llama-3.1-8b,deepseek-r1 --tp-prefill 4,2 --tp-decode 2,4 \
     --layers 4 --requests 2 --pages 8 --rounds 1";

fn bench_serve(bench: &str) -> String {
    format!("serve_until_stopped {bench} serve --key {BENCH_KEY} --fabric verbs")
}

fn bench_push(bench: &str) -> String {
    format!(
        "wait_for_tcp \"$KVPUSH_GUEST_PEER\" {BENCH_PORT} 120 && {bench} push \"$KVPUSH_GUEST_PEER\" --key {BENCH_KEY} \
         {BENCH_WORKLOAD} --json /out/{BENCH_ROWS}"
    )
}

/// Every suite for RDMA devices, in a guest with two of them.
pub(super) fn suites_in_one_guest(options: &Options, machine: &Machine) -> Result<()> {
    let (suites, missing) = select(artifacts::tests(options.release)?);
    for name in &missing {
        eprintln!(
            "ERROR: there is no test target {name:?}, which must run over rxe (see GUEST_TESTS)"
        );
    }
    if !suites.is_empty() {
        let guest = options.configure(Guest::alone(suites_script(&suites)));
        report(&guest::run("suites", machine, vec![guest])?)?;
    }
    if !missing.is_empty() {
        bail!("missing test targets: {}", missing.join(", "));
    }
    Ok(())
}

/// Pushes from guest `a` into guest `b`, every byte verified.
pub(super) fn bench_between_two_guests(options: &Options, machine: &Machine) -> Result<()> {
    let bench = artifacts::binary("kvpush-bench", options.release)?;
    let bench = quote(&bench.path.to_string_lossy());
    let [a, b] = Guest::pair(options.rails(), bench_push(&bench), bench_serve(&bench))?;
    let guests = vec![options.configure(a), options.configure(b.server())];
    let outcomes = guest::run("bench-pair", machine, guests)?;
    report(&outcomes)?;

    let path = outcomes.first().context("no outcome")?.out.join(BENCH_ROWS);
    let rows = std::fs::read_to_string(&path)
        .with_context(|| format!("the bench left no {}", path.display()))?;
    let count = check_bench_rows(&rows)?;
    println!("[a] {count} rows, all over verbs and verified");
    Ok(())
}

/// Those of `tests` to run in a guest, and names in [`GUEST_TESTS`] which are not among them.
fn select(tests: Vec<Executable>) -> (Vec<Executable>, Vec<&'static str>) {
    let wanted = |name: &str| GUEST_TESTS.contains(&name) || name.starts_with(GUEST_TEST_PREFIX);
    let suites: Vec<_> = tests
        .into_iter()
        .filter(|test| test.kind == "test" && wanted(&test.name))
        .collect();
    let missing = GUEST_TESTS
        .iter()
        .copied()
        .filter(|name| suites.iter().all(|suite| suite.name != *name))
        .collect();
    (suites, missing)
}

fn suites_script(suites: &[Executable]) -> String {
    let mut script = String::from("failed=()\n");
    for suite in suites {
        let name = quote(&suite.name);
        let (dir, path) = (
            quote(&suite.package_dir.to_string_lossy()),
            quote(&suite.path.to_string_lossy()),
        );
        script.push_str(&format!(
            "echo; echo '---- {name} over rxe'\ncd {dir}\n\
             CARGO_MANIFEST_DIR={dir} timeout {SUITE_TIMEOUT} {path} {TEST_ARGUMENTS} || failed+=({name}:$?)\n"
        ));
    }
    script.push_str(
        "if ((${#failed[@]})); then echo \"FAILED (suite:status): ${failed[*]}\"; exit 1; fi\n",
    );
    script
}

/// The bench's rows (a JSON array, or one object per line): how many there are; an error if any is not what it should.
fn check_bench_rows(text: &str) -> Result<usize> {
    let rows: Vec<Value> = match serde_json::from_str(text) {
        Ok(Value::Array(rows)) => rows,
        _ => text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?,
    };
    if rows.is_empty() {
        bail!("the bench measured nothing");
    }
    for row in &rows {
        if row["verified"] != true {
            bail!("the bench did not verify every byte: {row}");
        }
        if row["fabric"] != "verbs" {
            bail!("the bench did not use RDMA: {row}");
        }
    }
    Ok(rows.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str, kind: &str) -> Executable {
        Executable {
            name: name.into(),
            kind: kind.into(),
            path: "/t/x".into(),
            package_dir: "/w".into(),
        }
    }

    #[test]
    fn only_suites_for_rdma_are_selected() {
        let all = vec![
            test("fabric_suite", "test"),
            test("rxe_faults", "test"),
            test("other", "test"),
            test("rxe_x", "bin"),
        ];
        let (suites, missing) = select(all);
        let names: Vec<_> = suites.iter().map(|suite| suite.name.as_str()).collect();
        assert_eq!(names, ["fabric_suite", "rxe_faults"]);
        assert!(missing.is_empty());
    }

    #[test]
    fn a_listed_suite_that_does_not_exist_is_reported() {
        assert_eq!(select(vec![test("rxe_faults", "test")]).1, ["fabric_suite"]);
    }

    #[test]
    fn bench_rows_must_be_verified_and_over_rdma() {
        let good = r#"{"fabric":"verbs","verified":true}"#;
        assert_eq!(check_bench_rows(&format!("{good}\n{good}\n")).unwrap(), 2);
        assert_eq!(check_bench_rows(&format!("[{good},{good}]")).unwrap(), 2);
        for bad in [
            "",
            "[]",
            "{}",
            &good.replace("true", "false"),
            &good.replace("verbs", "tcp"),
            "nonsense",
        ] {
            assert!(check_bench_rows(bad).is_err(), "{bad}");
        }
    }
}
