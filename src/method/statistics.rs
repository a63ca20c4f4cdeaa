//! Second moments of a linear's inputs, summed over calibration tokens.
//!
//! ```text
//! hessian = X̃ᵀX̃    X̃: inputs the quantized model will feed this linear
//! cross   = XᵀX̃    X:  inputs the full-precision model feeds it
//! drift   = (R - R̃)ᵀX̃    R, R̃: the residual streams the linear adds to, in both models
//! ```
//!
//! Linears that read the same input (q, k, v; gate, up) share one [`Moments`]. Sums are in F32: 65,536 tokens in
//! chunks of a few thousand lose less than 1e-5 relative, far below the damping.

use crate::linalg;

/// Sums over tokens of `x̃ᵀx̃` and `xᵀx̃`.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Input features.
    pub cols: usize,
    /// Number of tokens seen.
    pub tokens: usize,
    /// `X̃ᵀX̃`, `[cols, cols]`, symmetric.
    pub hessian: Vec<f32>,
    /// `XᵀX̃`, `[cols, cols]`.
    pub cross: Vec<f32>,
    /// `(R - R̃)ᵀX̃`, `[outputs, cols]`: how far the residual streams that the linear adds to have drifted apart; only
    /// for linears that add to them (o, down).
    pub drift: Option<Vec<f32>>,
}

impl Moments {
    /// Returns sums over no tokens.
    pub fn new(cols: usize) -> Self {
        Moments {
            cols,
            tokens: 0,
            hessian: vec![0.0; cols * cols],
            cross: vec![0.0; cols * cols],
            drift: None,
        }
    }

    /// Adds tokens: `quantized` is X̃ and `full` is X, each `[tokens, cols]`.
    pub fn add(&mut self, quantized: &[f32], full: &[f32]) {
        let (cols, tokens) = (self.cols, quantized.len() / self.cols);
        let shape = [tokens, cols, cols];
        linalg::add_transposed_product(&mut self.hessian, quantized, quantized, shape);
        linalg::add_transposed_product(&mut self.cross, full, quantized, shape);
        self.tokens += tokens;
    }

    /// Returns the mean squared input of each column, `[cols]`: the importances of a weighted scale search.
    pub fn importances(&self) -> Vec<f32> {
        let tokens = self.tokens.max(1) as f32;
        (0..self.cols).map(|col| self.hessian[col * (self.cols + 1)] / tokens).collect()
    }

    /// Returns columns per token: how little text there is for what is estimated from it.
    pub fn scarcity(&self) -> f32 {
        self.cols as f32 / self.tokens.max(1) as f32
    }

    /// Returns the mean of the Hessian's diagonal: the unit in which damping is given.
    pub fn mean_diagonal(&self) -> f64 {
        let sum: f64 = (0..self.cols).map(|col| self.hessian[col * (self.cols + 1)] as f64).sum();
        sum / self.cols.max(1) as f64
    }

    /// Returns `X̃ᵀX̃ + damp · mean diagonal · I`. A Hessian of zeros (no input ever) becomes the identity.
    pub fn damped(&self, damp: f32) -> Vec<f32> {
        let mut hessian = self.hessian.clone();
        let mean = self.mean_diagonal();
        let added = if mean > 0.0 { damp as f64 * mean } else { 1.0 };
        for col in 0..self.cols {
            hessian[col * (self.cols + 1)] += added as f32;
        }
        hessian
    }
}
