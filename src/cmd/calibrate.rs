//! Calibration text as the command line names it → token windows of a model, and which method is worth its time.

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::artifact::file_name;
use crate::backend::cpu::Cpu;
use crate::calib::choose::{Choice, Effort, Trial};
use crate::calib::corpus::{Corpus, WindowShape};
use crate::calib::settings::Settings;
use crate::checkpoint::Checkpoint;
use crate::cli::{ConvertArgs, MethodArg};
use crate::convert::{Calibration, choose_settings};
use crate::manifest;
use crate::output::Printer;
use crate::plan::Plan;
use crate::recipe::Method;

/// Weights times calibration tokens up to which `auto` calibrates: about ten minutes on two cores.
const AUTO_BUDGET: u64 = 10_000_000_000_000;
/// Draws the windows of longer texts.
const SEED: u64 = 0;

/// A model's calibration windows with their origin.
pub struct Windows {
    tokens: Vec<Vec<u32>>,
    record: manifest::Calibration,
}

/// Returns the method to use; `auto` is decided here, aloud.
pub fn method(args: &ConvertArgs, source: &Checkpoint, printer: Printer) -> Method {
    match args.method {
        MethodArg::Rtn => Method::Rtn,
        MethodArg::Gptq => Method::Gptq,
        MethodArg::Auto if source.total_weights() * args.calib_tokens as u64 <= AUTO_BUDGET => Method::Gptq,
        MethodArg::Auto => {
            printer.note(
                "note: method rtn: calibrating a model of this size takes hours on a CPU; pass `--method gptq` to do it",
            );
            Method::Rtn
        }
    }
}

impl Windows {
    /// Reads, tokenizes and cuts the calibration text.
    ///
    /// # Errors
    /// A text that cannot be read or does not fill a window, windows longer than the model's context.
    pub fn new(args: &ConvertArgs, source: &Checkpoint) -> Result<Self> {
        let corpus = match &args.calib {
            None => Corpus::bundled(),
            Some(path) => Corpus::open(path, None)?,
        };
        let context = args.calib_ctx as usize;
        ensure!(
            context <= source.config.max_position_embeddings,
            "`--calib-ctx {context}` exceeds the model's context of {}",
            source.config.max_position_embeddings
        );
        let tokenizer = source.tokenizer()?;
        let ids = tokenizer.encode(&corpus.text, false)?;
        let shape = WindowShape { context, tokens: args.calib_tokens as usize, bos: tokenizer.bos() };
        let tokens = corpus.windows(&ids, shape, SEED)?;
        let record = manifest::Calibration {
            name: args.calib.as_deref().map_or(corpus.name, file_name),
            sha256: corpus.sha256,
            windows: tokens.len(),
            n_ctx: context,
            seed: SEED,
            settings: Value::Null,
        };
        Ok(Windows { tokens, record })
    }

    /// Returns what the manifest says of them.
    pub fn record(&self) -> manifest::Calibration {
        self.record.clone()
    }

    /// Returns the calibration with those settings.
    pub fn calibration(&self, settings: Settings) -> Calibration<'_> {
        Calibration { windows: &self.tokens, held_out: 0, settings }
    }

    /// Finds the settings for a plan, as `--effort` says, and tells what was tried.
    ///
    /// # Errors
    /// If calibration fails.
    pub fn choose(
        &self,
        args: &ConvertArgs,
        source: &Checkpoint,
        plan: &Plan,
        printer: Printer,
    ) -> Result<Choice> {
        let effort = Effort::from(args.effort);
        let mut start =
            Settings { scale_rule: plan.recipe.scale_rule, ..Settings::of(plan.recipe.format.activations) };
        if effort == Effort::Fast {
            start.sweeps = 1;
        }
        let tell = |trial: &Trial| {
            printer.detail(format!(
                "{}: {}: KLD {:.5} on text kept out",
                plan.recipe.format.name, trial.change, trial.kld
            ));
        };
        let choice = choose_settings(&Cpu, source, plan, self.calibration(start), effort, &tell)?;
        if let Some(first) = choice.trials.first()
            && choice.settings != first.settings
        {
            let best = choice.trials.iter().min_by(|a, b| a.kld.total_cmp(&b.kld)).unwrap_or(first);
            printer.note(&format!(
                "{}: chose {} of {} settings tried: KLD {:.5} on calibration text kept out, {:.5} by default",
                plan.recipe.format.name,
                best.change,
                choice.trials.len(),
                best.kld,
                first.kld
            ));
        }
        Ok(choice)
    }
}
