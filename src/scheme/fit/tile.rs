//! Sixteen groups searched at once: transposed, so that each lane of a vector register works on its own group and no
//! sum ever crosses lanes.
//!
//! The loops here and in the searches are plain arrays of [`LANES`] numbers, which the compiler turns into vector
//! instructions for every target the caller is compiled for. A product is rounded before it is added unless the code says
//! `mul_add`, so every target finds the same scales.

use std::ops::Range;

use multiversion::multiversion;

use crate::num::Codec;

/// How many groups a tile holds.
pub const LANES: usize = 16;

/// One number per group of a tile.
pub type Lanes = [f32; LANES];

/// Returns `f` of every lane number.
#[inline(always)]
pub fn lanes(f: impl Fn(usize) -> f32) -> Lanes {
    let mut out = [0.0; LANES];
    for (l, out) in out.iter_mut().enumerate() {
        *out = f(l);
    }
    out
}

/// Returns `a` in the lanes whose mask is all ones, `b` in those where it is zero.
#[inline(always)]
pub fn select(masks: &[u32; LANES], a: &Lanes, b: &Lanes) -> Lanes {
    lanes(|l| f32::from_bits(a[l].to_bits() & masks[l] | b[l].to_bits() & !masks[l]))
}

/// Returns what `codec` stores of each.
#[inline(always)]
pub fn rounded(codec: Codec, values: &Lanes) -> Lanes {
    // The choice stands outside of the loop, so that it vectorises.
    match codec {
        Codec::F16 => lanes(|l| Codec::F16.round(values[l])),
        _ => lanes(|l| codec.round(values[l])),
    }
}

/// Sixteen groups of `N` weights: element `i` of the group in lane `l` is `x[i][l]`.
pub struct Tile<const N: usize> {
    /// The weights.
    pub x: [Lanes; N],
    /// How much each weight's squared error counts.
    pub importance: [Lanes; N],
    /// Whether not all count alike.
    weighted: bool,
}

impl<const N: usize> Tile<N> {
    /// Returns a tile of zeros that count alike.
    pub fn new() -> Self {
        Tile { x: [[0.0; LANES]; N], importance: [[1.0; LANES]; N], weighted: false }
    }

    /// Fills the tile with the groups from number `first` on and returns the range of those that exist; lanes past
    /// the last group become zeros. `importances` has one number per column of a row, whose length is a multiple of
    /// `N`.
    pub fn load(&mut self, weights: &[f32], importances: Option<&[f32]>, first: usize) -> Range<usize> {
        let groups = &weights[first * N..];
        let groups = &groups[..groups.len().min(LANES * N)];
        if groups.len() < LANES * N {
            self.x = [[0.0; LANES]; N];
        }
        transpose(groups, &mut self.x);
        self.weighted = importances.is_some();
        if let Some(row) = importances {
            for l in 0..LANES {
                let start = (first + l) * N % row.len();
                for (to, &from) in self.importance.iter_mut().zip(&row[start..start + N]) {
                    to[l] = from;
                }
            }
        }
        first..first + groups.len() / N
    }

    /// Returns per group the sum of `importance · difference²`, where `difference` is that of a weight in a lane.
    #[inline(always)]
    pub fn squares(&self, difference: impl Fn(f32, usize) -> f32) -> Lanes {
        let mut sum = [0.0; LANES];
        if self.weighted {
            for (x, importance) in self.x.iter().zip(&self.importance) {
                for l in 0..LANES {
                    let difference = difference(x[l], l);
                    sum[l] = (importance[l] * difference).mul_add(difference, sum[l]);
                }
            }
        } else {
            for x in &self.x {
                for l in 0..LANES {
                    let difference = difference(x[l], l);
                    sum[l] = difference.mul_add(difference, sum[l]);
                }
            }
        }
        sum
    }

    /// Returns the largest magnitude of each group.
    #[inline(always)]
    pub fn amax(&self) -> Lanes {
        let mut out = [0.0; LANES];
        for x in &self.x {
            for l in 0..LANES {
                out[l] = larger(out[l], x[l]);
            }
        }
        out
    }

    /// Returns the smallest and the largest weight of each group.
    #[inline(always)]
    pub fn range(&self) -> (Lanes, Lanes) {
        let (mut low, mut high) = (self.x[0], self.x[0]);
        for x in &self.x {
            for l in 0..LANES {
                low[l] = if x[l] < low[l] { x[l] } else { low[l] };
                high[l] = if x[l] > high[l] { x[l] } else { high[l] };
            }
        }
        (low, high)
    }
}

/// Returns the larger of `a`, which has no sign, and the magnitude of `b`.
///
/// As integers, which order magnitudes alike: of a comparison of floats the compiler makes scalar code here.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    let (a, b) = (a.to_bits(), b.to_bits() & !(1 << 31));
    f32::from_bits(if a > b { a } else { b })
}

/// Writes element `i` of group `l` to `x[i][l]`. Compiled for AVX2 at most: with AVX-512 the compiler takes scatter
/// instructions, which are half as fast as plain moves.
#[multiversion(targets("x86_64+avx2+fma"))]
fn transpose<const N: usize>(groups: &[f32], x: &mut [Lanes; N]) {
    for (l, group) in groups.chunks_exact(N).enumerate() {
        for (to, &from) in x.iter_mut().zip(group) {
            to[l] = from;
        }
    }
}

/// 1.5 · 2^23: the last place of a sum with it is one, so the addition itself rounds to an integer, ties to even. Holds
/// for magnitudes up to 2^22.
const ROUNDING: f32 = (3 << 22) as f32;

/// Returns `x · inverse` less the nearest integer, exact but for one last rounding.
#[inline(always)]
pub fn fraction(x: f32, inverse: f32) -> f32 {
    let nearest = x.mul_add(inverse, ROUNDING) - ROUNDING;
    x.mul_add(inverse, -nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_is_the_distance_to_the_nearest_integer() {
        for i in -4000..=4000 {
            let x = i as f32 / 16.0;
            assert_eq!(fraction(x, 0.5).abs(), (x * 0.5 - (x * 0.5).round_ties_even()).abs(), "{x}");
        }
    }
}
