//! `quant formats`: what can be written, at how many bits, and who loads it, from the tables that conversion uses.

use anyhow::Result;
use serde_json::{Value, json};

use super::Status;
use crate::cli::FormatsArgs;
use crate::dialect::{DIALECTS, Dialect};
use crate::loaders::{self, LoaderVerdict};
use crate::names::{Role, TensorId};
use crate::output::{self, Printer};
use crate::recipe::formats::{Base, FORMATS, Format};

/// Rows and columns of the matrix that bits are counted on: a whole number of every block.
const SIDE: usize = 4096;

/// Prints all formats and who loads them.
pub fn run(args: &FormatsArgs, printer: Printer) -> Result<Status> {
    if let Some(file) = &args.json {
        output::write_report(file, &format!("{:#}\n", json()), printer)?;
    }
    if args.json.as_deref().is_none_or(|file| file.as_os_str() != "-") {
        printer.result(&text())?;
    }
    Ok(Status::Ok)
}

/// Returns the tables for people: the formats, then each dialect's loaders.
fn text() -> String {
    let mut formats = output::table(["format", "bits/weight", "written for", "what it is"]);
    for format in &FORMATS {
        let dialects: Vec<_> = format.dialects.iter().map(|(dialect, _)| *dialect).collect();
        formats.add_row([
            format.name.to_string(),
            format!("{:.4}", bits(format)).trim_end_matches('0').trim_end_matches('.').to_string(),
            dialects.join(", "),
            format.about.to_string(),
        ]);
    }
    let dialects: Vec<_> = DIALECTS.into_iter().map(loaders_text).collect();
    format!(
        "{formats}\n\nBits are those of the format's main scheme; `quant convert --dry-run` counts the whole model.\n\n{}",
        dialects.join("\n")
    )
}

/// Returns who loads what a dialect writes; formats of one verdict stand together.
fn loaders_text(dialect: &dyn Dialect) -> String {
    let mut rows: Vec<(LoaderVerdict, Vec<&str>)> = Vec::new();
    for format in spelled_by(dialect) {
        for verdict in verdicts(dialect, format) {
            match rows.iter_mut().find(|row| row.0 == verdict) {
                Some(row) => row.1.push(format.name),
                None => rows.push((verdict, vec![format.name])),
            }
        }
    }
    let place = |loader| loaders::LOADERS.iter().position(|(name, _)| *name == loader);
    rows.sort_by_key(|(verdict, _)| place(verdict.loader));
    let count = spelled_by(dialect).count();
    let mut table = output::table(["loader", "version", "formats", "loads", "why"]);
    for (verdict, formats) in rows {
        let formats = if formats.len() == count { "all".to_string() } else { formats.join(", ") };
        let LoaderVerdict { loader, version, loads, reason } = verdict;
        table.add_row([loader, version, &formats, loads.word(), reason]);
    }
    format!("{} ({}):\n{table}\n", dialect.name(), output_of(dialect))
}

fn json() -> Value {
    let dialect = |format: &Format, name: &str| {
        let dialect = DIALECTS.into_iter().find(|dialect| dialect.name() == name)?;
        let loaders: Vec<_> = verdicts(dialect, format).iter().map(LoaderVerdict::to_json).collect();
        Some(json!({"name": name, "output": output_of(dialect), "loaders": loaders}))
    };
    let formats = FORMATS.iter().map(|format| {
        let dialects: Vec<_> = format.dialects.iter().filter_map(|row| dialect(format, row.0)).collect();
        json!({
            "name": format.name, "aliases": format.aliases, "about": format.about, "bits_per_weight": bits(format),
            "group_size": format.grouped.is_some(), "dialects": dialects,
        })
    });
    json!({ "formats": formats.collect::<Vec<_>>() })
}

/// Returns the formats that a dialect spells.
fn spelled_by(dialect: &dyn Dialect) -> impl Iterator<Item = &'static Format> {
    FORMATS.iter().filter(move |format| format.dialects.iter().any(|row| row.0 == dialect.name()))
}

/// Returns the verdicts on a model whose linears all have the format's main scheme.
fn verdicts(dialect: &dyn Dialect, format: &Format) -> Vec<LoaderVerdict> {
    let stored = format.base.choice().map(|choice| (choice.scheme, choice.inputs));
    let tensors = [(TensorId::in_layer(0, Role::O), stored)];
    loaders::verdicts(dialect.loaders(), &loaders::PlannedOutput { tensors: &tensors })
}

fn bits(format: &Format) -> f64 {
    match format.base {
        Base::Dense(dtype) => 8.0 * dtype.bytes() as f64,
        Base::Quantized(choice) => choice.scheme.stored_bits(SIDE, SIDE) as f64 / (SIDE * SIDE) as f64,
    }
}

fn output_of(dialect: &dyn Dialect) -> &'static str {
    if dialect.extension().is_some() { "a file" } else { "a folder" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_stands_in_the_table_with_a_loader_and_its_bits() {
        let (text, json) = (text(), json());
        for (format, json) in FORMATS.iter().zip(json["formats"].as_array().unwrap()) {
            assert!(text.lines().any(|line| line.trim_start().starts_with(format.name)), "{}", format.name);
            assert_eq!(json["dialects"].as_array().unwrap().len(), format.dialects.len(), "{}", format.name);
            let loaders = json["dialects"][0]["loaders"].as_array().unwrap();
            assert!(loaders.iter().any(|loader| matches!(loader["loads"].as_str(), Some("yes" | "if"))));
        }
        let bits = |name| FORMATS.iter().find(|format| format.name == name).map(bits);
        assert_eq!((bits("mxfp4"), bits("q6_k"), bits("f32")), (Some(4.25), Some(6.5625), Some(32.0)));
    }
}
