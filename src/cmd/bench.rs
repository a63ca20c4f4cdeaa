//! `quant bench`: how fast a model runs, beside what the machine can do at best.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::measure::{self, WithBackend};
use super::{ModelRef, Status};
use crate::backend::kv_cache::KvCache;
use crate::backend::machine::{Ceilings, Machine};
use crate::backend::{Backend, Batch};
use crate::checkpoint::Checkpoint;
use crate::cli::BenchArgs;
use crate::generate::{Draw, Generate};
use crate::model::Model;
use crate::model::config::Config;
use crate::names::{Role, TensorId};
use crate::output::{self, Printer};

/// Timed runs; the median counts.
const REPEATS: usize = 5;

/// Prints prompt and generation rates, time to the first token and memory, with shares of the machine's own rates.
pub fn run(args: &BenchArgs, printer: Printer) -> Result<Status> {
    output::check_reports(args.json.as_deref())?;
    let model = ModelRef::resolve(args.model.as_deref(), args.source.revision.as_deref(), printer)?;
    let checkpoint = model.open(printer)?;
    let needed = args.prompt as usize + args.tokens as usize + WARM_UP;
    ensure!(
        needed <= checkpoint.config.max_position_embeddings,
        "prompts of {} tokens and {} new ones exceed the model's context of {}; use a smaller `--prompt` or `--tokens`",
        args.prompt,
        args.tokens,
        checkpoint.config.max_position_embeddings
    );
    let bench = Bench { args, checkpoint: &checkpoint };
    let Found { device, rows } = measure::on_named_device(&args.source.device, false, printer, bench)?;
    if let Some(file) = &args.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        let report = json!({
            "model": model.name, "format": checkpoint.format_name(), "device": device, "rows": rows,
        });
        output::write_report(file, &format!("{report:#}\n"), printer)?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        let mut table = output::table(["what", "rate", "unit", "of the machine's best"]);
        output::right_align(&mut table, 1);
        rows.iter().for_each(|row| _ = table.add_row(row.cells()));
        printer.result(&format!("{}, {}, {device}\n{table}\n", model.name, checkpoint.format_name()))?;
    }
    Ok(Status::Ok)
}

/// Steps before the clock starts: the first compiles and records what it needs.
const WARM_UP: usize = 3;

struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    /// Share of the copy bandwidth or the matrix rate, whichever bounds it.
    share: Option<f64>,
}

impl Row {
    fn cells(&self) -> [String; 4] {
        let digits = if self.value < 100.0 { 2 } else { 0 };
        [
            self.what.clone(),
            format!("{:.digits$}", self.value),
            self.unit.to_string(),
            self.share.map_or_else(|| "–".to_string(), |share| format!("{:.1} %", 100.0 * share)),
        ]
    }

    fn json(&self) -> serde_json::Value {
        json!({ "what": self.what, "value": self.value, "unit": self.unit, "share": self.share })
    }
}

struct Found {
    device: String,
    rows: Vec<Row>,
}

struct Bench<'a> {
    args: &'a BenchArgs,
    checkpoint: &'a Checkpoint,
}

impl WithBackend for Bench<'_> {
    type Output = Found;

    fn run<B: Machine>(self, backend: &B) -> Result<Found> {
        let Bench { args, checkpoint } = self;
        let ceilings = backend.ceilings()?;
        let free = backend.free_memory()?;
        let started = Instant::now();
        let model = Model::load(backend, &checkpoint.config, checkpoint)
            .with_context(|| checkpoint.path.display().to_string())?;
        backend.wait()?;
        let row = |what: String, value, unit, share| Row { what, value, unit, share };
        let mut rows = vec![row("load".into(), started.elapsed().as_secs_f64(), "s", None)];
        if let Some(Ceilings { copy, products }) = ceilings {
            rows.push(row("copy, read + write".into(), copy / 1e9, "GB/s", None));
            rows.push(row("matrix product, 8192³".into(), products / 1e12, "TFLOP/s", None));
        }
        if let (Some(before), Some(after)) = (free, backend.free_memory()?) {
            rows.push(row(
                "memory of the weights".into(),
                before.saturating_sub(after) as f64 / 1e9,
                "GB",
                None,
            ));
        }
        rows.extend(prompts(backend, &model, ceilings)?);
        let step_bytes = bytes_of_step(checkpoint);
        for &sequences in &args.batch {
            let (first, rate) = generation(backend, &model, sequences as usize, args)?;
            if sequences == 1 {
                let what = format!("first token after {} tokens", args.prompt);
                rows.push(row(what, 1e3 * first, "ms", None));
            }
            // A step reads every weight once; keys and values come on top, so this is a lower bound.
            let share = ceilings.map(|it| rate / f64::from(sequences) * step_bytes as f64 / it.copy);
            rows.push(row(format!("generation, {sequences} at once"), rate, "tok/s", share));
        }
        if let (Some(before), Some(after)) = (free, backend.free_memory()?) {
            rows.push(row("memory in all".into(), before.saturating_sub(after) as f64 / 1e9, "GB", None));
        }
        Ok(Found { device: backend.describe(), rows })
    }
}

