//! Measuring what was written: perplexity, and divergence from a baseline.
//!
//! All models walk through the windows in lock step, as many at once as the backend likes, so that their activations are
//! all that is kept beside the weights and the baseline runs once per window. Logits are exact and never stored ([`Backend::compare`]).

pub mod protocol;
pub mod report;
pub mod speed;
pub mod statistics;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use self::protocol::{Protocol, Scored};
pub use self::report::{Report, Row};
use self::statistics::{mean, perplexity_difference_error, quantile, standard_error};
use crate::backend::{Backend, Batch, Divergence, Score};
use crate::model::Model;

/// A loaded model and what its row says of it.
pub struct Subject<'a, B: Backend> {
    /// Name as the user gave it.
    pub name: String,
    /// Format name.
    pub format: String,
    /// Stored bytes of all tensors.
    pub bytes: u64,
    /// `8 · bytes / weights`.
    pub bits_per_weight: f64,
    /// The weights.
    pub model: &'a Model<B>,
}

/// Evaluates `models`, and against `baseline` if there is one; its row comes first. `tokens` are those of the whole text.
///
/// `progress(done, total)` is called after every model's window.
///
/// # Errors
/// Vocabularies that differ from the baseline's, windows longer than a model's context, token ids outside a
/// vocabulary, and losses that are not finite; each names the model.
pub fn run<B: Backend>(
    backend: &B,
    baseline: Option<&Subject<B>>,
    models: &[Subject<B>],
    tokens: &[u32],
    protocol: &Protocol,
    progress: &dyn Fn(usize, usize),
) -> Result<Report> {
    let subjects = || baseline.into_iter().chain(models);
    for subject in subjects() {
        check(subject, baseline, tokens, protocol).with_context(|| subject.name.clone())?;
    }
    let total = protocol.windows * subjects().count();
    let mut tallies: Vec<Tally> = subjects().map(|_| Tally::default()).collect();
    let at_once = (backend.tokens_at_once() / protocol.n_ctx).max(1);
    let mut done = 0;
    for first in (0..protocol.windows).step_by(at_once) {
        let windows = first..protocol.windows.min(first + at_once);
        let ids: Vec<u32> = windows.clone().flat_map(|window| protocol.window(tokens, window)).collect();
        let mut reference = None;
        for (at, subject) in subjects().enumerate() {
            let context = || match windows.len() {
                1 => format!("{}, window {}", subject.name, windows.end),
                _ => format!("{}, windows {} to {}", subject.name, first + 1, windows.end),
            };
            let is_baseline = at == 0 && baseline.is_some();
            let hidden = tallies[at]
                .measure(backend, subject, &ids, protocol, reference.as_ref())
                .with_context(context)?;
            if is_baseline {
                reference = Some((hidden, subject.model.head()));
            }
            done += windows.len();
            progress(done, total);
        }
    }
    let reference = baseline.map(|_| tallies[0].window_nll.clone());
    let rows = subjects().zip(tallies).enumerate().map(|(at, (subject, tally))| {
        let compared_with = reference.as_deref().filter(|_| at > 0);
        tally.into_row(subject, compared_with, protocol)
    });
    Ok(Report { protocol: protocol.clone(), rows: rows.collect() })
}

fn check<B: Backend>(
    subject: &Subject<B>,
    baseline: Option<&Subject<B>>,
    tokens: &[u32],
    protocol: &Protocol,
) -> Result<()> {
    let config = &subject.model.config;
    if let Some(baseline) = baseline {
        let (found, wanted) = (config.vocab_size, baseline.model.config.vocab_size);
        ensure!(
            found == wanted,
            "its vocabulary has {found} tokens and the baseline's ({}) {wanted}; a divergence needs one vocabulary",
            baseline.name
        );
    }
    ensure!(
        protocol.n_ctx <= config.max_position_embeddings,
        "windows of {} tokens exceed its context of {}; use a smaller `--ctx`",
        protocol.n_ctx,
        config.max_position_embeddings
    );
    ensure!(
        tokens.len() >= protocol.windows * protocol.n_ctx,
        "{} tokens do not fill {} windows of {}",
        tokens.len(),
        protocol.windows,
        protocol.n_ctx
    );
    if let Some(id) = tokens.iter().chain(&protocol.bos).find(|&&id| id as usize >= config.vocab_size) {
        bail!(
            "token id {id} is outside its vocabulary of {}; was the text tokenized for another model?",
            config.vocab_size
        );
    }
    Ok(())
}

