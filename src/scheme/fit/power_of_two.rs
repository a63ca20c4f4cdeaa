//! E8M0 scales: the choice of one exponent per block of 32 E2M1 values.

use super::ScaleRule;
use super::e2m1::error;
use super::tile::{self, LANES, Lanes, Tile};
use crate::scheme::QTensor;

#[inline(always)]
pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>, rule: ScaleRule) {
    let mut tile = Tile::<32>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        let amax = tile.amax();
        let scales = match rule {
            ScaleRule::Floor | ScaleRule::Even | ScaleRule::T7_25 => {
                tile::lanes(|l| scale(byte_for(amax[l], rule.carry())))
            }
            ScaleRule::Search => search(&tile, &amax, importances.is_some()),
        };
        q.scales[groups.clone()].copy_from_slice(&scales[..groups.len()]);
    }
}

// A threshold T is stored as what must be added to the mantissa field of T / 4 to carry into the exponent.
const T8: u32 = 0;
const T7_25: u32 = 0x0018_0000;
const T7: u32 = 0x0020_0000;

impl ScaleRule {
    /// Returns what is added to a largest magnitude's bits before its exponent is read; a search starts at the floor rule's.
    pub(crate) fn carry(self) -> u32 {
        match self {
            ScaleRule::Floor | ScaleRule::Search => T8,
            ScaleRule::Even => T7,
            ScaleRule::T7_25 => T7_25,
        }
    }
}

/// Returns the byte of `ceil(log2(amax / T))`, for elements that end at 6. Within 0..=254.
///
/// `floor(log2 amax) - 2` is read off the exponent field; below the normal numbers the field is 0, as is the byte.
#[inline(always)]
fn byte_for(amax: f32, carry: u32) -> i32 {
    let byte = ((amax.to_bits() + carry) >> 23) as i32 - 2;
    if byte > 0 { byte } else { 0 }
}

#[inline(always)]
fn scale(byte: i32) -> f32 {
    // Byte 0 is 2^-127, a subnormal.
    f32::from_bits(if byte > 0 { (byte as u32) << 23 } else { 0x0040_0000 })
}

/// Returns per block the power of two of least error: the floor rule's `s` or a neighbour.
///
/// Twice the scale can only win where the largest magnitude is above 6 s: below, its grid is a part of the one at s.
/// Half the scale can only win below that if all weights count alike: it clips at 3 s, which costs 9 s² where the maximum
/// lies above 6 s, while s itself costs at most 4 s² there and the finer steps gain at most s²/16 for each other weight,
/// less than 2 s² together. So equal weights leave two candidates to each block, importances all three.
#[inline(always)]
fn search(tile: &Tile<32>, amax: &Lanes, weighted: bool) -> Lanes {
    let floor = tile::lanes(|l| scale(byte_for(amax[l], T8)));
    let factor = tile::lanes(|l| if amax[l] > 6.0 * floor[l] { 2.0 } else { 0.5 });
    let (mut best, mut chosen) = ([f32::INFINITY; LANES], floor);
    try_factor(tile, &floor, &[1.0; LANES], &mut best, &mut chosen);
    try_factor(tile, &floor, &factor, &mut best, &mut chosen);
    if weighted {
        try_factor(tile, &floor, &factor.map(|factor| 1.0 / factor), &mut best, &mut chosen);
    }
    chosen
}

/// Keeps `factor` times the floor rule's scale in the lanes where it is better than the best so far.
#[inline(always)]
fn try_factor(tile: &Tile<32>, floor: &Lanes, factor: &Lanes, best: &mut Lanes, chosen: &mut Lanes) {
    let candidate = tile::lanes(|l| {
        let candidate = floor[l] * factor[l];
        if candidate > scale(0) { candidate } else { scale(0) }
    });
    let cost = error(tile, &candidate);
    for l in 0..LANES {
        // In units of the floor rule's scale.
        let ratio = candidate[l] / floor[l];
        let cost = cost[l] * (ratio * ratio);
        let better = cost < best[l];
        best[l] = if better { cost } else { best[l] };
        chosen[l] = if better { candidate[l] } else { chosen[l] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_candidates_are_as_good_as_all_three_when_weights_count_alike() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        for round in 0..2000 {
            let mut tile = Tile::<32>::new();
            // From flat to peaked, so that every branch of the choice is met.
            let power = [1, 3, 9][round % 3];
            tile.x.iter_mut().flatten().for_each(|x| *x = next().powi(power));
            let amax = tile.amax();
            assert_eq!(search(&tile, &amax, false), search(&tile, &amax, true));
        }
    }
}
