//! Writes one planned artifact: nearest codes, or calibrated ones, which an interrupted run may have begun or finished.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use super::calibration::{Start, Windows};
use super::measure::{self, WithBackend};
use crate::artifact::{Artifact, file_name};
use crate::backend::machine::Machine;
use crate::calib::imatrix::Imatrix;
use crate::calib::tune::{STEPS, Tuned};
use crate::checkpoint::Checkpoint;
use crate::cli::ConvertArgs;
use crate::container::{FileHash, Opening, leftovers};
use crate::convert::journal::{self, FinishedOutput, Journal};
use crate::convert::{self, Calibration, Draft};
use crate::manifest::{self, Hashes, Manifest, SchemeRecord, TensorRecord};
use crate::method::solve::Outcome;
use crate::num::Codec;
use crate::output::{Printer, Unit};
use crate::plan::{Action, Plan, Step};

/// One artifact: what was asked, what was decided, where it goes.
pub struct Task {
    pub plan: Plan,
    pub artifact: Artifact,
    pub manifest: Manifest,
    pub out: PathBuf,
    /// Of the files that were written, side files included.
    pub hashes: Hashes,
    /// Of a calibrated output that is written but not yet measured.
    pub journal: Option<Journal>,
}

/// Writes one artifact and records what became of every tensor.
pub fn write(
    args: &ConvertArgs,
    source: &Checkpoint,
    hashes: &[FileHash],
    task: &mut Task,
    windows: Option<&Windows>,
    imatrix: Option<&Imatrix>,
    printer: Printer,
) -> Result<()> {
    let outcomes = match windows {
        None => {
            clear_leftovers(args, &task.out, None, printer)?;
            let sink = task.artifact.create(&task.out, Opening { force: args.force, key: None })?;
            let bar = printer.bar(task.plan.weights(), task.plan.recipe.format.name, Unit::Count);
            let progress = |weights| bar.inc(weights);
            let outcomes = convert::convert(source, &task.plan, sink.as_ref(), imatrix, hashes, &progress)?;
            task.manifest.source.files = source_hashes(source, hashes)?;
            sink.restate(&task.manifest.gguf_keys())?;
            if sink.path().is_dir() {
                // While the disk still writes; a GGUF file holds no hash of itself.
                task.hashes = manifest::hash_folder(sink.path())?;
            }
            sink.finish()?;
            bar.finish_and_clear();
            outcomes
        }
        Some(windows) => {
            let work = Calibrated { args, source, task, windows, printer };
            measure::on_named_device(&args.source.device, args.protocol.precise, printer.silent(), work)?
        }
    };
    report_deviations(task.plan.recipe.format.name, &task.plan, &outcomes, printer);
    report_rounded(task.plan.recipe.format.name, &task.plan, &outcomes, printer);
    for (step, outcome) in task.plan.steps.iter().zip(outcomes) {
        let record = record(&task.plan, step, outcome);
        printer.detail(detail(task.plan.recipe.format.name, step, outcome));
        task.manifest.tensors.insert(step.id.to_string(), record);
    }
    Ok(())
}

/// Deletes what interrupted runs have left of an output and cannot be gone on with, and tells of the rest. `key` is that
/// of this run.
fn clear_leftovers(args: &ConvertArgs, out: &Path, key: Option<&str>, printer: Printer) -> Result<()> {
    for left in leftovers::of(out)? {
        let shown = left.path.display();
        if left.key.is_none() || args.fresh {
            left.remove()?;
            printer.note(format!("removed {shown}, left by an interrupted run"));
        } else if left.key.as_deref() != key {
            printer.note(format!(
                "note: {shown} is left by an interrupted run with other settings; the same command as then goes on \
                 from it, `--fresh` deletes it"
            ));
        }
    }
    Ok(())
}

/// A calibrated conversion, on the device that was asked for.
struct Calibrated<'a> {
    args: &'a ConvertArgs,
    source: &'a Checkpoint,
    task: &'a mut Task,
    windows: &'a Windows,
    printer: Printer,
}

impl WithBackend for Calibrated<'_> {
    type Output = Vec<Outcome>;

    fn run<B: Machine>(self, backend: &B) -> Result<Vec<Outcome>> {
        let Calibrated { args, source, task, windows, printer } = self;
        let start = windows.start(backend, args, source, &task.plan, printer)?;
        let key = task.key(args, windows, start, backend)?;
        clear_leftovers(args, &task.out, Some(journal::short(&key)), printer)?;
        if let Some(outcomes) = task.finished_before(&key, printer)? {
            return Ok(outcomes);
        }
        printer.note(format!("calibrating on {}", backend.describe()));
        let opening = Opening { force: args.force, key: Some(journal::short(&key)) };
        let sink = task.artifact.create(&task.out, opening)?;
        let journal = Journal::open(&task.out, &key)?;
        if journal.is_worth_keeping() {
            printer.note(format!(
                "going on from an interrupted run: {} of {} layers are finished, {} settings tried; `--fresh` begins anew",
                journal.layers().len(),
                source.config.num_hidden_layers,
                journal.trials().len()
            ));
        }
        let output = Draft { plan: &task.plan, sink: sink.as_ref(), journal: &journal };
        let (outcomes, settings) = calibrated(args, source, (windows, start), backend, output, printer)
            .inspect_err(|_| {
                if journal.is_worth_keeping() {
                    let out = task.out.display();
                    printer
                        .note(format!("what is finished of {out} is kept; the same command goes on from it"));
                }
            })?;
        sink.finish()?;
        task.hashes = output_hashes(&task.out)?;
        let hash = lines(&task.hashes);
        journal.add_output(FinishedOutput {
            hash,
            outcomes: outcomes.clone(),
            settings: settings.clone(),
        })?;
        task.journal = Some(journal);
        task.record_settings(settings);
        Ok(outcomes)
    }
}

