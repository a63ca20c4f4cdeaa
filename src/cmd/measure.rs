//! Runs an evaluation on the device that was asked for.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde_json::Value;

use super::questions::Questions;
use super::subject::{about, kinds, load, subject, variants};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Precision};
use crate::backend::kv_cache::KvCache;
use crate::backend::machine::Machine;
use crate::calib::corpus;
use crate::checkpoint::Checkpoint;
use crate::cli::{ProtocolArg, ProtocolArgs};
use crate::embedded;
use crate::eval::cache::{self, Cache};
use crate::eval::report::{self, Report, Segment, Timed};
use crate::eval::residency::{self, Residency};
use crate::eval::samples::Samples;
use crate::eval::slices::{self, Slice};
use crate::eval::tokenization::{Parting, parting};
use crate::eval::{self, About, Protocol, Schedule, Scored, Subject, Text};
use crate::manifest;
use crate::memory::{Budget, Limits};
use crate::model::Model;
use crate::model::chat_template::ChatTemplate;
use crate::model::kv_cache::KvMemory;
use crate::model::layers::{Held, Layers, Streamed};
use crate::output::{Printer, Unit};

/// Windows of the embedded text that are evaluated by default.
const DEFAULT_WINDOWS: usize = 60;
/// Multiply-adds a validation may cost: about two minutes on two cores.
const VALIDATION_BUDGET: u64 = 10_000_000_000_000;
/// Fewer windows than this say nothing.
const MIN_WINDOWS: u64 = 4;

/// What to measure, on what text and where.
pub struct Request {
    content: String,
    text: Text,
    slices: Vec<Text>,
    cache: Option<PathBuf>,
    kv_caches: Vec<KvCache>,
    questions: Option<Questions>,
    device: String,
    precise: bool,
    limits: Limits,
}

impl Request {
    /// Reads and tokenizes the text with the tokenizer of `reference`, whose token ids all models share.
    pub fn new(args: &ProtocolArgs, device: &str, reference: &Checkpoint) -> Result<Self> {
        let text = match &args.text {
            None => embedded::EVAL_TEXT.to_string(),
            Some(path) => read_text(path, reference)?,
        };
        let tokenizer = reference.tokenizer()?;
        let bos = tokenizer.bos();
        let (scored, n_ctx) = match args.protocol {
            ProtocolArg::LlamaCpp => (Scored::SecondHalf, 512),
            ProtocolArg::Full => (Scored::All, 2048),
        };
        let n_ctx = args.ctx.map_or(n_ctx, |n| n as usize);
        let all = args.text.is_some().then_some(usize::MAX);
        let windows = args.windows.map(|n| n as usize).or(all).unwrap_or(DEFAULT_WINDOWS);
        let tokens = tokenizer.encode_start(&text, bos.is_some(), windows.saturating_mul(n_ctx))?;
        let protocol = Protocol::new(scored, n_ctx, Some(windows), &text, &tokens, bos)?;
        let content = text;
        let text = Text { name: "text".to_string(), tokens, protocol };
        Ok(Request {
            content,
            text,
            slices: Vec::new(),
            cache: None,
            kv_caches: Vec::new(),
            questions: None,
            device: device.to_string(),
            precise: args.precise,
            limits: Limits::default(),
        })
    }

