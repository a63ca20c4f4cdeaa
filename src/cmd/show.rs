//! The tables of an evaluation.

use crate::eval::report::Part;
use crate::eval::{Metric, Report, Row};
use crate::output;

/// Returns everything that was measured as tables: rows, slices, positions, gates.
pub fn report(report: &Report) -> String {
    let mut text = rows(report);
    for (title, parts) in [("slice", &report.slices), ("positions", &report.positions)] {
        if !parts.is_empty() {
            text += &format!("\n{}\n", part_table(title, parts));
        }
    }
    if !report.gates.is_empty() {
        text += &format!("\n{}\n", gate_table(report));
    }
    text
}

/// Returns the rows as a table, with the protocol below it.
pub fn rows(report: &Report) -> String {
    let mut table = output::table([
        "model",
        "format",
        "size",
        "bits/weight",
        "PPL",
        "ΔPPL",
        "KLD",
        "KLD p99",
        "same top-1",
        "tok/s",
    ]);
    output::right_align(&mut table, 2);
    for row in &report.rows {
        table.add_row([
            row.model.clone(),
            row.format.clone(),
            output::size(row.bytes),
            format!("{:.3}", row.bits_per_weight),
            shown(row, Metric::Ppl),
            with_error(row, Metric::DeltaPpl, row.errors.delta_ppl),
            with_error(row, Metric::Kld, row.errors.kld),
            shown(row, Metric::KldP99),
            shown(row, Metric::Top1),
            row.tok_per_s.map_or_else(dash, |rate| format!("{rate:.0}")),
        ]);
    }
    let protocol = &report.protocol;
    format!(
        "{table}\n\nprotocol {}: {} windows of {} tokens, text sha256 {}…\n",
        protocol.name,
        protocol.windows,
        protocol.n_ctx,
        &protocol.text_sha256[..12],
    )
}

/// Rows of several parts of the text, or of other texts.
fn part_table(title: &str, parts: &[Part]) -> String {
    let mut table =
        output::table([title, "model", "tokens", "PPL", "ΔPPL %", "KLD", "95 % interval", "same top-1"]);
    output::right_align(&mut table, 2);
    for part in parts {
        // What is compared speaks for the baseline too.
        let own = if part.rows.len() > 1 && part.rows[1].value(Metric::DeltaPpl).is_some() { 1 } else { 0 };
        for row in &part.rows[own..] {
            table.add_row([
                part.name.clone(),
                row.model.clone(),
                row.tokens.to_string(),
                shown(row, Metric::Ppl),
                shown(row, Metric::DeltaPplPct),
                shown(row, Metric::Kld),
                interval(row, Metric::Kld),
                shown(row, Metric::Top1),
            ]);
        }
    }
    table.to_string()
}

fn gate_table(report: &Report) -> String {
    let mut table = output::table(["gate", "model", "measured [95 % interval]", "limit", ""]);
    for verdict in &report.gates {
        table.add_row([
            verdict.gate.as_str(),
            &verdict.model,
            &verdict.shown,
            &verdict.shown_limit,
            if verdict.passed { "passed" } else { "FAILED" },
        ]);
    }
    table.to_string()
}

fn shown(row: &Row, metric: Metric) -> String {
    row.value(metric).map_or_else(dash, |value| metric.show(value))
}

/// `value ± error`; one window has no error to show.
fn with_error(row: &Row, metric: Metric, error: Option<f64>) -> String {
    let error = error.filter(|_| row.value(metric).is_some());
    shown(row, metric) + &error.map_or_else(String::new, |error| format!(" ± {}", metric.show_error(error)))
}

fn interval(row: &Row, metric: Metric) -> String {
    let interval = row.measures.get(metric).and_then(|estimate| estimate.interval);
    interval.map_or_else(dash, |[low, high]| format!("{} to {}", metric.show(low), metric.show(high)))
}

fn dash() -> String {
    "–".to_string()
}
