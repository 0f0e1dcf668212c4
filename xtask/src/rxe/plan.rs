//! What runs in the guests when no command is given: the one place with the names of the tests and the command lines.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Options, report};
use crate::artifacts::{self, Executable};
use crate::guest::{self, Guest, Machine, Outcome, quote};

/// Test targets which must run in a guest. One of these that does not exist is an error, so that a renamed suite
/// cannot drop out of the RDMA tests without notice.
const GUEST_TESTS: &[&str] = &["fabric_suite", "endpoint_suite", "two_process", "disagg"];

/// Test targets whose names start so run in a guest, too.
const GUEST_TEST_PREFIX: &str = "rxe_";

/// Test targets that need a kernel which makes dmabufs, and what to run of them. They, too, must exist.
const DMABUF_TESTS: &[(&str, &str)] = &[
    ("dmabuf", "--include-ignored"),
    (
        "fabric_suite",
        "--include-ignored any_offset outside_of_the_range a_mapping_ends",
    ),
];

/// Arguments of all tests. The suites share two emulated devices, and each test of theirs uses threads of its own.
const TEST_ARGUMENTS: &str = "--test-threads=1";

/// What to run of a suite that has cases for several fabrics: those over verbs, which are ignored elsewhere.
const VERBS_CASES: &str = "--include-ignored verbs";

/// For one suite, in seconds. Emulation is slow; a suite which hangs should still not take the others with it.
const SUITE_TIMEOUT: u32 = 1200;

/// The end of a script whose `failed` lists what failed.
const REPORT_FAILURES: &str =
    "if ((${#failed[@]})); then echo \"FAILED (suite:status): ${failed[*]}\"; exit 1; fi\n";

/// The bench's default port, on which its server listens.
const BENCH_PORT: u16 = 7700;

/// Where the bench leaves its rows.
const BENCH_ROWS: &str = "bench.json";

/// The same of a second run, over verbs.
const VERBS_ROWS: &str = "bench-verbs.json";

/// What both guests know; the network between them has nobody else on it.
const BENCH_KEY: &str = "between-two-guests";

/// An emulated host often takes longer to acknowledge than the 67 ms that suit real ones, and after a retransmission
/// that nothing was lost for rxe sometimes finds the request invalid: 1.07 s.
const BENCH_FABRIC: &str = "--fabric verbs --ack-timeout 18";

/// Grouped-query attention and MLA, with more ranks on either side, over two lanes; small, because emulation is slow.
const BENCH_WORKLOAD: &str = "--lanes 2 --model llama-3.1-8b,deepseek-r1 --tp-prefill 4,2 --tp-decode 2,4 \
     --layers 4 --requests 2 --pages 8 --rounds 1";

/// Where the comparison leaves its lines.
const COMPARE_LINES: &str = "compare.json";

/// Little, because emulation is slow; whoever wants figures calls the tool with its own sizes in a guest.
const COMPARE_WORKLOAD: &str =
    "--fabric verbs --ack-timeout 18 --sizes 4k,64k --moved 4m --repeat 1";

fn bench_serve(bench: &str) -> String {
    format!("serve_until_stopped {bench} serve --key {BENCH_KEY} {BENCH_FABRIC}")
}

fn bench_push(bench: &str) -> String {
    format!(
        "wait_for_tcp \"$KVPUSH_GUEST_PEER\" {BENCH_PORT} 120 && {bench} push \"$KVPUSH_GUEST_PEER\" --key {BENCH_KEY} \
         {BENCH_FABRIC} {BENCH_WORKLOAD} --json /out/{BENCH_ROWS}"
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
        let bench = artifacts::binary("kvpush-bench", options.release)?;
        let bench = quote(&bench.path.to_string_lossy());
        let guest = options.configure(Guest::alone(suites_script(&suites, &bench)));
        let outcomes = guest::run("suites", machine, vec![guest])?;
        report(&outcomes)?;
        println!(
            "{} rows, all over verbs and verified",
            bench_rows(&outcomes)?
        );
    }
    if !missing.is_empty() {
        bail!("missing test targets: {}", missing.join(", "));
    }
    Ok(())
}

