//! A stored scale and a stored minimum per group (Q4_1, Q5_1).

use super::{best, groups};
use crate::scheme::{Offset, QTensor};

pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let scheme = q.scheme;
    let Offset::Added(codec) = scheme.offset else { unreachable!("affine schemes add their offset") };
    let (_, steps) = scheme.element.range();
    let blocks = groups(q, weights, importances);
    for ((scale, offset), block) in q.scales.iter_mut().zip(&mut q.offsets).zip(blocks) {
        let (low, high) = block.range();
        let shrunk = (0..8).map(|i| 1.0 - 0.03 * i as f32);
        let grids = shrunk.map(|f| {
            let middle = 0.5 * low + 0.5 * high;
            let reach = f * (0.5 * high - 0.5 * low);
            (scheme.scale.round(reach * 2.0 / steps), codec.round(middle - reach))
        });
        let cost = |(scale, offset)| block.error(scheme.element, scale, offset);
        (*scale, *offset) = best(grids, cost).unwrap_or((0.0, 0.0));
    }
}
