//! Runs an evaluation on the device that was asked for.

use std::fs;

use anyhow::{Context, Result};

use crate::artifact::file_name;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Precision};
use crate::checkpoint::Checkpoint;
use crate::cli::{ProtocolArg, ProtocolArgs};
use crate::embedded;
use crate::eval::report::{self, Report};
use crate::eval::{self, Protocol, Scored, Subject, Text};
use crate::model::Model;
use crate::output::{Printer, Unit};

/// Windows of the embedded text that are evaluated unless told otherwise.
const DEFAULT_WINDOWS: usize = 60;
/// Multiply-adds a validation may cost: about two minutes on two cores.
const VALIDATION_BUDGET: u64 = 10_000_000_000_000;
/// Fewer windows than this say nothing.
const MIN_WINDOWS: u64 = 4;

/// What to measure, on what text and where.
pub struct Request {
    text: Text,
    device: String,
    precise: bool,
}

impl Request {
    /// Reads and tokenizes the text with the tokenizer of `reference`, whose token ids all models share.
    pub fn new(args: &ProtocolArgs, device: &str, reference: &Checkpoint) -> Result<Self> {
        let text = match &args.text {
            None => embedded::EVAL_TEXT.to_string(),
            Some(path) => fs::read_to_string(path)
                .with_context(|| format!("{}: cannot be read as UTF-8 text", path.display()))?,
        };
        let tokenizer = reference.tokenizer()?;
        let bos = tokenizer.bos();
        let tokens = tokenizer.encode(&text, bos.is_some())?;
        let (scored, n_ctx) = match args.protocol {
            ProtocolArg::LlamaCpp => (Scored::SecondHalf, 512),
            ProtocolArg::Full => (Scored::All, 2048),
        };
        let n_ctx = args.ctx.map_or(n_ctx, |n| n as usize);
        let all = args.text.is_some().then_some(usize::MAX);
        let windows = args.windows.map(|n| n as usize).or(all).unwrap_or(DEFAULT_WINDOWS);
        let protocol = Protocol::new(scored, n_ctx, Some(windows), &text, &tokens, bos)?;
        let text = Text { name: "text".to_string(), tokens, protocol };
        Ok(Request { text, device: device.to_string(), precise: args.precise })
    }

    /// Lowers the number of windows to what a validation may cost with a model of that many weights.
    pub fn within_budget(mut self, weights: u64) -> Self {
        let protocol = &mut self.text.protocol;
        let window = weights.max(1) * protocol.n_ctx as u64;
        let affordable = (VALIDATION_BUDGET / window).max(MIN_WINDOWS) as usize;
        protocol.windows = protocol.windows.min(affordable);
        self
    }
}

/// Measures the models, against the baseline if there is one; its row comes first.
pub fn run(
    request: &Request,
    baseline: Option<&Checkpoint>,
    models: &[&Checkpoint],
    printer: Printer,
) -> Result<Report> {
    let precision = if request.precise { Precision::F32 } else { Precision::F16 };
    let ordinal = match request.device.as_str() {
        "cpu" => return run_on(&Cpu, request, baseline, models, printer),
        "auto" => None,
        other => {
            Some(other.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()).with_context(
                || format!("`--device {other}`: devices are `auto`, `cpu` and `cuda:N`, such as `cuda:0`"),
            )?)
        }
    };
    match (Cuda::new(ordinal.unwrap_or(0), precision), ordinal) {
        (Ok(cuda), _) => run_on(&cuda, request, baseline, models, printer),
        (Err(reason), Some(_)) => Err(reason),
        (Err(reason), None) => {
            printer.note(format!("the CPU measures: {reason:#}"));
            run_on(&Cpu, request, baseline, models, printer)
        }
    }
}

fn run_on<B: Backend>(
    backend: &B,
    request: &Request,
    baseline: Option<&Checkpoint>,
    models: &[&Checkpoint],
    printer: Printer,
) -> Result<Report> {
    printer.note(format!("measuring on {}", backend.describe()));
    let load = |checkpoint: &Checkpoint| {
        Model::load(backend, &checkpoint.config, checkpoint)
            .with_context(|| format!("{}", checkpoint.path.display()))
    };
    let baseline_model = baseline.map(load).transpose()?;
    let loaded = models.iter().map(|checkpoint| load(checkpoint)).collect::<Result<Vec<_>>>()?;
    let baseline =
        baseline.zip(baseline_model.as_ref()).map(|(checkpoint, model)| subject(checkpoint, model));
    let subjects: Vec<_> =
        models.iter().zip(&loaded).map(|(checkpoint, model)| subject(checkpoint, model)).collect();
    let everyone: Vec<&Subject<B>> = baseline.iter().chain(&subjects).collect();
    let runs = request.text.protocol.windows * everyone.len();
    let bar = printer.bar(runs as u64, "measuring", Unit::Count);
    let samples = eval::run(backend, baseline.as_ref(), &subjects, &request.text, &|n| bar.inc(n as u64))?;
    bar.finish_and_clear();
    Ok(Report {
        protocol: request.text.protocol.clone(),
        rows: report::rows(&everyone, &samples, true),
        slices: Vec::new(),
        positions: report::positions(&everyone, &samples, &request.text),
    })
}

fn subject<'a, B: Backend>(checkpoint: &Checkpoint, model: &'a Model<B>) -> Subject<'a, B> {
    Subject {
        name: file_name(&checkpoint.path),
        format: checkpoint.format_name(),
        bytes: checkpoint.total_bytes(),
        bits_per_weight: checkpoint.bits_per_weight(),
        model,
    }
}
