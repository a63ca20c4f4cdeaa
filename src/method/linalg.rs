//! Dense products and factorisations on row-major slices, by `faer`.

use anyhow::Result;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Side, get_global_parallelism};

/// out += a · b for `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`.
pub fn add_product(out: &mut [f32], a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let a = MatRef::from_row_major_slice(a, m, k);
    let b = MatRef::from_row_major_slice(b, k, n);
    matmul(out, Accum::Add, a, b, 1.0, get_global_parallelism());
}

/// out += aᵀ · b for `a` `[k, m]`, `b` `[k, n]`, `out` `[m, n]`.
pub fn add_transposed_product(out: &mut [f32], a: &[f32], b: &[f32], [k, m, n]: [usize; 3]) {
    let out = MatMut::from_row_major_slice_mut(out, m, n);
    let a = MatRef::from_row_major_slice(a, k, m);
    let b = MatRef::from_row_major_slice(b, k, n);
    matmul(out, Accum::Add, a.transpose(), b, 1.0, get_global_parallelism());
}

/// Returns the lower Cholesky factor `L` of a symmetric matrix, `L Lᵀ = M`, of which `entry(row, col)` gives the lower
/// half.
///
/// # Errors
/// If the matrix is not positive definite.
pub fn cholesky(n: usize, entry: impl Fn(usize, usize) -> f64) -> Result<Mat<f64>> {
    let lower = Mat::from_fn(n, n, |row, col| if row >= col { entry(row, col) } else { 0.0 });
    match lower.llt(Side::Lower) {
        Ok(factor) => Ok(factor.L().to_owned()),
        Err(err) => anyhow::bail!("matrix of {n} columns is not positive definite ({err:?})"),
    }
}

/// Returns `b · M⁻¹` for `b` `[rows, n]` and symmetric `M = L Lᵀ`.
pub fn solve_right(b: &[f32], rows: usize, factor: &Mat<f64>) -> Vec<f32> {
    let n = factor.nrows();
    // Column i of `x` is row i of `b`: M is symmetric, so b M⁻¹ = (M⁻¹ bᵀ)ᵀ.
    let mut x = Mat::from_fn(n, rows, |col, row| b[row * n + col] as f64);
    let par = get_global_parallelism();
    faer::linalg::triangular_solve::solve_lower_triangular_in_place(factor.as_ref(), x.as_mut(), par);
    faer::linalg::triangular_solve::solve_upper_triangular_in_place(factor.transpose(), x.as_mut(), par);
    let mut out = Vec::with_capacity(rows * n);
    for row in 0..rows {
        out.extend(x.col(row).iter().map(|&v| v as f32));
    }
    out
}
