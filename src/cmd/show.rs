//! The table of measured rows.

use crate::eval::Report;
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
        table.add_row([
            row.model.clone(),
            row.format.clone(),
            output::size(row.bytes),
            format!("{:.3}", row.bits_per_weight),
            format!("{:.4}", row.ppl),
            with_error(row.delta_ppl, row.delta_ppl_se, true),
            with_error(row.kld, row.kld_se, false),
            row.kld_p99.map_or_else(dash, |v| format!("{v:.4}")),
            row.top1.map_or_else(dash, |v| format!("{:.2} %", 100.0 * v)),
            format!("{:.0}", row.tok_per_s),
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

/// `value ± error`; one window has no error to show.
fn with_error(value: Option<f64>, error: Option<f64>, signed: bool) -> String {
    let Some(value) = value else { return dash() };
    let (value, error) = match signed {
        true => (format!("{value:+.4}"), error.map(|e| format!(" ± {e:.4}"))),
        false => (format!("{value:.5}"), error.map(|e| format!(" ± {e:.5}"))),
    };
    value + &error.unwrap_or_default()
}

fn dash() -> String {
    "–".to_string()
}