/// Chooses settings and writes every tensor. Returns what rounding outcome them, and what the manifest says of the settings.
fn calibrated<B: Machine>(
    args: &ConvertArgs,
    source: &Checkpoint,
    (windows, start): (&Windows, Start),
    backend: &B,
    output: Draft,
    printer: Printer,
) -> Result<(Vec<Outcome>, Value)> {
    let plan = output.plan;
    let room = windows.room(backend, args.memory.into(), source, plan, printer)?;
    let energies = match start.settings.token_power {
        0.0 => Vec::new(),
        _ => windows.energies(backend, source, printer)?,
    };
    let begin = Calibration { energies: &energies, ..windows.calibration(start.settings, room) };
    let choice = windows.choose(backend, args, source, output, begin, printer)?;
    let bar = printer.bar(plan.weights(), plan.recipe.format.name, Unit::Count);
    let calibration = Calibration { settings: choice.settings, ..begin };
    let progress = |weights| bar.inc(weights);
    // For logs, where there is no bar.
    let (started, count) = (Instant::now(), source.config.num_hidden_layers);
    let finished_before = output.journal.layers().len();
    let layer_done = |layer: usize| {
        let own = (layer + 1).saturating_sub(finished_before).max(1) as u32;
        let left = started.elapsed() / own * (count - layer - 1) as u32;
        let (name, done) = (plan.recipe.format.name, layer + 1);
        printer
            .detail(format!("{name}: layer {done} of {count} is finished, about {} s left", left.as_secs()));
    };
    let outcomes =
        convert::convert_calibrated(backend, source, output, calibration, &progress, &layer_done)?.0;
    bar.finish_and_clear();
    let mut settings = choice.record();
    if start.tunes {
        settings["gains"] = tuned(source, windows, backend, output, &outcomes, printer)?;
    }
    Ok((outcomes, settings))
}

/// Tunes the gains of norms, and returns what the manifest says of it.
fn tuned<B: Machine>(
    source: &Checkpoint,
    windows: &Windows,
    backend: &B,
    output: Draft,
    outcomes: &[Outcome],
    printer: Printer,
) -> Result<Value> {
    let name = output.plan.recipe.format.name;
    let bar = printer.bar(STEPS as u64, "gains", Unit::Count);
    let tuned = convert::tune_gains(backend, source, output, outcomes, windows.tokens(), &|| bar.inc(1))?;
    bar.finish_and_clear();
    Ok(match tuned {
        Some(Tuned { kld: [before, after], steps, .. }) => {
            printer.note(format!(
                "{name}: {steps} steps on the gains of norms: KLD {after:.5} on calibration text kept out, {before:.5} before"
            ));
            json!({ "steps": steps, "kld_before": before, "kld": after })
        }
        None => json!("as in the source"),
    })
}

/// Returns the hashes of the source's configuration and weight files, given those of the latter; what is missing is read.
pub fn source_hashes(source: &Checkpoint, weights: &[FileHash]) -> Result<Hashes> {
    let mut hashes = Hashes::new();
    if let Some(folder) = source.folder() {
        let name = "config.json";
        hashes.insert(name.to_string(), manifest::hash_file(&folder.join(name))?);
    }
    for hash in weights {
        hashes.insert(file_name(&hash.path), hash.finish()?);
    }
    Ok(hashes)
}

/// Returns the hashes of a finished output: of the file, or of every file in the folder.
fn output_hashes(out: &Path) -> Result<Hashes> {
    if out.is_dir() {
        return manifest::hash_folder(out);
    }
    Ok(Hashes::from([(file_name(out), manifest::hash_file(out)?)]))
}

/// Returns what `b3sum` prints for files.
fn lines(hashes: &Hashes) -> String {
    hashes.iter().map(|(name, hash)| format!("{hash}  {name}\n")).collect()
}

impl Task {
    /// Returns a hash of everything the output's bytes depend on.
    fn key<B: Machine>(
        &self,
        args: &ConvertArgs,
        windows: &Windows,
        start: Start,
        backend: &B,
    ) -> Result<String> {
        let Task { plan, artifact, manifest, .. } = self;
        journal::key(|hash| {
            let facts = format!("{:?}\n{:?}\n{start:?}\n{}\n", plan.steps, args.effort, backend.arithmetic());
            hash.update(facts.as_bytes());
            hash.update(&serde_json::to_vec(&(&manifest.source, &manifest.recipe, &manifest.calibration))?);
            windows.identify(hash);
            artifact.identify(hash);
            plan.outputs.iter().filter_map(|output| output.fixed.as_ref()).for_each(|bytes| {
                hash.update(bytes);
            });
            Ok(())
        })
    }

