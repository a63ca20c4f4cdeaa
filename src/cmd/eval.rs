//! `quant eval`: perplexity, divergence from a baseline, and whether that is good enough.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use super::measure::{self, Request};
use super::questions::Questions;
use super::{ModelRef, Status, show};
use crate::artifact::file_name;
use crate::checkpoint::Checkpoint;
use crate::cli::{EvalArgs, GateArgs, OutputArgs};
use crate::eval::Report;
use crate::eval::gate::{self, Gate};
use crate::eval::report::{Bench, SpeedRow};
use crate::eval::sensitivity::Sensitivity;
use crate::eval::slices;
use crate::eval::tokenization::Parting;
use crate::output::{self, Printer};
use crate::report;

/// Measures every model on the same token ids, prints a row for each, and judges them.
pub fn run(args: &EvalArgs, printer: Printer) -> Result<Status> {
    output::check_reports(files(&args.outputs).into_iter().map(|(_, file, _)| file))?;
    let on_stdout = takes_stdout(&args.outputs)?;
    let gates = gates(&args.gates)?;
    ensure!(
        gates.is_empty() || args.baseline.is_some(),
        "a gate compares with a baseline; name one with `--baseline MODEL`"
    );
    let slices =
        slices::by_names(args.slices.iter().map(String::as_str).chain(gates.iter().filter_map(Gate::slice)))?;
    let (sensitivity, speed) = measured_before(&args.outputs)?;
    let open = |model: Option<&str>| -> Result<Checkpoint> {
        ModelRef::resolve(model, args.source.revision.as_deref(), printer)?.open(printer)
    };
    let baseline = args.baseline.as_deref().map(|model| open(Some(model))).transpose()?;
    let models = match args.models.as_slice() {
        [] => vec![open(None)?],
        models => models.iter().map(|model| open(Some(model))).collect::<Result<_>>()?,
    };
    let reference = baseline.as_ref().unwrap_or(&models[0]);
    let request = Request::new(&args.protocol, &args.source.device, reference)?;
    let mut request = request.within(args.memory.into());
    request.add_slices(slices, reference)?;
    if let Some(folder) = &args.chunks_cache {
        let timed = gates.iter().any(Gate::needs_speed);
        ensure!(
            !timed,
            "`--min-tok-s-ratio` times the baseline, which `--chunks-cache` does not run; drop one of them"
        );
        request.cache_in(folder);
    }
    let models: Vec<&Checkpoint> = models.iter().collect();
    request.add_kv_caches(&args.kv_cache, reference)?;
    request.ask(Questions::new(&args.questions, reference, &models)?);
    let partings = request.partings(reference, &models, printer)?;
    let mut report = measure::run(&request, baseline.as_ref(), &models, printer)?;
    report.gates = gate::judge(&gates, &report)?;
    if !gates.is_empty() {
        let verdict = |(at, parting): &(usize, Parting)| parting.verdict(&file_name(&models[*at].path));
        report.gates.extend(partings.iter().map(verdict));
    }
    if !args.kld && !gates.iter().any(Gate::needs_divergence) {
        report.without_divergence();
    }
    report.sensitivity = sensitivity;
    report.speed = speed;
    for (_, file, format) in files(&args.outputs) {
        output::write_report(file, &format(&report)?, printer)?;
    }
    if !on_stdout {
        printer.result(&show::report(&report))?;
    }
    for verdict in report.gates.iter().filter(|verdict| !verdict.passed) {
        printer.failure(format!("gate failed: {}", verdict.line()));
    }
    let errors = report.errors();
    ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(if report.passed() { Status::Ok } else { Status::GateFailed })
}

/// Reads what other commands have measured, to be shown in the reports.
fn measured_before(outputs: &OutputArgs) -> Result<(Option<Sensitivity>, Vec<SpeedRow>)> {
    let sensitivity =
        outputs.sensitivity.as_deref().map(|file| read_json(file, "sensitivity")).transpose()?;
    let benches = outputs.bench.iter().map(|file| read_json::<Bench>(file, "bench"));
    let speed = benches.collect::<Result<Vec<_>>>()?.into_iter().flat_map(Bench::rows).collect();
    Ok((sensitivity, speed))
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

/// Turns a report into text.
type Format = fn(&Report) -> Result<String>;

/// The files that were asked for: the option that names each, the file, what writes it.
fn files(args: &OutputArgs) -> Vec<(&'static str, &Path, Format)> {
    let all: [(&'static str, &Option<PathBuf>, Format); 5] = [
        ("--json", &args.json, Report::json),
        ("--csv", &args.csv, Report::csv),
        ("--html", &args.html, report::html),
        ("--markdown", &args.markdown, report::markdown),
        ("--junit", &args.junit, report::junit::xml),
    ];
    all.into_iter().filter_map(|(option, file, format)| Some((option, file.as_deref()?, format))).collect()
}

/// Returns whether standard output is taken by a file.
fn takes_stdout(args: &OutputArgs) -> Result<bool> {
    let files = files(args);
    let taken: Vec<&str> = files.iter().filter(|file| file.1 == Path::new("-")).map(|file| file.0).collect();
    if let [first, second, ..] = taken[..] {
        bail!("`{first} -` and `{second} -` both want standard output; give one of them a file");
    }
    Ok(!taken.is_empty())
}

/// Reads what another command's `--json` wrote.
fn read_json<T: DeserializeOwned>(file: &Path, command: &str) -> Result<T> {
    let text = fs::read_to_string(file).with_context(|| format!("{}: cannot be read", file.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: is no JSON of `quant {command} --json`", file.display()))
}