    /// Bounds the memory that measuring takes.
    pub fn within(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Returns the main text as it was read.
    pub fn content(&self) -> &str {
        &self.content
    }

    /// Returns where each model's own tokenizer parts from that of `reference`, by the model's index, and tells of it; a
    /// tokenizer that cannot be read is reported, too.
    pub fn partings(
        &self,
        reference: &Checkpoint,
        models: &[&Checkpoint],
        printer: Printer,
    ) -> Result<Vec<(usize, Parting)>> {
        let baseline = reference.tokenizer()?;
        let count = self.text.protocol.windows.saturating_mul(self.text.protocol.n_ctx);
        let mut found = Vec::new();
        for (at, model) in models.iter().enumerate().filter(|(_, model)| model.path != reference.path) {
            let shown = model.path.display();
            let own = model.tokenizer().and_then(|own| parting(&baseline, &own, &self.content, count));
            match own {
                Err(error) => {
                    printer.note(format!("note: {shown}: its own tokenizer cannot be compared: {error:#}"))
                }
                Ok(None) => {}
                Ok(Some(parting)) => {
                    printer.failure(format!("warning: {shown}: {}", parting.sentence()));
                    found.push((at, parting));
                }
            }
        }
        Ok(found)
    }

    /// Returns the main text.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// Keeps the baseline's last hidden states in a folder.
    pub fn cache_in(&mut self, folder: &Path) {
        self.cache = Some(folder.to_path_buf());
    }

    /// Measures every model again with each of these caches.
    ///
    /// # Errors
    /// Groups that do not divide a head of `reference`; stored baselines, which have no cache.
    pub fn add_kv_caches(&mut self, kinds: &[KvCache], reference: &Checkpoint) -> Result<()> {
        ensure!(
            kinds.is_empty() || self.cache.is_none(),
            "`--kv-cache` runs the baseline with other caches, which `--chunks-cache` does not store; drop one of them"
        );
        kinds.iter().try_for_each(|kind| kind.check(reference.config.head_dim))?;
        self.kv_caches = kinds.to_vec();
        Ok(())
    }

    /// Lets every model answer questions as well.
    pub fn ask(&mut self, questions: Option<Questions>) {
        self.questions = questions;
    }

    fn texts(&self) -> impl Iterator<Item = &Text> {
        [&self.text].into_iter().chain(&self.slices)
    }

    /// Returns how many windows go through how many layers.
    fn steps<'a>(&self, models: impl Iterator<Item = &'a Checkpoint>) -> u64 {
        let layers: usize = models.map(|model| model.config.num_hidden_layers).sum();
        let windows: usize = self.texts().map(|text| text.protocol.windows).sum();
        (windows * layers * (1 + self.kv_caches.len())) as u64
    }

    /// Adds texts of one kind of content each, tokenized as the main text is.
    pub fn add_slices(&mut self, slices: Vec<Slice>, reference: &Checkpoint) -> Result<()> {
        if slices.is_empty() {
            return Ok(());
        }
        let files = reference.tokenizer_files()?;
        let context = || reference.path.display().to_string();
        let (tokenizer, template) =
            (reference.tokenizer()?, ChatTemplate::new(&files).with_context(context)?);
        let main = &self.text.protocol;
        for slice in slices {
            let text = slice.text(template.as_ref()).with_context(context)?;
            let name = slice.name.clone();
            let tokens = tokenizer.encode(&text, main.bos.is_some())?;
            let n_ctx = main.n_ctx.min(slices::N_CTX);
            let protocol = Protocol::new(main.name, n_ctx, None, &text, &tokens, main.bos)
                .with_context(|| format!("slice `{name}`"))?;
            self.slices.push(Text { name, tokens, protocol });
        }
        Ok(())
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

/// Reads an evaluation text as calibration reads its own: JSON lines are the documents in them.
fn read_text(path: &Path, reference: &Checkpoint) -> Result<String> {
    ensure!(!path.is_dir(), "{}: found a folder, wanted a text file; name a file in it", path.display());
    let render = |messages: &Value| {
        let template = ChatTemplate::new(&reference.tokenizer_files()?)?;
        template
            .context("`messages` need a chat template, and this model has none")?
            .render_messages(messages)
    };
    Ok(corpus::CorpusPart::open(path, Some(&render))?.text)
}

/// Work that runs on whichever device there is.
pub trait WithBackend: Send {
    /// What comes out.
    type Output: Send;

    /// Does it.
    fn run<B: Machine>(self, backend: &B) -> Result<Self::Output>;
}

/// Runs work on the device that was asked for.
pub fn on_device<W: WithBackend>(request: &Request, printer: Printer, work: W) -> Result<W::Output> {
    on_named_device(&request.device, request.precise, printer, work)
}

/// The same for a device by its name: `auto`, `cpu` or `cuda:N`.
pub fn on_named_device<W: WithBackend>(
    device: &str,
    precise: bool,
    printer: Printer,
    work: W,
) -> Result<W::Output> {
    let precision = if precise { Precision::F32 } else { Precision::F16 };
    let ordinal = match device {
        "cpu" => return on_cpu(printer, work),
        "auto" => None,
        other => {
            Some(other.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()).with_context(
                || format!("`--device {other}`: devices are `auto`, `cpu` and `cuda:N`, such as `cuda:0`"),
            )?)
        }
    };
    match (Cuda::new(ordinal.unwrap_or(0), precision), ordinal) {
        (Ok(cuda), _) => announced(&cuda, printer, work),
        (Err(reason), Some(_)) => Err(reason),
        (Err(reason), None) => {
            printer.note(format!("the CPU measures: {reason:#}"));
            on_cpu(printer, work)
        }
    }
}

/// Works on one of the pool's own threads: from outside, each of the thousands of small parallel steps would put the caller
/// to sleep and wake another thread, a tenth of an evaluation's time.
fn on_cpu<W: WithBackend>(printer: Printer, work: W) -> Result<W::Output> {
    rayon::scope(|_| announced(&Cpu, printer, work))
}

fn announced<W: WithBackend>(backend: &impl Machine, printer: Printer, work: W) -> Result<W::Output> {
    printer.note(format!("measuring on {}", backend.describe()));
    work.run(backend)
}

/// Measures the models, against the baseline if there is one; its row comes first.
pub fn run(
    request: &Request,
    baseline: Option<&Checkpoint>,
    models: &[&Checkpoint],
    printer: Printer,
) -> Result<Report> {
    on_device(request, printer, Evaluation { request, baseline, models, printer })
}

struct Evaluation<'a> {
    request: &'a Request,
    baseline: Option<&'a Checkpoint>,
    models: &'a [&'a Checkpoint],
    printer: Printer,
}

