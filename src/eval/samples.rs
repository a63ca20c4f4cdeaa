//! What was measured at every scored position of one model, and the metrics of all or some of the positions.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::bootstrap;
use super::metric::{COUNT, Estimate, METRICS, Measures, Metric};
use super::statistics::{perplexity_difference_error, standard_error};
use crate::backend::{Divergence, RANKS, Score};

/// One model's results on one text: `per_window` positions of each window, in the order of the text.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    per_window: usize,
    /// What each position says; of a baseline, only `model` means something.
    positions: Vec<Divergence>,
    /// Whether the positions were compared with a baseline.
    compared: bool,
    /// Tokens and time of each forward pass.
    passes: Vec<(usize, Duration)>,
}

/// Standard errors over windows that reports have beside the intervals.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StandardErrors {
    /// Of `delta_ppl`, paired.
    pub delta_ppl: Option<f64>,
    /// Of `kld`.
    pub kld: Option<f64>,
}

impl Samples {
    /// Starts with nothing measured.
    pub fn new(per_window: usize, compared: bool) -> Self {
        Samples { per_window, compared, ..Samples::default() }
    }

    /// Takes in the positions of whole windows.
    ///
    /// # Errors
    /// If a window's loss is not finite.
    pub fn add(&mut self, positions: impl IntoIterator<Item = Divergence>) -> Result<()> {
        let first = self.positions.len();
        self.positions.extend(positions);
        for window in self.positions[first..].chunks(self.per_window) {
            let nll = sum(window, |d| d.model.nll as f64) / window.len() as f64;
            ensure!(nll.is_finite(), "the loss is {nll}; the weights overflow or hold NaN");
        }
        Ok(())
    }

    /// Takes in what the baseline itself says.
    pub fn add_scores(&mut self, scores: &[Score]) -> Result<()> {
        self.add(scores.iter().map(|&model| Divergence { model, ..Divergence::default() }))
    }

    /// Takes in how long a forward pass took.
    pub fn add_pass(&mut self, tokens: usize, elapsed: Duration) {
        self.passes.push((tokens, elapsed));
    }

    /// Returns the baseline's own samples, as comparing with it found them.
    pub fn of_baseline(&self) -> Samples {
        let positions = self.positions.iter();
        let positions =
            positions.map(|d| Divergence { model: d.baseline, ..Divergence::default() }).collect();
        Samples { per_window: self.per_window, positions, compared: false, passes: Vec::new() }
    }

    /// Returns the number of scored positions.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Returns the passes that say something about speed: the first one also compiles kernels and fills caches.
    fn timed(&self) -> &[(usize, Duration)] {
        &self.passes[usize::from(self.passes.len() > 1)..]
    }

    /// Returns the tokens per second of all forward passes but the first; `None` if none was timed.
    pub fn tok_per_s(&self) -> Option<f64> {
        let (tokens, elapsed) =
            self.timed().iter().fold((0, Duration::ZERO), |(n, t), pass| (n + pass.0, t + pass.1));
        (tokens > 0).then(|| tokens as f64 / elapsed.as_secs_f64())
    }

    /// Returns how many times the baseline's rate the model reaches, with an interval over passes if there were several.
    pub fn speed_ratio(&self, baseline: &Samples) -> Option<Estimate> {
        let ratio = |(own, other): (&(usize, Duration), &(usize, Duration))| {
            (own.0 as f64 / own.1.as_secs_f64()) / (other.0 as f64 / other.1.as_secs_f64())
        };
        let ratios: Vec<f64> = self.timed().iter().zip(baseline.timed()).map(ratio).collect();
        let value = self.tok_per_s()? / baseline.tok_per_s()?;
        Some(Estimate { value, interval: bootstrap::of_mean(&ratios).interval })
    }

    /// Returns the standard errors over windows.
    pub fn standard_errors(&self) -> StandardErrors {
        if !self.compared {
            return StandardErrors::default();
        }
        let means = |value: fn(&Divergence) -> f64| -> Vec<f64> {
            let windows = self.positions.chunks(self.per_window);
            windows.map(|window| sum(window, value) / window.len() as f64).collect()
        };
        let (model, baseline) = (means(|d| d.model.nll as f64), means(|d| d.baseline.nll as f64));
        StandardErrors {
            delta_ppl: perplexity_difference_error(&model, &baseline),
            kld: standard_error(&means(|d| d.kld as f64)),
        }
    }

