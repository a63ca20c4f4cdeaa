//! Small floats in one byte: decode by formula, encode to the nearest value with ties to the even code.

/// Returns the value of an E2M1 code (sign, 2 exponent bits with bias 1, 1 mantissa bit). No infinity, no NaN.
///
/// Twice the magnitude is the integer 0, 1, 2, 3, 4, 6, 8, 12: computed with shifts, so that the loop around this
/// vectorises, which a table does not.
#[inline(always)]
pub(super) fn decode_e2m1(code: u8) -> f32 {
    let (exponent, mantissa, sign) = (code as u32 >> 1 & 3, code as u32 & 1, code as u32 >> 3 & 1);
    let leading = ((exponent != 0) as u32) << 1;
    let twice = (leading | mantissa) << exponent >> leading.min(1);
    f32::from_bits((twice as i32 as f32 * 0.5).to_bits() | sign << 31)
}

/// Returns the E2M1 code nearest to `x`, ties to the even mantissa, saturating at ±6.
///
/// Each comparison is one rounding boundary, so the code is their count and the loop around this vectorises.
#[inline(always)]
pub(super) fn encode_e2m1(x: f32) -> u8 {
    let a = x.abs();
    let magnitude = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    magnitude | (((x.to_bits() >> 31) as u8) << 3)
}

/// Returns the value of an E4M3 ("fn") byte: sign, 4 exponent bits with bias 7, 3 mantissa bits; `S.1111.111` is NaN.
#[inline]
pub(super) fn decode_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3) & 15, (code & 7) as f32);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent as i32 - 7),
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// Returns the E4M3 byte nearest to `x`, ties to even, saturating at ±448; NaN stays NaN.
#[inline]
pub(super) fn encode_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 31) as u8) << 7;
    let a = x.abs();
    if a.is_nan() {
        return sign | 0x7f;
    }
    if a >= 448.0 {
        return sign | 0x7e;
    }
    // Below 2^-6 the spacing stays 2^-9 (subnormals); above, it is 2^(exponent - 3).
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (a * 2f32.powi(3 - exponent)).round_ties_even() as u8;
    // `steps` is 8..=16 for normals: 16 carries into the next exponent by plain addition.
    sign | (((exponent + 6) as u8) << 3).wrapping_add(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e2m1_codes_are_the_sixteen_values_of_the_specification() {
        let positive = [0.0f32, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for (code, value) in positive.into_iter().enumerate() {
            assert_eq!(decode_e2m1(code as u8).to_bits(), value.to_bits());
            assert_eq!(decode_e2m1(code as u8 | 8).to_bits(), (-value).to_bits());
        }
    }

    fn nearest_by_search(x: f32, values: &[(u8, f32)]) -> f32 {
        let best = values.iter().map(|&(_, v)| (v - x).abs()).fold(f32::INFINITY, f32::min);
        let ties: Vec<_> = values.iter().filter(|&&(_, v)| (v - x).abs() == best).collect();
        ties.iter().find(|(c, _)| c & 1 == 0).unwrap_or(&ties[0]).1
    }

    #[test]
    fn every_e2m1_code_survives_a_round_trip() {
        for code in 0..16u8 {
            assert_eq!(encode_e2m1(decode_e2m1(code)), code);
        }
    }

    #[test]
    fn e2m1_encode_is_the_nearest_value_with_ties_to_even() {
        let values: Vec<_> = (0..16).map(|c| (c, decode_e2m1(c))).collect();
        for i in -2000..=2000 {
            let x = i as f32 / 256.0;
            assert_eq!(decode_e2m1(encode_e2m1(x)), nearest_by_search(x, &values), "x = {x}");
        }
    }

    #[test]
    fn every_finite_e4m3_code_survives_a_round_trip() {
        for code in (0..=255u8).filter(|c| c & 0x7f != 0x7f) {
            assert_eq!(encode_e4m3(decode_e4m3(code)), code, "code {code:#x}");
        }
        assert!(decode_e4m3(0x7f).is_nan() && decode_e4m3(0xff).is_nan());
        assert_eq!((decode_e4m3(0x7e), decode_e4m3(1)), (448.0, 2f32.powi(-9)));
    }

    #[test]
    fn e4m3_encode_is_the_nearest_value_with_ties_to_even() {
        let values: Vec<_> = (0..=255u8).filter(|c| c & 0x7f != 0x7f).map(|c| (c, decode_e4m3(c))).collect();
        let mut boundaries: Vec<f32> = values.iter().map(|&(_, v)| v).collect();
        boundaries.sort_by(f32::total_cmp);
        for pair in boundaries.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            for x in [middle, middle.next_up(), middle.next_down()] {
                assert_eq!(decode_e4m3(encode_e4m3(x)), nearest_by_search(x, &values), "x = {x}");
            }
        }
    }
}
