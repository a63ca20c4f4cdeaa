//! Calibration text as the command line names it → token windows of a model, and which method is worth its time.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::artifact::file_name;
use crate::backend::cpu::Cpu;
use crate::backend::footprint::Footprint;
use crate::backend::machine::Machine;
use crate::backend::{SecondMoments, cuda};
use crate::calib::choose::{Chosen, Effort, Search, Trial};
use crate::calib::corpus::{Corpus, RenderChat, WindowShape};
use crate::calib::imatrix::Imatrix;
use crate::calib::settings::Settings;
use crate::calib::token_energies::{TokenEnergies, token_energies};
use crate::calib::{importance, memory};
use crate::checkpoint::Checkpoint;
use crate::cli::{CalibrationArgs, ConvertArgs, MethodArg};
use crate::convert::{Calibration, Draft, choose_settings};
use crate::manifest::{self, CalibrationText};
use crate::memory::{Budget, Limits};
use crate::model::Model;
use crate::model::chat_template::ChatTemplate;
use crate::names::{Role, TensorId};
use crate::output::{Printer, Unit, size};
use crate::plan::{Action, Plan};
use crate::recipe::Method;
use crate::recipe::formats;

/// Weights times calibration tokens up to which `auto` calibrates on a CPU: about ten minutes on two cores.
const AUTO_BUDGET: u64 = 10_000_000_000_000;
/// The same on a GPU: about a quarter of an hour on one H100.
const AUTO_BUDGET_GPU: u64 = 10_000_000_000_000_000;
/// Share of an evaluation text's runs of words above which numbers measured on it flatter what was calibrated. Stock
/// phrases alone make 5 % between unrelated texts of the same kinds.
const OVERLAP: f64 = 0.1;

/// What a calibration begins with.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Where a search for settings begins.
    pub settings: Settings,
    /// Whether gains of norms are tuned at the end.
    pub tunes: bool,
}

/// A model's calibration windows with their origin.
pub struct Windows {
    tokens: Vec<Vec<u32>>,
    record: manifest::Calibration,
    corpus: Corpus,
}

/// Returns the method to use; `auto` is decided here, aloud.
pub fn method(args: &ConvertArgs, source: &Checkpoint, printer: Printer) -> Result<Method> {
    if let Some(name) = args.format.iter().find(|name| is_static(name)) {
        ensure!(
            args.imatrix.is_none() && args.method != MethodArg::Rtn,
            "`--format {name}` fixes the scales of inputs on calibration text: leave `--method rtn` and `--imatrix` away, \
             or use `--format int8-w8a8`, whose scales engines find token by token"
        );
        return Ok(Method::Gptq);
    }
    ensure!(
        args.imatrix.is_none() || args.method != MethodArg::Gptq,
        "`--imatrix` weighs the errors of round-to-nearest; `--method gptq` measures its own on `--calib`: give one of them"
    );
    let quantizes = |format: &String| formats::by_name(format).is_none_or(|f| f.base.choice().is_some());
    Ok(match args.method {
        _ if !args.format.iter().any(quantizes) => Method::Rtn,
        MethodArg::Auto if args.imatrix.is_some() => Method::Rtn,
        MethodArg::Rtn => Method::Rtn,
        MethodArg::Gptq => Method::Gptq,
        MethodArg::Auto if work(args, source) <= AUTO_BUDGET => Method::Gptq,
        MethodArg::Auto if work(args, source) <= AUTO_BUDGET_GPU && may_use_gpu(&args.source.device) => {
            Method::Gptq
        }
        MethodArg::Auto => {
            printer.note(
                "note: method rtn: calibrating a model of this size takes hours on a CPU; pass `--method gptq` to do it",
            );
            Method::Rtn
        }
    })
}

/// Whether a format of that name has input scales that only calibration finds.
fn is_static(format: &str) -> bool {
    formats::by_name(format).is_some_and(|format| format.base.choice().is_some_and(|c| c.inputs.is_static()))
}

/// Weights times calibration tokens.
fn work(args: &ConvertArgs, source: &Checkpoint) -> u64 {
    source.total_weights() * u64::from(args.calibration.calib_tokens)
}

/// Whether a device of that name is a GPU that is there.
fn may_use_gpu(device: &str) -> bool {
    device != "cpu" && cuda::is_present()
}

/// Says how many quantized weights an importance matrix has nothing on.
///
/// # Errors
/// If it is of another model.
pub fn report_missing(imatrix: &Imatrix, plan: &Plan, printer: Printer) -> Result<()> {
    let quantized = || plan.steps.iter().filter(|step| matches!(step.action, Action::Quantize(_)));
    let missing = importance::missing(imatrix, quantized().map(|step| (step.id, step.cols())))?;
    if missing > 0 {
        printer.note(format!(
            "note: the importance matrix has nothing on {missing} of {} weights; their columns count alike",
            quantized().count()
        ));
    }
    Ok(())
}

