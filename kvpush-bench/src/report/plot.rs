//! The rows as an SVG drawing: GB/s over page size, one line for each operation, if the rows are a sweep; else a bar
//! for each row.

use std::fmt::Write;

use super::row::{Row, significant};
use crate::measure::bytes_text;

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 64.0;
/// Colours that people with the common colour blindnesses can tell apart (Okabe and Ito).
const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
];

/// Draws `rows`.
pub(super) fn svg(rows: &[Row]) -> String {
    let sweep = rows.len() > 1 && rows.iter().all(|row| row.model == "raw");
    if sweep { lines(rows) } else { bars(rows) }
}

/// A drawing under way.
struct Drawing(String);

impl Drawing {
    fn new(height: f64) -> Self {
        let mut drawing = Self(String::new());
        drawing.add(format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12" fill="#222">"##
        ));
        drawing.add(format_args!(
            r##"<rect width="{WIDTH}" height="{height}" fill="#fff"/>"##
        ));
        drawing
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{element}");
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = text
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        self.add(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}"/>"#
        ));
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// A round figure not below `value`, and the step of its axis.
fn axis(value: f64) -> (f64, f64) {
    let value = value.max(1e-6);
    let magnitude = 10f64.powf(value.log10().floor());
    let step = [0.2, 0.5, 1.0, 2.0].map(|factor| factor * magnitude);
    let step = step
        .into_iter()
        .find(|step| value / step <= 6.0)
        .unwrap_or(magnitude * 2.0);
    ((value / step).ceil() * step, step)
}

fn greatest(rows: &[Row]) -> f64 {
    rows.iter().map(|row| row.gb_per_s).fold(0.0, f64::max)
}

fn lines(rows: &[Row]) -> String {
    const HEIGHT: f64 = 440.0;
    let mut drawing = Drawing::new(HEIGHT);
    let (top, step) = axis(greatest(rows));
    let sizes = rows.iter().map(|row| (row.page_bytes as f64).log2());
    let (least, most) = sizes.fold((f64::MAX, f64::MIN), |(a, b), size| {
        (a.min(size), b.max(size))
    });
    let x = |bytes: u64| {
        MARGIN + ((bytes as f64).log2() - least) / (most - least).max(1.0) * (WIDTH - 2.0 * MARGIN)
    };
    let y = |value: f64| HEIGHT - MARGIN - value / top * (HEIGHT - 2.0 * MARGIN);

    let title = rows.first().map_or(String::new(), |row| {
        format!(
            "kvpush over {}: batches of {} pages that lie apart, {} lane(s)",
            row.fabric, row.pages, row.lanes
        )
    });
    drawing.text(MARGIN, 26.0, "start", &title);
    drawing.text(MARGIN - 8.0, MARGIN - 14.0, "end", "GB/s");
    let mut value = 0.0;
    while value <= top * 1.001 {
        drawing.line((MARGIN, y(value)), (WIDTH - MARGIN, y(value)), "#ddd");
        drawing.text(
            MARGIN - 8.0,
            y(value) + 4.0,
            "end",
            format!("{value:.3}")
                .trim_end_matches('0')
                .trim_end_matches('.'),
        );
        value += step;
    }
    let mut sizes: Vec<u64> = rows.iter().map(|row| row.page_bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for &bytes in &sizes {
        drawing.line(
            (x(bytes), HEIGHT - MARGIN),
            (x(bytes), HEIGHT - MARGIN + 5.0),
            "#222",
        );
        drawing.text(
            x(bytes),
            HEIGHT - MARGIN + 20.0,
            "middle",
            &bytes_text(bytes),
        );
    }
    drawing.text(WIDTH / 2.0, HEIGHT - 20.0, "middle", "page size");

    let mut ops: Vec<&str> = Vec::new();
    for row in rows {
        if !ops.contains(&row.op) {
            ops.push(row.op);
        }
    }
    for (index, (op, colour)) in ops.into_iter().zip(COLOURS.iter().cycle()).enumerate() {
        let mut of_op: Vec<&Row> = rows.iter().filter(|row| row.op == op).collect();
        of_op.sort_by_key(|row| row.page_bytes);
        let points: Vec<_> = of_op
            .iter()
            .map(|row| format!("{:.1},{:.1}", x(row.page_bytes), y(row.gb_per_s)))
            .collect();
        drawing.add(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            points.join(" ")
        ));
        for row in of_op {
            drawing.add(format_args!(
                r#"<circle cx="{:.1}" cy="{:.1}" r="3.5" fill="{colour}"><title>{} {}: {:.3} GB/s</title></circle>"#,
                x(row.page_bytes),
                y(row.gb_per_s),
                row.op,
                bytes_text(row.page_bytes),
                row.gb_per_s
            ));
        }
        let left = MARGIN + 16.0 + 90.0 * index as f64;
        drawing.add(format_args!(
            r#"<rect x="{left:.1}" y="40" width="12" height="12" fill="{colour}"/>"#
        ));
        drawing.text(left + 18.0, 50.5, "start", op);
    }
    drawing.finish()
}