    /// Takes over an output that an earlier run finished but could not measure. Returns what rounding outcome its tensors.
    fn finished_before(&mut self, key: &str, printer: Printer) -> Result<Option<Vec<Outcome>>> {
        let Some(FinishedOutput { hash, outcomes, settings }) = journal::finished(&self.out, key)? else {
            return Ok(None);
        };
        if !self.out.exists() {
            return Ok(None);
        }
        self.hashes = output_hashes(&self.out)?;
        if lines(&self.hashes) != hash {
            return Ok(None);
        }
        printer.note(format!("{} is finished already, by an interrupted run", self.out.display()));
        self.journal = Some(Journal::open(&self.out, key)?);
        self.record_settings(settings);
        Ok(Some(outcomes))
    }

    fn record_settings(&mut self, settings: Value) {
        if let Some(calibration) = &mut self.manifest.calibration {
            calibration.settings = settings;
        }
    }
}

/// Says how many matrices calibration could not treat as asked.
fn report_deviations(format: &str, plan: &Plan, outcomes: &[Outcome], printer: Printer) {
    let raised: Vec<f32> = outcomes.iter().filter_map(|outcome| outcome.deviation.raised_damp).collect();
    if let Some(most) = raised.iter().copied().reduce(f32::max) {
        printer.note(format!(
            "note: {format}: damping rose, to {most} at most, for {} matrices whose inputs depend on each other",
            raised.len()
        ));
    }
    let nearest = plan.steps.iter().zip(outcomes).filter(|(_, outcome)| outcome.deviation.kept_nearest);
    let (unseen, worse): (Vec<_>, Vec<_>) = nearest.partition(|(_, outcome)| outcome.tokens == Some(0));
    for (matrices, reason) in
        [(unseen, "no token of the calibration text reached them"), (worse, "calibrated ones were worse")]
    {
        if let Some((first, _)) = matrices.first() {
            printer.note(format!(
                "note: {format}: {} matrices keep their nearest codes, since {reason}: {}{}",
                matrices.len(),
                first.id,
                if matrices.len() > 1 { ", …" } else { "" }
            ));
        }
    }
    let experts = plan.steps.iter().zip(outcomes).filter(|(step, _)| step.id.expert.is_some());
    let tokens = || experts.clone().filter_map(|(_, outcome)| outcome.tokens);
    if let (Some(fewest), Some(most)) = (tokens().min(), tokens().max()) {
        printer.note(format!("note: {format}: experts were calibrated on {fewest} to {most} tokens each"));
    }
}

/// Tells of values that the output's number type does not hold.
fn report_rounded(format: &str, plan: &Plan, outcomes: &[Outcome], printer: Printer) {
    let kept = plan.steps.iter().zip(outcomes).filter(|(step, _)| matches!(step.action, Action::Keep(_)));
    let rounded: Vec<f64> = kept.map(|(_, outcome)| outcome.error).filter(|&error| error > 0.0).collect();
    if let Some(most) = rounded.iter().copied().reduce(f64::max) {
        printer.note(format!(
            "note: {format}: {} of {} tensors hold values that the output's number type rounds, by {:.1e} of their size at \
             most (root mean square of a tensor); `--format f32` keeps all",
            rounded.len(),
            plan.steps.len(),
            most.sqrt()
        ));
    }
}

/// One line about a quantized tensor for `--verbose`.
fn detail(format: &str, step: &Step, outcome: Outcome) -> String {
    let nearest =
        outcome.error_nearest.map_or(String::new(), |e| format!(", nearest codes {:.3} %", 100.0 * e));
    match step.action {
        Action::Keep(_) | Action::Copy(_) => format!("{format}: {}: {}", step.id, step.action.name()),
        Action::Quantize(_) => {
            format!(
                "{format}: {}: {}, error {:.3} %{nearest}",
                step.id,
                step.action.name(),
                100.0 * outcome.error
            )
        }
    }
}

fn record(plan: &Plan, step: &Step, outcome: Outcome) -> TensorRecord {
    match step.action {
        Action::Keep(dtype) => TensorRecord::kept(dtype),
        Action::Quantize(scheme) | Action::Copy(scheme) => TensorRecord::Quantized {
            scheme: Box::new(SchemeRecord::new(&scheme, step.inputs)),
            scale_rule: match scheme.scale {
                _ if step.action == Action::Copy(scheme) => "given".to_string(),
                Codec::E8M0 => plan.recipe.scale_rule.to_string(),
                _ => "search".to_string(),
            },
            outcome,
            fallback_from: (step.fallback.as_ref().and(plan.recipe.format.base.choice()))
                .map(|choice| choice.scheme.name.to_string()),
        },
    }
}
