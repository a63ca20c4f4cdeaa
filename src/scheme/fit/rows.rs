//! One scale for a long group of a symmetric grid: INT8 per row or per group of columns, FP8 per row.

use super::tile::{LANES, Lanes};
use crate::num::{Codec, Element};
use crate::scheme::QTensor;

/// Candidates: the scale that just reaches the largest weight, times these. Two thirds are close to it, since sums of
/// rounding errors vary by chance even between neighbours; the others clip.
const FACTORS: [f32; 12] = [1.0, 1.006, 1.012, 0.994, 0.988, 0.982, 0.975, 0.965, 0.95, 0.93, 0.9, 0.86];

/// Candidates for FP8, whose relative error depends on where within a binade the weights fall, not on the scale's size.
const PHASES: [f32; 8] = [1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83];

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
                *scale = match element {
                    Element::E4M3 => search_float(codec, group, importances),
                    _ => search(element, codec, group, importances),
                };
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
        let cost =
            ratio * ratio * error(weights, importances, scale, |x| x.round_ties_even().clamp(low, high));
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
fn search_float(codec: Codec, weights: &[f32], importances: Option<&[f32]>) -> f32 {
    let reach = amax(weights) / Element::E4M3.range().1;
    let (mut best, mut chosen) = (f32::INFINITY, 0.0);
    for phase in PHASES {
        let scale = codec.round(reach * phase);
        let ratio = if reach == 0.0 { 0.0 } else { scale / reach };
        let cost = ratio * ratio * error(weights, importances, scale, nearest_e4m3);
        if cost < best {
            (best, chosen) = (cost, scale);
        }
    }
    chosen
}

/// Returns the E4M3 value nearest to `x`: the spacing is an eighth of the binade, and 2^-9 below 2^-6. Adding 1.5 · 2^23
/// spacings makes the last place of the sum one spacing, so the addition itself rounds, ties to even.
#[inline(always)]
fn nearest_e4m3(x: f32) -> f32 {
    let a = x.abs();
    let smallest_normal = 1.0 / 64.0;
    let binade =
        f32::from_bits(if a > smallest_normal { a } else { smallest_normal }.to_bits() & 0x7f80_0000);
    let magic = binade * (1.5 * (1 << 20) as f32);
    let rounded = (a + magic) - magic;
    (if rounded < 448.0 { rounded } else { 448.0 }).copysign(x)
}

#[inline(always)]
pub(super) fn amax(weights: &[f32]) -> f32 {
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
fn error(weights: &[f32], importances: Option<&[f32]>, scale: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { (1.0 / scale).min(f32::MAX) };
    let square = |x: f32| {
        let units = x * inverse;
        let difference = units - nearest(units);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_e4m3_is_what_the_element_encodes() {
        for i in -5000..=5000 {
            for x in [i as f32 / 4096.0, i as f32 / 8.0] {
                assert_eq!(nearest_e4m3(x), Element::E4M3.decode(Element::E4M3.encode(x)), "{x}");
            }
        }
    }
}
