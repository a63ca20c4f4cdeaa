//! A scale and an offset per group: `value = scale · q + offset` with `q` in `0..=steps` (Q4_1, Q5_1, and the inner
//! scales and minima of Q4_K and Q5_K).
//!
//! For given codes the weighted error is least where two normal equations hold:
//!
//! ```text
//! | Σ w q²  Σ w q | | scale  |   | Σ w x q |
//! | Σ w q   Σ w   | | offset | = | Σ w x   |
//! ```
//!
//! So candidates only have to find good codes: each is rounded and refitted that way, and the best refit is kept.

use super::symmetric::reciprocal;
use super::tile::{self, LANES, Lanes, Tile};
use crate::num::Codec;
use crate::scheme::{Offset, QTensor};

#[inline(always)]
pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let Offset::Added(offset_codec) = q.scheme.offset else {
        unreachable!("affine schemes add their offset")
    };
    let (scale_codec, (_, steps)) = (q.scheme.scale, q.scheme.element.range());
    let round = |codec: Codec, values: &Lanes| tile::lanes(|l| codec.round(values[l]));
    let mut tile = Tile::<32>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        let fixed = Fixed::of(&tile);
        let mut grid = search(&tile, &fixed, steps, false);
        let (mut best, mut chosen) = ([f32::INFINITY; LANES], grid);
        for _ in 0..3 {
            grid =
                Affine { scale: round(scale_codec, &grid.scale), offset: round(offset_codec, &grid.offset) };
            let sums = Sums::of(&tile, &grid, steps);
            keep(&mut best, &mut chosen, &sums.cost(&fixed, &grid), &grid);
            grid = sums.refit(&fixed, false);
        }
        q.scales[groups.clone()].copy_from_slice(&chosen.scale[..groups.len()]);
        q.offsets[groups.clone()].copy_from_slice(&chosen.offset[..groups.len()]);
    }
}

/// A grid per group.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    pub scale: Lanes,
    pub offset: Lanes,
}

/// What does not depend on the codes: `Σ w` and `Σ w x` of each group.
pub(super) struct Fixed {
    pub w: Lanes,
    pub wx: Lanes,
}

impl Fixed {
    #[inline(always)]
    pub fn of<const N: usize>(tile: &Tile<N>) -> Self {
        let (mut w, mut wx) = ([0.0; LANES], [0.0; LANES]);
        for (x, importance) in tile.x.iter().zip(&tile.importance) {
            for l in 0..LANES {
                w[l] += importance[l];
                wx[l] += importance[l] * x[l];
            }
        }
        Fixed { w, wx }
    }
}

/// What depends on the codes: `Σ w q`, `Σ w q²` and `Σ w x q` of each group.
pub(super) struct Sums {
    pub q: Lanes,
    pub qq: Lanes,
    pub xq: Lanes,
}

impl Sums {
    /// Returns the sums for the codes nearest on that grid.
    #[inline(always)]
    pub fn of<const N: usize>(tile: &Tile<N>, grid: &Affine, steps: f32) -> Self {
        let inverse = reciprocal(&grid.scale);
        let (mut q, mut qq, mut xq) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (x, importance) in tile.x.iter().zip(&tile.importance) {
            for l in 0..LANES {
                let code = ((x[l] - grid.offset[l]) * inverse[l]).round_ties_even().clamp(0.0, steps);
                let weighted = importance[l] * code;
                q[l] += weighted;
                qq[l] += weighted * code;
                xq[l] += weighted * x[l];
            }
        }
        Sums { q, qq, xq }
    }

    /// Returns `Σ w (x - scale · q - offset)²` less the constant `Σ w x²`.
    #[inline(always)]
    pub fn cost(&self, fixed: &Fixed, grid: &Affine) -> Lanes {
        tile::lanes(|l| {
            let (s, o) = (grid.scale[l], grid.offset[l]);
            s * (s * self.qq[l] + 2.0 * (o * self.q[l] - self.xq[l]))
                + o * (o * fixed.w[l] - 2.0 * fixed.wx[l])
        })
    }

    /// Returns the grid of least error for the same codes; with `negative` its offset is at most zero.
    #[inline(always)]
    pub fn refit(&self, fixed: &Fixed, negative: bool) -> Affine {
        let mut grid = Affine { scale: [0.0; LANES], offset: [0.0; LANES] };
        for l in 0..LANES {
            let determinant = fixed.w[l] * self.qq[l] - self.q[l] * self.q[l];
            // All codes alike: one number fits the group.
            let singular = determinant <= 1e-6 * (fixed.w[l] * self.qq[l]);
            let scale = (fixed.w[l] * self.xq[l] - fixed.wx[l] * self.q[l]) / determinant;
            let scale = if singular { 0.0 } else { scale };
            let offset = (fixed.wx[l] - scale * self.q[l]) / fixed.w[l];
            let through_zero = negative && offset > 0.0;
            let slope = if self.qq[l] > 0.0 { self.xq[l] / self.qq[l] } else { 0.0 };
            grid.scale[l] = if through_zero { slope } else { scale };
            grid.offset[l] = if through_zero || fixed.w[l] <= 0.0 { 0.0 } else { offset };
        }
        grid
    }
}

/// Where candidates put the ends of the weights' range, in steps inside (or outside) the grid's ends.
const INSETS: [(f32, f32); 14] = [
    (0.0, 0.0),
    (-0.35, -0.35),
    (0.35, 0.35),
    (0.7, 0.7),
    (1.05, 1.05),
    (1.4, 1.4),
    (0.5, 0.0),
    (0.0, 0.5),
    (1.0, 0.0),
    (0.0, 1.0),
    (1.5, 0.3),
    (0.3, 1.5),
    (0.25, -0.25),
    (-0.25, 0.25),
];

/// Returns the best refitted grid, not rounded. With `negative`, zero is always on or inside the grid.
#[inline(always)]
pub(super) fn search<const N: usize>(tile: &Tile<N>, fixed: &Fixed, steps: f32, negative: bool) -> Affine {
    let (low, high) = tile.range();
    let low = tile::lanes(|l| if negative && low[l] > 0.0 { 0.0 } else { low[l] });
    let mut best = [f32::INFINITY; LANES];
    let mut chosen = Affine { scale: [0.0; LANES], offset: low };
    for (below, above) in INSETS {
        // `below` and `above` are how many steps of the range lie beyond the grid's first and last value.
        let scale = tile::lanes(|l| (high[l] - low[l]) * (1.0 / (steps + below + above)));
        let offset = tile::lanes(|l| low[l] + below * scale[l]);
        let sums = Sums::of(tile, &Affine { scale, offset }, steps);
        let grid = sums.refit(fixed, negative);
        keep(&mut best, &mut chosen, &sums.cost(fixed, &grid), &grid);
    }
    for _ in 0..2 {
        let sums = Sums::of(tile, &chosen, steps);
        let grid = sums.refit(fixed, negative);
        keep(&mut best, &mut chosen, &sums.cost(fixed, &grid), &grid);
    }
    chosen
}

/// Replaces what was chosen wherever the cost is lower.
#[inline(always)]
pub(super) fn keep(best: &mut Lanes, chosen: &mut Affine, cost: &Lanes, candidate: &Affine) {
    for l in 0..LANES {
        let better = cost[l] < best[l];
        best[l] = if better { cost[l] } else { best[l] };
        chosen.scale[l] = if better { candidate.scale[l] } else { chosen.scale[l] };
        chosen.offset[l] = if better { candidate.offset[l] } else { chosen.offset[l] };
    }
}
