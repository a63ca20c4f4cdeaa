//! One matrix from weights to codes: target, scales, feedback rounding, descent.

use anyhow::{Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::descent::descend;
use super::gptq::{Feedback, gptq};
use super::mismatch::{Strength, corrected_target};
use super::statistics::Moments;
use crate::linalg;
use crate::scheme::fit::{self, ScaleRule, fit_under};
use crate::scheme::{QTensor, Scheme};
use crate::tensor::{Matrix, first_non_finite};

/// The knobs of calibrated rounding of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knobs {
    /// Strength of the mismatch correction.
    pub strength: Strength,
    /// Damping relative to the Hessian's mean diagonal; columns per token are added to it.
    pub damp: f32,
    /// Coordinate-descent sweeps over codes and scales.
    pub sweeps: usize,
    /// How power-of-two scales are chosen.
    pub scale_rule: ScaleRule,
}

/// A quantized matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// Codes and scales.
    pub q: QTensor,
    /// How it came out.
    pub outcome: Outcome,
}

/// How the quantization of one tensor came out: what the solver found, what calibration adds, what journal and manifest say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Relative squared error of what was written, weighed as the method weighs it: `tr(Δ H Δᵀ) / tr(W H Wᵀ)` of calibrated
    /// codes, `Σ wⱼ (x − x̂)² / Σ wⱼ x²` of others; 0 for kept tensors and for a tensor of zeros.
    pub error: f64,
    /// The same for nearest codes on the same scales, where the method chose others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_nearest: Option<f64>,
    /// Tokens that its statistics come from, where it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// How strongly its input was smoothed: the α of SmoothQuant or AWQ ([`crate::calib::smoothing`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smoothing: Option<f32>,
    /// The scale of its linear's inputs, where calibration fixes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_scale: Option<f32>,
    /// What was not done as asked.
    #[serde(flatten)]
    pub deviation: Deviation,
}

/// Where calibrating a matrix did not go as asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Deviation {
    /// Damping that the Hessian needed, relative to its mean diagonal, where what was asked for did not make it positive
    /// definite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raised_damp: Option<f32>,
    /// Whether these are the nearest codes after all: those chosen were worse, or there were no statistics to choose by.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept_nearest: bool,
}

/// Chooses the codes of the linears that read one input, on any device. [`Solver`] is the definition.
pub trait Solve {
    /// A matrix as the device multiplies with it.
    type Weight;

    /// Returns the number of input features.
    fn cols(&self) -> usize;

    /// Returns the quantized form of `weights`, under the factor `global` where the scheme has one for the whole tensor
    /// (`None`: its own), and the same matrix where the device keeps it.
    ///
    /// # Errors
    /// If weights or moments are not finite.
    fn quantize(
        &self,
        weights: &Matrix,
        scheme: Scheme,
        global: Option<f32>,
    ) -> Result<(Solved, Self::Weight)>;
}

/// Returns the factor that a matrix's scales are fitted under: `given`, else its own, where the scheme has one.
pub fn global_of(weights: &Matrix, scheme: &Scheme, given: Option<f32>) -> Option<f32> {
    let own = || fit::global_scale(scheme, 1.0).and_then(|_| fit::global_scale(scheme, amax(weights)));
    given.or_else(own)
}

/// Returns the largest magnitude, rows in parallel.
pub fn amax(weights: &Matrix) -> f32 {
    let [rows, cols] = weights.dims();
    let of_row = |row: &mut Vec<f32>, i: usize| {
        row.resize(cols, 0.0);
        weights.decode_rows(i, row);
        fit::amax(row)
    };
    (0..rows).into_par_iter().map_init(Vec::new, of_row).reduce(|| 0.0, f32::max)
}

/// Rows that one thread fits at a time.
const FIT_ROWS: usize = 64;

/// Returns [`fit_under`] of `target`, its rows in parallel.
pub fn fit_target(
    target: &[f32],
    cols: usize,
    scheme: Scheme,
    global: Option<f32>,
    importances: Option<&[f32]>,
    rule: ScaleRule,
) -> QTensor {
    let rows = target.len() / cols;
    let fitted: Vec<QTensor> = target
        .par_chunks(FIT_ROWS * cols)
        .map(|part| fit_under(global, scheme, part, part.len() / cols, cols, importances, rule))
        .collect();
    let mut q = QTensor::zeroed(scheme, rows, cols);
    for (i, part) in fitted.iter().enumerate() {
        q.set_rows(i * FIT_ROWS, part);
    }
    q
}

/// The statistics of one input with everything derived from them that its linears share.
pub struct Solver {
    moments: Moments,
    importances: Vec<f32>,
    feedback: Feedback,
    damped: Vec<f32>,
    raised_damp: Option<f32>,
    knobs: Knobs,
}

