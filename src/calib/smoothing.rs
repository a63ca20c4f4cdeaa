//! Moves size from a linear's inputs to its weights, channel by channel, and takes it back where the inputs come from:
//!
//! ```text
//! x Wᵀ = (x / s) (W · s)ᵀ        s: one factor per input channel
//! norm → q, k, v and norm → gate, up:  the norm's gain is divided by s
//! up → down:                           up's rows are divided by s (what silu(gate) multiplies)
//! ```
//!
//! Where inputs are quantized, channels far larger than the others cost all others their resolution: SmoothQuant
//! (Xiao et al., arXiv 2211.10438) sets `s = max|x|^α / max|w|^(1-α)`. Where only weights are, larger factors for channels
//! with larger inputs give their weights finer steps: AWQ (Lin et al., arXiv 2306.00978), `s = rms(x)^α` (AWQ
//! itself takes the mean size). Between up and down that is better with rounded inputs too: simulated with
//! nearest codes on small-qwen3 (16 windows, α = ½) it took the KLD of W8A8 from .00605 to .00562, the mean size to .00587.
//!
//! A norm's gain is rounded to its stored number type first, and what it then divides by is the factor
//! ([`Factors::fold`]): the rewritten full-precision model differs from the original by roundings of F32 alone. α is
//! searched per linear by the outputs' error with inputs and weights rounded as the engine will, relative token by token:
//! a few tokens with huge activations would outweigh all others.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::inputs::unclipped_scale;
use crate::backend::Backend;
use crate::scheme::fit::{ScaleRule, fit};
use crate::scheme::{Activations, Rounding, Scheme};
use crate::tensor::{Dense, Matrix};

/// Whether and how strongly.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Smoothing {
    /// Not at all.
    Off,
    /// With this α everywhere.
    Fixed(f32),
    /// With the best α of each linear.
    Search,
}

/// What [`Smoothing::Search`] tries; 0 is no smoothing.
const STRENGTHS: [f32; 9] = [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// The factors of one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// α.
    pub strength: f32,
    /// One per channel, positive.
    pub scales: Vec<f32>,
}

impl Factors {
    /// Returns `gain` divided by the factors, in `gain`'s number type, and makes the factors what it was divided by.
    pub fn fold(&mut self, gain: &Dense) -> Dense {
        let values = gain.to_f32();
        let divided: Vec<f32> = values.iter().zip(&self.scales).map(|(g, s)| g / s).collect();
        let divided = Dense::from_f32(gain.shape.clone(), &divided).cast(gain.dtype);
        let mut stored = divided.to_f32();
        for ((stored, scale), value) in stored.iter_mut().zip(&mut self.scales).zip(values) {
            *scale = value / *stored;
            if !(scale.is_finite() && *scale > 0.0) {
                // A gain of zero, or one that leaves its type's range.
                (*stored, *scale) = (value, 1.0);
            }
        }
        Dense::from_f32(gain.shape.clone(), &stored).cast(gain.dtype)
    }
}

/// The linears that read one input, with rows of it.
pub struct Linears<'a> {
    /// `[tokens, cols]`
    pub inputs: &'a [f32],
    /// Input channels.
    pub cols: usize,
    /// Weights `[rows, cols]` and what they become.
    pub weights: &'a [(Vec<f32>, Scheme)],
    /// What the engine does to the inputs.
    pub activations: Activations,
    /// Whether the factors mind the weights' sizes too, as SmoothQuant's do.
    pub against_weights: bool,
}

