//! E8M0 scales: the choice of one exponent per block of 32 E2M1 values.

use super::ScaleRule;
use super::tile::{self, LANES, Lanes, Tile};
use crate::num::Codec;
use crate::scheme::QTensor;

#[inline(always)]
pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>, rule: ScaleRule) {
    let mut tile = Tile::<32>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        let amax = tile.amax();
        let scales = match rule {
            ScaleRule::Floor => tile::lanes(|l| scale(byte_for(amax[l], T8))),
            ScaleRule::Even => tile::lanes(|l| scale(byte_for(amax[l], T7))),
            ScaleRule::T7_25 => tile::lanes(|l| scale(byte_for(amax[l], T7_25))),
            ScaleRule::Search => search(&tile, &amax),
        };
        q.scales[groups.clone()].copy_from_slice(&scales[..groups.len()]);
    }
}

// A threshold T is stored as what must be added to the mantissa field of T / 4 to carry into the exponent.
const T8: u32 = 0;
const T7_25: u32 = 0x0018_0000;
const T7: u32 = 0x0020_0000;

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

/// Returns per block the best of three powers of two: the floor rule's and its neighbours.
#[inline(always)]
fn search(tile: &Tile<32>, amax: &Lanes) -> Lanes {
    let mut best = [f32::INFINITY; LANES];
    let mut chosen = [Codec::E8M0.decode(0); LANES];
    for offset in [0, 1, -1] {
        let candidate = tile::lanes(|l| {
            let byte = byte_for(amax[l], T8) + offset;
            scale(if byte < 254 { byte } else { 254 })
        });
        let cost = error(tile, &candidate, 4f32.powi(offset));
        for l in 0..LANES {
            let better = cost[l] < best[l];
            best[l] = if better { cost[l] } else { best[l] };
            chosen[l] = if better { candidate[l] } else { chosen[l] };
        }
    }
    chosen
}

/// Returns the weighted squared error of each block in units of the scale, times `unit_squared`. (Squares of the
/// weights themselves could leave the range of F32.)
#[inline(always)]
fn error(tile: &Tile<32>, scale: &Lanes, unit_squared: f32) -> Lanes {
    let inverse = tile::lanes(|l| 1.0 / scale[l]);
    let mut sum = [0.0; LANES];
    for (x, importance) in tile.x.iter().zip(&tile.importance) {
        for l in 0..LANES {
            let magnitude = x[l].abs() * inverse[l];
            let difference = magnitude - nearest_magnitude(magnitude);
            sum[l] += importance[l] * (difference * difference);
        }
    }
    tile::lanes(|l| sum[l] * unit_squared)
}

/// Returns the E2M1 magnitude nearest to `a`, which is not negative; ties to even, at most 6.
///
/// The spacing is half the binade's power of two, and ½ below 1. Adding 1.5 · 2^23 spacings makes the last place of
/// the sum one spacing, so the addition itself rounds.
#[inline(always)]
pub(super) fn nearest_magnitude(a: f32) -> f32 {
    let above_one = if a > 1.0 { a } else { 1.0 };
    let binade = f32::from_bits(above_one.to_bits() & 0x7f80_0000);
    let magic = binade * (1.5 * (1 << 22) as f32);
    let rounded = (a + magic) - magic;
    if rounded < 6.0 { rounded } else { 6.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::Element;

    #[test]
    fn nearest_magnitude_is_what_the_element_encodes() {
        for i in 0..=4096 {
            let a = i as f32 / 256.0;
            assert_eq!(nearest_magnitude(a), Element::E2M1.decode(Element::E2M1.encode(a)), "{a}");
        }
    }
}
