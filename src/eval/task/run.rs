//! Every model works through a benchmark.
//!
//! A choice is scored by the log-likelihood of its tokens after the prompt: both are tokenized together and split where
//! the prompt's own tokens end, blanks at the prompt's end counted with the choice (`_encode_pair` of lm-evaluation-harness).
//! `acc` takes the likeliest choice, `acc_norm` the likeliest per character.

use anyhow::{Context, Result, ensure};

use super::answer::{Filters, UNTIL};
use super::result::{TaskItem, TaskResult, TaskRow};
use super::{Kind, Question, Task};
use crate::backend::{Batch, Score};
use crate::eval::Subject;
use crate::eval::suite::ask::Asker;
use crate::generate::{self, Generate, Request, Sampling, Stop};
use crate::model::Model;
use crate::model::tokenizer::Tokenizer;

/// A benchmark as one model family reads it.
pub struct Prepared {
    task: Task,
    work: Work,
}

enum Work {
    /// Inputs, each with the choices it scores.
    Choose(Vec<Input>),
    /// Prompts to be continued.
    Generate(Vec<Request>),
}

/// A forward pass over a prompt and a choice's tokens but the last; choices of one token share it.
struct Input {
    ids: Vec<u32>,
    /// (question, choice, its tokens)
    choices: Vec<(usize, usize, Vec<u32>)>,
}

impl Prepared {
    /// Tokenizes a benchmark. Prompts that exceed `context` lose their start, as in lm-evaluation-harness.
    pub fn new(task: Task, asker: &Asker, context: usize, max_new_tokens: usize) -> Result<Self> {
        let tokenizer = asker.tokenizer();
        let work = match task.kind {
            Kind::Gsm8k => {
                let room = context.saturating_sub(max_new_tokens);
                ensure!(room > 0, "answers of {max_new_tokens} tokens fill the context of {context}");
                let request = |question: &Question| {
                    let ids = tokenizer.encode(&question.prompt, true)?;
                    let ids = ids[ids.len().saturating_sub(room)..].to_vec();
                    Ok(Request { ids, max_new_tokens })
                };
                Work::Generate(task.questions.iter().map(request).collect::<Result<_>>()?)
            }
            _ => Work::Choose(inputs(&task.questions, tokenizer, context)?),
        };
        Ok(Prepared { task, work })
    }

    /// Returns the number of questions.
    pub fn questions(&self) -> usize {
        self.task.questions.len()
    }

    /// Lets the baseline, if there is one, and every model answer. `progress` is called with numbers of questions.
    ///
    /// An error of one model ends the benchmark; what was finished before is in the result.
    pub fn run<B: Generate>(
        &self,
        backend: &B,
        baseline: Option<&Subject<Model<B>>>,
        models: &[Subject<Model<B>>],
        asker: &Asker,
        progress: &dyn Fn(usize),
    ) -> TaskResult {
        let mut result = TaskResult {
            task: self.task.kind.name().to_string(),
            sha256: self.task.sha256.clone(),
            shots: self.task.shots,
            questions: self.questions(),
            rows: Vec::new(),
            error: None,
        };
        for subject in baseline.into_iter().chain(models) {
            let row = match &self.work {
                Work::Choose(inputs) => self.choose(backend, subject, inputs),
                Work::Generate(requests) => self.solve(backend, subject, requests, asker),
            };
            match row.with_context(|| subject.name.clone()) {
                Ok(row) => result.rows.push(row),
                Err(error) => {
                    result.error = Some(format!("{error:#}"));
                    break;
                }
            }
            progress(self.questions());
        }
        if let (true, Some((first, rows))) = (baseline.is_some(), result.rows.split_first_mut()) {
            rows.iter_mut().for_each(|row| row.compare(first));
        }
        result
    }

    fn choose<B: Generate>(
        &self,
        backend: &B,
        subject: &Subject<Model<B>>,
        inputs: &[Input],
    ) -> Result<TaskRow> {
        let questions = &self.task.questions;
        let mut found: Vec<Vec<f64>> =
            questions.iter().map(|question| vec![0.0; question.doc.choices.len()]).collect();
        let mut rest = inputs;
        while let Some(first) = rest.first() {
            let longest = |count: usize| rest[..count].iter().map(|input| input.ids.len()).max().unwrap_or(0);
            let mut count = 1;
            while count < rest.len() && longest(count + 1) * (count + 1) <= backend.tokens_at_once() {
                count += 1;
            }
            ensure!(!first.ids.is_empty(), "an empty prompt has no likelihood");
            let (group, later) = rest.split_at(count);
            log_likelihoods(backend, subject, group, longest(count), &mut found)?;
            rest = later;
        }
        let metrics: &[&str] = if self.task.kind == Kind::Mmlu { &["acc"] } else { &["acc_norm", "acc"] };
        let items = questions.iter().zip(found).map(|(question, found)| chosen(question, found, metrics));
        Ok(TaskRow::new(&subject.name, metrics, items.collect()))
    }