impl Linears<'_> {
    /// Returns the factors that `smoothing` asks for.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn factors<B: Backend>(&self, backend: &B, smoothing: Smoothing) -> Result<Factors> {
        let of = |strength| Factors { strength, scales: self.scales(strength) };
        match smoothing {
            Smoothing::Off => Ok(of(0.0)),
            Smoothing::Fixed(strength) => Ok(of(strength)),
            Smoothing::Search => {
                let inputs = backend.tensor(self.inputs.len() / self.cols, self.cols, self.inputs)?;
                let wanted = self.weights.iter().map(|(weights, _)| {
                    let weight = backend.upload(self.dense(weights))?;
                    backend.read(&backend.linear(&inputs, &weight, None, Rounding::None)?)
                });
                let wanted = wanted.collect::<Result<Vec<_>>>()?;
                let mut best: Option<(f64, Factors)> = None;
                for factors in STRENGTHS.map(of) {
                    let error = self.error(backend, &factors.scales, &wanted)?;
                    if best.as_ref().is_none_or(|(least, _)| error < *least) {
                        best = Some((error, factors));
                    }
                }
                Ok(best.map_or_else(|| of(0.0), |(_, factors)| factors))
            }
        }
    }

    fn dense(&self, weights: &[f32]) -> Matrix {
        Matrix::Dense(Dense::from_f32(vec![weights.len() / self.cols, self.cols], weights))
    }

    /// Returns the factors for a strength, of geometric mean about one.
    fn scales(&self, strength: f32) -> Vec<f32> {
        let exponents: Vec<f32> = match (strength, self.against_weights) {
            (0.0, _) => return vec![1.0; self.cols],
            (_, false) => {
                let squares = column_sizes(self.inputs, self.cols, |sum, x| sum + x * x);
                squares.iter().map(|sum| 0.5 * strength * sum.log2()).collect()
            }
            _ => {
                let inputs = column_sizes(self.inputs, self.cols, f32::max);
                let mut weights = vec![0f32; self.cols];
                for (values, _) in self.weights {
                    let sizes = column_sizes(values, self.cols, f32::max);
                    weights.iter_mut().zip(sizes).for_each(|(w, size)| *w = w.max(size));
                }
                let pairs = inputs.iter().zip(&weights);
                pairs.map(|(x, w)| strength * x.log2() - (1.0 - strength) * w.log2()).collect()
            }
        };
        let finite = || exponents.iter().filter(|e| e.is_finite());
        let mean = finite().sum::<f32>() / finite().count().max(1) as f32;
        // Channels that are never used keep their size.
        let factor = |e: &f32| if e.is_finite() { (e - mean).clamp(-12.0, 12.0).exp2() } else { 1.0 };
        exponents.iter().map(factor).collect()
    }

    /// Returns the squared error of the outputs with inputs and weights rounded after rescaling, relative to each token's
    /// outputs and summed over tokens and linears.
    fn error<B: Backend>(&self, backend: &B, scales: &[f32], wanted: &[Vec<f32>]) -> Result<f64> {
        let mut inputs = self.inputs.to_vec();
        divide_columns(&mut inputs, scales);
        let largest = || Ok(unclipped_scale(inputs.iter().fold(0.0, |a: f32, x| a.max(x.abs()))));
        let rounding = self.activations.rounding(largest)?;
        let tokens = inputs.len() / self.cols;
        let inputs = backend.tensor(tokens, self.cols, &inputs)?;
        let mut error = 0.0;
        for ((weights, scheme), wanted) in self.weights.iter().zip(wanted) {
            let mut weights = weights.clone();
            multiply_columns(&mut weights, scales);
            let rows = weights.len() / self.cols;
            let q = fit(*scheme, &weights, rows, self.cols, None, ScaleRule::Search);
            let weight = backend.upload(Matrix::Quantized(q))?;
            let found = backend.read(&backend.linear(&inputs, &weight, None, rounding)?)?;
            error += relative_error(&found, wanted, tokens);
        }
        Ok(error)
    }
}

/// Returns the squared error of outputs `[tokens, _]`, relative to each token's own and summed over tokens.
pub(super) fn relative_error(found: &[f32], wanted: &[f32], tokens: usize) -> f64 {
    let width = (wanted.len() / tokens.max(1)).max(1);
    let pairs = found.chunks(width).zip(wanted.chunks(width));
    let relative = |(found, wanted): (&[f32], &[f32])| {
        let square = |x: f32| (x as f64).powi(2);
        let difference: f64 = found.iter().zip(wanted).map(|(a, b)| square(a - b)).sum();
        let energy: f64 = wanted.iter().map(|x| square(*x)).sum();
        if energy > 0.0 { difference / energy } else { 0.0 }
    };
    pairs.map(relative).sum()
}

fn column_sizes(values: &[f32], cols: usize, combine: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    let mut sizes = vec![0f32; cols];
    for row in values.chunks_exact(cols) {
        sizes.iter_mut().zip(row).for_each(|(size, x)| *size = combine(*size, x.abs()));
    }
    sizes
}

