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

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn of_row(weights: &[f32], values: &[f32], importances: Option<&[f32]>) -> Distortion {
    let (mut error, mut power) = ([0f64; LANES], [0f64; LANES]);
    let mut add = |lane: usize, weight: f32, value: f32, importance: f64| {
        // The weight and its value are close, so F32 holds their difference with hardly a rounding.
        let (difference, weight) = ((weight - value) as f64, weight as f64);
        error[lane] += importance * (difference * difference);
        power[lane] += importance * (weight * weight);
    };
    let (weight_chunks, weight_rest) = weights.as_chunks::<LANES>();
    let (value_chunks, value_rest) = values.as_chunks::<LANES>();
    for (i, (weights, values)) in weight_chunks.iter().zip(value_chunks).enumerate() {
        match importances {
            Some(h) => {
                let h = &h[i * LANES..(i + 1) * LANES];
                (0..LANES).for_each(|l| add(l, weights[l], values[l], h[l] as f64));
            }
            None => (0..LANES).for_each(|l| add(l, weights[l], values[l], 1.0)),
        }
    }
    for (l, (&weight, &value)) in weight_rest.iter().zip(value_rest).enumerate() {
        let importance = importances.map_or(1.0, |h| h[weights.len() - weight_rest.len() + l] as f64);
        add(l, weight, value, importance);
    }
    Distortion { error: error.iter().sum(), power: power.iter().sum() }
}
