//! Two-level scales of K-quants: small integers per sub-block under F16 factors per super-block of 256.
//!
//! The sub-blocks are fitted freely, the factors are set so that the largest fitted scale (and minimum) is the largest
//! integer, and then both levels are refitted in turn against the errors of what would really be stored:
//!
//! 1. per sub-block, the neighbouring integer scales, each with the integer minimum that is best for it;
//! 2. per super-block, the factors: for given codes and integers, values are linear in `d` and `dmin`.

use super::affine::{self, Affine, Fixed, Sums};
use super::symmetric;
use super::tile::{self, LANES, Lanes, Tile};
use crate::num::Codec;
use crate::scheme::QTensor;

/// How often both levels are refitted.
const ROUNDS: usize = 2;

/// `value = d · scale · q - dmin · minimum`: Q4_K and Q5_K with eight sub-blocks of 32 and integers of 6 bits, Q2_K with sixteen
/// of 16 and integers of 4 bits.
#[inline(always)]
pub(super) fn fit_with_minima<const N: usize, const SUBS: usize>(
    q: &mut QTensor,
    weights: &[f32],
    importances: Option<&[f32]>,
) {
    let ends = Ends { steps: q.scheme.element.range().1, largest: largest_integer(q.scheme.scale) };
    let mut tile = Tile::<N>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        weigh::<N, SUBS>(&mut tile, importances.is_some());
        let stored = WithMinima::<SUBS>::fit(&tile, ends);
        q.scales[groups.clone()].copy_from_slice(&stored.scale[..groups.len()]);
        q.offsets[groups.clone()].copy_from_slice(&stored.minimum[..groups.len()]);
        for lane in (0..groups.len()).step_by(SUBS) {
            let outer = (groups.start + lane) / SUBS;
            q.outer_scales[outer] = stored.d[lane];
            q.outer_offsets[outer] = stored.dmin[lane];
        }
    }
}

/// `value = d · scale · q`: Q6_K and Q3_K with sixteen sub-blocks of 16, IQ4_XS with eight of 32; integers with a sign, of 8
/// bits or 6. `nearest` rounds to the element.
#[inline(always)]
pub(super) fn fit_symmetric<const N: usize, const SUBS: usize>(
    q: &mut QTensor,
    weights: &[f32],
    importances: Option<&[f32]>,
    nearest: impl Fn(f32) -> f32 + Copy,
) {
    let (element, codec) = (q.scheme.element, q.scheme.scale);
    let lowest = -largest_integer(codec) - 1.0;
    let mut tile = Tile::<N>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        weigh::<N, SUBS>(&mut tile, importances.is_some());
        let fitted = symmetric::search(&tile, element, nearest);
        let d = signed_largest::<SUBS>(&fitted).map(|largest| Codec::F16.round(largest * (1.0 / lowest)));
        let inverse = symmetric::reciprocal(&d);
        let start = Symmetric::<SUBS> { scale: tile::lanes(|l| codec.round(fitted[l] * inverse[l])), d };
        let stored = start.refit(&tile, codec, nearest);
        q.scales[groups.clone()].copy_from_slice(&stored.scale[..groups.len()]);
        for lane in (0..groups.len()).step_by(SUBS) {
            q.outer_scales[(groups.start + lane) / SUBS] = stored.d[lane];
        }
    }
}

/// Returns the largest of a codec's integers.
fn largest_integer(codec: Codec) -> f32 {
    match codec {
        Codec::U4 => 15.0,
        Codec::U6 => 63.0,
        Codec::I6 => 31.0,
        _ => 127.0,
    }
}

/// Sets the weight of each error to `importance · √(σ² + x²)`, where `σ²` is twice the mean square of the super-block
/// of `SUBS` sub-blocks: large weights matter more than plain squared error says. The formula is ggml's for an
/// importance matrix (`quantize_row_q4_K_impl` in ggml-quants.c), which serves as well without one: on two small
/// models KLD was equal or lower than with `rms + |x|`, ggml's data-free choice.
#[inline(always)]
fn weigh<const N: usize, const SUBS: usize>(tile: &mut Tile<N>, has_importances: bool) {
    let mut square = [0.0; LANES];
    for x in &tile.x {
        for l in 0..LANES {
            square[l] += x[l] * x[l];
        }
    }
    let mut variance = [0.0; LANES];
    for (variance, square) in variance.chunks_exact_mut(SUBS).zip(square.chunks_exact(SUBS)) {
        variance.fill(2.0 * square.iter().sum::<f32>() / (N * SUBS) as f32);
    }
    for (x, importance) in tile.x.iter().zip(&mut tile.importance) {
        for l in 0..LANES {
            let given = if has_importances { importance[l] } else { 1.0 };
            importance[l] = given * (variance[l] + x[l] * x[l]).sqrt();
        }
    }
}

