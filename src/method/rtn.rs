//! Round to nearest: every weight takes the closest value of its group's grid.

use crate::num::Element;
use crate::scheme::{Grid, QTensor};

/// Replaces all codes of `q` by those nearest to `weights` (`[rows, cols]`) on the grids `q` already has.
pub fn encode(q: &mut QTensor, weights: &[f32]) {
    debug_assert_eq!(weights.len(), q.rows * q.cols);
    let (cols, group_cols) = (q.cols, q.group_cols());
    let mut codes = std::mem::take(&mut q.codes);
    for row in 0..q.rows {
        let span = row * cols..(row + 1) * cols;
        let groups = codes[span.clone()].chunks_mut(group_cols).zip(weights[span].chunks(group_cols));
        for (group, (codes, weights)) in groups.enumerate() {
            encode_group(q.scheme.element, q.grid(row, group), weights, codes);
        }
    }
    q.codes = codes;
}

/// Writes the codes of one group's weights. A grid of scale zero gets the code nearest to zero.
pub fn encode_group(element: Element, grid: Grid, weights: &[f32], codes: &mut [u8]) {
    // The reciprocal of a tiny scale overflows; the largest finite number is close enough to it, and 0 · it is 0.
    let inverse = if grid.scale == 0.0 { 0.0 } else { (1.0 / grid.scale).clamp(-f32::MAX, f32::MAX) };
    for (code, &w) in codes.iter_mut().zip(weights) {
        // Adding zero turns the -0 of a negative scale's or weight's zero into +0, whose code is the plain one.
        *code = element.encode((w - grid.offset) * inverse + 0.0);
    }
}
