//! The Cholesky factorisation of a row-major matrix, and what it solves.

use anyhow::{Result, bail};
use multiversion::multiversion;
use rayon::prelude::*;

/// Columns factored together: their rows stay in the L2 cache while all later rows pass.
const BLOCK: usize = 32;
/// Right-hand sides solved together, one per SIMD lane.
const LANES: usize = 8;

/// The lower factor `L` of a symmetric positive definite matrix, `L Lᵀ = M`.
pub struct Cholesky {
    n: usize,
    /// `[n, n]`, entries above the diagonal are meaningless.
    lower: Vec<f64>,
}

impl Cholesky {
    /// Factors the matrix of which `entry(row, col)` gives the lower half.
    ///
    /// # Errors
    /// If it is not positive definite, or not finite.
    pub fn new(n: usize, entry: impl Fn(usize, usize) -> f64 + Sync) -> Result<Self> {
        let mut lower = vec![0.0; n * n];
        lower.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, out)| {
            out[..=row].iter_mut().enumerate().for_each(|(col, out)| *out = entry(row, col));
        });
        let mut factor = Cholesky { n, lower };
        for start in (0..n).step_by(BLOCK) {
            factor.eliminate_block(start, n.min(start + BLOCK))?;
        }
        Ok(factor)
    }

    /// Returns `L[row, col]` for `col <= row`.
    #[inline]
    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.lower[row * self.n + col]
    }

    /// Computes columns `start..end` of the factor from the columns before them.
    fn eliminate_block(&mut self, start: usize, end: usize) -> Result<()> {
        let n = self.n;
        let pivots: Vec<f64> =
            (start..end).flat_map(|row| self.lower[row * n..][..start].iter().copied()).collect();
        let rest = &mut self.lower[start * n..];
        rest.par_chunks_mut(n).for_each(|row| subtract_dots(row, start, end, &pivots));
        for row in start..end {
            for col in start..=row {
                let sum: f64 = (start..col).map(|k| self.at(row, k) * self.at(col, k)).sum();
                let value = self.at(row, col) - sum;
                self.lower[row * n + col] = if col < row {
                    value / self.at(col, col)
                } else if value > 0.0 && value.is_finite() {
                    value.sqrt()
                } else {
                    bail!("the matrix is not positive definite at column {row} of {n}")
                };
            }
        }
        let (done, later) = self.lower.split_at_mut(end * n);
        later.par_chunks_mut(n.max(1)).for_each(|row| {
            for col in start..end {
                let pivot = &done[col * n..][..n];
                let sum: f64 = (start..col).map(|k| row[k] * pivot[k]).sum();
                row[col] = (row[col] - sum) / pivot[col];
            }
        });
        Ok(())
    }

    /// Returns `b · M⁻¹` for `b` `[rows, n]`.
    pub fn solve_right(&self, b: &[f32]) -> Vec<f32> {
        let mut out = b.to_vec();
        out.par_chunks_mut(LANES * self.n.max(1)).for_each(|rows| solve_lanes(&self.lower, self.n, rows));
        out
    }
}

/// row\[start + i\] -= row\[..start\] · pivots\[i\] for every column of the block.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn subtract_dots(row: &mut [f64], start: usize, end: usize, pivots: &[f64]) {
    let (before, block) = row.split_at_mut(start);
    for (out, pivot) in block[..end - start].iter_mut().zip(pivots.chunks(start.max(1))) {
        *out -= dot(before, pivot);
    }
}

#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4 * LANES];
    let (a, a_rest) = a.as_chunks::<{ 4 * LANES }>();
    let (b, b_rest) = b.as_chunks::<{ 4 * LANES }>();
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// Solves `x L Lᵀ = b` for up to [`LANES`] rows in place: forward, then backward.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn solve_lanes(lower: &[f64], n: usize, rows: &mut [f32]) {
    let mut x = vec![[0.0f64; LANES]; n];
    for (lane, row) in rows.chunks(n).enumerate() {
        x.iter_mut().zip(row).for_each(|(x, &b)| x[lane] = b as f64);
    }
    for i in 0..n {
        let row = &lower[i * n..][..=i];
        let mut sums = [[0.0; LANES]; 4];
        for (x, l) in x[..i].chunks(4).zip(row[..i].chunks(4)) {
            for ((sums, x), &l) in sums.iter_mut().zip(x).zip(l) {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = x.mul_add(l, *sum));
            }
        }
        for lane in 0..LANES {
            let sum = sums[0][lane] + sums[1][lane] + sums[2][lane] + sums[3][lane];
            x[i][lane] = (x[i][lane] - sum) / row[i];
        }
    }
    for i in (0..n).rev() {
        let row = &lower[i * n..][..=i];
        x[i].iter_mut().for_each(|x| *x /= row[i]);
        let solved = x[i];
        for (x, &l) in x[..i].iter_mut().zip(row) {
            x.iter_mut().zip(&solved).for_each(|(x, solved)| *x = (-l).mul_add(*solved, *x));
        }
    }
    for (lane, row) in rows.chunks_mut(n).enumerate() {
        row.iter_mut().zip(&x).for_each(|(out, x)| *out = x[lane] as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{add_product, add_transposed_product};
    use crate::method::testing::Random;

    fn positive_definite(n: usize) -> Vec<f32> {
        let a = Random::new(11).normal(2 * n * n);
        let mut m = vec![0.0; n * n];
        add_transposed_product(&mut m, &a, &a, [2 * n, n, n]);
        m
    }

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for n in [1, 7, 32, 33, 101] {
            let m = positive_definite(n);
            let factor = Cholesky::new(n, |row, col| m[row * n + col] as f64).unwrap();
            for row in 0..n {
                for col in 0..=row {
                    let product: f64 = (0..=col).map(|k| factor.at(row, k) * factor.at(col, k)).sum();
                    assert!(
                        (product - m[row * n + col] as f64).abs() < 1e-9 * n as f64 * 100.0,
                        "{n}: {row}, {col}"
                    );
                }
            }
        }
    }

    #[test]
    fn solving_undoes_multiplying() {
        let (rows, n) = (13, 75);
        let m = positive_definite(n);
        let x = Random::new(12).normal(rows * n);
        let mut b = vec![0.0; rows * n];
        add_product(&mut b, &x, &m, [rows, n, n]);
        let factor = Cholesky::new(n, |row, col| m[row * n + col] as f64).unwrap();
        for (found, x) in factor.solve_right(&b).iter().zip(&x) {
            assert!((found - x).abs() < 1e-3, "{found} for {x}");
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused() {
        assert!(Cholesky::new(2, |row, col| if row == col { 1.0 } else { 2.0 }).is_err());
        assert!(Cholesky::new(1, |_, _| f64::NAN).is_err());
    }
}