/// The largest code and the largest integer.
#[derive(Clone, Copy)]
struct Ends {
    steps: f32,
    largest: f32,
}

/// The stored numbers of super-blocks of `SUBS` lanes; `d` and `dmin` are alike within each.
#[derive(Clone, Copy)]
struct WithMinima<const SUBS: usize> {
    scale: Lanes,
    minimum: Lanes,
    d: Lanes,
    dmin: Lanes,
}

impl<const SUBS: usize> WithMinima<SUBS> {
    #[inline(always)]
    fn fit<const N: usize>(tile: &Tile<N>, ends: Ends) -> Self {
        let fixed = Fixed::of(tile);
        let fitted = affine::search(tile, &fixed, ends.steps, true);
        let d = factor::<SUBS>(&fitted.scale, ends.largest);
        let dmin = factor::<SUBS>(&tile::lanes(|l| -fitted.offset[l]), ends.largest);
        let mut current = WithMinima { scale: [0.0; LANES], minimum: [0.0; LANES], d, dmin };
        current.scale = integers(&fitted.scale, &d, ends.largest);
        current.minimum = integers(&tile::lanes(|l| -fitted.offset[l]), &dmin, ends.largest);
        for round in 0..=ROUNDS {
            current.refit_integers(tile, &fixed, ends);
            if round < ROUNDS {
                current.refit_factors(tile, &fixed, ends.steps);
            }
        }
        current
    }

    /// Returns the effective grid as [`QTensor::grid`] computes it.
    #[inline(always)]
    fn grid(&self) -> Affine {
        Affine {
            scale: tile::lanes(|l| self.d[l] * self.scale[l]),
            offset: tile::lanes(|l| -(self.dmin[l] * self.minimum[l])),
        }
    }

    /// Tries the integers next to each sub-block's scale, with the minimum that suits the codes they give.
    #[inline(always)]
    fn refit_integers<const N: usize>(&mut self, tile: &Tile<N>, fixed: &Fixed, ends: Ends) {
        let start = *self;
        let grid = start.grid();
        let sums = Sums::of(tile, &grid, ends.steps);
        let mut best = sums.cost(fixed, &grid);
        for offset in [0.0, -1.0, 1.0] {
            let mut candidate = start;
            candidate.scale = tile::lanes(|l| (start.scale[l] + offset).clamp(0.0, ends.largest));
            let scale = tile::lanes(|l| candidate.d[l] * candidate.scale[l]);
            // The minimum that is best for codes on the unshifted grid, then the codes that are best for it.
            let minimum = tile::lanes(|l| (scale[l] * sums.q[l] - fixed.wx[l]) / fixed.w[l]);
            candidate.minimum = integers(&minimum, &start.dmin, ends.largest);
            let grid = candidate.grid();
            let cost = Sums::of(tile, &grid, ends.steps).cost(fixed, &grid);
            for l in 0..LANES {
                let better = cost[l] < best[l];
                best[l] = if better { cost[l] } else { best[l] };
                self.scale[l] = if better { candidate.scale[l] } else { self.scale[l] };
                self.minimum[l] = if better { candidate.minimum[l] } else { self.minimum[l] };
            }
        }
    }

