//! Coordinate descent on `tr Δ H Δᵀ`: sweeps that re-round one code given all others, then try other scales for each
//! group with its codes re-solved. Every accepted change lowers the loss, so the loss never rises.
//!
//! With `g = H (q - t)` for one row, moving value k by `d` changes the loss by `d (2 g[k] + d H[k,k])`; the best real
//! value is `q[k] - g[k] / H[k,k]`, and the best code is the one nearest to it. Greedy re-rounding after error feedback
//! goes back to Babai's rounding with local search; see also CDQuant (arXiv 2406.17542).

use std::ops::Range;

use multiversion::multiversion;
use rayon::prelude::*;

use super::refit::{self, Normal, StoredScale};
use crate::linalg;
use crate::scheme::{Grid, Offset, QTensor, Span};

/// Improves codes and scales of `q` for `target` `[rows, cols]` under the symmetric `hessian` `[cols, cols]`. Rows run
/// in parallel; each stops early when a sweep changes nothing.
pub fn descend(target: &[f32], q: &mut QTensor, hessian: &[f32], sweeps: usize) {
    if sweeps == 0 {
        return;
    }
    let (rows, cols) = (q.rows, q.cols);
    let values = q.decode();
    let errors: Vec<f32> = values.iter().zip(target).map(|(v, t)| v - t).collect();
    let mut gradients = vec![0.0; rows * cols];
    linalg::add_product(&mut gradients, &errors, hessian, [rows, cols, cols]);
    let row_states = values.par_chunks(cols).zip(gradients.par_chunks(cols)).enumerate();
    let solved: Vec<QTensor> = row_states
        .map(|(row, (values, gradient))| {
            let stored = q.slice_rows(row..row + 1);
            let mut state = Row { q: stored, values: values.to_vec(), gradient: gradient.to_vec(), hessian };
            for _ in 0..sweeps {
                if !sweep(&mut state) {
                    break;
                }
            }
            state.q
        })
        .collect();
    for (row, solved) in solved.iter().enumerate() {
        q.set_rows(row, solved);
    }
}

/// One row under descent.
struct Row<'a> {
    /// The row as a tensor of its own.
    q: QTensor,
    /// Its decoded values.
    values: Vec<f32>,
    /// `H (values - target)`.
    gradient: Vec<f32>,
    hessian: &'a [f32],
}

/// One sweep over codes, then over scales. Returns whether anything changed.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn sweep(row: &mut Row) -> bool {
    let mut changed = sweep_codes(row);
    if row.q.scheme.group != Span::Tensor {
        for group in 0..row.q.groups_per_row() {
            changed |= improve_scale(row, group);
        }
        changed |= refit_outer(row);
    }
    changed
}

#[inline(always)]
fn sweep_codes(row: &mut Row) -> bool {
    let (cols, group_cols, element) = (row.q.cols, row.q.group_cols(), row.q.scheme.element);
    let mut changed = false;
    for group in 0..row.q.groups_per_row() {
        let grid = row.q.grid(0, group);
        let inverse = inverse(grid);
        for col in group_columns(group, group_cols, cols) {
            let curvature = row.hessian[col * (cols + 1)];
            let wanted = row.values[col] - row.gradient[col] / curvature;
            let code = element.encode((wanted - grid.offset) * inverse);
            let value = grid.scale * element.decode(code) + grid.offset;
            let step = value - row.values[col];
            if step != 0.0 && step * (2.0 * row.gradient[col] + step * curvature) < 0.0 {
                row.q.codes[col] = code;
                row.values[col] = value;
                add_scaled(&mut row.gradient, &row.hessian[col * cols..][..cols], step);
                changed = true;
            }
        }
    }
    changed
}

/// Tries other stored scales for a group and keeps the best that lowers the loss.
#[inline(always)]
fn improve_scale(row: &mut Row, group: usize) -> bool {
    let columns = group_columns(group, row.q.group_cols(), row.q.cols);
    let normal = normal_equations(row, columns.clone());
    let mut best: Option<(StoredScale, Trial)> = None;
    for stored in refit::candidates(&row.q, group, &normal) {
        let trial = resolve(row, columns.clone(), effective(&row.q, group, stored));
        if trial.change < best.as_ref().map_or(0.0, |(_, best)| best.change) {
            best = Some((stored, trial));
        }
    }
    let Some((stored, trial)) = best else { return false };
    row.q.scales[group] = stored.scale;
    if let Some(offset) = row.q.offsets.get_mut(group) {
        *offset = stored.offset;
    }
    let cols = row.q.cols;
    for (i, col) in columns.enumerate() {
        let step = trial.values[i] - row.values[col];
        row.q.codes[col] = trial.codes[i];
        row.values[col] = trial.values[i];
        if step != 0.0 {
            add_scaled(&mut row.gradient, &row.hessian[col * cols..][..cols], step);
        }
    }
    true
}

