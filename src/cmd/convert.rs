//! `quant convert`: load → plan → quantize → write → load the artifact back → measure → report.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::calibration::{self, Windows};
use super::measure::{self, Request};
use super::write::{Task, source_hashes, write};
use super::{ModelRef, Status, plan_report, show};
use crate::artifact::{self, Artifact};
use crate::backend::cpu::Cpu;
use crate::backend::kv_cache::KvCache;
use crate::calib::imatrix::Imatrix;
use crate::calib::kv_cache::fp8_scales;
use crate::checkpoint::Checkpoint;
use crate::cli::ConvertArgs;
use crate::container::apart::ensure_apart;
use crate::container::gguf::is_gguf;
use crate::container::output::{check_file, check_folder};
use crate::container::safetensors::is_safetensors;
use crate::container::{FileHash, leftovers};
use crate::convert::journal::Journal;
use crate::eval::{Metric, ModelRow, Report};
use crate::manifest::{self, Evaluation, Hashes, Manifest, Source};
use crate::output::{self, Printer, Unit};
use crate::plan::{Action, Plan, Step};
use crate::recipe::{Method, Recipe};
use crate::scheme::Span;

/// Runs the whole pipeline for every format.
pub fn run(args: &ConvertArgs, printer: Printer) -> Result<Status> {
    output::check_reports(args.json.as_deref())?;
    let model = ModelRef::resolve(args.model.as_deref(), args.source.revision.as_deref(), printer)?;
    let source = model.open(printer)?;
    let method = calibration::method(args, &source, printer)?;
    let windows = match method {
        Method::Rtn => None,
        Method::Gptq => Some(Windows::new(&args.calibration, &source, printer)?),
    };
    let imatrix = args.imatrix.as_deref().map(Imatrix::open).transpose()?;
    let kv_scales = kv_scales(args, &source, windows.as_ref(), printer)?;
    let hashes = source.weight_files().map(FileHash::open).collect::<Result<Vec<_>>>()?;
    let mut record =
        Source { name: model.name.clone(), revision: model.revision.clone(), files: Hashes::new() };
    if windows.is_some() && !args.dry_run {
        // What an interrupted run has left is found by them. Nearest codes are chosen while the source is hashed.
        record.files = source_hashes(&source, &hashes)?;
    }
    let mut tasks = tasks(args, &model, &source, record, windows.as_ref(), kv_scales.as_deref())?;
    check_outputs(args, &source, &tasks)?;
    report_losses(&tasks, printer);
    if args.dry_run {
        return dry_run(args, &source, &tasks, windows.as_ref(), printer);
    }
    let request = (!args.no_validate)
        .then(|| Request::new(&args.protocol, &args.source.device, &source))
        .transpose()?
        .map(|request| request.within_budget(source.total_weights()).within(args.memory.into()));
    if let (Some(windows), Some(request)) = (&windows, &request) {
        windows.warn_of_overlap(request.content(), printer);
    }
    for task in &mut tasks {
        if let Some(imatrix) = &imatrix {
            calibration::report_missing(imatrix, &task.plan, printer)?;
        }
        let windows = windows.as_ref().filter(|_| task.plan.recipe.method == Method::Gptq);
        write(args, &source, &hashes, task, windows, imatrix.as_ref(), printer)?;
    }
    let artifacts = tasks.iter().map(|task| Checkpoint::open(&task.out)).collect::<Result<Vec<_>>>()?;
    let measured = request
        .map(|request| {
            let artifacts: Vec<_> = artifacts.iter().collect();
            request.partings(&source, &artifacts, printer)?;
            measure::run(&request, Some(&source), &artifacts, printer)
        })
        .transpose()?;
    for (i, task) in tasks.iter_mut().enumerate() {
        // The first row is the source's own.
        finish_manifest(args, task, &source, measured.as_ref().map(|report| (report, &report.rows[i + 1])))?;
        task.journal.take().map_or(Ok(()), Journal::finish)?;
    }
    report(args, &tasks, measured.as_ref(), printer)?;
    Ok(Status::Ok)
}