impl Knobs {
    /// Returns the damping to begin with for moments of that many columns per token.
    pub(crate) fn first_damp(&self, scarcity: f32) -> f32 {
        (self.damp + scarcity.min(1.0)).max(1e-6)
    }
}

impl Solver {
    /// Prepares to quantize the linears that read this input.
    ///
    /// # Errors
    /// If the moments are not finite.
    pub fn new(moments: Moments, knobs: Knobs) -> Result<Self> {
        let asked = knobs.first_damp(moments.scarcity());
        let feedback = Feedback::new(&moments, asked)?;
        let raised_damp = (feedback.damp != asked).then_some(feedback.damp);
        let (damped, importances) = (moments.damped(feedback.damp), moments.importances());
        Ok(Solver { importances, feedback, damped, raised_damp, moments, knobs })
    }

    fn error(&self, q: &QTensor, target: &[f32]) -> f64 {
        let delta: Vec<f32> = q.decode().iter().zip(target).map(|(v, t)| v - t).collect();
        self.energy(&delta, q.rows)
    }

    /// tr(a H aᵀ) for `a` `[rows, cols]`.
    fn energy(&self, a: &[f32], rows: usize) -> f64 {
        let cols = self.moments.cols;
        let mut product = vec![0.0; a.len()];
        linalg::add_product(&mut product, a, &self.moments.hessian, [rows, cols, cols]);
        a.iter().zip(&product).map(|(a, p)| *a as f64 * *p as f64).sum()
    }
}

impl Solve for Solver {
    type Weight = Matrix;

    fn cols(&self) -> usize {
        self.moments.cols
    }

    fn quantize(&self, weights: &Matrix, scheme: Scheme, global: Option<f32>) -> Result<(Solved, Matrix)> {
        let (rows, global) = (weights.dims()[0], global_of(weights, &scheme, global));
        let weights = weights.to_f32();
        if let Some(at) = first_non_finite(&weights) {
            bail!("weight {at} is {}, wanted finite numbers", weights[at]);
        }
        let target = corrected_target(&weights, &self.moments, self.knobs.strength)?;
        let rule = self.knobs.scale_rule;
        let mut q = fit_target(&target, self.moments.cols, scheme, global, Some(&self.importances), rule);
        let energy = self.energy(&target, rows).max(f64::MIN_POSITIVE);
        let error_nearest = self.error(&q, &target) / energy;
        let nearest = q.clone();
        gptq(&target, &mut q, &self.feedback);
        descend(&target, &mut q, &self.damped, self.knobs.sweeps);
        let mut error = self.error(&q, &target) / energy;
        let kept_nearest = error > error_nearest;
        if kept_nearest {
            (q, error) = (nearest, error_nearest);
        }
        let deviation = Deviation { raised_damp: self.raised_damp, kept_nearest };
        let weight = Matrix::Quantized(q.clone());
        let outcome = Outcome { error, error_nearest: Some(error_nearest), deviation, ..Outcome::default() };
        Ok((Solved { q, outcome }, weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::testing::Random;
    use crate::scheme::schemes::Q4_0;
    use crate::tensor::Dense;

    const KNOBS: Knobs = Knobs {
        strength: Strength { inputs: 0.0, residual: 0.0 },
        damp: 0.01,
        sweeps: 2,
        scale_rule: ScaleRule::Search,
    };

    fn solve(moments: Moments, knobs: Knobs) -> Outcome {
        let weights = Random::new(3).normal(8 * moments.cols);
        let weights = Matrix::Dense(Dense::from_f32(vec![8, moments.cols], &weights));
        Solver::new(moments, knobs).unwrap().quantize(&weights, Q4_0, None).unwrap().0.outcome
    }

    #[test]
    fn damping_that_had_to_rise_is_told() {
        let mut moments = Moments::new(64);
        moments.tokens = 1 << 20;
        (0..64).for_each(|col| moments.hessian[col * 65] = 1.0);
        assert_eq!(solve(moments.clone(), KNOBS).deviation, Deviation::default());
        // Eigenvalue -0.05: a hundredth of the diagonal does not lift it, a tenth does.
        (moments.hessian[1], moments.hessian[64]) = (1.05, 1.05);
        let raised = solve(moments, KNOBS).deviation.raised_damp.unwrap();
        assert!((raised - 0.1).abs() < 1e-3, "{raised}");
    }

    #[test]
    fn nearest_codes_stay_where_calibrated_ones_are_worse() {
        let mut moments = Moments::new(128);
        moments.tokens = 1 << 20;
        (0..128).for_each(|col| moments.hessian[col * 129] = if col % 32 == 0 { 1e6 } else { 1.0 });
        // So much damping hides which columns matter: descent leaves the scales that were fitted to them.
        let solved = solve(moments, Knobs { damp: 1e6, ..KNOBS });
        assert!(solved.deviation.kept_nearest);
        assert_eq!(Some(solved.error), solved.error_nearest);
    }
}
