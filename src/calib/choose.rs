//! Chooses settings for a model by measuring: each candidate quantizes the whole model on few windows, and the KL
//! divergence on windows kept out of its statistics decides.
//!
//! The best strengths differ from model to model, and full-strength correction can hurt. Candidates change one setting at a
//! time and the best is kept before the next setting is tried. How many there are depends on the effort and the model's
//! size, never on a clock: the same inputs make the same choice on every machine.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::driver::{Finished, Request, calibrate};
use super::settings::Settings;
use super::token_energies::TokenEnergies;
use crate::backend::SecondMoments;
use crate::model::TensorSource;
use crate::model::config::Config;

/// How much time choosing may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// The default settings, fewer sweeps: nothing is tried.
    Fast,
    /// About as long again as the calibration itself.
    Balanced,
    /// Several times as long.
    Best,
}

/// Windows that a trial's statistics come from, and windows its divergence is measured on.
const TRIAL_WINDOWS: (usize, usize) = (24, 12);
/// A candidate must be better by this much, relative, to replace what came before it. Trials see fewer tokens than the run
/// they choose for, which favours weaker correction: six tenths of it were worse by 2 % on tiny-llama (MXFP4, KLD .1051 and
/// .1032) where trials had them 3 % better, and so was weaker smoothing of down on small-qwen3 (INT8 per token, .00591 and
/// .00577). What trials preferred by 5 % and more kept its promise.
const MARGIN: f64 = 0.04;

/// One candidate and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What it changed.
    pub change: String,
    /// All its settings.
    pub settings: Settings,
    /// Mean KL divergence on the windows kept out, nats.
    pub kld: f64,
}

/// The settings found, and all that were tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The best.
    pub settings: Settings,
    /// In the order they were tried.
    pub trials: Vec<Trial>,
}

type Change = (&'static str, fn(&mut Settings));

fn scale_strengths(settings: &mut Settings, factor: f32) {
    settings.mismatch *= factor;
    settings.mismatch_later *= factor;
    settings.residual *= factor;
}

/// Candidates by the setting they change.
const STRENGTHS: [Change; 2] =
    [("correction × 0.6", |s| scale_strengths(s, 0.6)), ("correction × 1.4", |s| scale_strengths(s, 1.4))];
const DAMPING: [Change; 2] = [("damping 0.1", |s| s.damp = 0.1), ("damping 0.02", |s| s.damp = 0.02)];
const SMOOTHING: [Change; 2] = [
    ("smoothing 0.25", |s| (s.smoothing, s.inner_smoothing) = (0.25, 0.25)),
    ("smoothing 0.4", |s| (s.smoothing, s.inner_smoothing) = (0.4, 0.4)),
];
/// For inputs that are rounded too, and smoothed from the start.
const INPUT_SMOOTHING: [Change; 2] = [
    ("smoothing 0.3", |s| (s.smoothing, s.inner_smoothing) = (0.3, 0.3)),
    ("smoothing 0.7", |s| (s.smoothing, s.inner_smoothing) = (0.7, 0.7)),
];

/// What a search knows and who hears of it.
pub struct Search<'a> {
    /// How much may be tried.
    pub effort: Effort,
    /// Trials of an earlier search for the same request: they are not run again.
    pub known: &'a [Trial],
    /// Hears of each trial.
    pub tell: &'a dyn Fn(&Trial) -> Result<()>,
    /// Hears of each layer of a trial that is finished.
    pub progress: &'a dyn Fn(),
}

impl Effort {
    /// Returns how many settings are tried at most, the first ones included.
    pub fn trials(self, rounds_inputs: bool) -> usize {
        match self.candidates(rounds_inputs).iter().map(|group| group.changes.len()).sum() {
            0 => 0,
            changes => 1 + changes,
        }
    }

    /// Returns the candidates, grouped by setting.
    fn candidates(self, rounds_inputs: bool) -> Vec<Group> {
        let any = |changes| Group { changes, opposite: false };
        let opposite = |changes| Group { changes, opposite: true };
        match (self, rounds_inputs) {
            (Effort::Fast, _) => vec![],
            (Effort::Balanced, false) => vec![opposite(&STRENGTHS)],
            (Effort::Balanced, true) => vec![opposite(&INPUT_SMOOTHING)],
            (Effort::Best, false) => {
                vec![any(&SMOOTHING), opposite(&STRENGTHS), opposite(&DAMPING)]
            }
            (Effort::Best, true) => {
                vec![opposite(&INPUT_SMOOTHING), opposite(&STRENGTHS), opposite(&DAMPING)]
            }
        }
    }
}

/// Candidates that change one setting.
struct Group {
    changes: &'static [Change],
    /// Whether they are two opposite ways from where the search stands: where the first is better, the second is left out.
    opposite: bool,
}

