//! Second moments of a linear's inputs while they are summed, chunk by chunk, on a backend.

use anyhow::Result;
use rayon::prelude::*;

use crate::backend::cpu::round_rows;
use crate::backend::{MomentSums, SecondMoments};
use crate::scheme::Activations;

/// Returns rows spread evenly over `rows`, the first among them, about `count`.
pub(super) fn sampled_rows(rows: usize, count: usize) -> Vec<usize> {
    (0..rows).step_by(rows.div_ceil(count).max(1)).collect()
}

/// Moments while they are summed, with the backend.
pub(super) struct Sums<'a, B: SecondMoments> {
    backend: &'a B,
    pub(super) moments: MomentSums<B::Tensor>,
    /// Some rows of X̃, where smoothing factors are searched.
    pub(super) sample: Vec<f32>,
    /// Rows to take from each chunk.
    sampled: usize,
    /// What the engine does to X̃ before it multiplies.
    activations: Activations,
}

impl<'a, B: SecondMoments> Sums<'a, B> {
    /// Returns sums over no tokens, for inputs of `cols` columns; of drift with residual streams of `hidden` columns.
    pub(super) fn new(backend: &'a B, cols: usize, hidden: Option<usize>) -> Result<Self> {
        let zeros = |rows: usize| backend.zeros(rows, cols);
        let drift = hidden.map(zeros).transpose()?;
        let moments = MomentSums { cols, tokens: 0, hessian: zeros(cols)?, cross: zeros(cols)?, drift };
        Ok(Sums { backend, moments, sample: Vec::new(), sampled: 0, activations: Activations::Full })
    }

    /// Returns sums over inputs as the engine rounds them: what the linear's weights really meet.
    pub(super) fn with_rounding(self, activations: Activations) -> Self {
        Sums { activations, ..self }
    }

    /// Returns sums that also keep about `tokens` rows of X̃ of every chunk.
    pub(super) fn with_sample(self, tokens: usize) -> Self {
        Sums { sampled: tokens, ..self }
    }

    /// Adds the inputs of the next linears in both models, of `tokens` tokens; `streams` are the residual streams that the
    /// linear adds to, where drift is summed.
    pub(super) fn add(
        &mut self,
        tokens: usize,
        full: &B::Tensor,
        quantized: &B::Tensor,
        streams: Option<(&B::Tensor, &B::Tensor)>,
    ) -> Result<()> {
        if self.sampled > 0 {
            let rows = sampled_rows(tokens, self.sampled);
            self.sample.extend(self.backend.read(&self.backend.select_rows(quantized, &rows)?)?);
        }
        let rounded = match round_rows(self.activations) {
            None => None,
            Some(round) => {
                let (cols, mut values) = (self.moments.cols, self.backend.read(quantized)?);
                values.par_chunks_mut(cols).for_each(round);
                Some(self.backend.tensor(tokens, cols, &values)?)
            }
        };
        let quantized = rounded.as_ref().unwrap_or(quantized);
        let moments = &mut self.moments;
        self.backend.add_moment(&mut moments.hessian, quantized, quantized)?;
        self.backend.add_moment(&mut moments.cross, full, quantized)?;
        if let (Some(drift), Some((full, quantized_stream))) = (&mut moments.drift, streams) {
            let mut difference = full.clone();
            self.backend.subtract(&mut difference, quantized_stream)?;
            self.backend.add_moment(drift, &difference, quantized)?;
        }
        moments.tokens += tokens;
        Ok(())
    }
}