impl WithBackend for Evaluation<'_> {
    type Output = Report;

    fn run<B: Machine>(self, backend: &B) -> Result<Report> {
        let Evaluation { request, baseline, models, printer } = self;
        let all: Vec<&Checkpoint> = baseline.into_iter().chain(models.iter().copied()).collect();
        let streamed = request.schedule(backend, &all, printer)?;
        let bar = printer.bar(request.steps(all.iter().copied()), "measuring", Unit::Count);
        let progress = |windows: usize| bar.inc(windows as u64);
        let schedule = streamed.unwrap_or(Schedule::resident(backend));
        let run = Run { backend, request, schedule, streamed: streamed.is_some(), progress: &progress };
        let samples = match (&request.cache, baseline, streamed) {
            (Some(folder), Some(baseline), None) => {
                run.against_states(&Cache::open(folder)?, baseline, models, |model| load(backend, model))?
            }
            (Some(folder), Some(baseline), Some(_)) => {
                run.against_states(&Cache::open(folder)?, baseline, models, stream)?
            }
            (_, _, None) => run.side_by_side(baseline, models, |model| load(backend, model))?,
            (_, _, Some(_)) => run.side_by_side(baseline, models, stream)?,
        };
        bar.finish_and_clear();
        let everyone: Vec<About> = baseline
            .iter()
            .chain(models)
            .flat_map(|checkpoint| kinds(&request.kv_caches).map(|kind| about(checkpoint).with_cache(kind)))
            .collect();
        let (main, slices) = samples.split_first().context("nothing was measured")?;
        let rows = report::rows(&everyone, main, Timed::Yes);
        let mut report = Report::new(request.text.protocol.clone(), rows);
        report.positions = report::positions(&everyone, main, &request.text);
        report.slices = request
            .slices
            .iter()
            .zip(slices)
            .map(|(Text { name, protocol, .. }, samples)| Segment {
                name: name.clone(),
                protocol: protocol.clone(),
                rows: report::rows(&everyone, samples, Timed::No),
            })
            .collect();
        let config = &baseline.unwrap_or(models[0]).config;
        report.kv_caches = request.kv_caches.iter().map(|&kind| KvMemory::new(kind, config)).collect();
        if let Some(questions) = &request.questions {
            questions.ask(backend, baseline, models, &request.kv_caches, printer, &mut report)?;
        }
        Ok(report)
    }
}

/// Samples of every text, and for each of every model, the baseline first.
type Found = Vec<Vec<Samples>>;

/// A backend and how models run on it.
#[derive(Clone, Copy)]
struct Run<'a, B> {
    backend: &'a B,
    request: &'a Request,
    schedule: Schedule,
    /// Whether weights stay in their files.
    streamed: bool,
    progress: &'a dyn Fn(usize),
}

