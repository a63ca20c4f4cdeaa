//! Every model answers a suite; answers are judged and compared with the baseline's.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Suite;
use super::ask::Asker;
use super::python::Sandbox;
use super::result::{Asked, Item, SuiteResult, SuiteRow};
use crate::backend::{Batch, Divergence};
use crate::eval::Subject;
use crate::generate::{self, Generate, Generated, Request, Sampling, Stop};
use crate::model::Model;

/// How suites are run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Most tokens of an answer; prompts may ask for fewer.
    pub max_new_tokens: usize,
    /// Where code runs; `None` leaves code unjudged.
    pub sandbox: Option<Sandbox>,
}

/// A suite's prompts as one model family reads them.
pub struct Prepared {
    suite: Suite,
    requests: Vec<Request>,
    chat_template: bool,
}

impl Prepared {
    /// Tokenizes a suite.
    ///
    /// # Errors
    /// Conversations that the template refuses, and prompts that leave no room for their answer in a context of `context`
    /// tokens; each names suite and prompt.
    pub fn new(suite: Suite, asker: &Asker, context: usize, settings: &Settings) -> Result<Self> {
        let mut requests = Vec::with_capacity(suite.prompts.len());
        for prompt in &suite.prompts {
            let place = || format!("suite `{}`, prompt `{}`", suite.name, prompt.id);
            let ids = asker.ids(&prompt.chat).with_context(place)?;
            let limit = prompt.max_new_tokens.unwrap_or(usize::MAX).min(settings.max_new_tokens);
            ensure!(
                ids.len() + limit <= context,
                "{}: its {} tokens and an answer of {limit} exceed the context of {context}; lower `--max-new-tokens` \
                 or leave the suite out",
                place(),
                ids.len()
            );
            requests.push(Request { ids, max_new_tokens: limit });
        }
        Ok(Prepared { suite, requests, chat_template: asker.has_template() })
    }

    /// Returns the number of prompts.
    pub fn prompts(&self) -> usize {
        self.requests.len()
    }

    /// Lets the baseline, if there is one, and every model answer. `progress` is called after every answer.
    ///
    /// An error of one model ends the suite; what was finished before is in the result.
    pub fn run<B: Generate>(
        &self,
        backend: &B,
        baseline: Option<&Subject<Model<B>>>,
        models: &[Subject<Model<B>>],
        asker: &Asker,
        settings: &Settings,
        progress: &dyn Fn(),
    ) -> SuiteResult {
        let about = Asked {
            suite: self.suite.name.clone(),
            sha256: self.suite.sha256.clone(),
            prompts: self.prompts(),
            chat_template: self.chat_template,
            max_new_tokens: settings.max_new_tokens,
            error: None,
        };
        let mut result = SuiteResult { about, compared: baseline.is_some(), rows: Vec::new() };
        let mut answer_all = || -> Result<()> {
            for subject in baseline.into_iter().chain(models) {
                let row = self
                    .answer(backend, subject, asker, settings, progress)
                    .with_context(|| subject.name.clone())?;
                result.rows.push(row);
            }
            if let (Some(baseline), Some((first, rows))) = (baseline, result.rows.split_first_mut()) {
                let divergences = self.divergences(backend, baseline, models, first)?;
                for (row, kld) in rows.iter_mut().zip(&divergences) {
                    row.compare(first, kld);
                }
            }
            Ok(())
        };
        if let Err(error) = answer_all() {
            result.about.error = Some(format!("{error:#}"));
        }
        result
    }