/// Multiplies column j of `values` `[_, scales.len()]` with `scales[j]`.
pub fn multiply_columns(values: &mut [f32], scales: &[f32]) {
    values
        .chunks_exact_mut(scales.len())
        .for_each(|row| row.iter_mut().zip(scales).for_each(|(x, s)| *x *= s));
}

/// Divides column j of `values` `[_, scales.len()]` by `scales[j]`.
pub fn divide_columns(values: &mut [f32], scales: &[f32]) {
    values
        .chunks_exact_mut(scales.len())
        .for_each(|row| row.iter_mut().zip(scales).for_each(|(x, s)| *x /= s));
}

/// Divides row i of `values` `[scales.len(), cols]` by `scales[i]`.
pub fn divide_rows(values: &mut [f32], scales: &[f32]) {
    let cols = values.len() / scales.len();
    values.chunks_exact_mut(cols).zip(scales).for_each(|(row, s)| row.iter_mut().for_each(|x| *x /= s));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::method::testing::Random;
    use crate::scheme::schemes::INT8;
    use crate::tensor::Dtype;

    /// Inputs some of whose channels are a hundred times larger than the rest.
    fn outliers(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
        let mut inputs = random.normal(tokens * cols);
        for row in inputs.chunks_mut(cols) {
            row[3] *= 100.0;
            row[17] *= 60.0;
        }
        inputs
    }

    fn with_rounded_inputs<'a>(
        inputs: &'a [f32],
        cols: usize,
        weights: &'a [(Vec<f32>, Scheme)],
    ) -> Linears<'a> {
        Linears { inputs, cols, weights, activations: Activations::Int8PerToken, against_weights: true }
    }

    #[test]
    fn folding_leaves_outputs_unchanged_in_every_number_type() {
        let (tokens, cols) = (24, 64);
        let mut random = Random::new(21);
        let inputs = outliers(&mut random, tokens, cols);
        let weights = [(random.normal(8 * cols), INT8)];
        let linears = with_rounded_inputs(&inputs, cols, &weights);
        let gains: Vec<f32> = (0..cols).map(|i| if i == 5 { 0.0 } else { 0.5 + random.uniform() }).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let gain = Dense::from_f32(vec![cols], &gains).cast(dtype);
            let mut factors = linears.factors(&Cpu, Smoothing::Fixed(0.6)).unwrap();
            assert!(factors.scales[3] > 4.0 * factors.scales[0]);
            let folded = factors.fold(&gain);
            assert_eq!(folded.dtype, dtype);
            let mut scaled_weights = weights[0].0.clone();
            multiply_columns(&mut scaled_weights, &factors.scales);
            let dot = |x: &[f32], gain: &[f32], w: &[f32]| -> [f64; 2] {
                let terms = || x.iter().zip(gain).zip(w).map(|((x, g), w)| (x * g) as f64 * *w as f64);
                [terms().sum(), terms().map(f64::abs).sum()]
            };
            let (gain, folded) = (gain.to_f32(), folded.to_f32());
            for x in inputs.chunks(cols) {
                for (w, v) in weights[0].0.chunks(cols).zip(scaled_weights.chunks(cols)) {
                    let ([before, size], [after, _]) = (dot(x, &gain, w), dot(x, &folded, v));
                    // Three F32 roundings a term on each side.
                    assert!((before - after).abs() <= 6.0 * f32::EPSILON as f64 * size, "{dtype}");
                }
            }
        }
    }

    #[test]
    fn the_search_smooths_outliers_away() {
        let (tokens, cols) = (64, 64);
        let mut random = Random::new(22);
        let inputs = outliers(&mut random, tokens, cols);
        let weights = [(random.normal(16 * cols), INT8)];
        let linears = with_rounded_inputs(&inputs, cols, &weights);
        let wanted = [Cpu
            .read(
                &Cpu.linear(
                    &Cpu.tensor(tokens, cols, &inputs).unwrap(),
                    &linears.dense(&weights[0].0),
                    None,
                    Rounding::None,
                )
                .unwrap(),
            )
            .unwrap()];
        let chosen = linears.factors(&Cpu, Smoothing::Search).unwrap();
        let plain = linears.error(&Cpu, &vec![1.0; cols], &wanted).unwrap();
        let smoothed = linears.error(&Cpu, &chosen.scales, &wanted).unwrap();
        assert!(smoothed < 0.2 * plain, "{smoothed} of {plain} with {}", chosen.strength);
    }
}
