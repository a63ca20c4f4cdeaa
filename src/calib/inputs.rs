//! What the linears of a stage read in the quantized model, looked at before it is summed: some of its rows, and how large
//! each channel becomes over all of them. Smoothing factors and the scale of static inputs are found from that.

use anyhow::{Result, ensure};

use super::smoothing::divide_columns;
use crate::backend::SecondMoments;
use crate::num::Codec;
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// Tokens whose inputs are looked at closely. They are spread over all of the text, since its parts differ in kind: smoothing
/// down for the first two chunks alone was worse (INT8 per token: KLD .00326 for .00314 on tiny-llama, .00575 for .00572 on
/// small-qwen3).
const SAMPLED_TOKENS: usize = 1024;
/// What the search for a static scale tries, in units of the scale that clips nothing.
const CLIPS: [f32; 13] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.18, 0.125, 0.0625];
/// Codes on either side of zero that the largest value may take without being clipped.
const CODES: f32 = 127.0;

/// Returns how many rows to look at in each of so many chunks.
pub(super) fn rows_of_each(chunks: usize) -> usize {
    SAMPLED_TOKENS.div_ceil(chunks.max(1))
}

/// Returns rows spread evenly over `rows`, the first among them, about `count`.
pub(super) fn sampled_rows(rows: usize, count: usize) -> Vec<usize> {
    (0..rows).step_by(rows.div_ceil(count).max(1)).collect()
}

/// Inputs of one stage.
pub(super) struct Inputs<'a, B: SecondMoments> {
    backend: &'a B,
    cols: usize,
    /// Some rows `[_, cols]`.
    pub(super) sample: Vec<f32>,
    /// Rows to take from each chunk.
    sampled: usize,
    /// max|x| of each channel so far `[1, cols]`.
    maxima: B::Tensor,
}

impl<'a, B: SecondMoments> Inputs<'a, B> {
    /// Returns what is known before any token, for inputs of `cols` columns that come in so many chunks.
    pub(super) fn new(backend: &'a B, cols: usize, chunks: usize) -> Result<Self> {
        Ok(Inputs {
            backend,
            cols,
            sample: Vec::new(),
            sampled: rows_of_each(chunks),
            maxima: backend.zeros(1, cols)?,
        })
    }

    /// Looks at the inputs `[tokens, cols]` of a chunk.
    pub(super) fn add(&mut self, tokens: usize, x: &B::Tensor) -> Result<()> {
        let rows = sampled_rows(tokens, self.sampled);
        self.sample.extend(self.backend.read(&self.backend.select_rows(x, &rows)?)?);
        self.backend.add_maxima(&mut self.maxima, x)
    }

    /// Returns the one scale for these inputs, each column divided by its factor in `factors` first, that lets the linears
    /// behind them err least: `weights` `[_, cols]`, in the units of the divided columns. Scales that clip the largest values
    /// give all others finer steps; the error is that of the outputs, relative token by token, since a
    /// few tokens with huge activations would outweigh all others (relative to the residual stream that outputs join it was worse: KLD .0191 for .0178 on small-qwen3). Without
    /// clipping the KLD of tiny-llama is .0393, at six tenths .0165, with this search .0116.
    /// The scale is a BF16 number, so that engines that keep it so compute with the same.
    ///
    /// # Errors
    /// If an input is not finite.
    pub(super) fn static_scale(&self, factors: Option<&[f32]>, weights: &[Matrix]) -> Result<f32> {
        let divided = |values: &[f32]| -> Vec<f32> {
            let mut values = values.to_vec();
            factors.into_iter().for_each(|factors| divide_columns(&mut values, factors));
            values
        };
        let maxima = divided(&self.backend.read(&self.maxima)?);
        ensure!(maxima.iter().all(|x| x.is_finite()), "inputs are not finite; they cannot be quantized");
        let largest = maxima.into_iter().map(f32::abs).fold(0.0, f32::max);
        let sample = divided(&self.sample);
        let inputs = self.backend.tensor(sample.len() / self.cols, self.cols, &sample)?;
        let weights = weights.iter().map(|weight| self.backend.upload(weight.clone()));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let outputs = |rounding| -> Result<Vec<Vec<f32>>> {
            let outputs =
                weights.iter().map(|w| self.backend.read(&self.backend.linear(&inputs, w, None, rounding)?));
            outputs.collect()
        };
        let wanted = outputs(Activations::Full)?;
        let tokens = sample.len() / self.cols;
        let mut best = (f64::INFINITY, 1.0);
        for clip in CLIPS {
            let scale = clip * unclipped_scale(largest);
            let scale = Codec::BF16.decode(Codec::BF16.encode(scale));
            let found = outputs(Activations::Int8PerTensor(scale))?;
            let pairs = found.iter().zip(&wanted);
            let error: f64 = pairs.map(|(found, wanted)| relative_error(found, wanted, tokens)).sum();
            if error < best.0 {
                best = (error, scale);
            }
        }
        Ok(best.1)
    }
}

/// Returns the static scale that clips nothing of inputs up to `largest` in size. Inputs without any signal still need a
/// scale that can divide.
fn unclipped_scale(largest: f32) -> f32 {
    let scale = largest / CODES;
    if scale > f32::MIN_POSITIVE { scale } else { 1.0 }
}

/// Returns the squared error of outputs `[tokens, _]`, relative to each token's own and summed over tokens.
fn relative_error(found: &[f32], wanted: &[f32], tokens: usize) -> f64 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::backend::cpu::Cpu;
    use crate::tensor::Dense;

    fn scale_of(values: &[f32]) -> Result<f32> {
        let mut inputs = Inputs::new(&Cpu, 4, 1).unwrap();
        inputs.add(values.len() / 4, &Cpu.tensor(values.len() / 4, 4, values).unwrap()).unwrap();
        inputs.static_scale(None, &[Matrix::Dense(Dense::from_f32(vec![1, 4], &[1.0; 4]))])
    }

    #[test]
    fn a_scale_is_found_for_finite_inputs_only_wherever_the_others_stand() {
        let finite = [1.0, -2.0, 0.5, 1.5, 0.0, 2.0, 1.0, -1.0];
        assert!(scale_of(&finite).unwrap() > 0.0 && scale_of(&[0.0; 8]).unwrap() > 0.0);
        for at in 0..finite.len() {
            for value in [f32::NAN, f32::INFINITY] {
                let mut values = finite;
                values[at] = value;
                assert!(scale_of(&values).unwrap_err().to_string().contains("not finite"), "{value} at {at}");
            }
        }
    }
}
