//! One stored scale per group of a symmetric grid (INT8 per row or group, Q8_0, Q4_0, Q5_0).

use super::{Group, best, groups};
use crate::scheme::{QTensor, Scheme};

pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let scheme = q.scheme;
    let blocks = groups(q, weights, importances);
    for (scale, block) in q.scales.iter_mut().zip(blocks) {
        *scale = search(&scheme, block);
    }
}

/// Tries scales that put the largest magnitude between 0.75 and 1.05 of the range's long end, on either side.
fn search(scheme: &Scheme, block: Group) -> f32 {
    let (low, _) = scheme.element.range();
    let full = block.amax() / low;
    let factors = (0..13).map(|i| 0.76 + 0.02 * i as f32);
    let scales = factors.flat_map(|f| [full * f, -full * f]).map(|s| scheme.scale.round(s));
    best(scales, |scale| block.error(scheme.element, scale, 0.0)).unwrap_or(0.0)
}