impl<'a, B: Backend> Run<'a, B> {
    /// Opens all models at once and runs them in lock step.
    fn side_by_side<'m, M: Layers<B>>(
        self,
        baseline: Option<&'m Checkpoint>,
        models: &[&'m Checkpoint],
        open: impl Fn(&'m Checkpoint) -> Result<M>,
    ) -> Result<Found> {
        let Run { backend, request, schedule, progress, .. } = self;
        let baseline_model = baseline.map(&open).transpose()?;
        let opened = models.iter().map(|checkpoint| open(checkpoint)).collect::<Result<Vec<_>>>()?;
        let baseline = baseline.zip(baseline_model.as_ref());
        let subjects = baseline
            .iter()
            .flat_map(|&(checkpoint, model)| variants(&request.kv_caches, checkpoint, model))
            .skip(1);
        let others = models.iter().zip(&opened);
        let others = others.flat_map(|(checkpoint, model)| variants(&request.kv_caches, checkpoint, model));
        let subjects: Vec<Subject<M>> = subjects.chain(others).collect();
        let baseline = baseline.map(|(checkpoint, model)| subject(checkpoint, model));
        let run = |text: &Text| {
            eval::run(backend, schedule, baseline.as_ref(), &subjects, text, progress)
                .with_context(|| text.name.clone())
        };
        request.texts().map(run).collect()
    }

    /// Opens one model at a time and runs it against the baseline's stored states; the baseline runs only where they lack.
    fn against_states<'m, M: Layers<B>>(
        self,
        cache: &Cache,
        baseline: &'m Checkpoint,
        models: &[&'m Checkpoint],
        open: impl Fn(&'m Checkpoint) -> Result<M>,
    ) -> Result<Found> {
        let Run { backend, request, schedule, progress, .. } = self;
        let device = backend.describe();
        let hash = content_hash(baseline)?;
        let keys: Vec<String> =
            request.texts().map(|text| Cache::key(&hash, text, &device)).collect::<Result<_>>()?;
        let find = |text, key: &String| cache.find(key, text, baseline.config.hidden_size);
        let mut states =
            request.texts().zip(&keys).map(|(text, key)| find(text, key)).collect::<Result<Vec<_>>>()?;
        if states.iter().any(Option::is_none) {
            let model = open(baseline)?;
            let subject = subject(baseline, &model);
            for ((text, key), states) in request.texts().zip(&keys).zip(&mut states) {
                if states.is_none() {
                    *states = Some(cache.record(key, (backend, schedule), &subject, text, progress)?);
                }
            }
        }
        let load_head = || {
            Model::load_head(backend, &baseline.config, baseline)
                .with_context(|| format!("{}", baseline.path.display()))
        };
        let lent = if self.streamed { None } else { Some(load_head()?) };
        let head = || match &lent {
            Some(head) => Ok(Held::Lent(head)),
            None => load_head().map(Held::Read),
        };
        let mut found: Found = request.texts().map(|_| Vec::new()).collect();
        for &checkpoint in models {
            eval::check_vocabulary(&checkpoint.config, &about(baseline), &baseline.config)
                .with_context(|| about(checkpoint).name)?;
            let model = open(checkpoint)?;
            let subject = subject(checkpoint, &model);
            for ((text, states), found) in request.texts().zip(states.iter().flatten()).zip(&mut found) {
                let samples = cache::run((backend, schedule), (states, &head), &subject, text, progress)
                    .with_context(|| text.name.clone())?;
                if found.is_empty() {
                    found.push(samples.of_baseline());
                }
                found.push(samples);
            }
        }
        Ok(found)
    }
}

impl Request {
    /// Decides whether `models`, the baseline first, lie in memory (`None`) or are streamed, and tells.
    ///
    /// # Errors
    /// If they do not fit even so, or are to generate and cannot be in memory.
    fn schedule<B: Machine>(
        &self,
        backend: &B,
        models: &[&Checkpoint],
        printer: Printer,
    ) -> Result<Option<Schedule>> {
        let budget = Budget::new(self.limits, backend.free_memory()?)?;
        let texts: Vec<&Text> = self.texts().collect();
        let Residency { streamed, summary } =
            residency::decide(backend, budget, models, self.cache.is_none(), &texts)?;
        ensure!(
            streamed.is_none() || self.questions.is_none(),
            "`--suites` and `--tasks` let models generate, which needs them in memory; {summary}; leave them out, or raise \
             what may be used"
        );
        if streamed.is_some() || self.limits != Limits::default() {
            printer.note(&summary);
        } else {
            printer.detail(&summary);
        }
        Ok(streamed)
    }
}

/// Opens a model whose layers are read when they are needed.
fn stream(checkpoint: &Checkpoint) -> Result<Streamed<'_, Checkpoint>> {
    Streamed::new(&checkpoint.config, checkpoint).with_context(|| format!("{}", checkpoint.path.display()))
}

/// Returns a hash of everything that decides what a model computes.
fn content_hash(checkpoint: &Checkpoint) -> Result<String> {
    let files: Vec<&Path> = checkpoint.weight_files().collect();
    let mut hashes = files.par_iter().map(|file| manifest::hash_file(file)).collect::<Result<Vec<_>>>()?;
    hashes.extend(checkpoint.config_json().map(str::to_string));
    Ok(hashes.join("\n"))
}
