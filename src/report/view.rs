//! What every report shows, as text and drawings ready for a template.

use serde_json::{Value, json};

use super::plot::{self, Bar, COLOURS, Cell, Group, Point};
use crate::eval::answers::Answer;
use crate::eval::metric::METRICS;
use crate::eval::report::{Segment, SpeedRow};
use crate::eval::sensitivity::{Sensitivity, TensorGroup};
use crate::eval::{Estimate, Metric, ModelRow, Report};
use crate::output;

/// Metrics of the summary table.
const SUMMARY: [Metric; 6] =
    [Metric::Kld, Metric::DeltaPplPct, Metric::Top1, Metric::Ppl, Metric::KldP99, Metric::RmsDp];
/// Tensor groups that are listed by name.
const LISTED_GROUPS: usize = 15;
/// Answers that are shown side by side.
const SHOWN_ANSWERS: usize = 60;

/// Returns the context of the templates.
pub fn of(report: &Report) -> Value {
    let models: Vec<&str> = report.rows.iter().map(|row| row.model.as_str()).collect();
    let series = |model: &str| models.iter().position(|name| *name == model).unwrap_or(0);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "title": if report.rows.is_empty() { "quant sensitivity" } else { "quant eval" },
        "verdict": verdict(report),
        "models": models.iter().enumerate().map(|(at, name)| json!({ "name": name, "colour": at % COLOURS })).collect::<Vec<_>>(),
        "headings": SUMMARY.map(|metric| metric.describe().label),
        "rows": report.rows.iter().enumerate().map(|(at, row)| summary(at, row)).collect::<Vec<_>>(),
        "size_plot": size_plot(report),
        "details": details(report),
        "gates": report.gates,
        "parts": [
            parts("By content", "slice", &report.slices),
            parts("By position in the window", "position", &report.positions),
        ],
        "speed": speed(report, &series),
        "sensitivity": report.sensitivity.as_ref().map(sensitivity),
        "suites": report.suites.iter().map(|score| json!({
            "score": score,
            "rate": share(score.pass_rate()),
            "numbers": numbers([score.p_value, score.length_ratio, score.kld, score.tok_per_s]),
            "baseline_rate": score.baseline_passed.map_or("–".to_string(), |passed| {
                format!("{:.1} %", 100.0 * passed as f64 / score.prompts.max(1) as f64)
            }),
        })).collect::<Vec<_>>(),
        "kv_caches": report.kv_caches.iter().map(|cache| json!({
            "name": cache.kv_cache,
            "bytes": cache.bytes_per_token,
            "saved": format!("{:.1} %", 100.0 * cache.saved),
        })).collect::<Vec<_>>(),
        "answers": answers(&report.answers),
        "hidden_answers": report.answers.len().saturating_sub(SHOWN_ANSWERS),
        "protocol": report.protocol,
    })
}

fn verdict(report: &Report) -> Value {
    let (all, failed) = (report.gates.len(), report.gates.iter().filter(|verdict| !verdict.passed).count());
    let (state, text) = match (all, failed) {
        (0, _) => ("none", "No gates were set".to_string()),
        (1, 0) => ("passed", "The gate is passed".to_string()),
        (_, 0) => ("passed", format!("All {all} gates are passed")),
        _ => ("failed", format!("{failed} of {all} gates failed")),
    };
    let failures: Vec<String> =
        report.gates.iter().filter(|verdict| !verdict.passed).map(|verdict| verdict.line()).collect();
    json!({ "state": state, "text": text, "failures": failures })
}

fn summary(at: usize, row: &ModelRow) -> Value {
    json!({
        "model": row.model,
        "colour": at % COLOURS,
        "format": row.format,
        "size": output::size(row.bytes),
        "bits": format!("{:.2}", row.bits_per_weight),
        "values": SUMMARY.map(|metric| cell(row, metric)),
    })
}

