//! Finds the stored scales for given weights: the second of the four questions.
//!
//! One file per kind of scale. Every search rounds a candidate to what its codec can store first and then judges it by
//! the error of the weights rounded to the grid it really gives, so nothing is lost afterwards.

mod affine;
mod power_of_two;
mod rows;
mod super_block;
mod symmetric;
mod tile;

use multiversion::multiversion;

use std::fmt;

use super::{Offset, QTensor, Scheme, Span};
use crate::method::rtn;
use crate::num::Codec;

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

impl fmt::Display for ScaleRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScaleRule::Floor => "floor",
            ScaleRule::Even => "even",
            ScaleRule::T7_25 => "t7.25",
            ScaleRule::Search => "search",
        })
    }
}

/// Returns the scales and offsets of every group of `weights` `[rows, cols]`, with the codes rounded to nearest.
///
/// `importances` weigh each column's squared error (`[cols]`, e.g. mean squared inputs); without them the scheme's own
/// data-free weighting is used. `rule` matters for E8M0 scales only. `cols` is a multiple of
/// [`Scheme::block_cols`]. Runs on the calling thread: callers split tensors into chunks of rows.
pub fn fit(
    scheme: Scheme,
    weights: &[f32],
    rows: usize,
    cols: usize,
    importances: Option<&[f32]>,
    rule: ScaleRule,
) -> QTensor {
    debug_assert_eq!(weights.len(), rows * cols);
    debug_assert!(cols.is_multiple_of(scheme.block_cols()) && scheme.group != Span::Tensor);
    let mut q = QTensor::zeroed(scheme, rows, cols);
    fit_scales(&mut q, weights, importances, rule);
    rtn::encode(&mut q, weights);
    q
}

/// Fills in everything but the codes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn fit_scales(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>, rule: ScaleRule) {
    let Scheme { group, scale, outer, offset, .. } = q.scheme;
    match (outer, offset) {
        (Some(_), Offset::None) => super_block::fit_symmetric(q, weights, importances),
        (Some(_), _) => super_block::fit_with_minima(q, weights, importances),
        (None, Offset::Added(_)) => affine::fit(q, weights, importances),
        (None, _) if scale == Codec::E8M0 => power_of_two::fit(q, weights, importances, rule),
        (None, _) if group == Span::Cols(32) => symmetric::fit(q, weights, importances),
        (None, _) => rows::fit(q, weights, importances),
    }
}
