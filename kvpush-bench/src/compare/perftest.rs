//! `ib_write_bw` and `ib_write_lat` of perftest, the reference for verbs: their command lines and tables.
//!
//! Their `--out_json` is left alone: several releases write keys and words without quotes, and none writes the unit. The
//! heading of the table has always named its columns and units, so that is read, by name. Parsing is pure.

use std::process::Command;

use super::tools;
use crate::error::{Error, Result};

pub(super) const BANDWIDTH: &str = "ib_write_bw";
pub(super) const LATENCY: &str = "ib_write_lat";

/// Which devices the tools use.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    pub(super) client: String,
    pub(super) server: String,
    pub(super) gid_index: Option<u8>,
    /// As `--ack-timeout`, so that neither is slower to send again than the other.
    pub(super) ack_timeout: Option<u8>,
}

impl Devices {
    fn run(&self, program: &str, arguments: &[String]) -> Result<String> {
        let port = tools::free_port()?.to_string();
        let command = |device: &str| {
            let (name, number) = match device.split_once(':') {
                Some((name, number)) => (name, Some(number)),
                None => (device, None),
            };
            let mut command = Command::new(program);
            // -F: measures whatever governs the processor's frequency.
            command
                .args(["-F", "-d", name, "-p", &port])
                .args(arguments);
            command.args(number.iter().flat_map(|number| ["-i", number]));
            if let Some(index) = self.gid_index {
                command.args(["-x", &index.to_string()]);
            }
            if let Some(timeout) = self.ack_timeout {
                command.args(["-u", &timeout.to_string()]);
            }
            command
        };
        let mut client = command(&self.client);
        client.arg("127.0.0.1");
        let refused = |output: &tools::Output| {
            let said = |text: &str| text.contains("Couldn't connect");
            said(&output.text) || said(&output.errors)
        };
        Ok(tools::pair(&mut command(&self.server), &mut client, refused)?.text)
    }

    /// GB/s of `lanes` queue pairs and messages of `size` bytes, `bytes` in all.
    pub(super) fn bandwidth(&self, size: u64, bytes: u64, lanes: u16) -> Result<f64> {
        let each = (bytes / size.max(1) / u64::from(lanes.max(1))).max(8);
        let arguments = ["-s", &size.to_string(), "-n", &each.to_string()];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).into();
        if lanes > 1 {
            arguments.extend(["-q".to_owned(), lanes.to_string()]);
        }
        let text = self.run(BANDWIDTH, &arguments)?;
        parse_bandwidth(&text).ok_or_else(|| no_result(BANDWIDTH))
    }

    /// The usual microseconds from one side's memory to the other's, of `count` writes of `size` bytes.
    pub(super) fn latency(&self, size: u64, count: u32) -> Result<f64> {
        let arguments = ["-s", &size.to_string(), "-n", &count.to_string()];
        let text = self.run(LATENCY, &arguments.map(str::to_owned))?;
        parse_latency(&text).ok_or_else(|| no_result(LATENCY))
    }
}

fn no_result(program: &str) -> Error {
    Error::failed(format!("{program} ended well but printed no result"))
}

/// The value below the heading that begins with `name`, and what the heading has in brackets.
fn column<'a>(text: &'a str, name: &str) -> Option<(f64, &'a str)> {
    let mut lines = text
        .lines()
        .skip_while(|line| !(line.trim_start().starts_with("#bytes") && line.contains(name)));
    let heading = lines.next()?;
    // Names have spaces in them ("BW average[MB/sec]"), but each begins in a known way.
    let before = heading.get(..heading.find(name)?)?;
    let index = before.matches(']').count() + before.matches('#').count();
    let unit = heading.get(before.len() + name.len()..)?;
    let unit = unit.strip_prefix('[')?.split(']').next()?;
    let value = lines.next()?.split_whitespace().nth(index)?;
    let value: f64 = value.parse().ok()?;
    (value.is_finite() && value > 0.0).then_some((value, unit))
}

/// GB/s on average.
fn parse_bandwidth(text: &str) -> Option<f64> {
    let (value, unit) = column(text, "BW average")?;
    // Its "MB" has always been 2^20 bytes; newer versions say so.
    match unit {
        "MB/sec" | "MiB/sec" => Some(value * 1_048_576.0 / 1e9),
        "Gb/sec" => Some(value / 8.0),
        _ => None,
    }
}

/// Microseconds, typically.
fn parse_latency(text: &str) -> Option<f64> {
    match column(text, "t_typical")? {
        (value, "usec") => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded: perftest 4.5-0.17 ("Version: 6.06"), Debian 12.
    const BW_6_06: &str = "\
 Data ex. method : Ethernet
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0011 PSN 0x3f84f1 RKey 0x0002da VAddr 0x0055dc77471000
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 4096       500              26.14              23.40  \t\t   0.005990
---------------------------------------------------------------------------------------
";

    /// The heading of newer releases (4.5-0.20 and later).
    const BW_NEWER: &str = "\
 #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   MsgRate[Mpps]
 65536      5000             11042.51            11041.86            0.176670
";

    /// With --report_gbits, and the column of the processor's use behind.
    const BW_GBITS: &str = "\
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]    CPU_Util[%]
 65536      5000             92.63              92.57              0.176558           3.12
";

    /// Recorded: as above.
    const LAT_6_06: &str = "\
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] 
 64      500          17.29          427.20       26.28    \t       30.59       \t27.51  \t\t207.16  \t\t427.20 
---------------------------------------------------------------------------------------
";

    /// 3.x had no average and no percentiles.
    const LAT_3: &str = "\
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]
 2       1000          0.84           5.65         0.87
";

    #[test]
    fn bandwidths_of_all_headings() {
        for (text, expected) in [
            (BW_6_06, 23.40 * 1.048_576e-3),
            (BW_NEWER, 11041.86 * 1.048_576e-3),
            (BW_GBITS, 92.57 / 8.0),
        ] {
            let value = parse_bandwidth(text).unwrap();
            assert!((value - expected).abs() < 1e-9, "{value} {expected}");
        }
    }

    #[test]
    fn latencies_of_all_headings() {
        assert_eq!(parse_latency(LAT_6_06), Some(26.28));
        assert_eq!(parse_latency(LAT_3), Some(0.87));
    }

    #[test]
    fn no_result_is_not_a_result() {
        for text in [
            "",
            "Couldn't connect to 127.0.0.1:18515\n",
            BW_6_06.split_once(" 4096 ").unwrap().0,
            &BW_6_06.replace("23.40", "0.00"),
            &BW_6_06.replace("23.40", "nan"),
            &BW_6_06.replace("MB/sec", "furlongs"),
            LAT_6_06,
        ] {
            assert_eq!(parse_bandwidth(text), None, "{text}");
        }
        assert_eq!(parse_latency(BW_6_06), None);
    }
}