/// What one model's windows add up to.
#[derive(Default)]
struct Tally {
    /// Mean negative log-likelihood of each window.
    window_nll: Vec<f64>,
    /// Mean divergence of each window.
    window_kld: Vec<f64>,
    /// Divergence of each position.
    kld: Vec<f32>,
    /// Positions whose most likely token is the baseline's.
    same_top: usize,
    elapsed: Duration,
}

impl Tally {
    /// Runs some windows, whose ids follow one another, and returns their final hidden states at the scored positions.
    /// `reference` holds those of the baseline, and its head.
    fn measure<B: Backend>(
        &mut self,
        backend: &B,
        subject: &Subject<B>,
        ids: &[u32],
        protocol: &Protocol,
        reference: Option<&(B::Tensor, &B::Weight)>,
    ) -> Result<B::Tensor> {
        let started = Instant::now();
        let batch = Batch { sequences: ids.len() / protocol.n_ctx, tokens: protocol.n_ctx };
        let positions: Vec<usize> = (0..batch.sequences)
            .flat_map(|sequence| protocol.scored().map(move |position| sequence * batch.tokens + position))
            .collect();
        let targets: Vec<u32> = positions.iter().map(|&position| ids[position + 1]).collect();
        let hidden = subject.model.hidden_at(backend, ids, batch, &positions)?;
        let head = subject.model.head();
        let per_window = protocol.scored().len();
        match reference {
            None => {
                let scores = backend.score(&hidden, head, &targets)?;
                scores.chunks(per_window).try_for_each(|window| self.add_scores(window))?;
            }
            Some((baseline, baseline_head)) => {
                let found = backend.compare((baseline, baseline_head), (&hidden, head), &targets)?;
                found.chunks(per_window).try_for_each(|window| self.add_divergences(window))?;
            }
        }
        self.elapsed += started.elapsed();
        Ok(hidden)
    }

    fn add_scores(&mut self, scores: &[Score]) -> Result<()> {
        let nll: Vec<f64> = scores.iter().map(|score| score.nll as f64).collect();
        let nll = mean(&nll);
        ensure!(nll.is_finite(), "the loss is {nll}; the weights overflow or hold NaN");
        self.window_nll.push(nll);
        Ok(())
    }

    fn add_divergences(&mut self, divergences: &[Divergence]) -> Result<()> {
        self.add_scores(&divergences.iter().map(|d| d.model).collect::<Vec<_>>())?;
        let start = self.kld.len();
        self.kld.extend(divergences.iter().map(|d| d.kld));
        self.window_kld.push(mean(&self.kld[start..].iter().map(|&kld| kld as f64).collect::<Vec<_>>()));
        self.same_top += divergences.iter().filter(|d| d.model.top == d.baseline.top).count();
        Ok(())
    }

