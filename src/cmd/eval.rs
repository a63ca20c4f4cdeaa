//! `quant eval`: perplexity, and divergence from a baseline.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::measure::{self, Request};
use super::{ModelRef, Outcome, show};
use crate::checkpoint::Checkpoint;
use crate::cli::EvalArgs;
use crate::eval::Report;
use crate::output::{self, Printer};

/// Measures every model on the same token ids and prints a row for each.
pub fn run(args: &EvalArgs, printer: Printer) -> Result<Outcome> {
    let open = |model: Option<&str>| -> Result<Checkpoint> {
        Checkpoint::open(&ModelRef::resolve(model, args.source.revision.as_deref(), printer)?.path)
    };
    let on_stdout =
        [&args.json, &args.csv].into_iter().flatten().filter(|path| *path == Path::new("-")).count();
    ensure!(on_stdout < 2, "`--json -` and `--csv -` both want standard output; give one of them a file");
    let baseline = args.baseline.as_deref().map(|model| open(Some(model))).transpose()?;
    let models = match args.models.as_slice() {
        [] => vec![open(None)?],
        models => models.iter().map(|model| open(Some(model))).collect::<Result<_>>()?,
    };
    let request = Request::new(&args.protocol, &args.source.device, baseline.as_ref().unwrap_or(&models[0]))?;
    let mut report = measure::run(&request, baseline.as_ref(), &models.iter().collect::<Vec<_>>(), printer)?;
    if !args.kld {
        for row in &mut report.rows {
            row.without_divergence();
        }
    }
    write(args, &report, printer)?;
    if on_stdout == 0 {
        printer.result(&show::rows(&report))?;
    }
    Ok(Outcome::Ok)
}

fn write(args: &EvalArgs, report: &Report, printer: Printer) -> Result<()> {
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
