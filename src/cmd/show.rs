//! The tables of an evaluation.

use crate::eval::report::Segment;
use crate::eval::{Metric, ModelRow, Report};
use crate::output;

/// Returns everything that was measured as tables: rows, slices, positions, gates.
pub fn report(report: &Report) -> String {
    let mut text = rows(report);
    for (title, parts) in [("slice", &report.slices), ("positions", &report.positions)] {
        if !parts.is_empty() {
            text += &format!("\n{}\n", part_table(title, parts));
        }
    }
    for section in [suite_table(report), task_table(report), cache_table(report)].into_iter().flatten() {
        text += &format!("\n{section}\n");
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

/// What prompt suites say of each model.
fn suite_table(report: &Report) -> Option<String> {
    let asked = report.asked.first()?;
    let mut table = output::table([
        "suite",
        "model",
        "pass",
        "baseline",
        "lost",
        "won",
        "McNemar p",
        "first difference",
        "length ratio",
        "KLD",
        "tok/s",
    ]);
    output::right_align(&mut table, 2);
    let of_suites = |name: &str| report.asked.iter().any(|asked| asked.suite == name);
    for score in report.suites.iter().filter(|score| of_suites(&score.suite)) {
        let flips = |count: usize| if score.baseline_passed.is_some() { count.to_string() } else { dash() };
        let number =
            |value: Option<f64>, digits: usize| value.map_or_else(dash, |value| format!("{value:.digits$}"));
        let of_all = |passed: usize| match score.prompts {
            0 => "not judged".to_string(),
            prompts => format!("{passed} of {prompts}"),
        };
        table.add_row([
            score.suite.clone(),
            score.model.clone(),
            of_all(score.passed),
            score.baseline_passed.map_or_else(dash, of_all),
            flips(score.lost),
            flips(score.won),
            number(score.p_value, 4),
            number(score.first_difference, 1),
            number(score.length_ratio, 3),
            number(score.kld, 5),
            number(score.tok_per_s, 0),
        ]);
    }
    let words = if asked.chat_template { "in the chat template" } else { "in plain text: no chat template" };
    Some(format!("{table}\n\nanswers of at most {} tokens, greedy, asked {words}", asked.max_new_tokens))
}

/// What benchmarks say of each model.
fn task_table(report: &Report) -> Option<String> {
    report.tasks.first()?;
    let mut table = output::table(["task", "shots", "model", "metric", "value", "same answers", "McNemar p"]);
    output::right_align(&mut table, 4);
    for task in &report.tasks {
        for row in &task.rows {
            for (at, score) in row.scores.iter().enumerate() {
                let versus = row.versus.as_ref().filter(|_| at == 0);
                let error = score.standard_error.map_or_else(String::new, |error| format!(" ± {error:.4}"));
                table.add_row([
                    task.task.clone(),
                    task.shots.to_string(),
                    row.model.clone(),
                    score.metric.clone(),
                    format!("{:.4}{error}", score.value),
                    versus.map_or_else(dash, |versus| format!("{} of {}", versus.same, task.questions)),
                    versus.map_or_else(dash, |versus| format!("{:.4}", versus.mcnemar_p)),
                ]);
            }
        }
    }
    Some(table.to_string())
}

/// What caches of keys and values take.
fn cache_table(report: &Report) -> Option<String> {
    report.kv_caches.first()?;
    let mut table = output::table(["kv cache", "bytes a token", "saved of bf16"]);
    output::right_align(&mut table, 1);
    for cache in &report.kv_caches {
        let saved = format!("{:.1} %", 100.0 * cache.saved);
        table.add_row([cache.kv_cache.clone(), cache.bytes_per_token.to_string(), saved]);
    }
    Some(table.to_string())
}

/// Rows of several parts of the text, or of other texts.
fn part_table(title: &str, parts: &[Segment]) -> String {
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

fn shown(row: &ModelRow, metric: Metric) -> String {
    row.value(metric).map_or_else(dash, |value| metric.show(value))
}

/// `value ± error`; one window has no error to show.
fn with_error(row: &ModelRow, metric: Metric, error: Option<f64>) -> String {
    let error = error.filter(|_| row.value(metric).is_some());
    shown(row, metric) + &error.map_or_else(String::new, |error| format!(" ± {}", metric.show_error(error)))
}

fn interval(row: &ModelRow, metric: Metric) -> String {
    let interval = row.measures.get(metric).and_then(|estimate| estimate.interval);
    interval.map_or_else(dash, |[low, high]| format!("{} to {}", metric.show(low), metric.show(high)))
}

fn dash() -> String {
    "–".to_string()
}
