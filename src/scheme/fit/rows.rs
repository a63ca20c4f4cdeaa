//! One scale for a long group of a symmetric grid: INT8 per row or per group of columns, FP8 per row.

use super::tile::{LANES, fraction, larger};
use crate::num::{Codec, Element};
use crate::scheme::QTensor;

/// Candidates: the scale that just reaches the largest weight, times these.
const FACTORS: [f32; 12] = [1.0, 1.006, 1.012, 0.994, 0.988, 0.982, 0.975, 0.965, 0.95, 0.93, 0.9, 0.86];

/// How many of them are tried. Those near the best differ by chance, since sums of rounding errors vary even between
/// neighbours.
const TRIED: usize = 6;

/// Candidates for FP8, whose relative error depends on where within a binade the weights fall, not on the scale's size.
const PHASES: [f32; 8] = [1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83];

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
    let clipped = Clipped::new(weights, importances, reach * FACTORS[FACTORS.len() - 1] * (high + 0.5));
    // Rounding costs a twelfth of the squared scale on average, so what clips decides which candidates are worth trying.
    let total = importances.map_or(weights.len() as f32, |h| h.iter().sum());
    let mut expected = FACTORS.map(|factor| {
        let inverse = reciprocal(reach * factor);
        (factor * factor * (total / 12.0 + clipped.excess(inverse, (low, high))), factor)
    });
    expected.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut best, mut chosen) = (f32::INFINITY, 0.0);
    for (_, factor) in expected.into_iter().take(TRIED) {
        let scale = codec.round(reach * factor);
        let ratio = if reach == 0.0 { 0.0 } else { scale / reach };
        let inverse = reciprocal(scale);
        let rounding = squares(weights, importances, |x| fraction(x, inverse));
        let cost = ratio * ratio * (rounding + clipped.excess(inverse, (low, high)));
        if cost < best {
            (best, chosen) = (cost, scale);
        }
    }
    chosen
}

/// The few weights, with their importances, that some candidate may clip. Knowing them, the sum over all weights needs
/// no clamping, a third of its work.
struct Clipped(Vec<(f32, f32)>);

impl Clipped {
    /// Finds the weights of magnitude above `limit`.
    #[inline(always)]
    fn new(weights: &[f32], importances: Option<&[f32]>, limit: f32) -> Self {
        let mut found = Vec::new();
        for (chunk, weights) in weights.chunks(4 * LANES).enumerate() {
            // Without a shortcut, so that it becomes a few comparisons of whole vectors.
            if weights.iter().fold(false, |any, x| any | (x.abs() > limit)) {
                let large = weights.iter().enumerate().filter(|(_, x)| x.abs() > limit);
                let importance = |i| importances.map_or(1.0, |h| h[chunk * 4 * LANES + i]);
                found.extend(large.map(|(i, &x)| (x, importance(i))));
            }
        }
        Clipped(found)
    }

    /// Returns by how much their weighted squared error exceeds that of rounding without bounds, in units of the scale.
    #[inline(always)]
    fn excess(&self, inverse: f32, (low, high): (f32, f32)) -> f32 {
        let of = |&(x, importance): &(f32, f32)| {
            let end = if x < 0.0 { -low } else { high };
            let beyond = x.abs() * inverse - end;
            let rounding = fraction(x, inverse);
            if beyond > 0.5 { importance * (beyond * beyond - rounding * rounding) } else { 0.0 }
        };
        self.0.iter().map(of).sum()
    }
}

#[inline(always)]
fn search_float(codec: Codec, weights: &[f32], importances: Option<&[f32]>) -> f32 {
    let reach = amax(weights) / Element::E4M3.range().1;
    let (mut best, mut chosen) = (f32::INFINITY, 0.0);
    for phase in PHASES {
        let scale = codec.round(reach * phase);
        let ratio = if reach == 0.0 { 0.0 } else { scale / reach };
        let inverse = reciprocal(scale);
        let difference = |x: f32| x * inverse - nearest_e4m3(x * inverse);
        let cost = ratio * ratio * squares(weights, importances, difference);
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
    let (chunks, rest) = weights.as_chunks::<WIDE>();
    let mut out = [0f32; WIDE];
    for x in chunks {
        for l in 0..WIDE {
            out[l] = larger(out[l], x[l]);
        }
    }
    out.iter().chain(rest).fold(0.0, |a, x| a.max(x.abs()))
}

/// Returns the reciprocal, 0 of 0 and finite throughout.
#[inline(always)]
fn reciprocal(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (1.0 / scale).min(f32::MAX) }
}

/// How many sums run side by side: two vector registers of them, so that one addition need not wait for the last.
const WIDE: usize = 2 * LANES;

/// Returns the sum of `importance · difference(weight)²`.
#[inline(always)]
fn squares(weights: &[f32], importances: Option<&[f32]>, difference: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = weights.as_chunks::<WIDE>();
    let mut sums = [0.0; WIDE];
    let mut tail = 0.0f32;
    if let Some(importances) = importances {
        let (h_chunks, h_rest) = importances.as_chunks::<WIDE>();
        for (x, h) in chunks.iter().zip(h_chunks) {
            for l in 0..WIDE {
                let difference = difference(x[l]);
                sums[l] = (h[l] * difference).mul_add(difference, sums[l]);
            }
        }
        tail += rest.iter().zip(h_rest).map(|(&x, &h)| h * difference(x).powi(2)).sum::<f32>();
    } else {
        for x in chunks {
            for l in 0..WIDE {
                let difference = difference(x[l]);
                sums[l] = difference.mul_add(difference, sums[l]);
            }
        }
        tail += rest.iter().map(|&x| difference(x).powi(2)).sum::<f32>();
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