    /// Returns the model's row; `baseline` holds the baseline's loss in each window.
    fn into_row<B: Backend>(
        mut self,
        subject: &Subject<B>,
        baseline: Option<&[f64]>,
        protocol: &Protocol,
    ) -> Row {
        let tokens = protocol.windows * protocol.scored().len();
        let ppl = mean(&self.window_nll).exp();
        Row {
            model: subject.name.clone(),
            format: subject.format.clone(),
            bytes: subject.bytes,
            bits_per_weight: subject.bits_per_weight,
            ppl,
            delta_ppl: baseline.map(|nll| ppl - mean(nll).exp()),
            delta_ppl_se: baseline.and_then(|nll| perplexity_difference_error(&self.window_nll, nll)),
            kld: baseline.map(|_| mean(&self.window_kld)),
            kld_se: baseline.and_then(|_| standard_error(&self.window_kld)),
            kld_p99: baseline.map(|_| quantile(&mut self.kld, 0.99)),
            top1: baseline.map(|_| self.same_top as f64 / tokens as f64),
            tokens,
            tok_per_s: (protocol.windows * protocol.n_ctx) as f64 / self.elapsed.as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Checkpoint;

    fn model(name: &str) -> Model<Cpu> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap()
    }

    fn subject<'a>(name: &str, model: &'a Model<Cpu>) -> Subject<'a, Cpu> {
        Subject { name: name.into(), format: "bf16".into(), bytes: 1, bits_per_weight: 16.0, model }
    }

    fn tokens() -> Vec<u32> {
        (0..100u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect()
    }

    fn protocol(name: Scored) -> Protocol {
        Protocol::new(name, 16, None, "text", &tokens(), None).unwrap()
    }

    #[test]
    fn a_model_diverges_from_itself_by_exactly_zero() {
        let model = model("qwen3");
        let (base, same) = (subject("base", &model), subject("same", &model));
        let calls = RefCell::new(Vec::new());
        let report =
            run(&Cpu, Some(&base), &[same], &tokens(), &protocol(Scored::SecondHalf), &|done, total| {
                calls.borrow_mut().push((done, total));
            });
        let rows = report.unwrap().rows;
        assert_eq!((rows[0].kld, rows[0].delta_ppl, rows[0].tokens), (None, None, 6 * 7));
        let zero = Some(0.0);
        let same = &rows[1];
        assert_eq!([same.kld, same.kld_se, same.kld_p99, same.delta_ppl, same.delta_ppl_se], [zero; 5]);
        assert_eq!((same.top1, same.ppl), (Some(1.0), rows[0].ppl));
        assert_eq!(*calls.borrow(), (1..=12).map(|done| (done, 12)).collect::<Vec<_>>());
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean_loss_of_all_scored_positions() {
        let model = model("mistral");
        let protocol = protocol(Scored::All);
        let report = run(&Cpu, None, &[subject("m", &model)], &tokens(), &protocol, &|_, _| ()).unwrap();
        let mut losses = Vec::new();
        for window in tokens().chunks_exact(16) {
            let hidden = model.hidden(&Cpu, window, Batch { sequences: 1, tokens: 16 }).unwrap();
            let hidden = Cpu.select_rows(&hidden, &(0..15).collect::<Vec<_>>()).unwrap();
            let scores = Cpu.score(&hidden, model.head(), &window[1..]).unwrap();
            losses.extend(scores.iter().map(|score| score.nll as f64));
        }
        assert_eq!(losses.len(), report.rows[0].tokens);
        assert!((report.rows[0].ppl - mean(&losses).exp()).abs() < 1e-9 * report.rows[0].ppl);
    }

    #[test]
    fn another_model_diverges_and_each_sees_its_own_hidden_states() {
        let (a, b) = (model("qwen3"), model("mistral"));
        let (a, b) = (subject("a", &a), subject("b", &b));
        let both =
            run(&Cpu, Some(&a), &[subject("b", b.model)], &tokens(), &protocol(Scored::All), &|_, _| ())
                .unwrap();
        let alone = run(&Cpu, None, &[b], &tokens(), &protocol(Scored::All), &|_, _| ()).unwrap();
        assert_eq!(both.rows[1].ppl, alone.rows[0].ppl);
        assert!(both.rows[1].kld.unwrap() > 0.1 && both.rows[1].kld_se.unwrap() > 0.0);
        assert!(both.rows[1].top1.unwrap() < 1.0);
    }

    #[test]
    fn what_cannot_be_compared_is_refused_with_the_models_name() {
        let (base, mut other) = (model("qwen3"), model("mistral"));
        let refusal = |base: &Model<Cpu>, other: &Model<Cpu>, tokens: &[u32], protocol: &Protocol| {
            let (base, other) = (subject("base", base), subject("other", other));
            format!("{:#}", run(&Cpu, Some(&base), &[other], tokens, protocol, &|_, _| ()).unwrap_err())
        };
        let protocol = protocol(Scored::All);
        let mut outside = tokens();
        outside[50] = 64;
        assert!(refusal(&base, &other, &outside, &protocol).contains("token id 64"));
        assert!(refusal(&base, &other, &tokens()[..90], &protocol).contains("90 tokens"));
        other.config.max_position_embeddings = 8;
        assert!(refusal(&base, &other, &tokens(), &protocol).starts_with("other: windows of 16 tokens"));
        other.config.vocab_size = 65;
        assert!(refusal(&base, &other, &tokens(), &protocol).starts_with("other: its vocabulary has 65"));
    }

    #[test]
    fn weights_that_overflow_are_reported_with_model_and_window() {
        let mut model = model("llama2");
        model.output_norm.fill(f32::NAN);
        let refusal =
            run(&Cpu, None, &[subject("broken", &model)], &tokens(), &protocol(Scored::All), &|_, _| ());
        assert!(format!("{:#}", refusal.unwrap_err()).starts_with("broken, window 1: the loss is NaN"));
    }
}
