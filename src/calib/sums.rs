//! Second moments of a linear's inputs while they are summed, chunk by chunk, on a backend.

use anyhow::Result;

use crate::backend::{MomentSums, SecondMoments};
use crate::scheme::Activations;

/// Moments while they are summed, with the backend.
pub(super) struct Sums<'a, B: SecondMoments> {
    backend: &'a B,
    pub(super) moments: MomentSums<B::Tensor>,
    /// What the engine does to X̃ before it multiplies.
    rounding: Activations<f32>,
}

impl<'a, B: SecondMoments> Sums<'a, B> {
    /// Returns sums over no tokens, for inputs of `cols` columns; of drift with residual streams of `hidden` columns.
    pub(super) fn new(backend: &'a B, cols: usize, hidden: Option<usize>) -> Result<Self> {
        let zeros = |rows: usize| backend.zeros(rows, cols);
        let drift = hidden.map(zeros).transpose()?;
        let moments = MomentSums { cols, tokens: 0, hessian: zeros(cols)?, cross: zeros(cols)?, drift };
        Ok(Sums { backend, moments, rounding: Activations::Full })
    }

    /// Returns sums over inputs as the engine rounds them: what the linear's weights really meet.
    pub(super) fn with_rounding(self, rounding: Activations<f32>) -> Self {
        Sums { rounding, ..self }
    }

    /// Adds the inputs of the next linears in both models, of `tokens` tokens; `streams` are the residual streams that the
    /// linear adds to, where drift is summed; `factors` those of each token.
    pub(super) fn add(
        &mut self,
        tokens: usize,
        full: &B::Tensor,
        quantized: &B::Tensor,
        streams: Option<(&B::Tensor, &B::Tensor)>,
        factors: Option<&[f32]>,
    ) -> Result<()> {
        let rounded = match self.rounding {
            Activations::Full => None,
            rounding => Some(self.backend.round_inputs(quantized, rounding)?),
        };
        let scaled = |x: &B::Tensor| factors.map(|factors| self.backend.scale_rows(x, factors)).transpose();
        let quantized = rounded.as_ref().unwrap_or(quantized);
        let (own, others) = (scaled(quantized)?, scaled(full)?);
        let (quantized, full) = (own.as_ref().unwrap_or(quantized), others.as_ref().unwrap_or(full));
        let moments = &mut self.moments;
        self.backend.add_moment(&mut moments.hessian, quantized, quantized)?;
        self.backend.add_moment(&mut moments.cross, full, quantized)?;
        if let (Some(drift), Some((full, quantized_stream))) = (&mut moments.drift, streams) {
            let mut difference = full.clone();
            self.backend.subtract(&mut difference, quantized_stream)?;
            difference = scaled(&difference)?.unwrap_or(difference);
            self.backend.add_moment(drift, &difference, quantized)?;
        }
        moments.tokens += tokens;
        Ok(())
    }
}
