use std::ops::AddAssign;

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
            for (col, (&weight, &value)) in weights.iter().zip(&values).enumerate() {
                let importance = importances.map_or(1.0, |h| h[col] as f64);
                let (weight, difference) = (weight as f64, weight as f64 - value as f64);
                total += Distortion {
                    error: importance * difference * difference,
                    power: importance * weight * weight,
                };
            }
        }
        total
    }
}
