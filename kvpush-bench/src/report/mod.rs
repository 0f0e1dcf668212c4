//! What comes out: rows as a table, as JSON and as a drawing.

mod plot;
mod row;

use std::{fs, path::Path};

use comfy_table::{CellAlignment, Table, TableComponent, presets::UTF8_HORIZONTAL_ONLY};

pub(crate) use self::row::Row;
use crate::{
    cli::OutputArgs,
    error::{Context, Result},
    out,
};

/// Fails before anything is measured if a result could not be written afterwards.
pub(crate) fn check_paths(output: &OutputArgs) -> Result<()> {
    let mut paths = [&output.json, &output.plot].into_iter().flatten();
    paths.try_for_each(|path| check_path(path))
}

/// The same for one file.
pub(crate) fn check_path(path: &Path) -> Result<()> {
    let file = fs::OpenOptions::new().create(true).append(true).open(path);
    file.context(format_args!("cannot write {}", path.display()))?;
    Ok(())
}

/// Prints the table and writes the files.
pub(crate) fn write(rows: &[Row], output: &OutputArgs) -> Result<()> {
    if !rows.is_empty() {
        out::say(table(rows));
    }
    for failure in rows
        .iter()
        .filter_map(|row| Some((row, row.failure.as_ref()?)))
    {
        out::say(format_args!(
            "NOT VERIFIED: {} {}: {}",
            failure.0.title(),
            failure.0.op,
            failure.1
        ));
    }
    if let Some(path) = &output.json {
        write_file(path, &json(rows)?)?;
    }
    if let Some(path) = &output.plot {
        write_file(path, &plot::svg(rows))?;
    }
    Ok(())
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(format_args!("cannot write {}", path.display()))
}

/// An array with one object on each line.
fn json(rows: &[Row]) -> Result<String> {
    let lines: Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
    Ok(format!(
        "[\n{}\n]\n",
        lines.context("encode the rows")?.join(",\n")
    ))
}

fn table(rows: &[Row]) -> Table {
    let mut table = compact_table();
    table.set_header(vec![
        "workload", "op", "fabric", "lanes", "page", "pages", "moved", "GB/s", "p50 ms", "p99 ms",
        "pages/s", "CPU s/GB", "verified",
    ]);
    for row in rows {
        table.add_row(row.cells());
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A table without lines between its rows.
pub(crate) fn compact_table() -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY);
    table.remove_style(TableComponent::HorizontalLines);
    table.remove_style(TableComponent::MiddleIntersections);
    table
}
