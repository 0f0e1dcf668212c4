//! What must fail, how, and in what time.

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::tool::{KEY, LONG, Running, Scratch, Server, TINY, run};

#[test]
fn a_planted_error_is_found_in_every_operation() {
    let json = Scratch::new("json");
    let outcome = run(&[&TINY[..], &["--plant-error", "--json", json.path()]].concat());
    outcome
        .assert_code(1)
        .assert_err(&["3 of 3 rows did not verify"]);
    assert!(
        outcome.out.contains("FAILED") && outcome.out.contains("1 bytes differ"),
        "{}",
        outcome.out
    );
    assert!(
        json.rows().iter().all(|row| row["verified"] == false),
        "{}",
        json.text()
    );

    let sweep = [
        "--fabric",
        "tcp",
        "--sweep",
        "4k",
        "--requests",
        "2",
        "--plant-error",
        "--json",
        json.path(),
    ];
    run(&sweep)
        .assert_code(1)
        .assert_err(&["3 of 3 rows did not verify"]);
    assert!(
        json.rows().iter().all(|row| row["verified"] == false),
        "{}",
        json.text()
    );
}

#[test]
fn another_key_is_refused() {
    let server = Server::start(&["--key", "the server's own"]);
    let start = Instant::now();
    let outcome = run(&server.push(&TINY));
    outcome
        .assert_code(1)
        .assert_err(&["llama-3.1-8b", "open a push", "control connection"]);
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn nobody_there() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    run(&["push", &free, "--key", "x"])
        .assert_code(1)
        .assert_err(&["cannot reach the server", "kvpush-bench serve", &free]);
    run(&["push", "no.such.host.invalid", "--key", "x"])
        .assert_code(1)
        .assert_err(&["no.such.host.invalid"]);
}

#[test]
fn somebody_else_is_there() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"220 mail.example.org ESMTP\r\n").unwrap();
        stream
    });
    run(&["push", &address, "--key", "x"])
        .assert_code(1)
        .assert_err(&["no message of kvpush-bench"]);
    drop(other.join());
}

/// A workload that goes on until somebody stops it.
fn endless(server: &Server) -> Running {
    let workload = [
        "--fabric",
        "tcp",
        "--model",
        "deepseek-r1",
        "--layers",
        "20",
        "--rounds",
        "10000",
        "--timeout",
        "30",
    ];
    let mut push = Running::start(&server.push(&workload));
    push.line_with("fabric: ");
    std::thread::sleep(Duration::from_millis(700));
    push
}

#[test]
fn a_killed_server_ends_the_push() {
    let server = Server::start(&KEY);
    let push = endless(&server);
    server.running.signal(libc::SIGKILL);
    let start = Instant::now();
    let outcome = push.wait(LONG);
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
    outcome.assert_code(1).assert_err(&["deepseek-r1"]);
    assert!(!outcome.err.contains("panicked"), "{}", outcome.err);
}

#[test]
fn a_stopped_server_ends_the_push_and_itself() {
    let server = Server::start(&KEY);
    let push = endless(&server);
    server.running.signal(libc::SIGINT);
    server.running.wait(Duration::from_secs(30)).assert_code(0);
    push.wait(Duration::from_secs(30)).assert_code(1);
}

#[test]
fn a_killed_pusher_leaves_the_server_to_others() {
    let server = Server::start(&KEY);
    let push = endless(&server);
    let busy = run(&server.push(&TINY));
    busy.assert_code(1)
        .assert_err(&["busy with another pusher"]);
    push.signal(libc::SIGKILL);
    drop(push);
    let end = Instant::now() + Duration::from_secs(60);
    while run(&server.push(&TINY)).status.code() != Some(0) {
        assert!(Instant::now() < end, "the server never became free");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn rubbish_does_not_hurt_the_server() {
    let server = Server::start(&KEY);
    let hello = "{\"type\":\"hello\",\"protocol\":1,\"version\":\"0\"}\n";
    let absurd = "{\"type\":\"case\",\"workload\":{\"model\":\"m\",\"op\":\"push\",\"layers\":1000,\"kv_heads\":60000,\
        \"head_dim\":4000000000,\"element\":\"f32\",\"mla\":false,\"layout\":\"flash\",\"tokens_per_page\":1000000,\
        \"tp_prefill\":1,\"tp_decode\":1,\"requests\":4096,\"pages\":60000,\"run_length\":0,\"lanes\":1,\"timeout_seconds\":1}}\n";
    for rubbish in [
        "",
        "\n",
        "GET / HTTP/1.1\r\n\r\n",
        "\u{1}\u{2}",
        hello,
        &format!("{hello}{absurd}"),
        &format!("{hello}{{\"type\":\"start\"}}\n"),
    ] {
        TcpStream::connect(&server.address)
            .unwrap()
            .write_all(rubbish.as_bytes())
            .unwrap();
    }
    run(&server.push(&TINY)).assert_code(0);
}

#[test]
fn too_little_memory_is_said_before_anything_is_done() {
    let server = Server::start(&[&KEY[..], &["--memory-limit", "1m"]].concat());
    let outcome = run(&server.push(&["--fabric", "tcp", "--pages", "100", "--requests", "1"]));
    outcome.assert_code(1).assert_err(&[
        "1 MiB are to be had",
        "decode: 1 rank(s) with 106 pages of 32 layers",
        "fewer --pages",
    ]);
    let outcome = run(&[
        "--fabric",
        "tcp",
        "--model",
        "llama-3.1-70b",
        "--pages",
        "60000",
        "--requests",
        "100",
    ]);
    outcome
        .assert_code(1)
        .assert_err(&["of memory", "prefill: 1 rank(s)", "decode: 1 rank(s)"]);
}

#[test]
fn results_that_cannot_be_written_are_known_before() {
    let start = Instant::now();
    let outcome = run(&[
        "--fabric",
        "tcp",
        "--rounds",
        "10000",
        "--json",
        "/no/such/folder/rows.json",
    ]);
    outcome
        .assert_code(1)
        .assert_err(&["cannot write /no/such/folder/rows.json"]);
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
}

/// Whether a process of that number does anything.
fn lives(id: &str) -> bool {
    let stat = std::fs::read_to_string(PathBuf::from("/proc").join(id).join("stat"));
    stat.is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('Z'))
    })
}

#[test]
fn the_decode_process_does_not_outlive_the_prefill_process() {
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let mut job = Running::start(&[
            "--fabric",
            "tcp",
            "--model",
            "deepseek-r1",
            "--layers",
            "20",
            "--rounds",
            "10000",
        ]);
        let line = job.line_with("decode: process ");
        let decode = line.rsplit(' ').next().expect("a number").trim().to_owned();
        assert!(lives(&decode), "{line}");
        job.line_with("fabric: ");
        job.signal(signal);
        let outcome = job.wait(LONG);
        assert_eq!(
            outcome.status.code(),
            (signal == libc::SIGTERM).then_some(1),
            "{}",
            outcome.err
        );
        let end = Instant::now() + Duration::from_secs(30);
        while lives(&decode) {
            assert!(
                Instant::now() < end,
                "process {decode} lives on after signal {signal}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