/// kvpush beside perftest, in one guest. How fast either is does not matter here; that both ran, and that every byte was
/// verified, does.
pub(super) fn compare_in_one_guest(options: &Options, machine: &Machine) -> Result<()> {
    let bench = artifacts::binary("kvpush-bench", options.release)?;
    let bench = quote(&bench.path.to_string_lossy());
    let script = format!("{bench} compare {COMPARE_WORKLOAD} --json /out/{COMPARE_LINES}");
    let guest = options.configure(Guest::alone(script));
    let outcomes = guest::run("compare", machine, vec![guest])?;
    report(&outcomes)?;
    let lines = rows_of(&outcomes, COMPARE_LINES)?;
    let count = check_rows(&lines, &[("fabric", "verbs")])?;
    check_compared(&lines)?;
    println!("{count} lines, all verified and beside what perftest measured");
    Ok(())
}

/// An error unless perftest has measured something beside each line, its latency among them.
fn check_compared(text: &str) -> Result<()> {
    let lines: Vec<Value> = serde_json::from_str(text).context("the lines of the comparison")?;
    for line in &lines {
        let positive = |value: &Value| value["median"].as_f64().is_some_and(|median| median > 0.0);
        if !(positive(&line["theirs"]) && positive(&line["ours"]) && positive(&line["ratio"])) {
            bail!("nothing was compared: {line}");
        }
    }
    for tool in ["ib_write_bw", "ib_write_lat"] {
        if lines.iter().all(|line| line["reference"] != tool) {
            bail!("{tool} did not run");
        }
    }
    Ok(())
}