    fn solve<B: Generate>(
        &self,
        backend: &B,
        subject: &Subject<Model<B>>,
        requests: &[Request],
        asker: &Asker,
    ) -> Result<TaskRow> {
        let mut decoder = generate::decoder_for(backend, subject.model, subject.kv_cache, requests)?;
        let stop = Stop { tokens: asker.stop_tokens().to_vec(), strings: UNTIL.map(str::to_string).to_vec() };
        let mut texts = vec![String::new(); requests.len()];
        let mut keep = |at: usize, answer: generate::Generated| {
            texts[at] = answer.text;
            Ok(())
        };
        let sampling = Sampling::GREEDY;
        generate::generate(decoder.as_mut(), asker.tokenizer(), requests, &sampling, &stop, &mut keep)?;
        let filters = Filters::new()?;
        let items = self.task.questions.iter().zip(texts).map(|(question, text)| {
            let answers = vec![filters.flexible(&text), filters.strict(&text)];
            let target = question.doc.target.clone();
            let right = answers.iter().map(|answer| filters.exact_match(answer, &target)).collect();
            TaskItem { line: question.line, target, log_likelihoods: Vec::new(), text, answers, right }
        });
        let metrics = ["exact_match,flexible-extract", "exact_match,strict-match"];
        Ok(TaskRow::new(&subject.name, &metrics, items.collect()))
    }
}

/// Tokenizes every question with every choice.
fn inputs(questions: &[Question], tokenizer: &Tokenizer, context: usize) -> Result<Vec<Input>> {
    let mut inputs: Vec<Input> = Vec::new();
    for (at, question) in questions.iter().enumerate() {
        for (choice, text) in question.doc.choices.iter().enumerate() {
            let (prompt, choice_ids) = encode_pair(tokenizer, &question.prompt, &format!(" {text}"))?;
            ensure!(
                !choice_ids.is_empty() && choice_ids.len() <= context,
                "line {}: choice {} has {} tokens for a context of {context}",
                question.line,
                choice + 1,
                choice_ids.len()
            );
            let mut ids = [&prompt[..], &choice_ids[..choice_ids.len() - 1]].concat();
            ids.drain(..ids.len().saturating_sub(context));
            match inputs
                .last_mut()
                .filter(|input| input.ids == ids && input.choices[0].2.len() == choice_ids.len())
            {
                Some(same) => same.choices.push((at, choice, choice_ids)),
                None => inputs.push(Input { ids, choices: vec![(at, choice, choice_ids)] }),
            }
        }
    }
    // Stable, so that the pieces of a pass are of like length and in one order on every run.
    inputs.sort_by_key(|input| input.ids.len());
    Ok(inputs)
}

fn encode_pair(tokenizer: &Tokenizer, prompt: &str, choice: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let trimmed = prompt.trim_end();
    let choice = format!("{}{choice}", &prompt[trimmed.len()..]);
    let mut whole = tokenizer.encode(&format!("{trimmed}{choice}"), true)?;
    let own = tokenizer.encode(trimmed, true)?.len().min(whole.len());
    let rest = whole.split_off(own);
    Ok((whole, rest))
}

/// Adds the log-likelihoods of a group of inputs, padded to `tokens` at their ends.
fn log_likelihoods<B: Generate>(
    backend: &B,
    subject: &Subject<Model<B>>,
    group: &[Input],
    tokens: usize,
    found: &mut [Vec<f64>],
) -> Result<()> {
    let (mut ids, mut rows, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, input) in group.iter().enumerate() {
        ids.extend(&input.ids);
        ids.resize((sequence + 1) * tokens, input.ids[0]);
        for (_, _, choice) in &input.choices {
            let end = sequence * tokens + input.ids.len();
            rows.extend(end - choice.len()..end);
            targets.extend(choice);
        }
    }
    let Subject { model, kv_cache, .. } = subject;
    let batch = Batch { sequences: group.len(), tokens };
    let hidden = model.hidden_at_with(backend, &ids, batch, &rows, *kv_cache)?;
    let scores = backend.score(&hidden, model.head(), &targets)?;
    let mut scores = scores.iter();
    for (question, choice, choice_ids) in group.iter().flat_map(|input| &input.choices) {
        let nll: f64 = scores.by_ref().take(choice_ids.len()).map(|Score { nll, .. }| f64::from(*nll)).sum();
        found[*question][*choice] = -nll;
    }
    Ok(())
}

/// Returns a question's answer by each metric; the first of equals, as numpy's argmax.
fn chosen(question: &Question, log_likelihoods: Vec<f64>, metrics: &[&str]) -> TaskItem {
    let choices = &question.doc.choices;
    let best = |score: &dyn Fn(usize) -> f64| {
        (0..choices.len()).rev().max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap_or(0)
    };
    let answer = |metric: &&str| match *metric {
        "acc_norm" => best(&|at| log_likelihoods[at] / choices[at].chars().count() as f64),
        _ => best(&|at| log_likelihoods[at]),
    };
    let answers: Vec<usize> = metrics.iter().map(answer).collect();
    TaskItem {
        line: question.line,
        target: question.doc.target.clone(),
        text: String::new(),
        right: answers.iter().map(|&at| at == question.doc.gold).collect(),
        answers: answers.iter().map(|&at| choices[at].clone()).collect(),
        log_likelihoods,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::task::Doc;

    #[test]
    fn acc_norm_divides_by_characters_and_ties_take_the_first() {
        let doc =
            Doc { choices: vec!["ab".into(), "éèêë".into(), "xy".into()], gold: 1, ..Doc::default() };
        let question = Question { line: 4, prompt: String::new(), doc };
        let item = chosen(&question, vec![-4.0, -6.0, -4.0], &["acc_norm", "acc"]);
        assert_eq!((item.answers[0].as_str(), item.answers[1].as_str()), ("éèêë", "ab"));
        assert_eq!(item.right, [true, false]);
    }
}
