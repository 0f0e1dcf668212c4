//! What works: the main job, two hosts, resharding, MLA, sweeps.

use serde_json::Value;

use crate::tool::{KEY, LONG, Scratch, Server, TINY, run};

/// Every row has all that was promised, in sensible values.
#[track_caller]
fn assert_rows(rows: &[Value], count: usize) {
    assert_eq!(rows.len(), count, "{rows:?}");
    for row in rows {
        for text in ["fabric", "op", "model", "tp"] {
            assert!(
                row[text].as_str().is_some_and(|text| !text.is_empty()),
                "{text}: {row}"
            );
        }
        for number in [
            "page_bytes",
            "pages",
            "gb_per_s",
            "p50_us",
            "p99_us",
            "cpu_s_per_gb",
            "pages_per_s",
            "lanes",
            "writes",
        ] {
            assert!(
                row[number].as_f64().is_some_and(|number| number > 0.0),
                "{number}: {row}"
            );
        }
        assert!(row["p50_us"].as_f64() <= row["p99_us"].as_f64(), "{row}");
        assert_eq!(row["verified"], true, "{row}");
        assert!(
            row["verified_bytes"].as_u64() >= row["bytes"].as_u64(),
            "{row}"
        );
        assert_eq!(row["fabric"], "tcp", "{row}");
    }
}

#[test]
fn the_main_job_in_small() {
    let json = Scratch::new("json");
    let outcome = run(&[&TINY[..], &["--json", json.path()]].concat());
    outcome.assert_code(0);
    for word in [
        "fabric: tcp; no RDMA because --fabric tcp was asked for",
        "llama-3.1-8b 1→1",
        "deepseek-r1",
        "GB/s",
        "seed: ",
    ] {
        assert!(
            outcome.out.contains(word),
            "no {word:?} in\n{}",
            outcome.out
        );
    }
    let rows = json.rows();
    assert_rows(&rows, 3);
    let first = &rows[0];
    // 2 rounds of 2 requests of 5 pages in 3 layers of 16 tokens, keys and values, 8 heads of 256 bytes.
    assert_eq!(first["bytes"], 2 * 2 * 5 * 3 * 16 * 2 * 8 * 256);
    assert_eq!(
        (&first["page_bytes"], &first["pages"]),
        (&Value::from(65536), &Value::from(5))
    );
    let processes = outcome.out.lines().next().expect("a line");
    let ids: Vec<_> = processes
        .split(|c: char| !c.is_ascii_digit())
        .filter(|id| !id.is_empty())
        .collect();
    assert!(
        ids.len() == 2 && ids[0] != ids[1],
        "two processes: {processes}"
    );
}

#[test]
fn statistics_on_request() {
    let outcome = run(&[&TINY[..], &["--stats"]].concat());
    outcome.assert_code(0);
    for word in [
        "sessions 1 (failed 0, silent 0)",
        " completed",
        " bytes in ",
        " stalls",
    ] {
        assert!(
            outcome.err.contains(word),
            "no {word:?} in\n{}",
            outcome.err
        );
    }
    let outcome = run(&TINY);
    assert!(!outcome.err.contains(" stalls"), "{}", outcome.err);
}

#[test]
fn between_two_hosts_with_other_numbers_of_ranks_and_mla() {
    let server = Server::start(&KEY);
    let json = Scratch::new("json");
    let workload = [
        "--model",
        "llama-3.1-8b,deepseek-r1-fp8",
        "--tp-prefill",
        "4,2",
        "--tp-decode",
        "2,4",
        "--json",
        json.path(),
    ];
    run(&server.push(&[&TINY[..], &workload].concat())).assert_code(0);
    let rows = json.rows();
    assert_rows(&rows, 4);
    let ranks: Vec<_> = rows
        .iter()
        .map(|row| (row["model"].as_str().unwrap(), row["tp"].as_str().unwrap()))
        .collect();
    let (llama, mla) = ("llama-3.1-8b", "deepseek-r1-fp8");
    assert_eq!(
        ranks,
        [
            (llama, "4->2"),
            (llama, "2->4"),
            (mla, "4->2"),
            (mla, "2->4")
        ]
    );
    // The same server again, with other ranks, lanes and layout, and pages that lie apart.
    let workload = [
        "--tp-prefill",
        "8",
        "--lanes",
        "3",
        "--layout",
        "sglang",
        "--run-length",
        "0",
        "--in-flight",
        "2",
    ];
    run(&server.push(&[&TINY[..], &workload].concat())).assert_code(0);
    server.running.signal(libc::SIGTERM);
    let outcome = server.running.wait(LONG);
    outcome.assert_code(0);
    assert!(outcome.out.contains("stopped"), "{}", outcome.out);
}

#[test]
fn without_a_key_only_if_both_say_so() {
    let server = Server::start(&["--insecure"]);
    let push = [&["push", server.address.as_str()], &TINY[..]].concat();
    run(&[&push[..], &["--insecure", "--model", "deepseek-r1"]].concat())
        .assert_code(0)
        .assert_err(&["warning: --insecure"]);
    run(&[&push[..], &KEY].concat())
        .assert_code(1)
        .assert_err(&["control connection"]);
}

#[test]
fn a_sweep_over_all_operations() {
    let (json, plot) = (Scratch::new("json"), Scratch::new("svg"));
    let outcome = run(&[
        "--fabric",
        "tcp",
        "--sweep",
        "1k..16k",
        "--requests",
        "2",
        "--rounds",
        "1",
        "--json",
        json.path(),
        "--plot",
        plot.path(),
    ]);
    outcome.assert_code(0);
    let rows = json.rows();
    assert_rows(&rows, 9);
    for (index, op) in ["push", "write", "read"].into_iter().enumerate() {
        for (row, size) in rows[index * 3..].iter().zip([1024, 4096, 16384]) {
            assert_eq!(
                (
                    row["op"].as_str(),
                    row["page_bytes"].as_u64(),
                    row["pages"].as_u64()
                ),
                (Some(op), Some(size), Some(128))
            );
            // Pages lie apart, so each is a write of its own; a push has its tails beside.
            assert!(row["writes"].as_u64() >= Some(2 * 128), "{row}");
        }
    }
    let plot = plot.text();
    assert!(
        plot.starts_with("<svg") && plot.matches("<polyline").count() == 3,
        "{plot}"
    );
}

#[test]
fn the_same_seed_makes_the_same_tables() {
    let writes = || {
        let json = Scratch::new("json");
        run(&[
            &TINY[..],
            &["--seed", "7", "--model", "qwen3-32b", "--json", json.path()],
        ]
        .concat())
        .assert_code(0);
        json.rows()[0]["writes"].clone()
    };
    assert_eq!(writes(), writes());
}

/// Real ones where the kernel has them, and otherwise the reason and what to do.
#[test]
fn pools_in_dmabufs_or_why_not() {
    let json = Scratch::new("json");
    let arguments = [&TINY[..], &["--memory", "udmabuf", "--json", json.path()]].concat();
    let outcome = run(&arguments);
    let node = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/udmabuf");
    match node {
        Ok(_) => {
            outcome.assert_code(0);
            let rows = json.rows();
            assert_rows(&rows, 3);
            assert!(
                rows.iter().all(|row| row["memory"] == "udmabuf->udmabuf"),
                "{rows:?}"
            );
        }
        Err(error) => {
            println!("not run with real dmabufs: /dev/udmabuf: {error}");
            outcome
                .assert_code(1)
                .assert_err(&["--memory udmabuf", "/dev/udmabuf", "next: "]);
        }
    }
}
