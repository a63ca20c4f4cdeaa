//! One matrix from weights to codes: target, scales, feedback rounding, descent.

use anyhow::{Result, bail};
use rayon::prelude::*;

use super::descent::descend;
use super::gptq::{Feedback, gptq};
use super::linalg;
use super::mismatch::{Strength, corrected_target};
use super::statistics::Moments;
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

/// A calibrated matrix and what rounding cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// Codes and scales.
    pub q: QTensor,
    /// Output error of the nearest codes, relative to the output's energy: `tr(Δ H Δᵀ) / tr(W H Wᵀ)`.
    pub error_nearest: f64,
    /// The same for the codes chosen.
    pub error: f64,
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
    importances: &[f32],
    rule: ScaleRule,
) -> QTensor {
    let rows = target.len() / cols;
    let fitted: Vec<QTensor> = target
        .par_chunks(FIT_ROWS * cols)
        .map(|part| fit_under(global, scheme, part, part.len() / cols, cols, Some(importances), rule))
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
    knobs: Knobs,
}

impl Solver {
    /// Prepares to quantize the linears that read this input.
    ///
    /// # Errors
    /// If the moments are not finite.
    pub fn new(moments: Moments, knobs: Knobs) -> Result<Self> {
        let feedback = Feedback::new(&moments, knobs.damp + moments.scarcity().min(1.0))?;
        let damped = moments.damped(feedback.damp);
        Ok(Solver { importances: moments.importances(), feedback, damped, moments, knobs })
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
        let mut q = fit_target(&target, self.moments.cols, scheme, global, &self.importances, rule);
        let energy = self.energy(&target, rows).max(f64::MIN_POSITIVE);
        let error_nearest = self.error(&q, &target) / energy;
        gptq(&target, &mut q, &self.feedback);
        descend(&target, &mut q, &self.damped, self.knobs.sweeps);
        let error = self.error(&q, &target) / energy;
        let weight = Matrix::Quantized(q.clone());
        Ok((Solved { q, error_nearest, error }, weight))
    }
}
