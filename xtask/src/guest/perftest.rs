//! `ib_write_bw` of the perftest package, to compare with and to see that a guest's RDMA works at all.

use anyhow::{Context, Result};

use super::{Guest, Machine, Outcome};

/// What `ib_write_bw` measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bandwidth {
    pub(crate) message_bytes: u64,
    pub(crate) iterations: u64,
    /// In MB/s: 1e6 bytes per second.
    pub(crate) megabytes_per_s: f64,
}

const MESSAGE_BYTES: u32 = 65_536;
const ITERATIONS: u32 = 400;

/// Runs it between the two devices of one guest.
pub(crate) fn one_guest(machine: &Machine) -> Result<(Outcome, Bandwidth)> {
    let script = format!(
        "timeout 120 {server} >/tmp/server.log 2>&1 &\n\
         wait_for_listener 18515 && timeout 120 {client} || {{ cat /tmp/server.log; exit 1; }}\n\
         wait $! || {{ cat /tmp/server.log; exit 1; }}",
        server = command("rxe1"),
        client = command("rxe0") + " 127.0.0.1",
    );
    let outcome = super::run("perftest", machine, vec![Guest::alone(script)])?
        .pop()
        .context("no outcome")?;
    read(outcome)
}

/// Runs it from guest `a` to guest `b`.
pub(crate) fn two_guests(machine: &Machine) -> Result<(Outcome, Bandwidth)> {
    // The guests boot side by side, so the client may come before the server listens; any other failure is final.
    let client = format!(
        "for attempt in $(seq 60); do\n\
         timeout 120 {} \"$KVPUSH_GUEST_PEER\" >/tmp/client.log 2>&1 && break\n\
         grep -q \"Couldn't connect\" /tmp/client.log || {{ cat /tmp/client.log; exit 1; }}\n\
         sleep 1\n\
         done\n\
         cat /tmp/client.log; grep -q 'BW average' /tmp/client.log",
        command("rxe0")
    );
    let server = format!(
        "timeout 240 {} >/tmp/server.log 2>&1 || {{ cat /tmp/server.log; exit 1; }}",
        command("rxe0")
    );
    let outcomes = super::run(
        "perftest-pair",
        machine,
        Guest::pair(1, client, server)?.into(),
    )?;
    outcomes.iter().try_for_each(Outcome::success)?;
    read(outcomes.into_iter().next().context("no outcome")?)
}

fn command(device: &str) -> String {
    // -F: the guest has no cpufreq and perftest would refuse to measure.
    format!("ib_write_bw -F -d {device} -s {MESSAGE_BYTES} -n {ITERATIONS}")
}

fn read(outcome: Outcome) -> Result<(Outcome, Bandwidth)> {
    outcome.success()?;
    let bandwidth =
        parse(&outcome.output).context("ib_write_bw succeeded but printed no result")?;
    println!(
        "[{}] ib_write_bw: {:.1} MB/s ({} messages of {} bytes)",
        outcome.name, bandwidth.megabytes_per_s, bandwidth.iterations, bandwidth.message_bytes
    );
    Ok((outcome, bandwidth))
}

/// Reads the result line: the one below the heading that names "BW average".
fn parse(output: &str) -> Option<Bandwidth> {
    let mut lines = output
        .lines()
        .skip_while(|line| !line.contains("BW average"));
    // perftest's "MB" is 2^20 bytes; newer versions write MiB.
    let heading = lines.next()?;
    let unit = if heading.contains("MB/sec") || heading.contains("MiB/sec") {
        1.048_576
    } else {
        return None;
    };
    let mut words = lines.next()?.split_whitespace();
    let message_bytes = words.next()?.parse().ok()?;
    let iterations = words.next()?.parse().ok()?;
    let average: f64 = words.nth(1)?.parse().ok()?;
    (average > 0.0).then_some(Bandwidth {
        message_bytes,
        iterations,
        megabytes_per_s: average * unit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
 Link type       : Ethernet
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      200              45.64              40.00  \t\t   0.000677
---------------------------------------------------------------------------------------
";

    #[test]
    fn the_average_is_read_in_decimal_megabytes() {
        let bandwidth = parse(OUTPUT).unwrap();
        assert_eq!(
            (bandwidth.message_bytes, bandwidth.iterations),
            (65_536, 200)
        );
        assert!((bandwidth.megabytes_per_s - 41.943_04).abs() < 1e-6);
        assert_eq!(parse(&OUTPUT.replace("MB/sec", "MiB/sec")), Some(bandwidth));
    }

    #[test]
    fn no_result_is_not_a_result() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("Couldn't connect to 10.77.0.2:18515\n"), None);
        assert_eq!(parse(OUTPUT.split_once(" 65536").unwrap().0), None);
        assert_eq!(parse(&OUTPUT.replace("40.00", "0.00")), None);
        assert_eq!(parse(&OUTPUT.replace("MB/sec", "Gb/sec")), None);
    }
}
