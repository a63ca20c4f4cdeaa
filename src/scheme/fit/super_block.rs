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

/// Q4_K, Q5_K: `value = d · scale · q - dmin · minimum`, eight sub-blocks of 32, integers of 6 bits.
#[inline(always)]
pub(super) fn fit_with_minima(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let (_, steps) = q.scheme.element.range();
    let mut tile = Tile::<32>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        weigh::<32, 8>(&mut tile, importances.is_some());
        let stored = WithMinima::fit(&tile, steps);
        q.scales[groups.clone()].copy_from_slice(&stored.scale[..groups.len()]);
        q.offsets[groups.clone()].copy_from_slice(&stored.minimum[..groups.len()]);
        for lane in (0..groups.len()).step_by(8) {
            let outer = (groups.start + lane) / 8;
            q.outer_scales[outer] = stored.d[lane];
            q.outer_offsets[outer] = stored.dmin[lane];
        }
    }
}

/// Q6_K: `value = d · scale · q`, sixteen sub-blocks of 16, integers of 8 bits with a sign.
#[inline(always)]
pub(super) fn fit_symmetric(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let element = q.scheme.element;
    let mut tile = Tile::<16>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        weigh::<16, 16>(&mut tile, importances.is_some());
        let fitted = symmetric::search(&tile, element);
        let d = Codec::F16.round(signed_largest(&fitted) * (1.0 / -128.0));
        let inverse = symmetric::reciprocal(&[d; LANES]);
        let integers = tile::lanes(|l| Codec::I8.round(fitted[l] * inverse[l]));
        let (integers, d) = refit_symmetric(&tile, element.range(), integers, d);
        q.scales[groups.clone()].copy_from_slice(&integers);
        q.outer_scales[groups.start / 16] = d;
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

/// The stored numbers of two super-blocks; `d` and `dmin` are alike within each.
#[derive(Clone, Copy)]
struct WithMinima {
    scale: Lanes,
    minimum: Lanes,
    d: Lanes,
    dmin: Lanes,
}

impl WithMinima {
    #[inline(always)]
    fn fit(tile: &Tile<32>, steps: f32) -> Self {
        let fixed = Fixed::of(tile);
        let fitted = affine::search(tile, &fixed, steps, true);
        let d = factor(&fitted.scale);
        let dmin = factor(&tile::lanes(|l| -fitted.offset[l]));
        let mut current = WithMinima { scale: [0.0; LANES], minimum: [0.0; LANES], d, dmin };
        current.scale = six_bits(&fitted.scale, &d);
        current.minimum = six_bits(&tile::lanes(|l| -fitted.offset[l]), &dmin);
        for round in 0..=ROUNDS {
            current.refit_integers(tile, &fixed, steps);
            if round < ROUNDS {
                current.refit_factors(tile, &fixed, steps);
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
    fn refit_integers(&mut self, tile: &Tile<32>, fixed: &Fixed, steps: f32) {
        let start = *self;
        let grid = start.grid();
        let sums = Sums::of(tile, &grid, steps);
        let mut best = sums.cost(fixed, &grid);
        for offset in [0.0, -1.0, 1.0] {
            let mut candidate = start;
            candidate.scale = tile::lanes(|l| (start.scale[l] + offset).clamp(0.0, 63.0));
            let scale = tile::lanes(|l| candidate.d[l] * candidate.scale[l]);
            // The minimum that is best for codes on the unshifted grid, then the codes that are best for it.
            let minimum = tile::lanes(|l| (scale[l] * sums.q[l] - fixed.wx[l]) / fixed.w[l]);
            candidate.minimum = six_bits(&minimum, &start.dmin);
            let grid = candidate.grid();
            let cost = Sums::of(tile, &grid, steps).cost(fixed, &grid);
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
    fn refit_factors(&mut self, tile: &Tile<32>, fixed: &Fixed, steps: f32) {
        let grid = self.grid();
        let sums = Sums::of(tile, &grid, steps);
        let (s, m) = (&self.scale, &self.minimum);
        let dd = per_super_block(&tile::lanes(|l| s[l] * s[l] * sums.qq[l]));
        let dm = per_super_block(&tile::lanes(|l| s[l] * m[l] * sums.q[l]));
        let mm = per_super_block(&tile::lanes(|l| m[l] * m[l] * fixed.w[l]));
        let xd = per_super_block(&tile::lanes(|l| s[l] * sums.xq[l]));
        let xm = per_super_block(&tile::lanes(|l| m[l] * fixed.wx[l]));
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
        let before = per_super_block(&sums.cost(fixed, &grid));
        let grid = candidate.grid();
        let after = per_super_block(&Sums::of(tile, &grid, steps).cost(fixed, &grid));
        for l in 0..LANES {
            let better = after[l] < before[l];
            self.d[l] = if better { candidate.d[l] } else { self.d[l] };
            self.dmin[l] = if better { candidate.dmin[l] } else { self.dmin[l] };
        }
    }
}

/// Returns the sum over each super-block of eight lanes, in all its lanes.
#[inline(always)]
fn per_super_block(values: &Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, values) in out.chunks_exact_mut(8).zip(values.chunks_exact(8)) {
        out.fill(values.iter().sum());
    }
    out
}

/// Returns, per super-block of eight lanes, the F16 factor under which the largest value is 63.
#[inline(always)]
fn factor(values: &Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for (out, values) in out.chunks_exact_mut(8).zip(values.chunks_exact(8)) {
        out.fill(
            Codec::F16.round(values.iter().fold(0f32, |a, &v| if v > a { v } else { a }) * (1.0 / 63.0)),
        );
    }
    out
}

#[inline(always)]
fn six_bits(values: &Lanes, factor: &Lanes) -> Lanes {
    let inverse = symmetric::reciprocal(factor);
    tile::lanes(|l| (values[l] * inverse[l]).round_ties_even().clamp(0.0, 63.0))
}

/// Returns the value of largest magnitude.
#[inline(always)]
fn signed_largest(values: &Lanes) -> f32 {
    values.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a })
}

/// Refits Q6_K's integers and factor in turn, from `integers` under `d`.
#[inline(always)]
fn refit_symmetric(tile: &Tile<16>, range: (f32, f32), mut integers: Lanes, mut d: f32) -> (Lanes, f32) {
    for round in 0..=ROUNDS {
        let (mut best, mut chosen) = ([f32::INFINITY; LANES], integers);
        for offset in [0.0, -1.0, 1.0] {
            let candidate = tile::lanes(|l| (integers[l] + offset).clamp(-128.0, 127.0));
            let (cost, _, _) = symmetric::cost(tile, &tile::lanes(|l| d * candidate[l]), range);
            symmetric::keep(&mut best, &mut chosen, &cost, &candidate);
        }
        integers = chosen;
        if round == ROUNDS {
            break;
        }
        let (before, xq, qq) = symmetric::cost(tile, &tile::lanes(|l| d * integers[l]), range);
        let numerator: f32 = tile::lanes(|l| integers[l] * xq[l]).iter().sum();
        let denominator: f32 = tile::lanes(|l| integers[l] * integers[l] * qq[l]).iter().sum();
        if denominator > 0.0 {
            let other = Codec::F16.round(numerator / denominator);
            let (after, _, _) = symmetric::cost(tile, &tile::lanes(|l| other * integers[l]), range);
            if after.iter().sum::<f32>() < before.iter().sum::<f32>() {
                d = other;
            }
        }
    }
    (integers, d)
}