/// A value with its interval; empty texts where nothing was measured.
fn cell(row: &ModelRow, metric: Metric) -> Value {
    let found = row.measures.get(metric);
    json!({
        "value": found.map_or("–".to_string(), |found| metric.show(found.value)),
        "interval": found.and_then(|found| found.interval).map_or(String::new(), |i| interval(metric, i)),
    })
}

fn interval(metric: Metric, [low, high]: [f64; 2]) -> String {
    format!("{} … {}", metric.show(low), metric.show(high))
}

fn share(found: Estimate) -> String {
    let interval = found.interval.map(|[low, high]| format!(" ({:.1} … {:.1})", 100.0 * low, 100.0 * high));
    format!("{:.1} %{}", 100.0 * found.value, interval.unwrap_or_default())
}

/// All compared models in the plane of size and divergence; nothing without a baseline.
fn size_plot(report: &Report) -> Option<String> {
    let points: Vec<Point> = report
        .rows
        .iter()
        .enumerate()
        .filter_map(|(at, row)| {
            let kld = row.measures.get(Metric::Kld)?;
            let title =
                format!("{}: {}, KLD {}", row.model, output::size(row.bytes), Metric::Kld.show(kld.value));
            Some(Point { label: row.model.clone(), x: row.bytes as f64, y: kld, title, series: at })
        })
        .collect();
    let size = |bytes: f64| output::size(bytes as u64);
    (!points.is_empty()).then(|| plot::scatter(&points, size, number))
}

/// Every metric of every model.
fn details(report: &Report) -> Value {
    let measured = |metric: &Metric| report.rows.iter().any(|row| row.value(*metric).is_some());
    let rows = METRICS.iter().filter(|row| measured(&row.metric)).map(|description| {
        json!({
            "label": description.label,
            "meaning": description.meaning,
            "values": report.rows.iter().map(|row| cell(row, description.metric)).collect::<Vec<_>>(),
        })
    });
    json!(rows.collect::<Vec<_>>())
}

/// Divergence of each part of the texts, or perplexity where nothing was compared.
fn parts(title: &str, heading: &str, parts: &[Segment]) -> Option<Value> {
    let first = parts.first()?;
    let compared = first.rows.iter().any(|row| row.value(Metric::Kld).is_some());
    let metric = if compared { Metric::Kld } else { Metric::Ppl };
    let group = |part: &Segment| Group {
        label: part.name.clone(),
        bars: part
            .rows
            .iter()
            .enumerate()
            .filter_map(|(series, row)| {
                let value = row.measures.get(metric)?;
                let shown = metric.show(value.value);
                let title = format!("{}, {}: {} {shown}", part.name, row.model, metric.describe().label);
                Some(Bar { value, shown, series, title })
            })
            .collect(),
    };
    let groups: Vec<Group> = parts.iter().map(group).collect();
    let rows = parts.iter().flat_map(|part| {
        part.rows.iter().filter(|row| row.value(metric).is_some()).map(|row| {
            let columns = [metric, Metric::DeltaPplPct, Metric::Top1];
            json!({
                "part": part.name,
                "model": row.model,
                "tokens": row.tokens,
                "values": columns.map(|metric| cell(row, metric)),
            })
        })
    });
    Some(json!({
        "title": title,
        "heading": heading,
        "metric": metric.describe().label,
        "plot": plot::bars(&groups, title),
        "rows": rows.collect::<Vec<_>>(),
    }))
}

/// One set of bars for each quantity, because units differ.
fn speed(report: &Report, series: &dyn Fn(&str) -> usize) -> Value {
    let forward = report.rows.iter().filter_map(|row| {
        let (what, unit) = ("forward pass".to_string(), "tok/s".to_string());
        Some(SpeedRow { model: row.model.clone(), what, value: row.tok_per_s?, unit })
    });
    let rows: Vec<SpeedRow> = report.speed.iter().cloned().chain(forward).collect();
    let mut quantities: Vec<(&str, &str)> = Vec::new();
    for row in &rows {
        if !quantities.contains(&(&row.what, &row.unit)) {
            quantities.push((&row.what, &row.unit));
        }
    }
    let drawn = quantities.into_iter().map(|(what, unit)| {
        let bars = rows.iter().filter(|row| row.what == what && row.unit == unit).map(|row| Bar {
            value: Estimate { value: row.value, interval: None },
            shown: format!("{} {unit}", number(row.value)),
            series: series(&row.model),
            title: format!("{}, {what}: {} {unit}", row.model, number(row.value)),
        });
        plot::bars(&[Group { label: what.to_string(), bars: bars.collect() }], what)
    });
    json!(drawn.collect::<Vec<_>>())
}

