//! NVFP4: one E4M3 scale per block of 16 E2M1 values, under a factor that the whole tensor shares.
//!
//! The scale that just reaches the block's largest weight, `amax / 6`, lies between two stored ones. Up to three steps
//! below it the largest weights clip; up to eight above it the largest comes to rest near 4 or 3, where E2M1 is denser.

use super::e2m1::error;
use super::tile::{self, LANES, Lanes, Tile};
use crate::num::Codec;
use crate::scheme::QTensor;

/// Candidates, in steps of the stored scale (1/8 to 1/16 of it) from the nearest to `amax / 6`.
const STEPS: [i32; 12] = [0, 1, -1, 2, -2, 3, -3, 4, 5, 6, 7, 8];
/// Bytes of the smallest and largest scale: zero and NaN left out.
const BYTES: (i32, i32) = (1, 0x7e);

#[inline(always)]
pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>) {
    let inverse_global = 1.0 / q.outer_scales[0];
    let mut tile = Tile::<16>::new();
    for first in (0..q.scales.len()).step_by(LANES) {
        let groups = tile.load(weights, importances, first);
        for x in &mut tile.x {
            x.iter_mut().for_each(|x| *x *= inverse_global);
        }
        let scales = search(&tile);
        q.scales[groups.clone()].copy_from_slice(&scales[..groups.len()]);
    }
}

#[inline(always)]
fn search(tile: &Tile<16>) -> Lanes {
    let amax = tile.amax();
    let nearest: [i32; LANES] = std::array::from_fn(|l| Codec::E4M3.encode(amax[l] * (1.0 / 6.0)) as i32);
    let (mut best, mut chosen) = ([f32::INFINITY; LANES], [1.0; LANES]);
    for step in STEPS {
        let candidate = tile::lanes(|l| scale((nearest[l] + step).clamp(BYTES.0, BYTES.1)));
        let cost = error(tile, &candidate);
        for l in 0..LANES {
            let cost = cost[l] * (candidate[l] * candidate[l]);
            let better = cost < best[l];
            best[l] = if better { cost } else { best[l] };
            chosen[l] = if better { candidate[l] } else { chosen[l] };
        }
    }
    chosen
}

/// Returns the value of an E4M3 byte without sign: its fields put in an F32's are 2^120 too small, subnormals as well.
#[inline(always)]
fn scale(byte: i32) -> f32 {
    f32::from_bits((byte as u32) << 20) * f32::from_bits((127 + 120) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_the_codecs_value() {
        for byte in BYTES.0..=BYTES.1 {
            assert_eq!(scale(byte), Codec::E4M3.decode(byte as u32), "{byte}");
        }
    }
}
