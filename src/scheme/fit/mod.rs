//! Finds the stored scales for given weights: the second of the four questions.
//!
//! One file per kind of scale. Every search rounds a candidate to what its codec can store first and then judges it by
//! the error of the weights rounded to the grid it really gives, so nothing is lost afterwards.

mod affine;
mod e2m1;
mod fp8_scale;
mod power_of_two;
mod rows;
mod super_block;
mod symmetric;
mod tile;

use std::fmt;

use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use super::encode::encode;
use super::{Offset, QTensor, Scheme, Span};
use crate::num::{Codec, Element};

/// How the exponent of an E8M0 scale is chosen from a block's largest magnitude: `e = ceil(log2(amax / T))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
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
    let global = global_scale(&scheme, amax(weights));
    fit_under(global, scheme, weights, rows, cols, importances, rule)
}

/// As [`fit`], under a factor that the whole tensor shares ([`global_scale`]); `None` for schemes without one. Rows of one
/// tensor that are fitted apart, and linears that engines join into one, must be given the same.
pub fn fit_under(
    global: Option<f32>,
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
    if let Some(global) = global {
        q.outer_scales.fill(global);
    }
    fit_scales(&mut q, weights, importances, rule);
    encode(&mut q, weights);
    q
}

/// Returns the factor of a tensor (or of several that share it) whose largest magnitude is `amax`; `None` for schemes
/// without one.
///
/// A power of two, so that it and its reciprocal are exact and no product with it rounds: E4M3 scales lose nothing, since
/// their relative precision is the same in every binade. The largest block's scale comes to 56..=112 of at most 448:
/// room for targets that calibration has made larger than the weights.
pub fn global_scale(scheme: &Scheme, amax: f32) -> Option<f32> {
    let Some((Span::Tensor, _)) = scheme.outer else { return None };
    let exponent = (amax / (scheme.element.range().1 * 112.0)).log2().ceil();
    // Zero weights give -∞.
    Some(exponent.clamp(-100.0, 100.0).exp2())
}

/// Returns the largest magnitude.
pub fn amax(weights: &[f32]) -> f32 {
    rows::amax(weights)
}

/// Fills in everything but the codes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn fit_scales(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>, rule: ScaleRule) {
    let Scheme { element, group, scale, outer, offset, .. } = q.scheme;
    match (outer, offset) {
        (Some((Span::Tensor, _)), _) => fp8_scale::fit(q, weights, importances),
        (Some(_), Offset::None) => match element {
            Element::Table(table) => {
                super_block::fit_symmetric::<32, 8>(q, weights, importances, |x| table.nearest(x));
            }
            _ => {
                let nearest = symmetric::integers(element.range());
                super_block::fit_symmetric::<16, 16>(q, weights, importances, nearest);
            }
        },
        (Some(_), _) if group == Span::Cols(16) => {
            super_block::fit_with_minima::<16, 16>(q, weights, importances);
        }
        (Some(_), _) => super_block::fit_with_minima::<32, 8>(q, weights, importances),
        (None, Offset::Added(_)) => affine::fit(q, weights, importances),
        (None, _) if scale == Codec::E8M0 => power_of_two::fit(q, weights, importances, rule),
        (None, _) if group == Span::Cols(32) => symmetric::fit::<32>(q, weights, importances),
        (None, _) if (element, group) == (Element::Int(4), Span::Cols(64)) => {
            symmetric::fit::<64>(q, weights, importances)
        }
        (None, _) if (element, group) == (Element::Int(4), Span::Cols(128)) => {
            symmetric::fit::<128>(q, weights, importances)
        }
        (None, _) => rows::fit(q, weights, importances),
    }
}
