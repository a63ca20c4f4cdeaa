//! Moves size from a linear's inputs to its weights, channel by channel, and takes it back where the inputs come from:
//!
//! ```text
//! x Wᵀ = (x / s) (W · s)ᵀ        s: one factor per input channel
//! norm → q, k, v and norm → gate, up:  the norm's gain is divided by s
//! up → down:                           up's rows are divided by s (what silu(gate) multiplies)
//! ```
//!
//! with `s = rms(x)^α`, the root mean square over tokens. Where only weights are quantized, larger factors for channels with
//! larger inputs give their weights finer steps: AWQ (Lin et al., arXiv 2306.00978; it takes the mean size). Where inputs
//! are, channels far larger than the others cost all others their resolution. SmoothQuant (Xiao et al., arXiv 2211.10438) then
//! sets `max|x|^α / max|w|^(1-α)`, but maxima follow a few tokens. Simulated with nearest codes, INT8 per token, α = ½,
//! rounding the inputs of q, k, v alone cost a KLD of .00017 on tiny-llama (SmoothQuant's factors .00049, none .00066) and
//! .00013 on small-qwen3 (.00015, .00014); those of down alone .0043 on small-qwen3 (none .0048). Factors learned for the
//! expected divergence on 12,000 tokens were better there by a quarter and worse on other text.
//!
//! A norm's gain is rounded to its stored number type first, and what it then divides by is the factor
//! ([`Factors::fold`]): the rewritten full-precision model differs from the original by roundings of F32 alone.

use crate::tensor::Dense;

/// The factors of one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// α.
    pub strength: f32,
    /// One per channel, positive.
    pub scales: Vec<f32>,
}

impl Factors {
    /// Returns the factors for `inputs` `[tokens, cols]` and α = `strength`, of geometric mean about one.
    pub fn new(inputs: &[f32], cols: usize, strength: f32) -> Self {
        let mut squares = vec![0f32; cols];
        for row in inputs.chunks_exact(cols) {
            squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
        }
        let exponents: Vec<f32> = squares.iter().map(|sum| 0.5 * strength * sum.log2()).collect();
        let finite = || exponents.iter().filter(|e| e.is_finite());
        let mean = finite().sum::<f32>() / finite().count().max(1) as f32;
        // Channels that are never used keep their size.
        let factor = |e: &f32| if e.is_finite() { (e - mean).clamp(-12.0, 12.0).exp2() } else { 1.0 };
        Factors { strength, scales: exponents.iter().map(factor).collect() }
    }

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
    use crate::method::testing::Random;
    use crate::tensor::Dtype;

    const COLS: usize = 64;

    /// Inputs some of whose channels are a hundred times larger than the rest.
    fn outliers(random: &mut Random, tokens: usize) -> Vec<f32> {
        let mut inputs = random.normal(tokens * COLS);
        for row in inputs.chunks_mut(COLS) {
            row[3] *= 100.0;
            row[17] *= 60.0;
        }
        inputs
    }

    #[test]
    fn folding_leaves_outputs_unchanged_in_every_number_type() {
        let mut random = Random::new(21);
        let inputs = outliers(&mut random, 24);
        let weights = random.normal(8 * COLS);
        let gains: Vec<f32> = (0..COLS).map(|i| if i == 5 { 0.0 } else { 0.5 + random.uniform() }).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let gain = Dense::from_f32(vec![COLS], &gains).cast(dtype);
            let mut factors = Factors::new(&inputs, COLS, 0.6);
            assert!(factors.scales[3] > 4.0 * factors.scales[0]);
            let folded = factors.fold(&gain);
            assert_eq!(folded.dtype, dtype);
            let mut scaled_weights = weights.clone();
            multiply_columns(&mut scaled_weights, &factors.scales);
            let dot = |x: &[f32], gain: &[f32], w: &[f32]| -> [f64; 2] {
                let terms = || x.iter().zip(gain).zip(w).map(|((x, g), w)| (x * g) as f64 * *w as f64);
                [terms().sum(), terms().map(f64::abs).sum()]
            };
            let (gain, folded) = (gain.to_f32(), folded.to_f32());
            for x in inputs.chunks(COLS) {
                for (w, v) in weights.chunks(COLS).zip(scaled_weights.chunks(COLS)) {
                    let ([before, size], [after, _]) = (dot(x, &gain, w), dot(x, &folded, v));
                    // Three F32 roundings a term on each side.
                    assert!((before - after).abs() <= 6.0 * f32::EPSILON as f64 * size, "{dtype}");
                }
            }
        }
    }

    #[test]
    fn at_full_strength_all_channels_that_are_used_become_alike() {
        let mut inputs = outliers(&mut Random::new(22), 64);
        inputs.iter_mut().skip(9).step_by(COLS).for_each(|x| *x = 0.0);
        let factors = Factors::new(&inputs, COLS, 1.0);
        assert_eq!(factors.scales[9], 1.0);
        divide_columns(&mut inputs, &factors.scales);
        let squares = |col: usize| inputs.iter().skip(col).step_by(COLS).map(|x| x * x).sum::<f32>();
        for col in (0..COLS).filter(|&col| col != 9) {
            // log2 and exp2 of numbers below 2^16, to 24 bits.
            assert!((squares(col) / squares(0) - 1.0).abs() < 1e-4, "column {col}");
        }
    }
}
