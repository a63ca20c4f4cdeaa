//! Nearest codes: every weight takes the closest value of its group's grid.

use multiversion::multiversion;

use super::{Grid, QTensor};
use crate::num::Element;

/// Replaces all codes of `q` by those nearest to `weights` (`[rows, cols]`) on the grids `q` already has.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn encode(q: &mut QTensor, weights: &[f32]) {
    debug_assert_eq!(weights.len(), q.rows * q.cols);
    let mut codes = std::mem::take(&mut q.codes);
    // One loop per element type, so that the choice is made outside of them.
    match q.scheme.element {
        Element::E2M1 => encode_groups(q, weights, &mut codes, |x| Element::E2M1.encode(x)),
        Element::E4M3 => encode_groups(q, weights, &mut codes, |x| Element::E4M3.encode(x)),
        Element::Int(bits) => encode_groups(q, weights, &mut codes, |x| Element::Int(bits).encode(x)),
        Element::Uint(bits) => encode_groups(q, weights, &mut codes, |x| Element::Uint(bits).encode(x)),
        Element::Table(table) => encode_groups(q, weights, &mut codes, |x| Element::Table(table).encode(x)),
    }
    q.codes = codes;
}

#[inline(always)]
fn encode_groups(q: &QTensor, weights: &[f32], codes: &mut [u8], nearest: impl Fn(f32) -> u8) {
    let (cols, group_cols) = (q.cols, q.group_cols());
    let rows = codes.chunks_exact_mut(cols).zip(weights.chunks_exact(cols));
    for (row, (codes, weights)) in rows.enumerate() {
        if group_cols == 32 {
            // Most schemes: with a known length the compiler drops the loop's ends.
            let blocks = codes.as_chunks_mut::<32>().0.iter_mut().zip(weights.as_chunks::<32>().0);
            for (group, (codes, weights)) in blocks.enumerate() {
                encode_group(q.grid(row, group), weights, codes, &nearest);
            }
        } else {
            let groups = codes.chunks_mut(group_cols).zip(weights.chunks(group_cols));
            for (group, (codes, weights)) in groups.enumerate() {
                encode_group(q.grid(row, group), weights, codes, &nearest);
            }
        }
    }
}

/// Writes the codes of one group's weights. A grid of scale zero gets the code nearest to zero.
#[inline(always)]
fn encode_group(grid: Grid, weights: &[f32], codes: &mut [u8], nearest: impl Fn(f32) -> u8) {
    // The reciprocal of a tiny scale overflows; the largest finite number is close enough to it, and 0 · it is 0.
    let inverse = if grid.scale == 0.0 { 0.0 } else { (1.0 / grid.scale).clamp(-f32::MAX, f32::MAX) };
    for (code, &w) in codes.iter_mut().zip(weights) {
        // Adding zero turns the -0 of a negative scale's or weight's zero into +0, whose code is the plain one.
        *code = nearest((w - grid.offset) * inverse + 0.0);
    }
}
