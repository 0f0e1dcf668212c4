//! One row: a workload and what was measured of it.

use std::time::Duration;

use serde::Serialize;

use crate::{
    cli::Op,
    measure::{bytes_text, percentile},
    push::Measured,
    wire::Verified,
    workload::Workload,
};

/// One result. Figures are of all measured rounds together; `--help` defines them.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) fabric: String,
    /// Where the pools are, prefill and decode: `cuda->host`.
    pub(crate) memory: String,
    pub(crate) op: &'static str,
    pub(crate) model: String,
    pub(crate) tp: String,
    pub(crate) tp_prefill: u32,
    pub(crate) tp_decode: u32,
    pub(crate) lanes: u16,
    pub(crate) layers: u32,
    /// Bytes of one page of one layer, all heads, keys and values.
    pub(crate) page_bytes: u64,
    /// Pages of one request.
    pub(crate) pages: u32,
    pub(crate) requests: u32,
    pub(crate) rounds: u32,
    /// Payload bytes measured.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) gb_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) pages_per_s: f64,
    pub(crate) cpu_s_per_gb: f64,
    /// Writes (reads) posted for them.
    pub(crate) writes: u64,
    /// Whether every byte of every round was right.
    pub(crate) verified: bool,
    /// Bytes compared.
    pub(crate) verified_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
    #[serde(skip)]
    cpu_seconds: f64,
    #[serde(skip)]
    latencies: Vec<Duration>,
}

impl Row {
    pub(crate) fn new(workload: &Workload, fabric: &str, memory: String, rounds: u32) -> Self {
        Self {
            fabric: fabric.to_owned(),
            memory,
            op: match workload.op {
                Op::Push => "push",
                Op::Write => "write",
                Op::Read => "read",
            },
            model: workload.model.clone(),
            tp: format!("{}->{}", workload.tp_prefill, workload.tp_decode),
            tp_prefill: workload.tp_prefill,
            tp_decode: workload.tp_decode,
            lanes: workload.lanes,
            layers: workload.layers,
            page_bytes: workload.page_bytes(),
            pages: workload.pages,
            requests: workload.requests,
            rounds,
            bytes: 0,
            seconds: 0.0,
            gb_per_s: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            pages_per_s: 0.0,
            cpu_s_per_gb: 0.0,
            writes: 0,
            verified: false,
            verified_bytes: 0,
            failure: None,
            cpu_seconds: 0.0,
            latencies: Vec::new(),
        }
    }

    /// Adds a round: what was measured, and how many bytes that was, unless it is not to count; and what the
    /// verification says.
    pub(crate) fn add(&mut self, measured: Option<(&Measured, u64)>, verified: &Verified) {
        if let Some((measured, bytes)) = measured {
            self.bytes += bytes;
            self.seconds += measured.seconds;
            self.cpu_seconds += measured.cpu_seconds + verified.cpu_seconds;
            self.writes += measured.writes;
            self.latencies.extend(&measured.latencies);
        }
        self.verified_bytes = self.verified_bytes.saturating_add(verified.bytes);
        if self.failure.is_none() {
            self.failure.clone_from(&verified.failure);
        }
    }

    /// Computes the figures once all rounds are in.
    pub(crate) fn close(&mut self) {
        self.latencies.sort_unstable();
        let microseconds = |percent| percentile(&self.latencies, percent).as_secs_f64() * 1e6;
        (self.p50_us, self.p99_us) = (microseconds(50), microseconds(99));
        let gigabytes = self.bytes as f64 / 1e9;
        let per = |value: f64, by: f64| if by > 0.0 { value / by } else { 0.0 };
        self.gb_per_s = per(gigabytes, self.seconds);
        self.cpu_s_per_gb = per(self.cpu_seconds, gigabytes);
        let pages = self.latencies.len() as f64 * f64::from(self.pages) * f64::from(self.layers);
        self.pages_per_s = per(pages, self.seconds);
        self.verified =
            self.failure.is_none() && self.verified_bytes > 0 && !self.latencies.is_empty();
    }

    pub(crate) fn title(&self) -> String {
        match self.model.as_str() {
            "raw" => format!("raw {}", bytes_text(self.page_bytes)),
            model => format!("{model} {}→{}", self.tp_prefill, self.tp_decode),
        }
    }

    /// For logs.
    pub(crate) fn sentence(&self) -> String {
        format!(
            "{} {} over {}: {:.2} GB/s, {}",
            self.title(),
            self.op,
            self.fabric,
            self.gb_per_s,
            if self.verified {
                "every byte verified"
            } else {
                "NOT VERIFIED"
            }
        )
    }

    pub(super) fn cells(&self) -> Vec<String> {
        let verified = match self.verified {
            true => bytes_text(self.verified_bytes),
            false => "FAILED".to_owned(),
        };
        vec![
            match self.model.as_str() {
                "raw" => "raw".to_owned(),
                _ => self.title(),
            },
            self.op.to_owned(),
            self.fabric.clone(),
            self.lanes.to_string(),
            bytes_text(self.page_bytes),
            self.pages.to_string(),
            bytes_text(self.bytes),
            significant(self.gb_per_s),
            significant(self.p50_us / 1e3),
            significant(self.p99_us / 1e3),
            format!("{:.0}", self.pages_per_s),
            significant(self.cpu_s_per_gb),
            verified,
        ]
    }
}

/// Three figures or all before the point.
pub(super) fn significant(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(seconds: f64, latencies: &[u64]) -> Measured {
        let latencies = latencies
            .iter()
            .map(|&ms| Duration::from_millis(ms))
            .collect();
        Measured {
            seconds,
            cpu_seconds: 1.0,
            latencies,
            writes: 7,
        }
    }

    #[test]
    fn figures_are_of_the_measured_rounds() {
        let workload = Workload::raw(Op::Push, 4096);
        let mut row = Row::new(&workload, "tcp", "host->host".into(), 2);
        let right = Verified {
            bytes: 10,
            cpu_seconds: 1.0,
            failure: None,
        };
        row.add(None, &right);
        row.add(Some((&measured(1.0, &[400, 600]), 1_000_000_000)), &right);
        row.add(Some((&measured(3.0, &[500, 2500]), 3_000_000_000)), &right);
        row.close();
        assert_eq!(
            (
                row.gb_per_s,
                row.cpu_s_per_gb,
                row.writes,
                row.verified_bytes
            ),
            (1.0, 1.0, 14, 30)
        );
        assert_eq!((row.p50_us, row.p99_us), (500e3, 2500e3));
        assert_eq!(row.pages_per_s, 4.0 * 128.0 / 4.0);
        assert!(row.verified);
    }

    #[test]
    fn one_bad_round_spoils_the_row_and_nothing_measured_is_not_verified() {
        let workload = Workload::raw(Op::Push, 4096);
        let mut row = Row::new(&workload, "tcp", "host->host".into(), 2);
        row.close();
        assert!(!row.verified);
        row.add(
            None,
            &Verified {
                bytes: 1,
                cpu_seconds: 0.0,
                failure: Some("bad".into()),
            },
        );
        row.add(
            Some((&measured(1.0, &[1]), 5)),
            &Verified {
                bytes: 1,
                cpu_seconds: 0.0,
                failure: None,
            },
        );
        row.close();
        assert!(!row.verified);
        assert_eq!(row.failure.as_deref(), Some("bad"));
    }
}