/// A group's codes under another grid, and how the loss changes.
struct Trial {
    codes: Vec<u8>,
    values: Vec<f32>,
    change: f64,
}

/// Re-solves a group's codes on `grid`: nearest to the present values, then two sweeps within the group.
#[inline(always)]
fn resolve(row: &Row, columns: Range<usize>, grid: Grid) -> Trial {
    let (cols, element, inverse) = (row.q.cols, row.q.scheme.element, inverse(grid));
    let old = &row.values[columns.clone()];
    let block = |i: usize| &row.hessian[(columns.start + i) * cols..][columns.clone()];
    let value_of = |code| grid.scale * element.decode(code) + grid.offset;
    let mut codes: Vec<u8> = old.iter().map(|v| element.encode((v - grid.offset) * inverse)).collect();
    let mut values: Vec<f32> = codes.iter().map(|&code| value_of(code)).collect();
    let mut gradient = row.gradient[columns.clone()].to_vec();
    for i in 0..old.len() {
        add_scaled(&mut gradient, block(i), values[i] - old[i]);
    }
    for _ in 0..2 {
        for i in 0..old.len() {
            let curvature = block(i)[i];
            let code = element.encode((values[i] - gradient[i] / curvature - grid.offset) * inverse);
            let step = value_of(code) - values[i];
            if step != 0.0 && step * (2.0 * gradient[i] + step * curvature) < 0.0 {
                codes[i] = code;
                values[i] += step;
                add_scaled(&mut gradient, block(i), step);
            }
        }
    }
    // The change is 2 d·g + dᵀHd = d · (g before + g after).
    let before = &row.gradient[columns];
    let change =
        (0..old.len()).map(|i| (values[i] - old[i]) as f64 * (before[i] as f64 + gradient[i] as f64));
    let change = change.sum();
    // Decoded again, so that values stay exactly what the codes mean.
    values.iter_mut().zip(&codes).for_each(|(value, &code)| *value = value_of(code));
    Trial { codes, values, change }
}

#[inline(always)]
fn normal_equations(row: &Row, columns: Range<usize>) -> Normal {
    let element = row.q.scheme.element;
    let units: Vec<f32> = row.q.codes[columns.clone()].iter().map(|&code| element.decode(code)).collect();
    let mut normal = Normal::default();
    for (i, col) in columns.clone().enumerate() {
        let (mut with_units, mut with_ones) = (0.0, 0.0);
        for (h, unit) in row.hessian[col * row.q.cols..][columns.clone()].iter().zip(&units) {
            with_units += h * unit;
            with_ones += h;
        }
        let (unit, gradient) = (units[i] as f64, row.gradient[col] as f64);
        normal.cc += unit * with_units as f64;
        normal.cu += with_units as f64;
        normal.uu += with_ones as f64;
        normal.cg += unit * gradient;
        normal.ug += gradient;
    }
    normal
}

/// Least squares in the outer scale and outer offset of each super-block, codes and inner scales as they are.
#[inline(always)]
fn refit_outer(row: &mut Row) -> bool {
    let Some((Span::Cols(span), codec)) = row.q.scheme.outer else { return false };
    let (cols, span, element) = (row.q.cols, span as usize, row.q.scheme.element);
    let mut changed = false;
    for outer in 0..cols.div_ceil(span) {
        let columns = group_columns(outer, span, cols);
        let group_cols = row.q.group_cols();
        let group = |col: usize| col / group_cols;
        let scaled = |col: usize| row.q.scales[group(col)] * element.decode(row.q.codes[col]);
        let scaled: Vec<f32> = columns.clone().map(scaled).collect();
        let offsets: Vec<f32> = match row.q.scheme.offset {
            Offset::Subtracted(_) => columns.clone().map(|col| -row.q.offsets[group(col)]).collect(),
            _ => vec![0.0; columns.len()],
        };
        let normal = outer_equations(row, columns.clone(), &scaled, &offsets);
        let (scale, offset) = normal.solve(normal.uu == 0.0);
        let new_scale = codec.round(row.q.outer_scales[outer] + scale);
        let new_offset = row.q.outer_offsets.get(outer).map(|old| codec.round(old + offset).max(0.0));
        let step_scale = new_scale - row.q.outer_scales[outer];
        let step_offset = new_offset.map_or(0.0, |new| new - row.q.outer_offsets[outer]);
        if new_scale == 0.0 || normal.change(step_scale, step_offset) >= 0.0 {
            continue;
        }
        row.q.outer_scales[outer] = new_scale;
        if let Some(new) = new_offset {
            row.q.outer_offsets[outer] = new;
        }
        for col in columns {
            let grid = row.q.grid(0, group(col));
            let value = grid.scale * element.decode(row.q.codes[col]) + grid.offset;
            let step = value - row.values[col];
            row.values[col] = value;
            add_scaled(&mut row.gradient, &row.hessian[col * cols..][..cols], step);
        }
        changed = true;
    }
    changed
}

