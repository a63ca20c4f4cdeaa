use super::{Table, minifloat};

/// A finite set of values at unit scale; a *code* is the stored index of one of them.
///
/// Integer codes are offset-binary (`code = value + 2^(bits-1)`), so that for `Int`, `Uint` and `Table` a larger code
/// is a larger value. Two's complement, where an ecosystem wants it, is the dialect's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// FP4: ±{0, ½, 1, 1½, 2, 3, 4, 6}; code = sign bit, then magnitude index.
    E2M1,
    /// FP8 "fn": largest value 448, no infinity.
    E4M3,
    /// Signed integers `-2^(bits-1) ..= 2^(bits-1) - 1`, `bits` in 2..=8.
    Int(u8),
    /// Unsigned integers `0 ..= 2^bits - 1`, `bits` in 2..=8.
    Uint(u8),
    /// Integers by table; code = index.
    Table(&'static Table),
}

impl Element {
    /// Returns the number of bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Element::E2M1 => 4,
            Element::E4M3 => 8,
            Element::Int(bits) | Element::Uint(bits) => bits as u32,
            Element::Table(table) => table.bits(),
        }
    }

    /// Returns the number of bits that 256 codes take in a file: fewer than 256 times [`Element::bits`] where codes are
    /// stored together, as one entry of a codebook.
    pub const fn bits_of_256(self) -> u32 {
        match self {
            Element::Table(table) => table.bits_of_256(),
            _ => 256 * self.bits(),
        }
    }

    /// Returns the smallest and the largest value.
    pub const fn range(self) -> (f32, f32) {
        match self {
            Element::E2M1 => (-6.0, 6.0),
            Element::E4M3 => (-448.0, 448.0),
            Element::Int(bits) => (-((1u32 << (bits - 1)) as f32), ((1u32 << (bits - 1)) - 1) as f32),
            Element::Uint(bits) => (0.0, ((1u32 << bits) - 1) as f32),
            Element::Table(table) => table.range(),
        }
    }

    /// Returns the value of `code` at unit scale. Codes past the element's bits are a caller's mistake.
    #[inline(always)]
    pub fn decode(self, code: u8) -> f32 {
        match self {
            Element::E2M1 => minifloat::decode_e2m1(code),
            Element::E4M3 => minifloat::decode_e4m3(code),
            Element::Int(bits) => code as f32 - (1u32 << (bits - 1)) as f32,
            Element::Uint(_) => code as f32,
            Element::Table(table) => table.decode(code),
        }
    }

    /// Returns the code whose value is nearest to `x`, ties to the even value, saturating at the range's ends.
    #[inline(always)]
    pub fn encode(self, x: f32) -> u8 {
        match self {
            Element::E2M1 => minifloat::encode_e2m1(x),
            Element::E4M3 => minifloat::encode_e4m3(x),
            Element::Int(bits) => {
                let half = (1u32 << (bits - 1)) as f32;
                low_byte(x.clamp(-half, half - 1.0), half)
            }
            Element::Uint(bits) => low_byte(x.clamp(0.0, ((1u32 << bits) - 1) as f32), 0.0),
            Element::Table(table) => table.encode(x),
        }
    }

    /// Returns how many codes there are: 2^bits, but for a table as many as it has values.
    pub const fn codes(self) -> usize {
        match self {
            Element::Table(table) => table.values().len(),
            _ => 1 << self.bits(),
        }
    }

    /// Returns the values of all codes, indexed by code.
    pub fn table(self) -> Vec<f32> {
        (0..self.codes()).map(|code| self.decode(code as u8)).collect()
    }
}

/// Returns `x + offset`, in 0..=255, rounded to the nearest integer, ties to even (`offset` is an even integer).
///
/// The last place of 2^23 + x is one, so that addition rounds and leaves the integer in the low bits; unlike a
/// saturating cast it costs one vector instruction.
#[inline(always)]
fn low_byte(x: f32, offset: f32) -> u8 {
    (x + ((1 << 23) as f32 + offset)).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNEVEN: Table = Table::new(&[-43, -25, -8, 8, 25, 43], 480);

    const ALL: [Element; 11] = [
        Element::E2M1,
        Element::E4M3,
        Element::Table(&UNEVEN),
        Element::Int(3),
        Element::Int(4),
        Element::Int(6),
        Element::Int(8),
        Element::Uint(2),
        Element::Uint(4),
        Element::Uint(5),
        Element::Uint(8),
    ];

    #[test]
    fn every_code_survives_a_round_trip() {
        for element in ALL {
            for (code, value) in element.table().into_iter().enumerate().filter(|(_, v)| !v.is_nan()) {
                assert_eq!(element.encode(value) as usize, code, "{element:?}");
            }
        }
    }

    #[test]
    fn values_outside_the_range_saturate() {
        for element in ALL {
            let (low, high) = element.range();
            assert_eq!(element.decode(element.encode(1e30)), high, "{element:?}");
            assert_eq!(element.decode(element.encode(-1e30)), low, "{element:?}");
        }
    }
}
