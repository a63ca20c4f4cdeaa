use std::ops::AddAssign;

use multiversion::multiversion;

use super::QTensor;

/// How far a quantized tensor lies from its weights, as two sums that add up over chunks of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distortion {
    /// Σ importance · (weight - value)².
    pub error: f64,
    /// Σ importance · weight².
    pub power: f64,
}

impl Distortion {
    /// Returns `error / power`: the inverse of the signal-to-noise ratio. Zero for a tensor of zeros, NaN if a weight
    /// is not finite.
    pub fn relative(self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.power }
    }
}

impl AddAssign for Distortion {
    fn add_assign(&mut self, other: Self) {
        self.error += other.error;
        self.power += other.power;
    }
}

impl QTensor {
    /// Returns the distortion against `weights` (`[rows, cols]`), columns weighed with `importances` (`[cols]`) or all
    /// alike.
    pub fn distortion(&self, weights: &[f32], importances: Option<&[f32]>) -> Distortion {
        debug_assert_eq!(weights.len(), self.rows * self.cols);
        let mut total = Distortion::default();
        let mut values = vec![0.0; self.cols];
        for (row, weights) in weights.chunks_exact(self.cols.max(1)).enumerate() {
            self.decode_row(row, &mut values);
            total += of_row(weights, &values, importances);
        }
        total
    }
}

/// How many sums run side by side, so that the loop vectorises.
const LANES: usize = 16;
/// Weights summed in F32 before the sum goes to F64: 32 additions a lane, so a relative error below 32 · 2^-24.
const RUN: usize = 32 * LANES;

/// Sums in F32 run by run. A run whose squares leave the middle of F32's range is summed in F64 instead, which holds the
/// square of any F32.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn of_row(weights: &[f32], values: &[f32], importances: Option<&[f32]>) -> Distortion {
    let mut total = Distortion::default();
    for start in (0..weights.len()).step_by(RUN) {
        let range = start..(start + RUN).min(weights.len());
        let (weights, values) = (&weights[range.clone()], &values[range.clone()]);
        total += match importances {
            None => unweighted(weights, values),
            Some(h) => in_f64(weights, values, |i| h[range.start + i] as f64),
        };
    }
    total
}

#[inline(always)]
fn unweighted(weights: &[f32], values: &[f32]) -> Distortion {
    let (mut error, mut power) = ([0f32; LANES], [0f32; LANES]);
    let mut add = |lane: usize, weight: f32, value: f32| {
        let difference = weight - value;
        error[lane] = difference.mul_add(difference, error[lane]);
        power[lane] = weight.mul_add(weight, power[lane]);
    };
    let (weight_chunks, weight_rest) = weights.as_chunks::<LANES>();
    let (value_chunks, value_rest) = values.as_chunks::<LANES>();
    for (weights, values) in weight_chunks.iter().zip(value_chunks) {
        (0..LANES).for_each(|l| add(l, weights[l], values[l]));
    }
    for (l, (&weight, &value)) in weight_rest.iter().zip(value_rest).enumerate() {
        add(l, weight, value);
    }
    let (error, power) = (error.iter().sum::<f32>(), power.iter().sum::<f32>());
    // Below, squares of differences a thousandth of the weights' size would no longer be normal numbers.
    if (1e-28..1e38).contains(&power) {
        Distortion { error: error as f64, power: power as f64 }
    } else {
        in_f64(weights, values, |_| 1.0)
    }
}

#[inline(always)]
fn in_f64(weights: &[f32], values: &[f32], importance: impl Fn(usize) -> f64) -> Distortion {
    let mut total = Distortion::default();
    for (i, (&weight, &value)) in weights.iter().zip(values).enumerate() {
        // The weight and its value are close, so F32 holds their difference with hardly a rounding.
        let (difference, weight) = ((weight - value) as f64, weight as f64);
        total.error += importance(i) * (difference * difference);
        total.power += importance(i) * (weight * weight);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_in_f32_are_those_in_f64_at_every_size_of_weights() {
        for exponent in [-140, -100, -60, -47, -46, -20, 0, 20, 50, 62, 64, 100, 126] {
            let size = (exponent as f64).exp2();
            let weights: Vec<f32> =
                (0..700).map(|i| (((i * 37 % 101) as f64 - 50.0) / 50.0 * size) as f32).collect();
            let values: Vec<f32> = weights.iter().map(|w| w * (1.0 - 1.0 / 1024.0)).collect();
            let exact = in_f64(&weights, &values, |_| 1.0);
            let found = of_row(&weights, &values, None);
            // 32 additions and two roundings of 2^-24 a term.
            assert!(
                (found.error - exact.error).abs() <= 34.0 * exact.error / (1 << 24) as f64,
                "2^{exponent}"
            );
            assert!(
                (found.power - exact.power).abs() <= 34.0 * exact.power / (1 << 24) as f64,
                "2^{exponent}"
            );
        }
    }
}
