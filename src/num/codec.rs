use half::{bf16, f16};

use super::minifloat;

/// How a scale or an offset is stored.
///
/// In memory a scale is always an `f32` that its codec can represent; `decode(encode(x)) == x` for such values, so
/// nothing is lost by keeping the decoded form until a dialect packs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// Upper half of an F32, 2 bytes.
    BF16,
    /// A power of two, `2^(byte - 127)`, byte 0..=254; 255 is NaN and is never written. No zero.
    E8M0,
    /// FP8 E4M3 used as a non-negative scale.
    E4M3,
    /// Unsigned 4-bit integer (Q2_K sub-block scales and minima).
    U4,
    /// Unsigned 6-bit integer (K-quant sub-block scales and minima).
    U6,
    /// Signed 6-bit integer, -32..=31, stored 32 larger (Q3_K and IQ4_XS sub-block scales).
    I6,
    /// Signed 8-bit integer, -128..=127 (Q6_K sub-block scales).
    I8,
    /// `(2k + 1) / 8` for a `k` of that many bits, 3 or 4: what the scales of ggml's IQ1, IQ2 and IQ3 types come to.
    OddEighths(u8),
}

impl Codec {
    /// Returns the number of stored bits.
    pub const fn bits(self) -> u32 {
        match self {
            Codec::F32 => 32,
            Codec::F16 | Codec::BF16 => 16,
            Codec::E8M0 | Codec::E4M3 | Codec::I8 => 8,
            Codec::U6 | Codec::I6 => 6,
            Codec::U4 => 4,
            Codec::OddEighths(bits) => bits as u32,
        }
    }

    /// Returns the stored bits (in the low end) nearest to `x`, saturating where the codec has an end.
    ///
    /// E8M0 rounds to the nearest exponent (in the linear sense, ties up); scale *rules* that want another exponent
    /// pass an exact power of two. I8 is stored as two's complement.
    #[inline]
    pub fn encode(self, x: f32) -> u32 {
        match self {
            Codec::F32 => x.to_bits(),
            Codec::F16 => f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits() as u32,
            Codec::BF16 => bf16::from_f32(x.clamp(-MAX_BF16, MAX_BF16)).to_bits() as u32,
            Codec::E8M0 => encode_e8m0(x),
            Codec::E4M3 => minifloat::encode_e4m3(x.clamp(0.0, 448.0)) as u32,
            Codec::U4 => x.round_ties_even().clamp(0.0, 15.0) as u32,
            Codec::U6 => x.round_ties_even().clamp(0.0, 63.0) as u32,
            Codec::I6 => (x.round_ties_even().clamp(-32.0, 31.0) + 32.0) as u32,
            Codec::OddEighths(bits) => {
                (4.0 * x - 0.5).round_ties_even().clamp(0.0, ((1u32 << bits) - 1) as f32) as u32
            }
            Codec::I8 => x.round_ties_even().clamp(-128.0, 127.0) as i8 as u8 as u32,
        }
    }

    /// Returns the value of stored bits.
    #[inline]
    pub fn decode(self, bits: u32) -> f32 {
        match self {
            Codec::F32 => f32::from_bits(bits),
            Codec::F16 => f16::from_bits(bits as u16).to_f32(),
            Codec::BF16 => bf16::from_bits(bits as u16).to_f32(),
            Codec::E8M0 => decode_e8m0(bits as u8),
            Codec::E4M3 => minifloat::decode_e4m3(bits as u8),
            Codec::U4 | Codec::U6 => bits as f32,
            Codec::I6 => bits as f32 - 32.0,
            Codec::OddEighths(_) => (2 * bits + 1) as f32 / 8.0,
            Codec::I8 => bits as u8 as i8 as f32,
        }
    }

    /// Returns the representable value that [`Codec::encode`] picks for `x`.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Codec::F16 => round_to_f16(x),
            _ => self.decode(self.encode(x)),
        }
    }
}

/// The F16 nearest to `x` in plain arithmetic, so that a loop over many scales vectorises on every target.
///
/// An F16 keeps 10 bits below the leading one, and none below 2^-24. Adding 1.5 · 2^23 units of the last kept place
/// makes that the last place of the sum, so the addition itself rounds, ties to even.
#[inline(always)]
fn round_to_f16(x: f32) -> f32 {
    let x = x.clamp(-65504.0, 65504.0);
    let binade = f32::from_bits(x.to_bits() & 0x7f80_0000);
    let smallest_normal = f32::from_bits((127 - 14) << 23);
    let magic = if binade > smallest_normal { binade } else { smallest_normal } * (1.5 * (1 << 13) as f32);
    (x + magic) - magic
}

const MAX_BF16: f32 = f32::from_bits(0x7f7f_0000);

/// 2^(byte - 127). Byte 0 is 2^-127, a subnormal F32, which is why the shift alone is not enough.
#[inline]
fn decode_e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits((byte as u32) << 23),
    }
}

fn encode_e8m0(x: f32) -> u32 {
    // Below 1.5 · 2^-127 everything is byte 0, zero and negatives included.
    if x.is_nan() || x <= f32::from_bits(0x0060_0000) {
        return 0;
    }
    let bits = x.min(decode_e8m0(254)).to_bits();
    // Adding half a binade to the mantissa carries into the exponent from 1.5 upward.
    ((bits + 0x0040_0000) >> 23).min(254)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stored_value_survives_a_round_trip() {
        for (codec, count) in [
            (Codec::F16, 1u32 << 16),
            (Codec::BF16, 1 << 16),
            (Codec::E8M0, 256),
            (Codec::E4M3, 128),
            (Codec::U4, 16),
            (Codec::U6, 64),
            (Codec::I6, 64),
            (Codec::OddEighths(3), 8),
            (Codec::OddEighths(4), 16),
            (Codec::I8, 256),
        ] {
            for bits in 0..count {
                let value = codec.decode(bits);
                if value.is_finite() {
                    assert_eq!(codec.encode(value), bits, "{codec:?} {bits:#x} = {value}");
                }
            }
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even_between_all_neighbours() {
        for bits in 0..0x7bff {
            let [low, high] = [Codec::F16.decode(bits), Codec::F16.decode(bits + 1)];
            // Between neighbours lie at least 2^12 F32 values, so both sides of the middle differ from it.
            let middle = (low + high) / 2.0;
            for x in [low, middle.next_down(), middle, middle.next_up(), high] {
                assert_eq!(Codec::F16.round(x), f16::from_f32(x).to_f32(), "{x}");
                assert_eq!(Codec::F16.round(-x), f16::from_f32(-x).to_f32(), "-{x}");
            }
        }
        assert_eq!((Codec::F16.round(1e9), Codec::F16.round(1e-9)), (65504.0, 0.0));
    }

    #[test]
    fn e8m0_decodes_to_exact_powers_of_two() {
        for byte in 0..=254u32 {
            assert_eq!(Codec::E8M0.decode(byte) as f64, 2f64.powi(byte as i32 - 127));
        }
    }

    #[test]
    fn e8m0_never_encodes_to_nan() {
        for x in [0.0, -1.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::INFINITY] {
            assert_ne!(Codec::E8M0.encode(x), 255, "{x}");
        }
    }
}
