//! Corrects a linear's target for inputs that quantization upstream has changed.
//!
//! The full-precision model computes `y = x Wᵀ`; the quantized one feeds `x̃`. The weights that give `y` from `x̃` best
//! are the least-squares solution `W XᵀX̃ (X̃ᵀX̃)⁻¹`. Moving there only part of the way generalises better:
//!
//! ```text
//! T = W + strength · W (XᵀX̃ - X̃ᵀX̃) (X̃ᵀX̃ + λI)⁻¹        λ = 0.01 · mean diagonal of X̃ᵀX̃
//! ```
//!
//! The idea of matching full-precision outputs from quantized inputs is GPTAQ's (arXiv 2504.02692) and Qronos'
//! (arXiv 2505.11695); the partial strength is ours: 0.5 beat 0 and 1 on every model measured.

use anyhow::{Context, Result};

use super::linalg::{self, Cholesky};
use super::statistics::Moments;

/// λ of the module's formula, relative to the mean diagonal.
const RIDGE: f32 = 0.01;

/// Returns the target `[rows, cols]` for `weights` `[rows, cols]`, one output feature per row.
///
/// # Errors
/// If the moments hold values that are not finite.
pub fn corrected_target(weights: &[f32], moments: &Moments, strength: f32) -> Result<Vec<f32>> {
    correct(weights, moments, strength, RIDGE)
}

fn correct(weights: &[f32], moments: &Moments, strength: f32, ridge: f32) -> Result<Vec<f32>> {
    if strength == 0.0 || moments.tokens == 0 {
        return Ok(weights.to_vec());
    }
    let (cols, rows) = (moments.cols, weights.len() / moments.cols);
    let difference: Vec<f32> = moments.cross.iter().zip(&moments.hessian).map(|(c, h)| c - h).collect();
    let mut missing = vec![0.0; rows * cols];
    linalg::add_product(&mut missing, weights, &difference, [rows, cols, cols]);
    let damped = moments.damped(ridge);
    let factor = Cholesky::new(cols, |row, col| damped[row * cols + col] as f64)
        .context("input-mismatch correction: calibration inputs are not finite")?;
    let correction = factor.solve_right(&missing);
    Ok(weights.iter().zip(correction).map(|(w, c)| w + strength * c).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::testing::{Random, output_error};

    #[test]
    fn full_strength_without_ridge_is_least_squares() {
        let (tokens, cols, rows) = (200, 12, 5);
        let mut random = Random::new(1);
        let full = random.normal(tokens * cols);
        let quantized: Vec<f32> = full.iter().map(|x| x + 0.3 * random.next()).collect();
        let weights = random.normal(rows * cols);
        let mut moments = Moments::new(cols);
        moments.add(&quantized, &full);
        let target = correct(&weights, &moments, 1.0, 1e-9).unwrap();
        let best = output_error(&weights, &full, &target, &quantized, cols);
        assert!(best < output_error(&weights, &full, &weights, &quantized, cols));
        // The least-squares solution is the unique minimum: every small step away from it costs.
        for at in 0..target.len() {
            for step in [-0.01, 0.01] {
                let mut moved = target.clone();
                moved[at] += step;
                assert!(output_error(&weights, &full, &moved, &quantized, cols) > best, "weight {at}");
            }
        }
    }

    #[test]
    fn equal_inputs_leave_the_weights_alone() {
        let mut random = Random::new(2);
        let inputs = random.normal(64 * 8);
        let weights = random.normal(3 * 8);
        let mut moments = Moments::new(8);
        moments.add(&inputs, &inputs);
        assert_eq!(corrected_target(&weights, &moments, 0.5).unwrap(), weights);
    }
}
