//! Finds the stored scales for given weights: the second of the four questions.
//!
//! One file per kind of scale. Every search rounds a candidate to what its codec can store first and then judges it by
//! the error of the weights rounded to the grid it really gives, so nothing is lost afterwards.

mod affine;
mod power_of_two;
mod single;
mod super_block;

use super::{Offset, QTensor, Scheme, Span};
use crate::method::rtn;
use crate::num::{Codec, Element};

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
    match (scheme.outer, scheme.offset) {
        (Some(_), _) => super_block::fit(&mut q, weights, importances),
        (None, Offset::None) if scheme.scale == Codec::E8M0 => {
            power_of_two::fit(&mut q, weights, importances, rule)
        }
        (None, Offset::None) => single::fit(&mut q, weights, importances),
        (None, _) => affine::fit(&mut q, weights, importances),
    }
    rtn::encode(&mut q, weights);
    q
}

/// The weights of one group with the importance of each.
#[derive(Clone, Copy)]
struct Group<'a> {
    weights: &'a [f32],
    importances: Option<&'a [f32]>,
}

impl Group<'_> {
    /// Returns the weighted squared error of rounding to nearest on a grid.
    fn error(&self, element: Element, scale: f32, offset: f32) -> f32 {
        let inverse = if scale == 0.0 { 0.0 } else { (1.0 / scale).clamp(-f32::MAX, f32::MAX) };
        let error = |w: f32| {
            let difference = w - (scale * element.decode(element.encode((w - offset) * inverse)) + offset);
            difference * difference
        };
        match self.importances {
            Some(h) => self.weights.iter().zip(h).map(|(&w, &h)| h * error(w)).sum(),
            None => self.weights.iter().map(|&w| error(w)).sum(),
        }
    }

    /// Returns the largest magnitude.
    fn amax(&self) -> f32 {
        self.weights.iter().fold(0.0, |a, w| a.max(w.abs()))
    }

    /// Returns the smallest and the largest weight.
    fn range(&self) -> (f32, f32) {
        self.weights.iter().fold((f32::MAX, f32::MIN), |(low, high), &w| (low.min(w), high.max(w)))
    }
}

/// Returns the groups of a `[rows, cols]` tensor in the order of its stored scales.
fn groups<'a>(
    q: &QTensor,
    weights: &'a [f32],
    importances: Option<&'a [f32]>,
) -> impl Iterator<Item = Group<'a>> + use<'a> {
    let (cols, group_cols) = (q.cols, q.group_cols());
    weights.chunks_exact(cols.max(1)).flat_map(move |row| {
        row.chunks(group_cols).enumerate().map(move |(i, weights)| {
            let start = i * group_cols;
            Group { weights, importances: importances.map(|h| &h[start..start + weights.len()]) }
        })
    })
}

/// Returns the candidate of least `cost`, the first among equals.
fn best<T: Copy>(candidates: impl IntoIterator<Item = T>, cost: impl Fn(T) -> f32) -> Option<T> {
    let costs = candidates.into_iter().map(|candidate| (cost(candidate), candidate));
    costs.reduce(|a, b| if b.0 < a.0 { b } else { a }).map(|(_, candidate)| candidate)
}
