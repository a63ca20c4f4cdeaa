//! One file per subcommand; each `run` reads as a table of contents.

mod bench;
mod calibrate;
mod calibration;
mod completions;
mod convert;
mod eval;
mod formats;
mod inspect;
mod measure;
mod plan_report;
mod questions;
mod sensitivity;
mod show;
mod subject;
mod write;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::artifact;
use crate::checkpoint::Checkpoint;
use crate::cli::{Cli, Command};
use crate::container::gguf::is_gguf;
use crate::container::safetensors::is_safetensors;
use crate::embedded;
use crate::hub;
use crate::memory;
use crate::output::{self, Printer};

/// How a command that ran to its end came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Everything was done.
    Ok,
    /// A quality gate failed.
    GateFailed,
}

/// Runs what was typed.
pub fn run(cli: Cli) -> Result<Status> {
    let printer = Printer::new(cli.global.quiet, cli.global.verbose);
    if let Some(threads) = cli.global.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global()
            .context("cannot start the worker threads")?;
    }
    let outcome = match cli.command {
        Command::Convert(args) => convert::run(&args, printer),
        Command::Eval(args) => eval::run(&args, printer),
        Command::Sensitivity(args) => sensitivity::run(&args, printer),
        Command::Calibrate(args) => calibrate::run(&args, printer),
        Command::Bench(args) => bench::run(&args, printer),
        Command::Inspect(args) => inspect::run(&args, printer),
        Command::Formats(args) => formats::run(&args, printer),
        Command::Completions(args) => completions::run(&args, printer),
    }?;
    if let Some(bytes) = memory::peak_bytes() {
        printer.detail(format!("peak memory {}", output::size(bytes)));
    }
    Ok(outcome)
}

/// A model as typed: a path, a hub id, or nothing for the embedded one.
struct ModelRef {
    /// Where its files are.
    path: PathBuf,
    /// Hub id, or the path's last component.
    name: String,
    /// Hub commit.
    revision: Option<String>,
}

impl ModelRef {
    /// Finds a model, downloading it if it is a hub id.
    fn resolve(model: Option<&str>, revision: Option<&str>, printer: Printer) -> Result<Self> {
        let Some(model) = model else {
            return Ok(ModelRef {
                path: embedded::model_folder()?,
                name: embedded::MODEL_NAME.to_string(),
                revision: None,
            });
        };
        let hub::Found { path, commit } = hub::resolve(model, revision, printer)?;
        let name = match commit {
            Some(_) => model.to_string(),
            None => artifact::file_name(&path.canonicalize().unwrap_or_else(|_| path.clone())),
        };
        Ok(ModelRef { path, name, revision: commit })
    }

    /// Opens it, and tells where its files disagree.
    fn open(&self, printer: Printer) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(&self.path)?;
        checkpoint
            .notes
            .iter()
            .for_each(|note| printer.note(format!("note: {}: {note}", self.path.display())));
        Ok(checkpoint)
    }

    /// Returns the name without its owner and file ending: what outputs are called after.
    fn short_name(&self) -> String {
        let name = self.name.rsplit('/').next().unwrap_or(&self.name);
        let path = Path::new(name);
        let name = if is_gguf(path) || is_safetensors(path) { path.file_stem() } else { path.file_name() };
        name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }
}
