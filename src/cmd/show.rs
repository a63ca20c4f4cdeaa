//! The table of measured rows.

use crate::eval::{Metric, Report};
use crate::output;

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
        let shown = |metric: Metric, error: Option<f64>| match (row.value(metric), error) {
            (None, _) => dash(),
            (Some(value), None) => metric.show(value),
            (Some(value), Some(error)) => format!("{} ± {}", metric.show(value), metric.show_error(error)),
        };
        table.add_row([
            row.model.clone(),
            row.format.clone(),
            output::size(row.bytes),
            format!("{:.3}", row.bits_per_weight),
            shown(Metric::Ppl, None),
            shown(Metric::DeltaPpl, row.errors.delta_ppl),
            shown(Metric::Kld, row.errors.kld),
            shown(Metric::KldP99, None),
            shown(Metric::Top1, None),
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

fn dash() -> String {
    "–".to_string()
}