impl Windows {
    /// Reads, tokenizes and cuts the calibration text.
    ///
    /// # Errors
    /// A text that cannot be read or does not fill a window, windows longer than the model's context.
    pub fn new(args: &CalibrationArgs, source: &Checkpoint, printer: Printer) -> Result<Self> {
        let template = ChatTemplate::new(&source.tokenizer_files()?)?;
        let render = |messages: &Value| match &template {
            Some(template) => template.render_messages(messages),
            None => bail!("this model has no chat template"),
        };
        let render: Option<RenderChat> = template.is_some().then_some(&render);
        let corpus = Corpus::open(&args.calib, render)?;
        if render.is_none() && corpus.lacks_conversations() {
            printer.note(
                "note: this model has no chat template: the calibration mix goes without its conversations",
            );
        }
        let context = args.calib_ctx as usize;
        ensure!(
            context <= source.config.max_position_embeddings,
            "`--calib-ctx {context}` exceeds the model's context of {}",
            source.config.max_position_embeddings
        );
        let tokenizer = source.tokenizer()?;
        let (mut ids, mut texts) = (Vec::new(), Vec::new());
        for part in &corpus.parts {
            let found = tokenizer.encode(&part.text, false)?;
            texts.push(CalibrationText {
                name: part.name.clone(),
                sha256: part.sha256.clone(),
                licence: part.licence.clone(),
                tokens: found.len(),
            });
            ids.extend(found);
        }
        let shape = WindowShape { context, tokens: args.calib_tokens as usize, bos: tokenizer.bos() };
        let tokens = corpus.windows(&ids, shape, args.calib_seed)?;
        let record = manifest::Calibration {
            name: args.calib.iter().map(|name| file_name(Path::new(name))).collect::<Vec<_>>().join(","),
            sha256: corpus.sha256(),
            texts,
            windows: tokens.len(),
            n_ctx: context,
            seed: args.calib_seed,
            settings: Value::Null,
        };
        Ok(Windows { tokens, record, corpus })
    }

    /// Adds all tokens to a hash.
    pub fn identify(&self, hash: &mut blake3::Hasher) {
        for window in &self.tokens {
            let bytes: Vec<u8> = window.iter().flat_map(|id| id.to_le_bytes()).collect();
            hash.update(&(window.len() as u64).to_le_bytes()).update(&bytes);
        }
    }

    /// Returns what the manifest says of them.
    pub fn record(&self) -> manifest::Calibration {
        self.record.clone()
    }

    /// Returns the windows.
    pub fn tokens(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// Warns if `text`, on which results will be measured, occurs in the calibration text.
    pub fn warn_of_overlap(&self, text: &str, printer: Printer) {
        let overlap = self.corpus.overlap(text);
        if overlap > OVERLAP {
            printer.note(format!(
                "warning: {:.0} % of the evaluation text is in the calibration text `{}`: its numbers will flatter the \
                 result; evaluate on another text",
                100.0 * overlap,
                self.corpus.name
            ));
        }
    }

    /// Returns the calibration with those settings, in that much device memory for streams.
    pub fn calibration(&self, settings: Settings, room: Option<u64>) -> Calibration<'_> {
        Calibration { windows: &self.tokens, energies: &[], held_out: 0, settings, room }
    }

    /// Returns the device memory that streams may take, `None` for as much as it takes, and tells what calibration takes.
    ///
    /// # Errors
    /// If it does not fit what may be used.
    pub fn room<B: Machine>(
        &self,
        backend: &B,
        limits: Limits,
        source: &Checkpoint,
        plan: &Plan,
        printer: Printer,
    ) -> Result<Option<u64>> {
        let budget = Budget::new(limits, backend.free_memory()?)?;
        let memory::MemoryPlan { room, summary } =
            memory::plan(backend, budget, self.work(backend, source, plan))?;
        if limits == Limits::default() {
            printer.detail(&summary)
        } else {
            printer.note(&summary)
        }
        Ok(room)
    }

    /// Returns what calibration takes on a CPU, in a sentence.
    pub fn memory(&self, source: &Checkpoint, plan: &Plan) -> Result<String> {
        let unlimited = Budget { device: None, host: None, separate: false };
        Ok(memory::plan(&Cpu, unlimited, self.work(&Cpu, source, plan))?.summary)
    }