    /// Solves for both factors of each super-block, given codes and integers, and keeps them where the error falls.
    #[inline(always)]
    fn refit_factors<const N: usize>(&mut self, tile: &Tile<N>, fixed: &Fixed, steps: f32) {
        let grid = self.grid();
        let sums = Sums::of(tile, &grid, steps);
        let (s, m) = (&self.scale, &self.minimum);
        let dd = per_super_block::<SUBS>(&tile::lanes(|l| s[l] * s[l] * sums.qq[l]));
        let dm = per_super_block::<SUBS>(&tile::lanes(|l| s[l] * m[l] * sums.q[l]));
        let mm = per_super_block::<SUBS>(&tile::lanes(|l| m[l] * m[l] * fixed.w[l]));
        let xd = per_super_block::<SUBS>(&tile::lanes(|l| s[l] * sums.xq[l]));
        let xm = per_super_block::<SUBS>(&tile::lanes(|l| m[l] * fixed.wx[l]));
        let mut candidate = *self;
        for l in 0..LANES {
            // value = d · (s q) - dmin · m
            let determinant = dd[l] * mm[l] - dm[l] * dm[l];
            let both = determinant > 1e-6 * (dd[l] * mm[l]);
            let d = if both { (xd[l] * mm[l] - xm[l] * dm[l]) / determinant } else { xd[l] / dd[l] };
            let dmin = if both { (xd[l] * dm[l] - xm[l] * dd[l]) / determinant } else { self.dmin[l] };
            // An empty or absurd solution fails the comparison below or these.
            candidate.d[l] = if d > 0.0 { Codec::F16.round(d) } else { self.d[l] };
            candidate.dmin[l] = if dmin > 0.0 { Codec::F16.round(dmin) } else { self.dmin[l] };
        }
        let before = per_super_block::<SUBS>(&sums.cost(fixed, &grid));
        let grid = candidate.grid();
        let after = per_super_block::<SUBS>(&Sums::of(tile, &grid, steps).cost(fixed, &grid));
        for l in 0..LANES {
            let better = after[l] < before[l];
            self.d[l] = if better { candidate.d[l] } else { self.d[l] };
            self.dmin[l] = if better { candidate.dmin[l] } else { self.dmin[l] };
        }
    }
}

/// Returns the sum over each super-block, in all its lanes.
#[inline(always)]
fn per_super_block<const SUBS: usize>(values: &Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, values) in out.chunks_exact_mut(SUBS).zip(values.chunks_exact(SUBS)) {
        out.fill(values.iter().sum());
    }
    out
}

/// Returns, per super-block, the F16 factor under which the largest value is the largest integer.
#[inline(always)]
fn factor<const SUBS: usize>(values: &Lanes, largest: f32) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, values) in out.chunks_exact_mut(SUBS).zip(values.chunks_exact(SUBS)) {
        let value = values.iter().fold(0f32, |a, &v| if v > a { v } else { a });
        out.fill(Codec::F16.round(value * (1.0 / largest)));
    }
    out
}

#[inline(always)]
fn integers(values: &Lanes, factor: &Lanes, largest: f32) -> Lanes {
    let inverse = symmetric::reciprocal(factor);
    tile::lanes(|l| (values[l] * inverse[l]).round_ties_even().clamp(0.0, largest))
}

/// Returns each super-block's value of largest magnitude, in all its lanes.
#[inline(always)]
fn signed_largest<const SUBS: usize>(values: &Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, values) in out.chunks_exact_mut(SUBS).zip(values.chunks_exact(SUBS)) {
        out.fill(values.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a }));
    }
    out
}

/// Integer scales and the factor of super-blocks of `SUBS` lanes, alike within each.
#[derive(Clone, Copy)]
struct Symmetric<const SUBS: usize> {
    scale: Lanes,
    d: Lanes,
}

impl<const SUBS: usize> Symmetric<SUBS> {
    /// Refits integers and factor in turn.
    #[inline(always)]
    fn refit<const N: usize>(
        mut self,
        tile: &Tile<N>,
        codec: Codec,
        nearest: impl Fn(f32) -> f32 + Copy,
    ) -> Self {
        let cost_of =
            |scale: &Lanes, d: &Lanes| symmetric::cost(tile, &tile::lanes(|l| d[l] * scale[l]), nearest);
        for round in 0..=ROUNDS {
            let (mut best, mut chosen) = ([f32::INFINITY; LANES], self.scale);
            for offset in [0.0, -1.0, 1.0] {
                let candidate = tile::lanes(|l| codec.round(self.scale[l] + offset));
                let (cost, _, _) = cost_of(&candidate, &self.d);
                symmetric::keep(&mut best, &mut chosen, &cost, &candidate);
            }
            self.scale = chosen;
            if round == ROUNDS {
                break;
            }
            let (before, xq, qq) = cost_of(&self.scale, &self.d);
            let numerator = per_super_block::<SUBS>(&tile::lanes(|l| self.scale[l] * xq[l]));
            let denominator =
                per_super_block::<SUBS>(&tile::lanes(|l| self.scale[l] * self.scale[l] * qq[l]));
            let other = tile::lanes(|l| {
                let solved = denominator[l] > 0.0;
                if solved { Codec::F16.round(numerator[l] / denominator[l]) } else { self.d[l] }
            });
            let (after, _, _) = cost_of(&self.scale, &other);
            let (after, before) = (per_super_block::<SUBS>(&after), per_super_block::<SUBS>(&before));
            for l in 0..LANES {
                self.d[l] = if after[l] < before[l] { other[l] } else { self.d[l] };
            }
        }
        self
    }
}