    /// Returns all metrics over all positions.
    pub fn measures(&self) -> Measures {
        self.measures_of(0..self.per_window)
    }

    /// Returns all metrics over some of every window's scored positions, counted from the first one.
    pub fn measures_of(&self, within: Range<usize>) -> Measures {
        let windows: Vec<&[Divergence]> =
            self.positions.chunks(self.per_window).map(|window| &window[within.clone()]).collect();
        let sums: Vec<Sums> = windows.iter().map(|window| Sums::of(window)).collect();
        let sorted = if self.compared { sorted(&windows) } else { Vec::new() };
        let found = bootstrap::estimates(windows.len(), |weights| {
            metrics(weights, within.len(), &sums, &sorted, self.compared)
        });
        let mut measures = Measures(found.map(Some));
        measures.retain(|metric| {
            metric != Metric::TokSRatio && (self.compared || !metric.describe().needs_baseline)
        });
        if let Some(max) = &mut measures.0[Metric::KldMax as usize] {
            max.interval = None;
        }
        measures
    }
}

/// What one window's positions add up to.
struct Sums {
    nll: f64,
    baseline_nll: f64,
    kld: f64,
    same_top: f64,
    in_top5: f64,
    /// Σ (p_model - p_baseline)² of the targets.
    squared_dp: f64,
}

impl Sums {
    fn of(window: &[Divergence]) -> Self {
        let probability = |score: Score| (-score.nll as f64).exp();
        Sums {
            nll: sum(window, |d| d.model.nll as f64),
            baseline_nll: sum(window, |d| d.baseline.nll as f64),
            kld: sum(window, |d| d.kld as f64),
            same_top: sum(window, |d| (d.rank == 0) as u32 as f64),
            in_top5: sum(window, |d| (d.rank < RANKS) as u32 as f64),
            squared_dp: sum(window, |d| (probability(d.model) - probability(d.baseline)).powi(2)),
        }
    }
}

fn sum(window: &[Divergence], value: impl Fn(&Divergence) -> f64) -> f64 {
    window.iter().map(value).sum()
}

/// Returns (divergence, window) of all positions, ascending.
fn sorted(windows: &[&[Divergence]]) -> Vec<(f32, u32)> {
    let all = windows.iter().zip(0..).flat_map(|(window, at)| window.iter().map(move |d| (d.kld, at)));
    let mut all: Vec<(f32, u32)> = all.collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all
}

/// Returns all metrics where window `i` counts `weights[i]` times.
fn metrics(
    weights: &[u32],
    per_window: usize,
    sums: &[Sums],
    sorted: &[(f32, u32)],
    compared: bool,
) -> [f64; COUNT] {
    let positions = weights.iter().sum::<u32>() as usize * per_window;
    let mean = |value: fn(&Sums) -> f64| {
        sums.iter().zip(weights).map(|(sums, &w)| value(sums) * w as f64).sum::<f64>() / positions as f64
    };
    let ppl = mean(|s| s.nll).exp();
    if !compared {
        return METRICS.each_ref().map(|row| if row.metric == Metric::Ppl { ppl } else { f64::NAN });
    }
    let baseline = mean(|s| s.baseline_nll).exp();
    let [median, p90, p99, p999] = quantiles(weights, positions, sorted, [0.5, 0.9, 0.99, 0.999]);
    METRICS.each_ref().map(|row| match row.metric {
        Metric::Ppl => ppl,
        Metric::DeltaPpl => ppl - baseline,
        Metric::DeltaPplPct => 100.0 * (ppl / baseline - 1.0),
        Metric::Kld => mean(|s| s.kld),
        Metric::KldMedian => median,
        Metric::KldP90 => p90,
        Metric::KldP99 => p99,
        Metric::KldP999 => p999,
        Metric::KldMax => sorted.last().map_or(f64::NAN, |last| last.0 as f64),
        Metric::Top1 => mean(|s| s.same_top),
        Metric::Top5 => mean(|s| s.in_top5),
        Metric::RmsDp => mean(|s| s.squared_dp).sqrt(),
        // No matter of positions.
        Metric::TokSRatio => f64::NAN,
    })
}

