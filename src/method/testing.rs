//! Fixtures of the methods' tests: random numbers, correlated inputs, plain scales, losses summed in F64.

use crate::method::statistics::Moments;
use crate::num::Codec;
use crate::scheme::{Grid, QTensor, Scheme};

/// A small deterministic generator (xorshift64*), bell-shaped by the sum of twelve uniforms.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 24) as f32
    }

    pub fn next(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// Moments of inputs whose columns are correlated and differ in size, as a model's are.
pub fn correlated_moments(random: &mut Random, tokens: usize, cols: usize) -> Moments {
    let mut inputs = random.normal(tokens * cols);
    for row in inputs.chunks_mut(cols) {
        for col in 1..cols {
            row[col] += 0.8 * row[col - 1];
        }
        for (col, x) in row.iter_mut().enumerate() {
            *x *= 1.0 + (col % 7) as f32;
        }
    }
    let mut moments = Moments::new(cols);
    moments.add(&inputs, &inputs);
    moments
}

/// Largest-magnitude scales and nearest codes, for one-level symmetric schemes.
pub fn nearest(scheme: Scheme, weights: &[f32], rows: usize, cols: usize) -> QTensor {
    let mut q = QTensor::zeroed(scheme, rows, cols);
    let (group_cols, groups, largest) = (q.group_cols(), q.groups_per_row(), scheme.element.range().1);
    for row in 0..rows {
        for group in 0..groups {
            let start = row * cols + group * group_cols;
            let block = &weights[start..start + group_cols];
            let amax = block.iter().fold(0f32, |a, w| a.max(w.abs()));
            let scale =
                if scheme.scale == Codec::E8M0 { (amax / 7.25).log2().ceil().exp2() } else { amax / largest };
            q.scales[row * groups + group] = scheme.scale.round(scale);
            let Grid { scale, offset } = q.grid(row, group);
            for (code, w) in q.codes[start..start + group_cols].iter_mut().zip(block) {
                *code = scheme.element.encode((w - offset) / scale);
            }
        }
    }
    q
}

/// tr Δ H Δᵀ with Δ = decoded - target.
pub fn proxy_loss(q: &QTensor, target: &[f32], hessian: &[f32]) -> f64 {
    let cols = q.cols;
    let delta: Vec<f64> = q.decode().iter().zip(target).map(|(v, t)| (v - t) as f64).collect();
    let row_loss = |d: &[f64]| -> f64 {
        (0..cols)
            .map(|i| {
                d[i] * hessian[i * cols..][..cols].iter().zip(d).map(|(h, d)| *h as f64 * d).sum::<f64>()
            })
            .sum()
    };
    delta.chunks(cols).map(row_loss).sum()
}

/// ‖full · weightsᵀ - quantized · targetᵀ‖²
pub fn output_error(weights: &[f32], full: &[f32], target: &[f32], quantized: &[f32], cols: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum() };
    let mut sum = 0.0;
    for (x, x_q) in full.chunks(cols).zip(quantized.chunks(cols)) {
        for (w, t) in weights.chunks(cols).zip(target.chunks(cols)) {
            sum += (dot(x, w) - dot(x_q, t)).powi(2);
        }
    }
    sum
}
