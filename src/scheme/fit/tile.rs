//! Sixteen groups searched at once: transposed, so that each lane of a vector register works on its own group and no
//! sum ever crosses lanes.
//!
//! The loops here and in the searches are plain arrays of [`LANES`] numbers, which the compiler turns into vector
//! instructions for every target the caller is compiled for. Products and sums are rounded separately (no fused
//! multiply-add), so every target finds the same scales.

use std::ops::Range;

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

/// Sixteen groups of `N` weights: element `i` of the group in lane `l` is `x[i][l]`.
pub struct Tile<const N: usize> {
    /// The weights.
    pub x: [Lanes; N],
    /// How much each weight's squared error counts.
    pub importance: [Lanes; N],
}

impl<const N: usize> Tile<N> {
    /// Returns a tile of zeros that count alike.
    pub fn new() -> Self {
        Tile { x: [[0.0; LANES]; N], importance: [[1.0; LANES]; N] }
    }

    /// Fills the tile with the groups from number `first` on and returns the range of those that exist; lanes past
    /// the last group become zeros. `importances` has one number per column of a row, whose length is a multiple of
    /// `N`.
    #[inline(always)]
    pub fn load(&mut self, weights: &[f32], importances: Option<&[f32]>, first: usize) -> Range<usize> {
        let groups = &weights[first * N..];
        let groups = &groups[..groups.len().min(LANES * N)];
        if groups.len() < LANES * N {
            self.x = [[0.0; LANES]; N];
        }
        for (l, group) in groups.chunks_exact(N).enumerate() {
            for (to, &from) in self.x.iter_mut().zip(group) {
                to[l] = from;
            }
        }
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

    /// Returns the largest magnitude of each group.
    #[inline(always)]
    pub fn amax(&self) -> Lanes {
        let mut out = [0.0; LANES];
        for x in &self.x {
            for l in 0..LANES {
                let a = x[l].abs();
                out[l] = if a > out[l] { a } else { out[l] };
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
