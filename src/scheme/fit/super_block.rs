//! Two-level scales of K-quants: integer scales (and minima) of sub-blocks under F16 factors of the super-block.

use super::{Group, best, groups};
use crate::num::Codec;
use crate::scheme::{Offset, QTensor, Scheme};

pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let scheme = q.scheme;
    let per_super = scheme.block_cols() / q.group_cols();
    let blocks: Vec<Group> = groups(q, weights, importances).collect();
    for (i, subs) in blocks.chunks(per_super).enumerate() {
        let at = i * per_super;
        let span = at..at + subs.len();
        match scheme.offset {
            Offset::None => q.outer_scales[i] = symmetric(&scheme, subs, &mut q.scales[span]),
            _ => {
                let (scales, minima) = (&mut q.scales[span.clone()], &mut q.offsets[span]);
                (q.outer_scales[i], q.outer_offsets[i]) = with_minima(&scheme, subs, scales, minima);
            }
        }
    }
}

/// Q6_K: `value = d · scale · element`. Returns `d`.
fn symmetric(scheme: &Scheme, subs: &[Group], scales: &mut [f32]) -> f32 {
    let (low, _) = scheme.element.range();
    for (scale, sub) in scales.iter_mut().zip(subs) {
        let full = sub.amax() / low;
        let factors = (0..9).map(|i| 0.84 + 0.025 * i as f32);
        let candidates = factors.flat_map(|f| [full * f, -full * f]);
        *scale = best(candidates, |s| sub.error(scheme.element, s, 0.0)).unwrap_or(0.0);
    }
    let largest = scales.iter().fold(0f32, |a, &s| if s.abs() > a.abs() { s } else { a });
    let d = Codec::F16.round(largest / -128.0);
    for scale in scales {
        *scale = if d == 0.0 { 0.0 } else { scheme.scale.round(*scale / d) };
    }
    d
}

/// Q4_K, Q5_K: `value = d · scale · code - dmin · minimum`. Returns `(d, dmin)`.
fn with_minima(scheme: &Scheme, subs: &[Group], scales: &mut [f32], minima: &mut [f32]) -> (f32, f32) {
    let (_, steps) = scheme.element.range();
    for ((scale, minimum), sub) in scales.iter_mut().zip(minima.iter_mut()).zip(subs) {
        let (low, high) = sub.range();
        let low = low.min(0.0);
        let grids = (0..8).map(|i| 1.0 - 0.03 * i as f32).map(|f| (f * (high - low) / steps, f * low));
        let fitted = best(grids, |(scale, offset)| sub.error(scheme.element, scale, offset));
        let (fitted_scale, offset) = fitted.unwrap_or((0.0, 0.0));
        (*scale, *minimum) = (fitted_scale, -offset);
    }
    (to_six_bits(scales), to_six_bits(minima))
}

/// Replaces values by their 6-bit integers under a common F16 factor, which it returns.
fn to_six_bits(values: &mut [f32]) -> f32 {
    let factor = Codec::F16.round(values.iter().fold(0f32, |a, &v| a.max(v)) / 63.0);
    for value in values {
        *value = if factor == 0.0 { 0.0 } else { Codec::U6.round(*value / factor) };
    }
    factor
}