/// Returns quantiles (ascending shares) with linear interpolation between order statistics, each position counted as often
/// as its window.
fn quantiles<const N: usize>(
    weights: &[u32],
    positions: usize,
    sorted: &[(f32, u32)],
    shares: [f64; N],
) -> [f64; N] {
    let mut seen = 0;
    let mut entries = sorted.iter();
    let mut current = f64::NAN;
    // The value of the order statistic, for ascending ranks.
    let mut at_rank = |rank: usize| {
        while seen <= rank {
            let Some(&(value, window)) = entries.next() else { break };
            seen += weights[window as usize] as usize;
            current = value as f64;
        }
        current
    };
    shares.map(|share| {
        let at = share * (positions - 1) as f64;
        let below = at_rank(at.floor() as usize);
        let above = at_rank(at.ceil() as usize);
        below + (above - below) * at.fract()
    })
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use fastrand::Rng;
    use rayon::prelude::*;

    use super::*;

    const PER_WINDOW: usize = 16;

    fn normal(random: &mut Rng) -> f64 {
        (-2.0 * (1.0 - random.f64()).ln()).sqrt() * (2.0 * PI * random.f64()).cos()
    }

    /// How strongly windows differ: standard deviation of the logarithm of a window's mean divergence.
    const SPREAD: f64 = 0.3;

    /// Sixty windows whose positions share luck: divergences exp(SPREAD · g) · Exp(1) / 20, a baseline's loss of 2 + 0.2 g',
    /// 0.03 + 0.01 g'' more for the model, and favourites shared with a probability uniform in 0.8 ..= 1.
    fn synthetic(seed: u64) -> Samples {
        let mut random = Rng::with_seed(seed);
        let mut samples = Samples::new(PER_WINDOW, true);
        for _ in 0..60 {
            let scale = (SPREAD * normal(&mut random)).exp() / 20.0;
            let nll = 2.0 + 0.2 * normal(&mut random);
            let more = 0.03 + 0.01 * normal(&mut random);
            let agreement = 0.8 + 0.2 * random.f64();
            let position = |_| Divergence {
                baseline: Score { nll: nll as f32, top: 0 },
                model: Score { nll: (nll + more) as f32, top: 0 },
                kld: (-scale * (1.0 - random.f64()).ln()) as f32,
                rank: (random.f64() > agreement) as u32 * RANKS,
            };
            samples.add((0..PER_WINDOW).map(position).collect::<Vec<_>>()).unwrap();
        }
        samples
    }

    /// The share of a mixture of exponentials below `x`, by integrating over the windows' luck.
    fn share_below(x: f64) -> f64 {
        let steps = (-400..=400).map(|i| i as f64 / 50.0);
        let density = |g: f64| (-g * g / 2.0).exp() / (2.0 * PI).sqrt() / 50.0;
        steps.map(|g| density(g) * (1.0 - (-20.0 * x * (-SPREAD * g).exp()).exp())).sum()
    }

    fn true_quantile(share: f64) -> f64 {
        let (mut low, mut high) = (0.0, 10.0);
        for _ in 0..60 {
            let middle: f64 = (low + high) / 2.0;
            *(if share_below(middle) < share { &mut low } else { &mut high }) = middle;
        }
        low
    }

    #[test]
    fn intervals_hold_the_truth_in_at_least_93_of_100_repetitions() {
        const REPETITIONS: u64 = 1000;
        let truth = [
            (Metric::DeltaPpl, 2.03f64.exp() - 2f64.exp()),
            (Metric::Kld, (SPREAD * SPREAD / 2.0).exp() / 20.0),
            (Metric::KldMedian, true_quantile(0.5)),
            (Metric::KldP90, true_quantile(0.9)),
            (Metric::Top1, 0.9),
        ];
        let found: Vec<Measures> =
            (0..REPETITIONS).into_par_iter().map(|seed| synthetic(seed).measures()).collect();
        for (metric, value) in truth {
            let holds = |m: &&Measures| {
                m.get(metric)
                    .and_then(|e| e.interval)
                    .is_some_and(|[low, high]| low <= value && value <= high)
            };
            let held = found.iter().filter(holds).count() as f64 / REPETITIONS as f64;
            println!("{metric:?}: {held}");
            assert!((0.93..=0.97).contains(&held), "{metric:?}: {held}");
        }
    }

    #[test]
    fn metrics_are_their_definitions() {
        let score = |nll: f32| Score { nll, top: 0 };
        let position = |kld: f32, rank: u32, base: f32, model: f32| Divergence {
            baseline: score(base),
            model: score(model),
            kld,
            rank,
        };
        let mut samples = Samples::new(2, true);
        samples.add([position(0.1, 0, 1.0, 1.5), position(0.3, 4, 2.0, 2.0)]).unwrap();
        samples.add([position(0.2, RANKS, 1.0, 0.5), position(0.4, 0, 2.0, 3.0)]).unwrap();
        let measures = samples.measures();
        let close = |metric: Metric, expected: f64| {
            let found = measures.value(metric).unwrap();
            assert!((found - expected).abs() < 1e-6, "{metric:?}: {found} for {expected}");
        };
        close(Metric::Ppl, 1.75f64.exp());
        close(Metric::DeltaPpl, 1.75f64.exp() - 1.5f64.exp());
        close(Metric::DeltaPplPct, 100.0 * (0.25f64.exp() - 1.0));
        close(Metric::Kld, 0.25);
        close(Metric::KldMedian, 0.25);
        close(Metric::KldP90, 0.37);
        close(Metric::KldMax, 0.4);
        close(Metric::Top1, 0.5);
        close(Metric::Top5, 0.75);
        let change = |base: f64, model: f64| ((-model).exp() - (-base).exp()).powi(2);
        close(Metric::RmsDp, ((change(1.0, 1.5) + change(1.0, 0.5) + change(2.0, 3.0)) / 4.0).sqrt());
        let second = samples.measures_of(1..2);
        assert_eq!(second.value(Metric::Top1), Some(0.5));
        assert!((second.value(Metric::Kld).unwrap() - 0.35).abs() < 1e-6);
    }

    #[test]
    fn weighted_quantiles_equal_those_of_repeated_positions() {
        let mut random = Rng::with_seed(7);
        let values: Vec<(f32, u32)> = (0..40).map(|i| (random.f32(), i % 4)).collect();
        let weights = [2, 0, 1, 1];
        let mut repeated: Vec<f32> = values
            .iter()
            .flat_map(|&(value, window)| vec![value; weights[window as usize] as usize])
            .collect();
        let mut sorted = values;
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        let shares = [0.0, 0.31, 0.9, 1.0];
        let expected = shares.map(|share| super::super::statistics::quantile(&mut repeated, share));
        assert_eq!(quantiles(&weights, 40, &sorted, shares), expected);
    }

    #[test]
    fn the_first_pass_does_not_count_for_speed() {
        let samples = |milliseconds: [u64; 3]| {
            let mut samples = Samples::new(1, true);
            milliseconds.iter().for_each(|&ms| samples.add_pass(100, Duration::from_millis(ms)));
            samples
        };
        let (slow, fast) = (samples([9000, 100, 100]), samples([1, 50, 50]));
        assert_eq!(slow.tok_per_s(), Some(1000.0));
        let ratio = fast.speed_ratio(&slow).unwrap();
        assert!((ratio.value - 2.0).abs() < 1e-9 && ratio.interval.is_some());
        let mut one = Samples::new(1, true);
        assert_eq!(one.tok_per_s(), None);
        one.add_pass(10, Duration::from_secs(1));
        assert_eq!(one.tok_per_s(), Some(10.0));
    }

    #[test]
    fn a_model_without_baseline_has_a_perplexity_and_nothing_else() {
        let mut samples = Samples::new(1, false);
        samples.add_scores(&[Score { nll: 1.0, top: 3 }, Score { nll: 2.0, top: 3 }]).unwrap();
        let measures = samples.measures();
        assert_eq!(measures.0.iter().flatten().count(), 1);
        assert!((measures.value(Metric::Ppl).unwrap() - 1.5f64.exp()).abs() < 1e-9);
        assert_eq!(samples.standard_errors(), StandardErrors::default());
    }
}
