//! One matrix from weights to codes: target, scales, feedback rounding, descent.

use anyhow::Result;

use super::descent::descend;
use super::gptq::{Feedback, gptq};
use super::mismatch::corrected_target;
use super::statistics::Moments;
use crate::scheme::fit::{ScaleRule, fit};
use crate::scheme::{QTensor, Scheme};

/// The knobs of calibrated rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Strength of the input-mismatch correction, 0..=1.
    pub mismatch: f32,
    /// Damping relative to the Hessian's mean diagonal.
    pub damp: f32,
    /// Coordinate-descent sweeps over codes and scales.
    pub sweeps: usize,
    /// How power-of-two scales are chosen.
    pub scale_rule: ScaleRule,
}

impl Default for Settings {
    /// The best fixed settings over the models measured.
    fn default() -> Self {
        Settings { mismatch: 0.5, damp: 0.05, sweeps: 4, scale_rule: ScaleRule::Search }
    }
}

/// The statistics of one input with everything derived from them that its linears share.
pub struct Solver {
    moments: Moments,
    importances: Vec<f32>,
    feedback: Feedback,
    damped: Vec<f32>,
    settings: Settings,
}

impl Solver {
    /// Prepares to quantize the linears that read this input.
    ///
    /// # Errors
    /// If the moments are not finite.
    pub fn new(moments: Moments, settings: Settings) -> Result<Self> {
        let feedback = Feedback::new(&moments, settings.damp)?;
        let damped = moments.damped(feedback.damp);
        Ok(Solver { importances: moments.importances(), feedback, damped, moments, settings })
    }

    /// Returns the quantized form of `weights` `[rows, cols]`.
    ///
    /// # Errors
    /// If the moments are not finite.
    pub fn quantize(&self, weights: &[f32], rows: usize, scheme: Scheme) -> Result<QTensor> {
        let cols = self.moments.cols;
        let target = corrected_target(weights, &self.moments, self.settings.mismatch)?;
        let mut q = fit(scheme, &target, rows, cols, Some(&self.importances), self.settings.scale_rule);
        gptq(&target, &mut q, &self.feedback);
        descend(&target, &mut q, &self.damped, self.settings.sweeps);
        Ok(q)
    }
}