/// Ids from all over the vocabulary.
fn ids(config: &Config, count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 % config.vocab_size) as u32).collect()
}

/// Returns the median seconds of some work, after one run that is not counted.
fn seconds<B: Backend>(backend: &B, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut times = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS {
        backend.wait()?;
        let start = Instant::now();
        work()?;
        backend.wait()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

/// Returns the rates of forward passes with every position scored, one window and as many as the device wants.
fn prompts<B: Backend>(backend: &B, model: &Model<B>, ceilings: Option<Ceilings>) -> Result<Vec<Row>> {
    let config = &model.config;
    let many = backend.tokens_at_once();
    let tokens = config.max_position_embeddings.min(if many > 1 { 2048 } else { 512 });
    let mut rows = Vec::new();
    let mut sizes = vec![1, many / tokens];
    sizes.retain(|&sequences| sequences > 0);
    sizes.dedup();
    for sequences in sizes {
        let batch = Batch { sequences, tokens };
        let ids = ids(config, sequences * tokens);
        let pass = || backend.score(&model.hidden(backend, &ids, batch)?, model.head(), &ids).map(|_| ());
        let rate = ids.len() as f64 / seconds(backend, pass)?;
        // Two operations a weight and token; attention comes on top, so this is a lower bound.
        let share = ceilings.map(|it| rate * 2.0 * multiplied(config) as f64 / it.products);
        let what = format!("prompts, {sequences} x {tokens} tokens, every position scored");
        rows.push(Row { what, value: rate, unit: "tok/s", share });
    }
    Ok(rows)
}

/// Returns seconds to the first token of one prompt, and tokens a second of all sequences together after that.
fn generation<B: Generate>(
    backend: &B,
    model: &Model<B>,
    sequences: usize,
    args: &BenchArgs,
) -> Result<(f64, f64)> {
    let (prompt, count) = (args.prompt as usize, args.tokens as usize);
    let prompts = ids(&model.config, sequences * prompt);
    let mut decoder = backend.decoder(model, KvCache::Exact, sequences, prompt + count + WARM_UP)?;
    for (sequence, prompt) in prompts.chunks(prompt).enumerate() {
        decoder.prefill(sequence, prompt, Draw::GREEDY)?;
    }
    let first = seconds(backend, || {
        decoder.prefill(0, &prompts[..prompt], Draw::GREEDY)?;
        decoder.next_tokens().map(|_| ())
    })?;
    let mut steps = |count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            let next: Vec<_> = decoder.next_tokens()?.into_iter().map(Some).collect();
            decoder.step(&next)?;
        }
        decoder.next_tokens()?;
        Ok(start.elapsed().as_secs_f64())
    };
    steps(WARM_UP)?;
    Ok((first, (sequences * count) as f64 / steps(count)?))
}

/// Returns the weights that every token is multiplied with: linears and head.
fn multiplied(config: &Config) -> usize {
    config.linears().map(|linear| linear.weights()).sum::<usize>() + config.vocab_size * config.hidden_size
}

/// Returns the stored bytes that a step reads: everything but a table of embeddings that is not the head.
fn bytes_of_step(checkpoint: &Checkpoint) -> u64 {
    let table = checkpoint.tensors.get(&TensorId::global(Role::Embed)).map_or(0, |info| info.bytes);
    checkpoint.total_bytes() - if checkpoint.config.tie_word_embeddings { 0 } else { table }
}
