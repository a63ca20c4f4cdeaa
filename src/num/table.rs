/// Up to sixteen integers, ascending: the values of ggml's non-linear types, and the alphabets of its codebooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    /// Past the last value, that again.
    values: [i8; 16],
    count: u8,
    bits_of_256: u16,
}

impl Table {
    /// Returns the table of these values, of which 256 take so many bits in a file.
    pub const fn new(values: &[i8], bits_of_256: u16) -> Self {
        let mut padded = [values[values.len() - 1]; 16];
        let mut i = 0;
        while i < values.len() {
            padded[i] = values[i];
            i += 1;
        }
        Table { values: padded, count: values.len() as u8, bits_of_256 }
    }

    /// Returns the values, ascending.
    pub const fn values(&self) -> &[i8] {
        self.values.split_at(self.count as usize).0
    }

    /// Returns the bits of a code.
    pub(super) const fn bits(&self) -> u32 {
        (self.count as u32 - 1).ilog2() + 1
    }

    pub(super) const fn bits_of_256(&self) -> u32 {
        self.bits_of_256 as u32
    }

    pub(super) const fn range(&self) -> (f32, f32) {
        (self.values[0] as f32, self.values[15] as f32)
    }

    /// Returns the value of a code; the largest one past the last.
    #[inline(always)]
    pub(super) fn decode(&self, code: u8) -> f32 {
        self.values[code.min(15) as usize] as f32
    }

    /// Returns the code of the value nearest to `x`, of two the lower: how many midpoints between neighbours lie below.
    #[inline(always)]
    pub(super) fn encode(&self, x: f32) -> u8 {
        let below = (0..15).map(|i| (2.0 * x > self.midpoint(i)) as u8).sum::<u8>();
        below.min(self.count - 1)
    }

    /// Returns the value nearest to `x`, of two the lower, without a look-up: a loop around this vectorises.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> f32 {
        let mut value = self.values[0] as f32;
        for i in 0..15 {
            let step = (self.values[i + 1] as i16 - self.values[i] as i16) as f32;
            value += if 2.0 * x > self.midpoint(i) { step } else { 0.0 };
        }
        value
    }

    /// Returns twice the midpoint between value `i` and the next.
    #[inline(always)]
    fn midpoint(&self, i: usize) -> f32 {
        (self.values[i] as i16 + self.values[i + 1] as i16) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_value_is_found_by_code_and_by_number() {
        for table in [Table::new(&[-9, -7, -1, 1, 7, 9], 360), Table::new(&[-1, 0, 1, 2], 512)] {
            for x in (-1200..=1200).map(|i| i as f32 / 100.0) {
                let distance = |&v: &i8| (v as f32 - x).abs();
                let least = table.values().iter().map(distance).fold(f32::INFINITY, f32::min);
                let found = table.decode(table.encode(x));
                assert_eq!((found - x).abs(), least, "{x}");
                assert_eq!(table.nearest(x), found, "{x}");
            }
        }
    }
}