fn bars(rows: &[Row]) -> String {
    const LEFT: f64 = 220.0;
    const BAR: f64 = 30.0;
    let height = 70.0 + BAR * rows.len() as f64 + 20.0;
    let mut drawing = Drawing::new(height);
    let (top, _) = axis(greatest(rows));
    let title = rows
        .first()
        .map_or("nothing was measured".to_owned(), |row| {
            format!("kvpush over {}, GB/s", row.fabric)
        });
    drawing.text(LEFT, 30.0, "start", &title);
    for (index, row) in rows.iter().enumerate() {
        let y = 50.0 + BAR * index as f64;
        let width = row.gb_per_s / top * (WIDTH - LEFT - 2.0 * MARGIN);
        let colour = if row.verified { COLOURS[0] } else { COLOURS[1] };
        drawing.text(
            LEFT - 10.0,
            y + 16.0,
            "end",
            &format!("{} {}", row.title(), row.op),
        );
        drawing.add(format_args!(
            r#"<rect x="{LEFT}" y="{y:.1}" width="{width:.1}" height="{:.1}" fill="{colour}"/>"#,
            BAR - 8.0
        ));
        let value = match row.verified {
            true => significant(row.gb_per_s),
            false => format!("{}, NOT VERIFIED", significant(row.gb_per_s)),
        };
        drawing.text(LEFT + width + 8.0, y + 16.0, "start", &value);
    }
    drawing.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::Op, workload::Workload};

    fn row(op: Op, bytes: u32, gb_per_s: f64) -> Row {
        let mut row = Row::new(&Workload::raw(op, bytes), "tcp", "host->host".into(), 1);
        (row.gb_per_s, row.verified) = (gb_per_s, true);
        row
    }

    #[test]
    fn a_sweep_has_a_line_for_each_operation() {
        let rows = [
            row(Op::Push, 4096, 1.0),
            row(Op::Push, 16384, 2.0),
            row(Op::Read, 4096, 0.5),
        ];
        let drawing = svg(&rows);
        assert_eq!(drawing.matches("<polyline").count(), 2);
        assert_eq!(drawing.matches("<circle").count(), 3);
        assert!(drawing.contains(">16 KiB<") && drawing.ends_with("</svg>\n"));
    }

    #[test]
    fn other_rows_have_bars_and_nothing_is_not_a_number() {
        let mut model = row(Op::Push, 4096, 0.0);
        model.model = "a<b".to_owned();
        model.verified = false;
        for drawing in [svg(&[model]), svg(&[])] {
            assert!(
                !drawing.contains("NaN") && !drawing.contains("inf"),
                "{drawing}"
            );
            assert!(!drawing.contains("a<b"));
        }
    }

    #[test]
    fn axes_end_at_round_figures() {
        let (top, step) = axis(1.7);
        assert!(
            (top - 2.0).abs() < 1e-9 && (step - 0.5).abs() < 1e-9,
            "{top} {step}"
        );
        for value in [0.0, 0.013, 0.9, 5.0, 47.0, 99.9] {
            let (top, step) = axis(value);
            assert!(
                top >= value && top / step <= 7.0 && step > 0.0,
                "{value}: {top} {step}"
            );
        }
    }
}