/// Decides everything that headers can decide, for every format, before anything is written.
fn tasks(
    args: &ConvertArgs,
    model: &ModelRef,
    source: &Checkpoint,
    record: Source,
    windows: Option<&Windows>,
    kv_scales: Option<&[[f32; 2]]>,
) -> Result<Vec<Task>> {
    let file_named = args.out.as_deref().is_some_and(is_gguf);
    ensure!(
        !(file_named && args.format.len() > 1),
        "`--out` names one file, but {} formats were asked for; name a folder",
        args.format.len()
    );
    ensure!(args.shard_size > 0.0, "`--shard-size {}`: wanted a positive number of GB", args.shard_size);
    let shard_bytes = (args.shard_size * 1e9) as u64;
    let method = if windows.is_some() { Method::Gptq } else { Method::Rtn };
    let mut tasks = Vec::new();
    for format in &args.format {
        let mut recipe = recipe(args, format, method)?;
        // There is nothing to choose for plain floats.
        let windows = windows.filter(|_| recipe.format.base.choice().is_some());
        recipe.method = if windows.is_some() { Method::Gptq } else { Method::Rtn };
        let out = out_path(args, model, &recipe)?;
        let mut plan = Plan::new(source, &recipe)?;
        // Copied codes cannot follow the smoothing and gains that calibration gives their neighbours.
        let windows = windows.filter(|_| !plan.copies());
        if windows.is_none() {
            plan.recipe.method = Method::Rtn;
        }
        let mut json = recipe_json(args, &plan.recipe)?;
        let stored = source.kv_scales();
        let stored = (!stored.is_empty() && recipe.dialect.kv_scales(0).is_some()).then_some(stored);
        if let Some(scales) = kv_scales.or(stored) {
            plan.add_kv_scales(scales)?;
            json["kv_cache"] = "fp8".into();
        }
        let mut manifest = Manifest::new(json, record.clone());
        manifest.calibration = windows.map(Windows::record);
        let artifact = Artifact::new(&plan, source, &model.short_name(), &manifest.gguf_keys(), shard_bytes)?;
        tasks.push(Task { plan, artifact, manifest, out, hashes: Hashes::new(), journal: None });
    }
    Ok(tasks)
}

/// Refuses outputs that could not be written, would write over each other, or would destroy what is read.
fn check_outputs(args: &ConvertArgs, source: &Checkpoint, tasks: &[Task]) -> Result<()> {
    let texts = args.protocol.text.iter().chain(&args.imatrix).cloned();
    let calibration = args.calibration.calib.iter().map(PathBuf::from).filter(|path| path.exists());
    let read: Vec<PathBuf> = source.read_files()?.into_iter().chain(texts).chain(calibration).collect();
    for (i, task) in tasks.iter().enumerate() {
        let out = &task.out;
        if let Some(other) = tasks[..i].iter().position(|other| other.out == *out) {
            bail!(
                "`--format {},{}` writes {} twice; name it once",
                args.format[other],
                args.format[i],
                out.display()
            );
        }
        ensure_apart(out, read.iter().map(PathBuf::as_path))?;
        // What an interrupted run has finished may stand there.
        if args.dry_run || leftovers::of(out)?.iter().any(|left| left.key.is_some()) {
            continue;
        }
        match is_gguf(out) {
            true => check_file(out, args.force)?,
            false => check_folder(out, args.force)?,
        }
    }
    Ok(())
}

fn recipe(args: &ConvertArgs, format: &str, method: Method) -> Result<Recipe> {
    Ok(Recipe {
        method,
        scale_rule: args.scale_rule.into(),
        pure: args.pure,
        no_fallback: args.no_fallback,
        allow_requantize: args.allow_requantize,
        ..Recipe::new(format, args.dialect.as_deref(), args.group_size)?
    })
}

