//! The Prometheus text, over HTTP as a scraper asks for it. Alone in its process, because the recorder is the process's.
//! Needs the feature `prometheus`.
#![cfg(feature = "prometheus")]

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use kvpush::{
    Auth, Endpoint,
    endpoint::telemetry::prometheus::{Metrics, ServeError, serve},
    fabric::FabricKind,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{HostMemory, Memory},
};

const LONG: Duration = Duration::from_secs(60);

fn ask(address: SocketAddr, request: &str) -> String {
    let mut socket = TcpStream::connect(address).expect("it listens");
    socket.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("it answers");
    answer
}

/// The samples of an answer: series with labels in order, and value.
fn scrape(address: SocketAddr) -> HashMap<String, f64> {
    let answer = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let samples = body
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    samples
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a series and a value");
            let name_ok = series.starts_with("kvpush_");
            assert!(name_ok, "a foreign series: {line}");
            (series.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

#[test]
fn a_scrape_tells_what_was_pushed() {
    let server = serve("127.0.0.1:0").expect("listen");
    assert!(matches!(Metrics::install(), Err(ServeError::Installed)));
    let endpoint = |name| {
        let builder = Endpoint::builder().name(name).auth(Auth::psk([1; 32]));
        builder
            .fabrics([FabricKind::Tcp])
            .bind("127.0.0.1:0")
            .unwrap()
    };
    let (prefill, decode) = (endpoint("prefill"), endpoint("decode"));
    let shape = KvShape {
        layers: 2,
        tokens_per_page: 16,
        heads: HeadRange::new(0, 2),
        head_dim: 64,
        dtype: Dtype::Bf16,
    };
    let layout = shape.vllm_flash(16).unwrap();
    let memory = || -> Vec<Arc<dyn Memory>> {
        let lengths = region_lengths(&layout).unwrap();
        lengths
            .into_iter()
            .map(|n| Arc::new(HostMemory::new(n).unwrap()) as Arc<dyn Memory>)
            .collect()
    };
    let source = prefill.register_pool(layout.clone(), memory()).unwrap();
    let destination = decode.register_pool(layout.clone(), memory()).unwrap();
    let mut report = None;
    for _ in 0..3 {
        let arrival = destination.grant("x", &[1, 2], LONG).unwrap();
        let push = prefill
            .push_blocking(&source, arrival.grant().clone(), LONG)
            .unwrap();
        push.layer(0, &[1, 2]).unwrap();
        push.layer(1, &[1, 2]).unwrap();
        report = Some(push.finish_blocking("", LONG).unwrap().unwrap());
        arrival.complete_blocking(LONG).unwrap().unwrap();
    }
    let report = report.unwrap();
    let samples = scrape(server.address());
    let value = |series: &str| {
        let found = samples.get(series);
        *found.unwrap_or_else(|| panic!("no {series}: {samples:#?}"))
    };
    assert_eq!(
        value(r#"kvpush_pushes_total{peer="decode",outcome="completed"}"#),
        3.0
    );
    assert_eq!(
        value(r#"kvpush_arrivals_total{peer="prefill",outcome="completed"}"#),
        3.0
    );
    let rail = prefill.rails().next().expect("a rail");
    let rail = format!(r#"{{peer="decode",rail="{}:{}"}}"#, rail.name, rail.port);
    let bytes = value(&format!("kvpush_written_bytes_total{rail}"));
    assert!(bytes >= 3.0 * report.bytes as f64, "{bytes}");
    let writes = value(&format!("kvpush_writes_total{rail}"));
    assert!(
        writes >= 6.0 && writes <= 3.0 * report.writes as f64 + 3.0,
        "{writes}"
    );
    assert_eq!(value(r#"kvpush_push_seconds_count{peer="decode"}"#), 3.0);
    assert_eq!(
        value(r#"kvpush_push_seconds_bucket{peer="decode",le="+Inf"}"#),
        3.0
    );
    assert_eq!(value(r#"kvpush_sessions_total{peer="decode"}"#), 1.0);
    // The text and the snapshot have one source.
    let stats = prefill.stats();
    let peer = stats.peers.iter().find(|peer| peer.peer == "decode");
    assert_eq!(peer.expect("the peer").rails[0].bytes as f64, bytes);

    // Clients that are no scrapers harm nobody.
    assert!(ask(server.address(), "POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    drop(TcpStream::connect(server.address()).expect("it listens"));
    let silent = TcpStream::connect(server.address()).expect("it listens");
    assert!(
        scrape(server.address()).len() > 20,
        "a silent client is not waited for long"
    );
    drop(silent);
    let address = server.address();
    drop(server);
    assert!(TcpStream::connect(address).is_err(), "it is gone");
}
