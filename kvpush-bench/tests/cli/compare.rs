//! `kvpush-bench compare`: beside memcpy, which every machine has, and without what is not installed.

use serde_json::Value;

use crate::tool::{LONG, Running, Scratch, command, run};

const LITTLE: [&str; 7] = [
    "compare", "--sizes", "4k,64k", "--moved", "1m", "--repeat", "2",
];

#[test]
fn beside_memcpy_with_ratios() {
    let file = Scratch::new("json");
    let path = file.0.display().to_string();
    let mut arguments = LITTLE.to_vec();
    arguments.extend(["--fabric", "shm", "--json", &path]);
    let outcome = run(&arguments);
    outcome.assert_code(0);
    assert!(outcome.out.contains("memcpy"), "{}", outcome.out);
    let lines: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(&file.0).unwrap()).unwrap();
    assert_eq!(lines.len(), 4);
    for line in &lines {
        assert_eq!(line["verified"], true, "{line}");
        assert_eq!(line["reference"], "memcpy");
        for figures in ["theirs", "ours", "ratio"] {
            assert!(line[figures]["median"].as_f64().unwrap() > 0.0, "{line}");
            assert_eq!(line[figures]["runs"].as_array().unwrap().len(), 2);
        }
    }
}

/// Our own rows are there, and nobody mistakes that for a comparison.
#[test]
fn what_is_not_installed_is_said() {
    let mut arguments = LITTLE.to_vec();
    arguments.extend(["--fabric", "tcp"]);
    let mut command = command(&arguments);
    // Nothing is found there.
    command.env("PATH", "/kvpush-has-no-such-folder");
    let outcome = Running::of(command).wait(LONG);
    outcome.assert_code(3);
    outcome.assert_err(&["iperf3 is not installed", "apt-get install iperf3"]);
    assert!(
        outcome.out.contains("tcp") && outcome.out.contains("yes"),
        "{}",
        outcome.out
    );
}

#[test]
fn help_says_what_is_compared_and_how() {
    let outcome = run(&["compare", "--help"]);
    outcome.assert_code(0);
    for word in [
        "iperf3",
        "ib_write_bw",
        "memcpy",
        "ratio",
        "Exit codes",
        "Examples",
    ] {
        assert!(
            outcome.out.contains(word),
            "no {word:?} in\n{}",
            outcome.out
        );
    }
}
