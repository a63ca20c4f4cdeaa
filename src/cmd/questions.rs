//! What models are asked beside reading a text: prompt suites and benchmarks.

use anyhow::{Context, Result};

use super::subject::{load, subject, variants};
use crate::backend::kv_cache::KvCache;
use crate::checkpoint::Checkpoint;
use crate::cli::QuestionArgs;
use crate::eval::Report;
use crate::eval::suite::ask::Asker;
use crate::eval::suite::python::Sandbox;
use crate::eval::suite::run::Settings;
use crate::eval::suite::{self, Suite};
use crate::eval::task::{self, Task};
use crate::generate::Generate;
use crate::output::{Printer, Unit};

/// Questions in the words of the model that all others are compared with.
pub struct Questions {
    asker: Asker,
    settings: Settings,
    suites: Vec<suite::run::Prepared>,
    tasks: Vec<task::run::Prepared>,
}

impl Questions {
    /// Reads and tokenizes what was asked for; `None` if nothing was. All of `models` must have room for it.
    ///
    /// # Errors
    /// Unknown suites and tasks, damaged files, prompts that exceed a context.
    pub fn new(args: &QuestionArgs, reference: &Checkpoint, models: &[&Checkpoint]) -> Result<Option<Self>> {
        if args.suites.is_empty() && args.tasks.is_empty() {
            return Ok(None);
        }
        let asker = Asker::new(reference)?;
        let sandbox = if args.allow_exec { Some(Sandbox::find()?) } else { None };
        let settings = Settings { max_new_tokens: args.max_new_tokens as usize, sandbox };
        let contexts = models.iter().chain([&reference]).map(|model| model.config.max_position_embeddings);
        let context = contexts.min().unwrap_or(0);
        let suites = Suite::select(&args.suites)?
            .into_iter()
            .map(|suite| suite::run::Prepared::new(suite, &asker, context, &settings));
        let suites = suites.collect::<Result<_>>()?;
        let tasks = args.tasks.iter().map(|spec| {
            let task = Task::open(spec, args.shots as usize)?;
            task::run::Prepared::new(task, &asker, context, settings.max_new_tokens).context(spec.clone())
        });
        let tasks = tasks.collect::<Result<_>>()?;
        Ok(Some(Questions { asker, settings, suites, tasks }))
    }

    /// Lets every model answer everything and puts the results into the report.
    pub fn ask<B: Generate>(
        &self,
        backend: &B,
        baseline: Option<&Checkpoint>,
        models: &[&Checkpoint],
        kv_caches: &[KvCache],
        printer: Printer,
        report: &mut Report,
    ) -> Result<()> {
        let baseline_model = baseline.map(|checkpoint| load(backend, checkpoint)).transpose()?;
        let loaded = models.iter().map(|checkpoint| load(backend, checkpoint)).collect::<Result<Vec<_>>>()?;
        let baseline = baseline.zip(baseline_model.as_ref());
        let others = models.iter().zip(&loaded).flat_map(|(about, model)| variants(kv_caches, about, model));
        let cached = baseline.iter().flat_map(|&(about, model)| variants(kv_caches, about, model).skip(1));
        let models: Vec<_> = cached.chain(others).collect();
        let baseline = baseline.map(|(about, model)| subject(about, model));
        let everyone = models.len() + usize::from(baseline.is_some());
        let prompts: usize = self.suites.iter().map(suite::run::Prepared::prompts).sum();
        let questions: usize = self.tasks.iter().map(task::run::Prepared::questions).sum();
        let bar = printer.bar((everyone * (prompts + questions)) as u64, "asking", Unit::Count);
        for suite in &self.suites {
            let progress = || bar.inc(1);
            let result =
                suite.run(backend, baseline.as_ref(), &models, &self.asker, &self.settings, &progress);
            report.suites.extend(result.scores());
            report.answers.extend(result.answers());
            report.asked.push(result.about);
        }
        for task in &self.tasks {
            let progress = |questions: usize| bar.inc(questions as u64);
            let result = task.run(backend, baseline.as_ref(), &models, &self.asker, &progress);
            report.suites.extend(result.scores());
            report.tasks.push(result);
        }
        bar.finish_and_clear();
        Ok(())
    }
}
