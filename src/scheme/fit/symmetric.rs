//! One scale per group of a grid without offset, `value = scale · q` (Q8_0, Q4_0, Q5_0, INT4, IQ4_NL, and the inner scales of
//! Q3_K, Q6_K and IQ4_XS).
//!
//! For given codes `q` the weighted error `Σ w (x - s q)²` is least at `s = Σ w x q / Σ w q²`. So candidates only have
//! to find good codes: each is rounded, refitted that way, and the best refit is kept.

use super::tile::{self, LANES, Lanes, Tile};
use crate::num::Element;
use crate::scheme::QTensor;

/// Eight bits: the largest weight sits at 127.45 units and fewer. No clipping; the error's mean grows with the scale
/// but its spread over candidates, being a sum of only 32 rounding errors, is far larger.
const EIGHT_BITS: [f32; 6] = [127.45, 126.25, 125.05, 123.85, 122.65, 121.45];

#[inline(always)]
pub(super) fn fit<const N: usize>(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let (element, codec) = (q.scheme.element, q.scheme.scale);
    let mut tile = Tile::<N>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        let round = |scale: &Lanes| tile::rounded(codec, scale);
        let scales = match element {
            Element::Int(8) => eight_bits(&tile, round),
            Element::Table(table) => {
                let nearest = |x| table.nearest(x);
                let fitted = search(&tile, element, nearest);
                refine(&tile, nearest, round(&fitted), round)
            }
            _ => {
                let nearest = integers(element.range());
                let fitted = search(&tile, element, nearest);
                refine(&tile, nearest, round(&fitted), round)
            }
        };
        q.scales[groups.clone()].copy_from_slice(&scales[..groups.len()]);
    }
}

/// Returns per group the best of [`EIGHT_BITS`], after rounding.
#[inline(always)]
fn eight_bits<const N: usize>(tile: &Tile<N>, round: impl Fn(&Lanes) -> Lanes) -> Lanes {
    let amax = tile.amax();
    let (mut best, mut chosen) = ([f32::INFINITY; LANES], [0.0; LANES]);
    for units in EIGHT_BITS {
        let scale = round(&tile::lanes(|l| amax[l] * (1.0 / units)));
        let inverse = reciprocal(&scale);
        let cost = tile.squares(|x, l| tile::fraction(x, inverse[l]));
        let cost = tile::lanes(|l| cost[l] * ((1.0 / units) * (1.0 / units)));
        keep(&mut best, &mut chosen, &cost, &scale);
    }
    chosen
}

/// Returns the function that rounds to the integers in a range.
#[inline(always)]
pub(super) fn integers((low, high): (f32, f32)) -> impl Fn(f32) -> f32 + Copy {
    move |x| x.round_ties_even().clamp(low, high)
}

/// Returns how far apart candidates are that put the largest weight near the grid's long end, relative to that, and near its
/// short end, in units. The fewer values, the less the end says of the best scale.
#[inline(always)]
fn spacing(element: Element) -> (f32, f32) {
    match element {
        Element::Int(..=3) => (0.04, 0.25),
        Element::Table(_) => (0.015, 0.05 * element.range().1),
        _ => (0.015, 0.35),
    }
}

/// Returns per group a scale of either sign for elements of 3 to 6 bits, which `nearest` rounds to; refitted but not rounded.
#[inline(always)]
pub(super) fn search<const N: usize>(
    tile: &Tile<N>,
    element: Element,
    nearest: impl Fn(f32) -> f32 + Copy,
) -> Lanes {
    let ((low, high), (at_low, at_high)) = (element.range(), spacing(element));
    let extreme = signed_amax(tile);
    let mut found = Found { explained: [0.0; LANES], scale: [0.0; LANES] };
    // The largest weight goes near the grid's long end, so the sign of the scale follows its sign; a few candidates
    // put it at the short end.
    for step in -6..=5 {
        found.try_units(tile, &extreme, low - at_low * low * step as f32, nearest);
    }
    for step in -1..=2 {
        found.try_units(tile, &extreme, high + at_high * step as f32, nearest);
    }
    found.scale
}

/// The best scales so far.
struct Found {
    /// Σ w x² less the error.
    explained: Lanes,
    scale: Lanes,
}