#[inline(always)]
fn outer_equations(row: &Row, columns: Range<usize>, scaled: &[f32], offsets: &[f32]) -> Normal {
    let mut normal = Normal::default();
    for (i, col) in columns.clone().enumerate() {
        let (mut with_scaled, mut with_offsets) = (0.0, 0.0);
        let h = &row.hessian[col * row.q.cols..][columns.clone()];
        for ((h, s), o) in h.iter().zip(scaled).zip(offsets) {
            with_scaled += h * s;
            with_offsets += h * o;
        }
        let (s, o, gradient) = (scaled[i] as f64, offsets[i] as f64, row.gradient[col] as f64);
        normal.cc += s * with_scaled as f64;
        normal.cu += o * with_scaled as f64;
        normal.uu += o * with_offsets as f64;
        normal.cg += s * gradient;
        normal.ug += o * gradient;
    }
    normal
}

fn group_columns(group: usize, group_cols: usize, cols: usize) -> Range<usize> {
    group * group_cols..cols.min((group + 1) * group_cols)
}

fn inverse(grid: Grid) -> f32 {
    if grid.scale == 0.0 { 0.0 } else { 1.0 / grid.scale }
}

fn effective(q: &QTensor, group: usize, stored: StoredScale) -> Grid {
    let (scale, offset) = refit::outer_factors(q, group);
    Grid { scale: scale * stored.scale, offset: offset * stored.offset }
}

/// y += a · x
#[inline(always)]
fn add_scaled(y: &mut [f32], x: &[f32], a: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(a, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::gptq::{Feedback, gptq};
    use crate::method::testing::{Random, correlated_moments, nearest, proxy_loss};
    use crate::scheme::schemes::*;

    #[test]
    fn no_sweep_raises_the_loss() {
        let (rows, cols) = (11, 128);
        let mut random = Random::new(7);
        let weights = random.normal(rows * cols);
        let moments = correlated_moments(&mut random, 512, cols);
        let hessian = moments.damped(0.01);
        for scheme in [MXFP4, INT8, Q8_0, Q4_0, Q5_0] {
            let mut q = nearest(scheme, &weights, rows, cols);
            let mut loss = proxy_loss(&q, &weights, &hessian);
            let first = loss;
            for _ in 0..4 {
                descend(&weights, &mut q, &hessian, 1);
                let next = proxy_loss(&q, &weights, &hessian);
                // Gradients are F32: a change worth less than 1e-5 of the loss may have the wrong sign.
                assert!(next <= loss * (1.0 + 1e-5), "{}: {next} after {loss}", scheme.name);
                loss = next;
            }
            assert!(loss < 0.7 * first, "{}: {loss} from {first}", scheme.name);
        }
    }

    #[test]
    fn descent_improves_on_gptq() {
        let (rows, cols) = (16, 128);
        let mut random = Random::new(8);
        let weights = random.normal(rows * cols);
        let moments = correlated_moments(&mut random, 512, cols);
        let mut q = nearest(MXFP4, &weights, rows, cols);
        gptq(&weights, &mut q, &Feedback::new(&moments, 0.01).unwrap());
        let before = proxy_loss(&q, &weights, &moments.damped(0.01));
        descend(&weights, &mut q, &moments.damped(0.01), 4);
        assert!(proxy_loss(&q, &weights, &moments.damped(0.01)) < 0.99 * before);
    }

    #[test]
    fn power_of_two_scales_stay_powers_of_two() {
        let mut random = Random::new(9);
        let weights = random.normal(4 * 64);
        let moments = correlated_moments(&mut random, 256, 64);
        let mut q = nearest(MXFP4, &weights, 4, 64);
        descend(&weights, &mut q, &moments.damped(0.01), 4);
        assert!(q.scales.iter().all(|s| s.log2().fract() == 0.0));
    }
}
