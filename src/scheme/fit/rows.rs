//! One scale for a long group of a symmetric grid: INT8 per row or per group of columns.

use super::tile::{LANES, Lanes};
use crate::num::{Codec, Element};
use crate::scheme::QTensor;

/// Candidates: the scale that just reaches the largest weight, times these. Two thirds are close to it, since sums of
/// rounding errors vary by chance even between neighbours; the others clip.
const FACTORS: [f32; 12] = [1.0, 1.006, 1.012, 0.994, 0.988, 0.982, 0.975, 0.965, 0.95, 0.93, 0.9, 0.86];

/// How many candidates in a row may fail to improve before the search ends.
const PATIENCE: usize = 5;

#[inline(always)]
pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let (element, codec, cols, group_cols) = (q.scheme.element, q.scheme.scale, q.cols, q.group_cols());
    let mut scales = q.scales.iter_mut();
    for row in weights.chunks_exact(cols) {
        for (i, group) in row.chunks(group_cols).enumerate() {
            let importances = importances.map(|h| &h[i * group_cols..][..group.len()]);
            if let Some(scale) = scales.next() {
                *scale = search(element, codec, group, importances);
            }
        }
    }
}

#[inline(always)]
fn search(element: Element, codec: Codec, weights: &[f32], importances: Option<&[f32]>) -> f32 {
    let (low, high) = element.range();
    let reach = amax(weights) / (high + 0.5);
    let (mut best, mut chosen, mut failures) = (f32::INFINITY, 0.0, 0);
    for factor in FACTORS {
        let scale = codec.round(reach * factor);
        let ratio = if reach == 0.0 { 0.0 } else { scale / reach };
        let cost = ratio * ratio * error(weights, importances, scale, low, high);
        if cost < best {
            (best, chosen, failures) = (cost, scale, 0);
        } else {
            failures += 1;
            if failures == PATIENCE {
                break;
            }
        }
    }
    chosen
}

#[inline(always)]
fn amax(weights: &[f32]) -> f32 {
    let (chunks, rest) = weights.as_chunks::<LANES>();
    let mut out = [0f32; LANES];
    for x in chunks {
        for l in 0..LANES {
            let a = x[l].abs();
            out[l] = if a > out[l] { a } else { out[l] };
        }
    }
    out.iter().chain(rest).fold(0.0, |a, x| a.max(x.abs()))
}

/// Returns the weighted squared error of rounding to that scale, in units of the scale.
#[inline(always)]
fn error(weights: &[f32], importances: Option<&[f32]>, scale: f32, low: f32, high: f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { (1.0 / scale).min(f32::MAX) };
    let square = |x: f32| {
        let units = x * inverse;
        let difference = units - units.round_ties_even().clamp(low, high);
        difference * difference
    };
    let (chunks, rest) = weights.as_chunks::<LANES>();
    let mut sums: Lanes = [0.0; LANES];
    let mut tail = 0.0;
    if let Some(importances) = importances {
        let (h_chunks, h_rest) = importances.as_chunks::<LANES>();
        for (x, h) in chunks.iter().zip(h_chunks) {
            for l in 0..LANES {
                sums[l] += h[l] * square(x[l]);
            }
        }
        tail += rest.iter().zip(h_rest).map(|(&x, &h)| h * square(x)).sum::<f32>();
    } else {
        for x in chunks {
            for l in 0..LANES {
                sums[l] += square(x[l]);
            }
        }
        tail += rest.iter().map(|&x| square(x)).sum::<f32>();
    }
    sums.iter().sum::<f32>() + tail
}