    fn answer<B: Generate>(
        &self,
        backend: &B,
        subject: &Subject<Model<B>>,
        asker: &Asker,
        settings: &Settings,
        progress: &dyn Fn(),
    ) -> Result<SuiteRow> {
        let started = Instant::now();
        let mut decoder = generate::decoder_for(backend, subject.model, subject.kv_cache, &self.requests)?;
        let mut answers: Vec<Option<Generated>> = vec![None; self.prompts()];
        let stop = Stop { tokens: asker.stop_tokens().to_vec(), strings: Vec::new() };
        let mut keep = |at: usize, answer: Generated| {
            answers[at] = Some(answer);
            progress();
            Ok(())
        };
        generate::generate(
            decoder.as_mut(),
            asker.tokenizer(),
            &self.requests,
            &Sampling::GREEDY,
            &stop,
            &mut keep,
        )?;
        let seconds = started.elapsed().as_secs_f64();
        let items = self.suite.prompts.iter().zip(answers).filter_map(|(prompt, answer)| {
            let Generated { tokens, text, .. } = answer?;
            let verdict = prompt.check.judge(&text, settings.sandbox.as_ref());
            Some(Item {
                id: prompt.id.clone(),
                passed: verdict.passed,
                reason: verdict.reason,
                prompt: prompt.question(),
                text,
                first_difference: None,
                kld: None,
                ids: tokens,
            })
        });
        Ok(SuiteRow::new(&subject.name, items.collect(), seconds))
    }

    /// Returns KL(baseline ‖ model) at every token of the baseline's answers, by model and prompt.
    fn divergences<B: Generate>(
        &self,
        backend: &B,
        baseline: &Subject<Model<B>>,
        models: &[Subject<Model<B>>],
        answers: &SuiteRow,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let mut found = vec![vec![Vec::new(); self.prompts()]; models.len()];
        let texts: Vec<Vec<u32>> = self
            .requests
            .iter()
            .zip(&answers.items)
            .map(|(request, item)| [&request.ids[..], &item.ids].concat())
            .collect();
        let mut order: Vec<usize> =
            (0..texts.len()).filter(|&at| !answers.items[at].ids.is_empty()).collect();
        order.sort_by_key(|&at| texts[at].len());
        while let Some(&shortest) = order.first() {
            let at_once = (backend.tokens_at_once() / texts[shortest].len()).clamp(1, order.len());
            let group: Vec<usize> = order.drain(..at_once).collect();
            let scored = Scored::of(&group, &texts, &self.requests);
            let reference = scored.hidden(backend, baseline)?;
            for (model, found) in models.iter().zip(&mut found) {
                let hidden = scored.hidden(backend, model)?;
                let pairs = backend.compare(
                    (&reference, baseline.model.head()),
                    (&hidden, model.model.head()),
                    &scored.targets,
                )?;
                let mut pairs = pairs.iter().map(|Divergence { kld, .. }| *kld);
                for &at in &group {
                    found[at] = pairs.by_ref().take(answers.items[at].ids.len()).collect();
                }
            }
        }
        Ok(found)
    }
}

/// Texts side by side, padded at their ends, which causal attention does not see.
struct Scored {
    ids: Vec<u32>,
    batch: Batch,
    /// Rows that predict a token of an answer.
    rows: Vec<usize>,
    /// Those tokens.
    targets: Vec<u32>,
}

impl Scored {
    fn of(group: &[usize], texts: &[Vec<u32>], requests: &[Request]) -> Self {
        let tokens = group.iter().map(|&at| texts[at].len()).max().unwrap_or(0);
        let mut scored = Scored {
            ids: Vec::new(),
            batch: Batch { sequences: group.len(), tokens },
            rows: Vec::new(),
            targets: Vec::new(),
        };
        for (sequence, &at) in group.iter().enumerate() {
            let (text, prompt) = (&texts[at], requests[at].ids.len());
            scored.ids.extend(text);
            scored.ids.resize((sequence + 1) * tokens, text[0]);
            scored.rows.extend((prompt..text.len()).map(|position| sequence * tokens + position - 1));
            scored.targets.extend(&text[prompt..]);
        }
        scored
    }

    fn hidden<B: Generate>(&self, backend: &B, subject: &Subject<Model<B>>) -> Result<B::Tensor> {
        let Subject { model, kv_cache, .. } = subject;
        model.hidden_at_with(backend, &self.ids, self.batch, &self.rows, *kv_cache)
    }
}
