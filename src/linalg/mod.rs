//! Linear algebra on a CPU, on row-major slices. Every sum has one fixed order, so results are the same bits for every
//! number of threads.
//!
//! - [`product`]: matrix products in F32, the base of the CPU backend and of rounding methods.
//! - [`cholesky`]: factors of symmetric positive definite matrices, in F64.

pub mod cholesky;
pub mod product;

use ndarray::{ArrayView2, ArrayViewMut2};

pub use self::cholesky::Cholesky;
use self::product::{Left, Wanted};

/// out += a · b for `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`.
pub fn add_product(out: &mut [f32], a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) {
    product::add_product(&Left::rows_of(view(a, m, k)), view(b, k, n), view_mut(out, m, n), Wanted::All);
}

/// out += aᵀ · b for `a` `[k, m]`, `b` `[k, n]`, `out` `[m, n]`.
pub fn add_transposed_product(out: &mut [f32], a: &[f32], b: &[f32], [k, m, n]: [usize; 3]) {
    product::add_product(&Left::pack_columns(view(a, k, m)), view(b, k, n), view_mut(out, m, n), Wanted::All);
}

fn view(values: &[f32], rows: usize, cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, cols), values).expect("callers pass a slice of that shape")
}

fn view_mut(values: &mut [f32], rows: usize, cols: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, cols), values).expect("callers pass a slice of that shape")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::testing::Random;

    #[test]
    fn products_agree_with_sums_in_f64() {
        let (m, k, n) = (19, 40, 35);
        let mut random = Random::new(10);
        let (a, b) = (random.normal(m * k), random.normal(k * n));
        let transposed: Vec<f32> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
        let (mut plain, mut by_transpose) = (vec![1.0; m * n], vec![1.0; m * n]);
        add_product(&mut plain, &a, &b, [m, k, n]);
        add_transposed_product(&mut by_transpose, &transposed, &b, [k, m, n]);
        for row in 0..m {
            for col in 0..n {
                let exact: f64 = (0..k).map(|i| a[row * k + i] as f64 * b[i * n + col] as f64).sum();
                // 40 products of magnitude ≤ 20, each rounded to 2^-24 relative: below 1e-4.
                assert!((plain[row * n + col] as f64 - 1.0 - exact).abs() < 1e-4);
            }
        }
        assert_eq!(plain, by_transpose);
    }
}
