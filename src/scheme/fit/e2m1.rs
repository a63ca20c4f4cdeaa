//! The error of rounding blocks to E2M1, which the scale searches of MXFP4 and NVFP4 share.

use super::tile::{self, Lanes, Tile};

/// Returns the weighted squared error of each block in units of the scale. (Squares of the weights themselves could
/// leave the range of F32.)
#[inline(always)]
pub(super) fn error<const N: usize>(tile: &Tile<N>, scale: &Lanes) -> Lanes {
    let inverse = tile::lanes(|l| 1.0 / scale[l]);
    tile.squares(|x, l| {
        let magnitude = x.abs() * inverse[l];
        magnitude - nearest_magnitude(magnitude)
    })
}

/// Returns the E2M1 magnitude nearest to `a`, which is not negative; ties to even, at most 6.
///
/// The spacing is half the binade's power of two, and ½ below 1. Adding 1.5 · 2^23 spacings makes the last place of
/// the sum one spacing, so the addition itself rounds.
#[inline(always)]
fn nearest_magnitude(a: f32) -> f32 {
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
