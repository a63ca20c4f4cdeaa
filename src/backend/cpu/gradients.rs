//! Derivatives in F32: the definition of [`Gradients`].

use anyhow::{Result, ensure};
use ndarray::{Array2, ArrayView2, Axis, linalg::general_mat_mul, s};
use rayon::prelude::*;

use super::decoded::add_decoded_product;
use super::elementwise;
use super::{Cpu, head, slice, slice_mut};
use crate::backend::gradients::Gradients;
use crate::backend::{AttentionShape, Batch};
use crate::tensor::Matrix;

/// Queries whose probabilities exist at a time.
const QUERIES: usize = 128;

impl Gradients for Cpu {
    fn linear_gradient(&self, dy: &Array2<f32>, weight: &Matrix) -> Result<Array2<f32>> {
        let [rows, cols] = weight.dims();
        ensure!(dy.ncols() == rows, "{} gradients for a linear of [{rows}, {cols}]", dy.ncols());
        let mut dx = Array2::zeros((dy.nrows(), cols));
        add_decoded_product(dy, weight, dx.view_mut());
        Ok(dx)
    }

    fn rms_norm_gradient(
        &self,
        x: &Array2<f32>,
        gain: &Array2<f32>,
        eps: f32,
        dy: &Array2<f32>,
    ) -> Result<Array2<f32>> {
        ensure!(dy.dim() == x.dim(), "gradients of differing shapes");
        let (gain, width, mut dx) = (slice(gain)?, gain.len(), dy.clone());
        slice_mut(&mut dx)?.par_chunks_mut(width).zip(slice(x)?.par_chunks(width)).for_each(|(dx, x)| {
            elementwise::rms_norm_gradient(x, gain, norm_factor(x, eps), dx);
        });
        Ok(dx)
    }

    fn gain_gradient(&self, x: &Array2<f32>, width: usize, eps: f32, dy: &Array2<f32>) -> Result<Vec<f32>> {
        ensure!(dy.dim() == x.dim(), "gradients of differing shapes");
        let mut sums = vec![0f64; width];
        for (x, dy) in slice(x)?.chunks_exact(width).zip(slice(dy)?.chunks_exact(width)) {
            let factor = norm_factor(x, eps);
            for ((sum, x), dy) in sums.iter_mut().zip(x).zip(dy) {
                *sum += (factor * x * dy) as f64;
            }
        }
        Ok(sums.into_iter().map(|sum| sum as f32).collect())
    }

    fn swiglu_gradient(
        &self,
        gate: &Array2<f32>,
        up: &Array2<f32>,
        dy: &Array2<f32>,
    ) -> Result<[Array2<f32>; 2]> {
        let (mut dgate, mut dup) = (dy.clone(), dy.clone());
        let width = dy.ncols().max(1);
        let inputs = slice(gate)?.par_chunks(width).zip(slice(up)?.par_chunks(width));
        let outputs =
            slice_mut(&mut dgate)?.par_chunks_mut(width).zip(slice_mut(&mut dup)?.par_chunks_mut(width));
        outputs.zip(inputs).for_each(|((dgate, dup), (gate, up))| {
            elementwise::swiglu_gradient(gate, up, dgate, dup);
        });
        Ok([dgate, dup])
    }

