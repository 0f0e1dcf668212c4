//! `iperf3`, the reference for TCP: its command lines, and what its JSON says. Parsing is pure.

use std::process::Command;

use serde_json::Value;

use super::tools;
use crate::error::{Context, Error, Result};

pub(super) const PROGRAM: &str = "iperf3";

/// GB/s of `streams` streams that hand `size` bytes to each call, `bytes` in all.
pub(super) fn bandwidth(size: u64, bytes: u64, streams: u16) -> Result<f64> {
    let port = tools::free_port()?.to_string();
    let mut server = Command::new(PROGRAM);
    // One client, and bound to where the client dials.
    server.args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]);
    let mut client = Command::new(PROGRAM);
    client
        .args(["-c", "127.0.0.1", "-p", &port, "--json"])
        .args(["-l", &size.to_string(), "-P", &streams.to_string()])
        .args(["-n", &bytes.to_string()]);
    let refused = |output: &tools::Output| {
        output.text.contains("Connection refused") || output.errors.contains("Connection refused")
    };
    let output = tools::pair(&mut server, &mut client, refused)?;
    parse(&output.text)
}

/// GB/s that arrived, from the report of `iperf3 --json`.
fn parse(text: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(text).context("the report of iperf3")?;
    if let Some(error) = report["error"].as_str() {
        return Err(Error::failed(format!("iperf3: {error}")));
    }
    let sum = &report["end"]["sum_received"];
    // Versions differ in the rounding of the rate; bytes and seconds are in all.
    let (bytes, seconds) = (sum["bytes"].as_f64(), sum["seconds"].as_f64());
    match (bytes, seconds) {
        (Some(bytes), Some(seconds)) if bytes > 0.0 && seconds > 0.0 => Ok(bytes / seconds / 1e9),
        _ => Err(Error::failed(
            "the report of iperf3 has no end.sum_received".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded, without the intervals: 3.12 of Debian 12.
    const V3_12: &str = r#"{"start":{"version":"iperf 3.12","test_start":{"protocol":"TCP","num_streams":2,"blksize":65536}},
        "intervals":[],
        "end":{"streams":[],"sum_sent":{"start":0,"end":0.100704,"seconds":0.100704,"bytes":200671232,"bits_per_second":15941470606.927233,"retransmits":0,"sender":true},
        "sum_received":{"start":0,"end":0.100704,"seconds":0.100704,"bytes":200671232,"bits_per_second":15941470606.927233,"sender":true},
        "cpu_utilization_percent":{"host_total":97.4,"host_user":0.8,"host_system":96.6,"remote_total":60.1,"remote_user":1.5,"remote_system":58.6}}}"#;

    /// The shape of 3.0.x: no `sender` in the sums, times as in the other.
    const V3_0: &str = r#"{"start":{"version":"iperf 3.0.11"},"intervals":[],"end":{"streams":[],
        "sum_sent":{"start":0,"end":10,"seconds":10,"bytes":47000000000,"bits_per_second":3.76e10,"retransmits":1},
        "sum_received":{"start":0,"end":10,"seconds":10,"bytes":46000000000,"bits_per_second":3.68e10}}}"#;

    /// Recorded of 3.12 when nobody listened.
    const REFUSED: &str = r#"{"start":{"connected":[],"version":"iperf 3.12"},"intervals":[],"end":{},
        "error":"unable to connect to server: Connection refused"}"#;

    #[test]
    fn what_arrived_counts() {
        assert!((parse(V3_12).unwrap() - 200_671_232.0 / 0.100_704 / 1e9).abs() < 1e-9);
        assert!((parse(V3_0).unwrap() - 4.6).abs() < 1e-9);
    }

    #[test]
    fn no_result_is_an_error() {
        let error = parse(REFUSED).unwrap_err().to_string();
        assert!(error.contains("Connection refused"), "{error}");
        for bad in [
            "",
            "{}",
            "iperf3: error",
            &V3_0.replace("sum_received", "x"),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&V3_0.replace("46000000000", "0")).is_err());
    }
}