/// Returns the scales of an FP8 cache, if one was asked for; those of a plan that is only shown are all 1.
fn kv_scales(
    args: &ConvertArgs,
    source: &Checkpoint,
    windows: Option<&Windows>,
    printer: Printer,
) -> Result<Option<Vec<[f32; 2]>>> {
    let Some(kind) = args.kv_cache else { return Ok(None) };
    ensure!(
        kind == KvCache::Fp8,
        "`--kv-cache {kind}`: a checkpoint holds scales for fp8 only; engines round to other caches by themselves"
    );
    for format in &args.format {
        let dialect = recipe(args, format, Method::Rtn)?.dialect;
        ensure!(
            dialect.kv_scales(0).is_some(),
            "`--kv-cache fp8`: `{format}` is written as {}, which has no place for scales; use a compressed-tensors format",
            dialect.name()
        );
    }
    if args.dry_run {
        return Ok(Some(vec![[1.0; 2]; source.config.num_hidden_layers]));
    }
    printer.note("calibrating the scales of keys and values");
    let own = if windows.is_none() { Some(Windows::new(&args.calibration, source, printer)?) } else { None };
    let Some(windows) = windows.or(own.as_ref()) else { return Ok(None) };
    let bar = printer.bar(source.config.num_hidden_layers as u64, "kv cache", Unit::Count);
    let scales = fp8_scales(&Cpu, &source.config, source, windows.tokens(), &|| bar.inc(1))?;
    bar.finish_and_clear();
    Ok(Some(scales))
}

/// Returns where a format goes: `--out` itself, or `MODEL-FORMAT` in it when several formats or GGUF files go into one
/// folder.
fn out_path(args: &ConvertArgs, model: &ModelRef, recipe: &Recipe) -> Result<PathBuf> {
    let end = recipe.dialect.extension().map_or(String::new(), |end| format!(".{end}"));
    let (name, file) = (format!("{}-{}{end}", model.short_name(), recipe.format.name), !end.is_empty());
    match args.out.as_deref() {
        None => Ok(PathBuf::from(name)),
        Some(out) if is_gguf(out) => {
            ensure!(
                file,
                "`--out {}` names a GGUF file, but `{}` is written for {}; name a folder, or pass `--dialect gguf`",
                out.display(),
                recipe.format.name,
                recipe.dialect.name()
            );
            Ok(out.to_path_buf())
        }
        Some(out) if is_safetensors(out) && !out.is_dir() => bail!(
            "`--out {}` names a safetensors file, but a folder is written; name the folder",
            out.display()
        ),
        Some(out) if args.format.len() > 1 || file => Ok(out.join(name)),
        Some(out) => Ok(out.to_path_buf()),
    }
}

fn report_losses(tasks: &[Task], printer: Printer) {
    for task in tasks {
        let format = task.plan.recipe.format.name;
        for loss in &task.plan.losses {
            printer.note(format!("note: {format}: {loss}"));
        }
        let copied = |step: &&Step| matches!(step.action, Action::Copy(_));
        match task.plan.steps.iter().filter(copied).count() {
            0 => {}
            count => printer.note(format!(
                "note: {format}: codes and scales of {count} tensors are copied as they are stored; any others are rounded to nearest"
            )),
        }
        for (step, reason) in task.plan.fallbacks() {
            printer.detail(format!("{format}: {}: {reason}", step.id));
        }
        if let Some((_, reason)) = task.plan.fallbacks().next() {
            let count = task.plan.fallbacks().count();
            printer.note(format!("note: {format}: {count} tensors do not get what was asked for: {reason}"));
        }
    }
}

fn dry_run(
    args: &ConvertArgs,
    source: &Checkpoint,
    tasks: &[Task],
    windows: Option<&Windows>,
    printer: Printer,
) -> Result<Status> {
    let mut plans = Vec::new();
    for task in tasks {
        let (out, bytes) = (task.out.display().to_string(), task.artifact.bytes()?);
        plans.push(plan_report::json(&task.plan, &out, bytes));
        if args.json.as_deref() != Some(Path::new("-")) {
            printer.result(&plan_report::text(&task.plan, &out, bytes))?;
            if let Some(windows) = windows {
                printer.result(&format!("on a CPU, {}\n", windows.memory(source, &task.plan)?))?;
            }
        }
    }
    if let Some(file) = &args.json {
        output::write_report(file, &format!("{:#}\n", json!({ "plans": plans })), printer)?;
    }
    Ok(Status::Ok)
}

