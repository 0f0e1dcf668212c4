//! What comes out of a comparison: medians, ratios, the table and the JSON. Pure.

use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::{measure::bytes_text, report::compact_table};

/// Several measurements of one thing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
    pub(super) runs: Vec<f64>,
}

impl Figures {
    /// `None` without a measurement.
    pub(super) fn of(runs: &[f64]) -> Option<Self> {
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = match sorted.len() % 2 {
            0 => (sorted.get(middle - 1)? + upper) / 2.0,
            _ => upper,
        };
        Some(Self {
            median,
            least,
            most,
            runs: runs.to_vec(),
        })
    }

    fn cell(&self) -> String {
        format!(
            "{} ({}..{})",
            number(self.median),
            number(self.least),
            number(self.most)
        )
    }
}

/// Three significant digits.
fn number(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0);
    format!("{value:.*}", digits as usize)
}

/// What a line's figures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    /// More is better.
    #[serde(rename = "GB/s")]
    GigabytesPerSecond,
    /// Less is better.
    #[serde(rename = "us")]
    Microseconds,
}

/// One thing that kvpush does, beside what the reference does.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) fabric: String,
    pub(super) what: &'static str,
    /// Bytes of a page, which is one message of the reference.
    pub(super) size: u64,
    pub(super) lanes: u16,
    pub(super) unit: Unit,
    /// The program that it is compared with.
    pub(super) reference: String,
    /// What that measured; none if it is not there, or failed.
    pub(super) theirs: Option<Figures>,
    pub(super) ours: Figures,
    /// Ours by theirs, of each repetition; none without theirs.
    pub(super) ratio: Option<Figures>,
    /// Whether every byte of every run was right.
    pub(super) verified: bool,
}

impl Line {
    /// `theirs` and `ours` in the order in which they were taken, one after the other.
    pub(super) fn fill(&mut self, theirs: &[f64], ours: &[f64]) {
        self.theirs = Figures::of(theirs);
        self.ours = Figures::of(ours).unwrap_or_default();
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .filter(|&(_, &theirs)| theirs > 0.0)
            .map(|(ours, theirs)| ours / theirs)
            .collect();
        self.ratio = Figures::of(&ratios);
    }
}

/// The lines for people.
pub(super) fn table(lines: &[Line]) -> Table {
    let mut table = compact_table();
    table.set_header(vec![
        "fabric",
        "what",
        "size",
        "lanes",
        "",
        "reference",
        "theirs",
        "kvpush",
        "ratio",
        "verified",
    ]);
    for line in lines {
        let absent = || "-".to_owned();
        table.add_row(vec![
            line.fabric.clone(),
            line.what.to_owned(),
            bytes_text(line.size),
            line.lanes.to_string(),
            match line.unit {
                Unit::GigabytesPerSecond => "GB/s".to_owned(),
                Unit::Microseconds => "µs".to_owned(),
            },
            line.reference.clone(),
            line.theirs.as_ref().map_or_else(absent, Figures::cell),
            line.ours.cell(),
            line.ratio.as_ref().map_or_else(absent, Figures::cell),
            if line.verified { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    for column in table.column_iter_mut().skip(6).take(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        let figures = Figures::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (figures.median, figures.least, figures.most),
            (2.0, 1.0, 3.0)
        );
        assert_eq!(Figures::of(&[1.0, 4.0]).unwrap().median, 2.5);
        assert_eq!(Figures::of(&[]), None);
    }

    #[test]
    fn ratios_are_of_neighbours_and_absent_without_a_reference() {
        let mut line = Line {
            fabric: "tcp".into(),
            what: "push",
            size: 4096,
            lanes: 1,
            unit: Unit::GigabytesPerSecond,
            reference: "iperf3".into(),
            theirs: None,
            ours: Figures::default(),
            ratio: None,
            verified: true,
        };
        // The machine was twice as fast in the second half, for both.
        line.fill(&[1.0, 1.0, 2.0], &[0.5, 0.5, 1.0]);
        let ratio = line.ratio.clone().unwrap();
        assert_eq!((ratio.median, ratio.least, ratio.most), (0.5, 0.5, 0.5));
        line.fill(&[], &[0.5]);
        assert_eq!((line.theirs.clone(), line.ratio.clone()), (None, None));
        assert!(table(&[line]).to_string().contains(" - "));
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [(0.012_345, "0.0123"), (1.0, "1.00"), (123.4, "123")] {
            assert_eq!(number(value), text);
        }
    }
}
