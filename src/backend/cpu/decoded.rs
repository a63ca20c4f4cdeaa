//! Products with stored weights, which are decoded a few rows at a time.

use ndarray::{Array2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::linalg::product::{Left, RightRows, Wanted, add_product};
use crate::tensor::Matrix;

/// Weight rows decoded at a time.
const ROWS: usize = 512;

impl RightRows for Matrix {
    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        Matrix::decode_rows(self, first, out);
    }
}

/// y += x · weight, with the weight decoded [`ROWS`] rows at a time.
pub(super) fn add_decoded_product(x: &Array2<f32>, weight: &Matrix, mut y: ArrayViewMut2<f32>) {
    let [rows, cols] = weight.dims();
    for first in (0..rows).step_by(ROWS) {
        let mut part = Array2::zeros((ROWS.min(rows - first), cols));
        part.axis_chunks_iter_mut(Axis(0), 32).into_par_iter().enumerate().for_each(|(chunk, mut rows)| {
            weight.decode_rows(first + 32 * chunk, rows.as_slice_mut().unwrap_or(&mut []));
        });
        let left = Left::rows_of(x.slice(s![.., first..first + part.nrows()]));
        add_product(&left, part.view(), y.view_mut(), Wanted::All);
    }
}