/// The windows that trials see: those for statistics, then those kept out of them.
struct TrialText {
    windows: Vec<Vec<u32>>,
    energies: Vec<TokenEnergies>,
    held_out: usize,
}

impl TrialText {
    /// Picks windows of a request; `None` if it has too few.
    fn pick(request: &Request) -> Option<Self> {
        let (counted, held_out) = TRIAL_WINDOWS;
        let available = request.windows.len();
        if available < 2 * held_out {
            return None;
        }
        // Spread over the text: its parts differ in kind.
        let picked = (counted + held_out).min(available);
        let (kept_out, mut order): (Vec<usize>, Vec<usize>) = (0..picked).partition(|i| i % 3 == 2);
        let held_out = kept_out.len();
        order.extend(kept_out);
        let spread = |i: &usize| i * available / picked;
        let windows = order.iter().map(|i| request.windows[spread(i)].clone()).collect();
        let energies = order.iter().filter_map(|i| request.energies.get(spread(i)).cloned()).collect();
        Some(TrialText { windows, energies, held_out })
    }
}

/// Tries candidates for `request`, whose settings are where the search starts and whose windows are divided into counted
/// and kept out.
///
/// # Errors
/// If calibration fails.
pub fn choose<B: SecondMoments>(
    backend: &B,
    config: &Config,
    source: &impl TensorSource,
    request: &Request,
    search: &Search,
) -> Result<Chosen> {
    let mut choice = Chosen { settings: request.settings, trials: Vec::new() };
    let candidates = search.effort.candidates(request.rounds_inputs);
    let text = TrialText::pick(request).filter(|_| !candidates.is_empty());
    let Some(text) = text else { return Ok(choice) };
    let layers = config.num_hidden_layers;
    let measure = |change: &str, settings: Settings| -> Result<Trial> {
        let known = |trial: &&Trial| trial.change == change && trial.settings == settings;
        if let Some(trial) = search.known.iter().find(known) {
            (0..layers).for_each(|_| (search.progress)());
            return Ok(trial.clone());
        }
        let kld = divergence(backend, config, source, &text, request, settings, search.progress)?;
        let trial = Trial { change: change.to_string(), settings, kld };
        (search.tell)(&trial)?;
        Ok(trial)
    };
    let first = measure("defaults", choice.settings)?;
    let mut least = first.kld;
    choice.trials.push(first);
    for Group { changes, opposite } in candidates {
        let (from, before) = (choice.settings, least);
        for (at, (name, change)) in changes.iter().enumerate() {
            let mut settings = from;
            change(&mut settings);
            let trial = measure(name, settings)?;
            if trial.kld < least * (1.0 - MARGIN) {
                (least, choice.settings) = (trial.kld, settings);
            }
            let better = trial.kld < before;
            choice.trials.push(trial);
            if opposite && better {
                (0..(changes.len() - at - 1) * layers).for_each(|_| (search.progress)());
                break;
            }
        }
    }
    Ok(choice)
}

/// Calibrates the whole model under `settings` on few windows and returns its mean KL divergence on those kept out, nats.
fn divergence<B: SecondMoments>(
    backend: &B,
    config: &Config,
    source: &impl TensorSource,
    text: &TrialText,
    request: &Request,
    settings: Settings,
    progress: &dyn Fn(),
) -> Result<f64> {
    let request = Request {
        windows: &text.windows,
        energies: &text.energies,
        held_out: text.held_out,
        settings: Settings { sweeps: settings.sweeps.min(1), ..settings },
        choice: request.choice,
        finished: None,
        ..*request
    };
    let kld = calibrate(backend, config, source, &request, &mut |finished| {
        if let Finished::Layer(_) = finished {
            progress();
        }
        Ok(())
    })?;
    let kld = kld.unwrap_or(f64::NAN);
    ensure!(kld.is_finite(), "the divergence on calibration text is {kld}");
    Ok(kld)
}

impl Chosen {
    /// Returns what the manifest says of it.
    pub fn record(&self) -> Value {
        let trials = self.trials.iter().map(|trial| json!({ "tried": trial.change, "kld": trial.kld }));
        let s = &self.settings;
        // As F32 prints itself: 0.4, not 0.4000000059604645.
        let number = |x: f32| x.to_string().parse::<f64>().unwrap_or(f64::NAN);
        json!({
            "mismatch": number(s.mismatch), "mismatch_later": number(s.mismatch_later),
            "residual": number(s.residual), "damp": number(s.damp), "sweeps": s.sweeps,
            "token_power": number(s.token_power), "scale_rule": s.scale_rule.to_string(),
            "smoothing": number(s.smoothing), "inner_smoothing": number(s.inner_smoothing),
            "trials": trials.collect::<Vec<_>>(),
        })
    }
}