    fn attention_gradient(
        &self,
        [q, k, v]: [&Array2<f32>; 3],
        sinks: Option<&Array2<f32>>,
        dy: &Array2<f32>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<[Array2<f32>; 3]> {
        let AttentionShape { heads, kv_heads, head_dim: width, .. } = *shape;
        ensure!(dy.dim() == q.dim() && k.dim() == v.dim(), "gradients of differing shapes");
        let (tokens, group) = (batch.tokens, heads / kv_heads);
        let parts: Vec<[Array2<f32>; 3]> = (0..batch.sequences * kv_heads)
            .into_par_iter()
            .map(|at| {
                let (rows, head) =
                    (s![at / kv_heads * tokens..(at / kv_heads + 1) * tokens, ..], at % kv_heads);
                let (own, wide) = (s![.., head * width..(head + 1) * width], group * width);
                let shared = s![.., head * wide..(head + 1) * wide];
                let of = |x: &Array2<f32>| x.slice(rows).slice(own).to_owned();
                let of_group = |x: &Array2<f32>| x.slice(rows).slice(shared).to_owned();
                let sinks = sinks.map(|sinks| sinks.slice(s![0, head * group..(head + 1) * group]).to_vec());
                group_gradient([of_group(q), of(k), of(v)], sinks.as_deref(), &of_group(dy), shape)
            })
            .collect();
        let mut gradients = [q, k, v].map(|x| Array2::zeros(x.dim()));
        for (at, part) in parts.iter().enumerate() {
            let (sequence, head) = (at / kv_heads, at % kv_heads);
            for (gradient, part) in gradients.iter_mut().zip(part) {
                let cols = part.ncols();
                let place = s![sequence * tokens..(sequence + 1) * tokens, head * cols..(head + 1) * cols];
                gradient.slice_mut(place).assign(part);
            }
        }
        Ok(gradients)
    }

    fn divergence_gradient(
        &self,
        baseline: (&Array2<f32>, &Matrix),
        model: (&Array2<f32>, &Matrix),
    ) -> Result<Array2<f32>> {
        let rows = [baseline.0.nrows(), model.0.nrows()];
        ensure!(rows[0] == rows[1], "hidden states of {} and {} positions", rows[0], rows[1]);
        Ok(head::divergence_gradient(baseline, model))
    }

    fn fisher_gradient(&self, hidden: &Array2<f32>, head: &Matrix, seed: u32) -> Result<Array2<f32>> {
        Ok(head::fisher_gradient(hidden, head, seed))
    }

    fn row_energies(&self, x: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(slice(x)?.par_chunks(x.ncols().max(1)).map(|row| elementwise::squares(row) as f32).collect())
    }

    fn scale_rows(&self, x: &Array2<f32>, factors: &[f32]) -> Result<Array2<f32>> {
        ensure!(x.nrows() == factors.len(), "{} factors for {} rows", factors.len(), x.nrows());
        let mut y = x.clone();
        y.axis_iter_mut(Axis(0)).zip(factors).for_each(|(mut row, factor)| row *= *factor);
        Ok(y)
    }
}

fn norm_factor(x: &[f32], eps: f32) -> f32 {
    let squares = elementwise::squares(x);
    (1.0 / (squares / x.len() as f64 + eps as f64).sqrt()) as f32
}

/// Returns the gradients of one sequence's query heads that share a key head `[tokens, group · head_dim]`, of its keys and
/// of its values `[tokens, head_dim]`.
fn group_gradient(
    [q, k, v]: [Array2<f32>; 3],
    sinks: Option<&[f32]>,
    dy: &Array2<f32>,
    shape: &AttentionShape,
) -> [Array2<f32>; 3] {
    let (tokens, width) = k.dim();
    let (mut dq, mut dk, mut dv) = (Array2::zeros(q.dim()), Array2::zeros(k.dim()), Array2::zeros(v.dim()));
    for head in 0..q.ncols() / width {
        let columns = head * width..(head + 1) * width;
        for first in (0..tokens).step_by(QUERIES) {
            let end = tokens.min(first + QUERIES);
            let oldest = shape.window.map_or(0, |window| (first + 1).saturating_sub(window));
            let (queries, seen) = (s![first..end, columns.clone()], s![oldest..end, ..]);
            let (q, k, v, dy) = (q.slice(queries), k.slice(seen), v.slice(seen), dy.slice(queries));
            let sink = sinks.map(|sinks| sinks[head]);
            let (p, ds) = probabilities_and_gradient([q, k, v, dy], sink, [first, oldest], shape);
            general_mat_mul(1.0, &ds, &k, 0.0, &mut dq.slice_mut(queries));
            general_mat_mul(1.0, &ds.t(), &q, 1.0, &mut dk.slice_mut(seen));
            general_mat_mul(1.0, &p.t(), &dy, 1.0, &mut dv.slice_mut(seen));
        }
    }
    [dq, dk, dv]
}

/// Returns the probabilities `[queries, keys]` and the gradient of the products q · k.
fn probabilities_and_gradient(
    [q, k, v, dy]: [ArrayView2<f32>; 4],
    sink: Option<f32>,
    [first_query, first_key]: [usize; 2],
    shape: &AttentionShape,
) -> (Array2<f32>, Array2<f32>) {
    let (mut p, mut ds) = (q.dot(&k.t()), dy.dot(&v.t()));
    for (query, (mut p, mut ds)) in (first_query..).zip(p.rows_mut().into_iter().zip(ds.rows_mut())) {
        let oldest = shape.window.map_or(0, |window| (query + 1).saturating_sub(window));
        let (Some(p), Some(ds)) = (p.as_slice_mut(), ds.as_slice_mut()) else { continue };
        let seen = oldest.saturating_sub(first_key)..query + 1 - first_key;
        p[..seen.start].fill(0.0);
        p[seen.end..].fill(0.0);
        elementwise::softmax(&mut p[seen.clone()], shape.scale, sink);
        let mean: f32 = p[seen.clone()].iter().zip(&ds[seen]).map(|(p, d)| p * d).sum();
        ds.iter_mut().zip(p.iter()).for_each(|(d, p)| *d = p * (*d - mean) * shape.scale);
    }
    (p, ds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::scheme::Activations;
    use crate::tensor::Dense;

    fn noise(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    fn matrix(x: &Array2<f32>) -> Matrix {
        Matrix::Dense(Dense::from_f32(x.shape().to_vec(), x.as_slice().unwrap()))
    }

    /// Checks a gradient of Σ dy ∘ f(x) against central differences along random directions. With steps of 2^-6 the third
    /// derivative leaves 2^-12 of it, F32 sums of `f` about as much.
    fn check(
        x: &Array2<f32>,
        gradient: &Array2<f32>,
        dy: &Array2<f32>,
        f: impl Fn(&Array2<f32>) -> Array2<f32>,
    ) {
        let step = 1.0 / 64.0;
        for seed in 100..108 {
            let direction = noise(x.nrows(), x.ncols(), seed);
            let value = |sign: f32| -> f64 {
                let y = f(&(x + &(&direction * (sign * step))));
                y.iter().zip(dy).map(|(y, d)| *y as f64 * *d as f64).sum()
            };
            let found = (value(1.0) - value(-1.0)) / (2.0 * step as f64);
            let wanted: f64 = gradient.iter().zip(&direction).map(|(g, d)| *g as f64 * *d as f64).sum();
            let size: f64 = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
            assert!((found - wanted).abs() < 2e-3 * size, "{found} {wanted} of {size}");
        }
    }

    #[test]
    fn linear_gradients_are_the_derivatives_of_the_forward_pass() {
        let rows = 521; // more than are decoded at a time
        let (x, w, dy) = (noise(5, 24, 1), matrix(&noise(rows, 24, 2)), noise(5, rows, 3));
        let dx = Cpu.linear_gradient(&dy, &w).unwrap();
        check(&x, &dx, &dy, |x| Cpu.linear(x, &w, None, Activations::Full).unwrap());
    }

    #[test]
    fn norm_gradients_are_the_derivatives_of_the_forward_pass_over_rows_and_heads() {
        for width in [16, 8] {
            let (x, gain, dy) = (noise(6, 16, 1) * 3.0, noise(1, width, 2), noise(6, 16, 3));
            let dx = Cpu.rms_norm_gradient(&x, &gain, 1e-2, &dy).unwrap();
            check(&x, &dx, &dy, |x| Cpu.rms_norm(x, &gain, 1e-2).unwrap());
            let dgain = Cpu.gain_gradient(&x, width, 1e-2, &dy).unwrap();
            let dgain = Array2::from_shape_vec((1, width), dgain).unwrap();
            check(&gain, &dgain, &dy, |gain| Cpu.rms_norm(&x, gain, 1e-2).unwrap());
        }
    }

    #[test]
    fn swiglu_gradients_are_the_derivatives_of_the_forward_pass() {
        let (gate, up, dy) = (noise(4, 12, 1) * 3.0, noise(4, 12, 2), noise(4, 12, 3));
        let [dgate, dup] = Cpu.swiglu_gradient(&gate, &up, &dy).unwrap();
        check(&gate, &dgate, &dy, |gate| Cpu.swiglu(gate, &up).unwrap());
        check(&up, &dup, &dy, |up| Cpu.swiglu(&gate, up).unwrap());
    }

    #[test]
    fn attention_gradients_are_the_derivatives_of_the_forward_pass_with_groups_windows_and_sinks() {
        for window in [None, Some(7), Some(150)] {
            let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, window, scale: 0.5 };
            let batch = Batch { sequences: 2, tokens: QUERIES + 23 };
            let n = batch.sequences * batch.tokens;
            let (q, k, v, dy) = (noise(n, 32, 1), noise(n, 16, 2), noise(n, 16, 3), noise(n, 32, 4));
            let sinks = noise(1, 4, 5) * 2.0;
            let sinks = window.map(|_| &sinks);
            let [dq, dk, dv] = Cpu.attention_gradient([&q, &k, &v], sinks, &dy, &shape, batch).unwrap();
            let run = |q: &_, k: &_, v: &_| Cpu.attention(q, k, v, sinks, &shape, batch).unwrap();
            check(&q, &dq, &dy, |q| run(q, &k, &v));
            check(&k, &dk, &dy, |k| run(&q, k, &v));
            check(&v, &dv, &dy, |v| run(&q, &k, v));
        }
    }

    #[test]
    fn divergence_gradients_are_the_derivatives_of_the_divergence() {
        let vocab = 1100;
        let (hidden, head, other) =
            (noise(130, 24, 1), matrix(&noise(vocab, 24, 2)), matrix(&noise(vocab, 24, 3)));
        let (baseline, targets, ones) = (noise(130, 24, 5), vec![0; 130], Array2::ones((130, 1)));
        let found = Cpu.divergence_gradient((&baseline, &other), (&hidden, &head)).unwrap();
        check(&hidden, &found, &ones, |x| {
            let compared = Cpu.compare((&baseline, &other), (x, &head), &targets).unwrap();
            Array2::from_shape_fn((130, 1), |(row, _)| compared[row].kld)
        });
    }

    #[test]
    fn fisher_gradients_have_the_covariance_of_the_fisher_information() {
        let vocab = 5;
        let logits = noise(1, vocab, 1) * 2.0;
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let p: Vec<f32> = logits.iter().map(|l| l.exp() / total).collect();
        let draws = 4000;
        let hidden = logits.broadcast((draws, vocab)).unwrap().to_owned();
        let v = Cpu.fisher_gradient(&hidden, &matrix(&Array2::eye(vocab)), 7).unwrap();
        assert!(v.rows().into_iter().all(|row| row.sum().abs() < 1e-6));
        let covariance = v.t().dot(&v) / draws as f32;
        for ((i, j), found) in covariance.indexed_iter() {
            let wanted = if i == j { p[i] - p[i] * p[i] } else { -p[i] * p[j] };
            // Products of entries below 1: five standard errors of their mean are below 5 / √draws of the larger variance.
            let bound = 5.0 * (p[i] * p[j]).sqrt() / (draws as f32).sqrt();
            assert!((found - wanted).abs() < bound, "{i} {j}: {found} {wanted}");
        }
    }

    #[test]
    fn rows_have_their_energies_and_scale_alone() {
        let x = Array2::from_shape_vec((2, 3), vec![1.0, -2.0, 2.0, 0.0, 3.0, 4.0]).unwrap();
        assert_eq!(Cpu.row_energies(&x).unwrap(), [9.0, 25.0]);
        assert_eq!(Cpu.scale_rows(&x, &[2.0, 0.0]).unwrap().row(0).to_vec(), [2.0, -4.0, 4.0]);
    }
}