impl Found {
    /// Rounds with the largest weight at `units` and keeps the refitted scale where it explains more.
    #[inline(always)]
    fn try_units<const N: usize>(
        &mut self,
        tile: &Tile<N>,
        extreme: &Lanes,
        units: f32,
        nearest: impl Fn(f32) -> f32 + Copy,
    ) {
        let inverse = tile::lanes(|l| if extreme[l] == 0.0 { 0.0 } else { units / extreme[l] });
        let Sums { xq, qq } = sums(tile, &inverse, nearest);
        for l in 0..LANES {
            let explained = if qq[l] > 0.0 { xq[l] * xq[l] / qq[l] } else { 0.0 };
            let better = explained > self.explained[l];
            self.explained[l] = if better { explained } else { self.explained[l] };
            self.scale[l] = if better { xq[l] / qq[l] } else { self.scale[l] };
        }
    }
}

/// Returns per group `Σ w (x - s q)²` less the constant `Σ w x²`, with `Σ w x q` and `Σ w q²`.
#[inline(always)]
pub(super) fn cost<const N: usize>(
    tile: &Tile<N>,
    scale: &Lanes,
    nearest: impl Fn(f32) -> f32 + Copy,
) -> (Lanes, Lanes, Lanes) {
    let Sums { xq, qq } = sums(tile, &reciprocal(scale), nearest);
    (tile::lanes(|l| scale[l] * (scale[l] * qq[l] - 2.0 * xq[l])), xq, qq)
}

/// Alternates re-rounding and refitting under a scale's stored form, keeping the best scale met.
#[inline(always)]
fn refine<const N: usize>(
    tile: &Tile<N>,
    nearest: impl Fn(f32) -> f32 + Copy,
    start: Lanes,
    round: impl Fn(&Lanes) -> Lanes,
) -> Lanes {
    let (mut best, mut chosen) = ([f32::INFINITY; LANES], [0.0; LANES]);
    let mut scale = start;
    for _ in 0..3 {
        let (cost, xq, qq) = cost(tile, &scale, nearest);
        keep(&mut best, &mut chosen, &cost, &scale);
        scale = round(&tile::lanes(|l| if qq[l] > 0.0 { xq[l] / qq[l] } else { 0.0 }));
    }
    chosen
}

/// `Σ w x q` and `Σ w q²` of each group.
struct Sums {
    xq: Lanes,
    qq: Lanes,
}

#[inline(always)]
fn sums<const N: usize>(tile: &Tile<N>, inverse: &Lanes, nearest: impl Fn(f32) -> f32 + Copy) -> Sums {
    let (mut xq, mut qq) = ([0.0; LANES], [0.0; LANES]);
    for (x, importance) in tile.x.iter().zip(&tile.importance) {
        for l in 0..LANES {
            let unit = nearest(x[l] * inverse[l]);
            let weighted = importance[l] * unit;
            xq[l] += weighted * x[l];
            qq[l] += weighted * unit;
        }
    }
    Sums { xq, qq }
}

/// Returns the weight of largest magnitude of each group.
#[inline(always)]
fn signed_amax<const N: usize>(tile: &Tile<N>) -> Lanes {
    let (low, high) = tile.range();
    tile::lanes(|l| if -low[l] > high[l] { low[l] } else { high[l] })
}

/// Returns the reciprocals, 0 of 0 and finite throughout.
#[inline(always)]
pub(super) fn reciprocal(scale: &Lanes) -> Lanes {
    tile::lanes(|l| if scale[l] == 0.0 { 0.0 } else { (1.0 / scale[l]).clamp(-f32::MAX, f32::MAX) })
}

/// Replaces what was chosen wherever the cost is lower.
#[inline(always)]
pub(super) fn keep(best: &mut Lanes, chosen: &mut Lanes, cost: &Lanes, candidate: &Lanes) {
    // As masks: from a conditional the compiler makes a branch for every lane.
    let better: [u32; LANES] = std::array::from_fn(|l| ((cost[l] < best[l]) as u32).wrapping_neg());
    *best = tile::select(&better, cost, best);
    *chosen = tile::select(&better, candidate, chosen);
}
