//! `quant eval`: perplexity, divergence from a baseline, and whether that is good enough.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::measure::{self, Request};
use super::{ModelRef, Outcome, show};
use crate::checkpoint::Checkpoint;
use crate::cli::{EvalArgs, GateArgs, OutputArgs};
use crate::eval::Report;
use crate::eval::gate::{self, Gate};
use crate::eval::slices;
use crate::output::{self, Printer};

/// Measures every model on the same token ids, prints a row for each, and judges them.
pub fn run(args: &EvalArgs, printer: Printer) -> Result<Outcome> {
    let on_stdout = outputs_on_stdout(&args.outputs)?;
    let gates = gates(&args.gates)?;
    ensure!(
        gates.is_empty() || args.baseline.is_some(),
        "a gate compares with a baseline; name one with `--baseline MODEL`"
    );
    let slices =
        slices::by_names(args.slices.iter().map(String::as_str).chain(gates.iter().filter_map(Gate::slice)))?;
    let open = |model: Option<&str>| -> Result<Checkpoint> {
        Checkpoint::open(&ModelRef::resolve(model, args.source.revision.as_deref(), printer)?.path)
    };
    let baseline = args.baseline.as_deref().map(|model| open(Some(model))).transpose()?;
    let models = match args.models.as_slice() {
        [] => vec![open(None)?],
        models => models.iter().map(|model| open(Some(model))).collect::<Result<_>>()?,
    };
    let reference = baseline.as_ref().unwrap_or(&models[0]);
    let mut request = Request::new(&args.protocol, &args.source.device, reference)?;
    request.add_slices(slices, reference)?;
    let mut report = measure::run(&request, baseline.as_ref(), &models.iter().collect::<Vec<_>>(), printer)?;
    report.gates = gate::judge(&gates, &report)?;
    if !args.kld && !gates.iter().any(Gate::needs_divergence) {
        report.without_divergence();
    }
    write(&args.outputs, &report, printer)?;
    if !on_stdout {
        printer.result(&show::report(&report))?;
    }
    for verdict in report.gates.iter().filter(|verdict| !verdict.passed) {
        printer.failure(format!("gate failed: {}", verdict.line()));
    }
    Ok(if report.passed() { Outcome::Ok } else { Outcome::GateFailed })
}

/// Returns the gates of the command line and of the file. Where both limit the same, both hold.
fn gates(args: &GateArgs) -> Result<Vec<Gate>> {
    let mut gates = match &args.file {
        Some(file) => Gate::read(file)?,
        None => Vec::new(),
    };
    for (rule, value) in &args.limits {
        gates.push(Gate::parse(rule, value)?);
    }
    Ok(gates)
}

/// The files that were asked for, with the option that names each.
fn files(args: &OutputArgs) -> [(&'static str, &Option<PathBuf>); 2] {
    [("--json", &args.json), ("--csv", &args.csv)]
}

/// Returns whether standard output is taken by a file.
fn outputs_on_stdout(args: &OutputArgs) -> Result<bool> {
    let taken: Vec<&str> = files(args)
        .into_iter()
        .filter(|(_, file)| file.as_deref() == Some(Path::new("-")))
        .map(|(option, _)| option)
        .collect();
    if let [first, second, ..] = taken[..] {
        anyhow::bail!("`{first} -` and `{second} -` both want standard output; give one of them a file");
    }
    Ok(!taken.is_empty())
}

fn write(args: &OutputArgs, report: &Report, printer: Printer) -> Result<()> {
    if let Some(file) = &args.json {
        let mut json = Vec::new();
        report.write_json(&mut json)?;
        output::write_report(file, &String::from_utf8(json).context("the report")?, printer)?;
    }
    if let Some(file) = &args.csv {
        let mut csv = Vec::new();
        report.write_csv(&mut csv)?;
        output::write_report(file, &String::from_utf8(csv).context("the report")?, printer)?;
    }
    Ok(())
}