fn evaluation(args: &ConvertArgs, report: &Report, row: &ModelRow) -> Evaluation {
    let protocol = &report.protocol;
    let metrics =
        [Metric::Ppl, Metric::DeltaPpl, Metric::Kld, Metric::Top1].map(|m| (m.describe().name, row.value(m)));
    Evaluation {
        protocol: protocol.name.to_string(),
        n_ctx: protocol.n_ctx,
        windows: protocol.windows,
        text: args.protocol.text.as_deref().map_or("embedded".to_string(), artifact::file_name),
        text_sha256: protocol.text_sha256.clone(),
        metrics: metrics.into_iter().filter_map(|(name, v)| Some((name.to_string(), v?))).collect(),
    }
}

fn recipe_json(args: &ConvertArgs, recipe: &Recipe) -> Result<Value> {
    let mut json = json!({
        "format": recipe.format.name,
        "dialect": recipe.dialect.name(),
        "method": recipe.method.to_string(),
        "scale_rule": recipe.scale_rule.to_string(),
    });
    let group = recipe.format.base.choice().map_or(Span::Row, |choice| choice.scheme.group);
    if let (Some(object), Span::Cols(size), Some(_)) = (json.as_object_mut(), group, recipe.format.grouped) {
        object.insert("group_size".into(), size.into());
    }
    if let (Some(object), true) = (json.as_object_mut(), recipe.pure) {
        object.insert("pure".into(), true.into());
    }
    if let (Some(object), Some(path)) = (json.as_object_mut(), &args.imatrix) {
        let name = artifact::file_name(path);
        let folder = path.parent().unwrap_or(Path::new("."));
        let hash = manifest::hash_files(folder, std::slice::from_ref(&name))?.remove(&name);
        object.insert("imatrix".into(), json!({ "name": name, "hash": hash }));
    }
    Ok(json)
}

/// Adds hashes and the measurement, and writes `quant.json` into a folder. A GGUF file carries its provenance inside.
fn finish_manifest(
    args: &ConvertArgs,
    task: &mut Task,
    source: &Checkpoint,
    measured: Option<(&Report, &ModelRow)>,
) -> Result<()> {
    if !task.out.is_dir() {
        return Ok(());
    }
    let copied: BTreeSet<String> = source.side_files()?.into_iter().collect();
    let mut hashes = std::mem::take(&mut task.hashes);
    task.manifest.side_files = hashes.extract_if(.., |name, _| copied.contains(name)).collect();
    task.manifest.outputs = hashes;
    task.manifest.evaluation = measured.map(|(report, row)| evaluation(args, report, row));
    task.manifest.write(&task.out)
}

/// Prints the summary and writes the JSON report.
fn report(args: &ConvertArgs, tasks: &[Task], measured: Option<&Report>, printer: Printer) -> Result<()> {
    if let Some(file) = &args.json {
        let artifacts: Vec<_> = tasks
            .iter()
            .map(|task| Ok(json!({ "out": task.out, "manifest": serde_json::to_value(&task.manifest)? })))
            .collect::<Result<_>>()?;
        let measured = measured.map(serde_json::to_value).transpose()?;
        let text = format!("{:#}\n", json!({ "artifacts": artifacts, "evaluation": measured }));
        output::write_report(file, &text, printer)?;
    }
    if args.json.as_deref() == Some(Path::new("-")) {
        return Ok(());
    }
    for task in tasks {
        printer.result(&format!("wrote {}", task.out.display()))?;
    }
    match measured {
        Some(measured) => printer.result(&show::rows(measured)),
        None => Ok(()),
    }
}