    /// Returns what decides how much memory calibration takes.
    fn work<'a>(&self, device: &impl Footprint, source: &'a Checkpoint, plan: &Plan) -> memory::Work<'a> {
        let down = source.tensors.get(&TensorId::in_layer(0, Role::Down));
        let weight_bytes = down.map_or(4, |info| info.bytes_on(device).div_ceil(info.weights().max(1)));
        let rounds = [Role::Embed, Role::Head].map(|role| {
            let step = plan.steps.iter().find(|step| step.id == TensorId::global(role));
            step.is_some_and(|step| matches!(step.action, Action::Quantize(_)))
        });
        let n_ctx = self.tokens.first().map_or(1, Vec::len);
        let tokens = self.tokens.len() * n_ctx;
        memory::Work { config: &source.config, weight_bytes, tokens, n_ctx, rounds }
    }

    /// Returns what a calibration begins with. Where the whole model does not fit into memory for a way back, all tokens
    /// count alike and gains stay as they are; a note says so.
    ///
    /// # Errors
    /// If the device does not say what it has.
    pub fn start<B: Machine>(
        &self,
        backend: &B,
        args: &ConvertArgs,
        source: &Checkpoint,
        plan: &Plan,
        printer: Printer,
    ) -> Result<Start> {
        let effort = Effort::from(args.effort);
        let start =
            Settings { scale_rule: plan.recipe.scale_rule, ..Settings::for_inputs(plan.rounds_inputs()) };
        if effort == Effort::Fast {
            let settings = Settings { sweeps: 1, token_power: 0.0, ..start };
            return Ok(Start { settings, tunes: false });
        }
        if source.config.has_experts() {
            printer.note("note: all tokens count alike: gradients do not go through mixtures of experts");
            return Ok(Start { settings: Settings { token_power: 0.0, ..start }, tunes: false });
        }
        if start.token_power == 0.0 && effort != Effort::Best {
            return Ok(Start { settings: start, tunes: false });
        }
        let budget = Budget::new(args.memory.into(), backend.free_memory()?)?;
        let weights: u64 = source.tensors.values().map(|info| info.bytes_on(backend)).sum();
        // Tuned gains take the quantized model as well.
        let models = if effort == Effort::Best { 2 } else { 1 };
        let wanted = memory::backward_bytes(backend, self.work(backend, source, plan), models * weights);
        match budget.device {
            Some(limit) if wanted > limit => {
                printer.note(format!(
                    "note: all tokens count alike and the gains of norms stay as they are: gradients take the whole model, \
                     {}, but {} may be used",
                    size(wanted),
                    size(limit)
                ));
                Ok(Start { settings: Settings { token_power: 0.0, ..start }, tunes: false })
            }
            _ => Ok(Start { settings: start, tunes: effort == Effort::Best }),
        }
    }

    /// Finds out how much each token matters.
    ///
    /// # Errors
    /// If the model cannot be read or the backend fails.
    pub fn energies<B: Machine>(
        &self,
        backend: &B,
        source: &Checkpoint,
        printer: Printer,
    ) -> Result<Vec<TokenEnergies>> {
        let bar = printer.bar(self.tokens.len() as u64, "gradients", Unit::Count);
        let model = Model::load(backend, &source.config, source)?;
        let found = token_energies(backend, &model, &self.tokens, &|windows| bar.inc(windows as u64))?;
        bar.finish_and_clear();
        Ok(found)
    }

    /// Finds the settings for a plan, as `--effort` says, and tells what was tried.
    ///
    /// # Errors
    /// If calibration fails.
    pub fn choose<B: SecondMoments>(
        &self,
        backend: &B,
        args: &ConvertArgs,
        source: &Checkpoint,
        Draft { plan, journal, .. }: Draft,
        begin: Calibration,
        printer: Printer,
    ) -> Result<Chosen> {
        let effort = Effort::from(args.effort);
        let trials = effort.trials(plan.rounds_inputs());
        let bar = printer.bar((trials * source.config.num_hidden_layers) as u64, "settings", Unit::Count);
        let tell = |trial: &Trial| {
            printer.detail(format!(
                "{}: {}: KLD {:.5} on text kept out",
                plan.recipe.format.name, trial.change, trial.kld
            ));
            journal.add_trial(trial)
        };
        let search = Search { effort, known: journal.trials(), tell: &tell, progress: &|| bar.inc(1) };
        let choice = choose_settings(backend, source, plan, begin, &search)?;
        bar.finish_and_clear();
        if effort != Effort::Fast && choice.trials.is_empty() {
            printer.note(format!(
                "note: {}: default settings: {} windows of calibration text are too few to try others on",
                plan.recipe.format.name,
                self.tokens.len()
            ));
        }
        if let Some(first) = choice.trials.first()
            && choice.settings != first.settings
        {
            let chosen =
                choice.trials.iter().find(|trial| trial.settings == choice.settings).unwrap_or(first);
            printer.note(format!(
                "{}: chose {} of {} settings tried: KLD {:.5} on calibration text kept out, {:.5} by default",
                plan.recipe.format.name,
                chosen.change,
                choice.trials.len(),
                chosen.kld,
                first.kld
            ));
        }
        Ok(choice)
    }
}