/// Everything about real dmabufs, over every fabric, in a guest whose kernel makes them.
pub(super) fn dmabufs_in_one_guest(options: &Options, machine: &Machine) -> Result<()> {
    let tests = artifacts::tests(options.release)?;
    let mut script = String::from(
        "failed=()\nfor node in /dev/udmabuf /dev/dma_heap/system; do\n    \
         [ -e $node ] || { echo \"this kernel has no $node\" >&2; exit 1; }\ndone\n",
    );
    for (name, cases) in DMABUF_TESTS {
        let mut suites = tests.iter().filter(|test| test.kind == "test");
        let suite = suites
            .find(|test| test.name == *name)
            .with_context(|| format!("there is no test target {name:?} (see DMABUF_TESTS)"))?;
        script.push_str(&suite_script(suite, cases));
    }
    let bench = artifacts::binary("kvpush-bench", options.release)?;
    let bench = quote(&bench.path.to_string_lossy());
    script.push_str(&format!(
        "echo; echo '---- kvpush-bench, its pools in dmabufs'\n\
         {bench} devices || failed+=(devices:$?)\n\
         {bench} --fabric tcp --memory udmabuf {BENCH_WORKLOAD} --json /out/{BENCH_ROWS} || failed+=(bench:$?)\n\
         {bench} {BENCH_FABRIC} --memory udmabuf {BENCH_WORKLOAD} --json /out/{VERBS_ROWS} || failed+=(bench-verbs:$?)\n"
    ));
    script.push_str(REPORT_FAILURES);
    let guest = options.configure(Guest::alone(script));
    let outcomes = guest::run("dmabuf", machine, vec![guest])?;
    report(&outcomes)?;
    for (fabric, rows) in [("tcp", BENCH_ROWS), ("verbs", VERBS_ROWS)] {
        let wanted = [("fabric", fabric), ("memory", "udmabuf->udmabuf")];
        let count = check_rows(&rows_of(&outcomes, rows)?, &wanted)?;
        println!("{count} rows over {fabric}, all in dmabufs and verified");
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

    println!(
        "[a] {} rows, all over verbs and verified",
        bench_rows(&outcomes)?
    );
    Ok(())
}

/// Checks the rows that the bench left in the first guest, and counts them.
fn bench_rows(outcomes: &[Outcome]) -> Result<usize> {
    check_rows(&rows_of(outcomes, BENCH_ROWS)?, &[("fabric", "verbs")])
}

/// What the bench left in file `name` of the first guest.
fn rows_of(outcomes: &[Outcome], name: &str) -> Result<String> {
    let path = outcomes.first().context("no outcome")?.out.join(name);
    std::fs::read_to_string(&path).with_context(|| format!("the bench left no {}", path.display()))
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

fn suites_script(suites: &[Executable], bench: &str) -> String {
    let mut script = String::from("failed=()\n");
    for suite in suites {
        let cases = match suite.name.starts_with(GUEST_TEST_PREFIX) {
            true => "--ignored",
            false => VERBS_CASES,
        };
        script.push_str(&suite_script(suite, cases));
    }
    // The bench's main job, two processes over both rails; and once with a wrong expectation, which it must notice.
    script.push_str(&format!(
        "echo; echo '---- kvpush-bench over rxe, prefill and decode as two processes'\n\
         {bench} {BENCH_FABRIC} {BENCH_WORKLOAD} --json /out/{BENCH_ROWS} || failed+=(bench:$?)\n\
         echo; echo '---- kvpush-bench with a planted error'\n\
         if {bench} {BENCH_FABRIC} {BENCH_WORKLOAD} --plant-error > /tmp/planted.log 2>&1; then failed+=(planted-error-unnoticed); \
         else grep -i -m1 verif /tmp/planted.log || failed+=(planted-error-other-failure); fi\n"
    ));
    script.push_str(REPORT_FAILURES);
    script
}

/// Runs one test target, and remembers if it failed or ran nothing.
fn suite_script(suite: &Executable, cases: &str) -> String {
    let name = quote(&suite.name);
    let (dir, path) = (
        quote(&suite.package_dir.to_string_lossy()),
        quote(&suite.path.to_string_lossy()),
    );
    format!(
        "echo; echo '---- {name} over rxe'\ncd {dir}\n\
         CARGO_MANIFEST_DIR={dir} timeout {SUITE_TIMEOUT} {path} {TEST_ARGUMENTS} {cases} | tee /tmp/suite.log\n\
         status=${{PIPESTATUS[0]}}\n\
         [ $status = 0 ] || failed+=({name}:$status)\n\
         grep -Eq 'test result: ok\\. [1-9][0-9]* passed' /tmp/suite.log || failed+=({name}:ran-nothing)\n"
    )
}

/// The bench's rows (a JSON array, or one object per line): how many there are; an error if any is not what it should.
/// `wanted` is what fields of each must hold.
fn check_rows(text: &str, wanted: &[(&str, &str)]) -> Result<usize> {
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
        for &(field, value) in wanted {
            if row[field] != value {
                bail!("the bench did not use {field} {value}: {row}");
            }
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
    fn a_comparison_without_its_reference_is_none() {
        let figures = r#"{"median":1.5}"#;
        let line = |tool: &str| {
            format!(
                r#"{{"reference":"{tool}","theirs":{figures},"ours":{figures},"ratio":{figures}}}"#
            )
        };
        let good = format!("[{},{}]", line("ib_write_bw"), line("ib_write_lat"));
        check_compared(&good).unwrap();
        for bad in [
            good.replace("ib_write_lat", "ib_write_bw"),
            good.replacen(&format!("\"theirs\":{figures}"), "\"theirs\":null", 1),
            good.replacen("1.5", "0", 1),
            "[]".to_owned(),
            "nonsense".to_owned(),
        ] {
            assert!(check_compared(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_suites_for_rdma_are_selected() {
        let listed = GUEST_TESTS.iter().map(|name| test(name, "test"));
        let others = [("rxe_faults", "test"), ("other", "test"), ("rxe_x", "bin")];
        let all = listed
            .chain(others.map(|(name, kind)| test(name, kind)))
            .collect();
        let (suites, missing) = select(all);
        let names: Vec<_> = suites.iter().map(|suite| suite.name.as_str()).collect();
        let expected: Vec<_> = GUEST_TESTS.iter().copied().chain(["rxe_faults"]).collect();
        assert_eq!(names, expected);
        assert!(missing.is_empty());
    }

    #[test]
    fn a_listed_suite_that_does_not_exist_is_reported() {
        assert_eq!(select(vec![test("rxe_faults", "test")]).1, GUEST_TESTS);
    }

    #[test]
    fn bench_rows_must_be_verified_and_over_rdma() {
        let good = r#"{"fabric":"verbs","verified":true}"#;
        let check = |text: &str| check_rows(text, &[("fabric", "verbs")]);
        assert_eq!(check(&format!("{good}\n{good}\n")).unwrap(), 2);
        assert_eq!(check(&format!("[{good},{good}]")).unwrap(), 2);
        for bad in [
            "",
            "[]",
            "{}",
            &good.replace("true", "false"),
            &good.replace("verbs", "tcp"),
            "nonsense",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