fn sensitivity(found: &Sensitivity) -> Value {
    let groups = &found.groups;
    let mut layers: Vec<Option<usize>> = groups.iter().map(|group| group.layer).collect();
    layers.sort();
    layers.dedup();
    let mut roles: Vec<String> = Vec::new();
    groups.iter().for_each(|group| {
        if !roles.contains(&group.role) {
            roles.push(group.role.clone());
        }
    });
    let cells: Vec<Cell> = groups
        .iter()
        .filter_map(|group| {
            Some(Cell {
                row: roles.iter().position(|role| *role == group.role)?,
                column: layers.iter().position(|layer| *layer == group.layer)?,
                value: group.kld.value,
                title: format!("{}: KLD {}", group.name, Metric::Kld.show(group.kld.value)),
            })
        })
        .collect();
    let columns: Vec<String> =
        layers.iter().map(|layer| layer.map_or("–".to_string(), |layer| layer.to_string())).collect();
    let listed = |group: &TensorGroup| {
        json!({
            "name": group.name,
            "scheme": group.scheme,
            "saved": output::size(group.bytes_saved),
            "kld": Metric::Kld.show(group.kld.value),
            "interval": group.kld.interval.map_or(String::new(), |i| interval(Metric::Kld, i)),
            "per_megabyte": number(group.kld_per_megabyte),
        })
    };
    json!({
        "model": found.model,
        "format": found.format,
        "plot": plot::heat(&roles, &columns, &cells, "KL divergence by role and layer"),
        "groups": groups.iter().take(LISTED_GROUPS).map(listed).collect::<Vec<_>>(),
        "hidden": groups.len().saturating_sub(LISTED_GROUPS),
    })
}

/// The answers that differ, worst first: lost ones, then won ones, then the rest.
fn answers(answers: &[Answer]) -> Value {
    let mut order: Vec<&Answer> = answers.iter().collect();
    order.sort_by_key(|answer| match (answer.baseline_passed, answer.model_passed) {
        (Some(true), Some(false)) => 0,
        (Some(false), Some(true)) => 1,
        _ if answer.baseline_answer != answer.model_answer => 2,
        _ => 3,
    });
    let shown = order.into_iter().take(SHOWN_ANSWERS).map(|answer| {
        let (baseline, model) = (&answer.baseline_answer, &answer.model_answer);
        let common: usize =
            baseline.chars().zip(model.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        let passed = |passed: Option<bool>| passed.map(|passed| if passed { "passed" } else { "failed" });
        json!({
            "suite": answer.suite,
            "id": answer.id,
            "model": answer.model,
            "prompt": answer.prompt,
            "reason": answer.reason,
            "same": &baseline[..common],
            "baseline_rest": &baseline[common..],
            "model_rest": &model[common..],
            "differs": baseline != model,
            "baseline_passed": passed(answer.baseline_passed),
            "model_passed": passed(answer.model_passed),
            "first_difference": answer.first_difference,
        })
    });
    json!(shown.collect::<Vec<_>>())
}

fn numbers(values: [Option<f64>; 4]) -> [String; 4] {
    values.map(|value| value.map_or("–".to_string(), number))
}

/// Three significant digits without a tail of zeros.
fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let digits = (2 - value.abs().log10().floor() as i32).max(0);
    let shown = match digits {
        0..=6 => format!("{value:.*}", digits as usize),
        _ => return format!("{value:.2e}"),
    };
    match shown.contains('.') {
        true => shown.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => shown,
    }
}
