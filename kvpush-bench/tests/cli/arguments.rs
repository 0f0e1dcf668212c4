//! The command line: what is refused, and what help says.

use crate::tool::run;

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    for (arguments, words) in [
        (
            &["--model", "gpt-9"][..],
            &["gpt-9", "llama-3.1-8b", "deepseek-r1"][..],
        ),
        (&["--tp-prefill", "3"], &["8 KV heads", "3 ranks"]),
        (&["--tp-prefill", "0"], &["0 is not within 1 to 64"]),
        (
            &["--tp-prefill", "1,2,4", "--tp-decode", "2,4"],
            &["--tp-prefill has 3 numbers"],
        ),
        (
            &["--sweep", "1m..4k"],
            &["the first size is the smaller one"],
        ),
        (&["--sweep", "4q"], &["unknown unit"]),
        (
            &["--sweep", "4k", "--model", "deepseek-r1"],
            &["cannot be used with"],
        ),
        (&["--op", "read"], &["--sweep"]),
        (&["--pages", "0"], &["pages: 0 is not within"]),
        (&["--layers", "100000"], &["layers: 100000"]),
        (
            &["--model", "deepseek-r1", "--layout", "sglang"],
            &["--layout does not apply"],
        ),
        (&["--dtype", "int3"], &["bf16"]),
        (&["--lanes", "17"], &["17"]),
        (&["--rounds", "0"], &["0"]),
        (&["--fabric", "tcp", "--devices", "mlx5_0"], &["--devices"]),
        (
            &["--memory", "tape"],
            &["known are host, memfd, hip, cuda and udmabuf"],
        ),
        (&["--memory", "hip:x"], &["no number of a GPU"]),
        (&["--memory", "udmabuf:1"], &["known are host"]),
        (&["--timeout=-1"], &["--timeout"]),
        (&["push", "somewhere"], &["--key"]),
        (&["serve"], &["--key", "--insecure"]),
        (
            &["serve", "--key", "a", "--insecure"],
            &["cannot be used with"],
        ),
        (&["serve", "--key", "a", "--bind", "somewhere"], &["--bind"]),
        (&["push", "--key", "a"], &["<HOST>"]),
        (
            &["push", "somewhere", "--key", "a", "--tp-decode", "5"],
            &["5 ranks"],
        ),
        (&["compare", "--lanes", "17"], &["17"]),
        (&["compare", "--repeat", "0"], &["0"]),
        (&["compare", "--sizes", "1m..4k"], &["the first size"]),
        (
            &["compare", "--fabric", "shm", "--devices", "mlx5_0"],
            &["--devices"],
        ),
        (&["dance"], &["dance"]),
    ] {
        run(arguments).assert_code(2).assert_err(words);
    }
}

#[test]
fn help_and_version() {
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["help"],
        &["push", "--help"],
        &["serve", "--help"],
        &["doctor", "--help"],
    ] {
        let outcome = run(arguments);
        outcome.assert_code(0);
        assert!(
            outcome.out.contains("Usage: kvpush-bench"),
            "{}",
            outcome.out
        );
        assert!(!outcome.out.contains("plant-error"), "{}", outcome.out);
    }
    assert!(run(&["--help"]).out.contains("p50, p99"));
    let version = run(&["--version"]);
    assert_eq!(
        version.out.trim(),
        concat!("kvpush-bench ", env!("CARGO_PKG_VERSION"))
    );
}
