//! GPTQ: rounds column after column, each absorbing the errors of those before it.
//!
//! With `H = R Rᵀ`, R upper triangular, the loss is `‖(q - t) R‖²`, whose k-th term is
//! `R[k,k]² (e[k] + Σ_{j<k} e[j] A[j,k])²` with `e = q - t` and `A[j,k] = R[j,k] / R[k,k]`. So column k is rounded from
//!
//! ```text
//! t[k] - Σ_{j<k} e[j] A[j,k]
//! ```
//!
//! which is GPTQ (Frantar et al., arXiv 2210.17323) in the form QuIP proves equivalent (Chee et al., arXiv 2307.13304,
//! §3 "LDLQ"): one Cholesky factor and no inverse. Columns are visited by descending `H[k,k]` ("activation order"),
//! whose scales are already fixed, so that groups stay where the format wants them.

// Lanes of several arrays advance together: indices say so better than zipped iterators.
#![allow(clippy::needless_range_loop)]

use anyhow::{Result, bail};
use multiversion::multiversion;
use rayon::prelude::*;

use super::statistics::Moments;
use crate::linalg::Cholesky;
use crate::num::Element;
use crate::scheme::{Grid, QTensor};

/// Rows rounded together, one per SIMD lane.
const LANES: usize = 16;
/// Columns that share one pass over all earlier errors.
const PANEL: usize = 8;

type Lanes = [f32; LANES];

/// The feedback coefficients of one input, shared by every linear that reads it.
pub struct Feedback {
    /// Column to visit at each step.
    order: Vec<u32>,
    /// For each panel of [`PANEL`] steps starting at `s`: `A[j, s..s + PANEL]` for `j` in `0..s + PANEL`.
    panels: Vec<Vec<[f32; PANEL]>>,
    /// Damping that made the Hessian positive definite, relative to its mean diagonal.
    pub damp: f32,
}

impl Feedback {
    /// Returns the coefficients for `X̃ᵀX̃ + damp · mean diagonal · I`. Damping rises tenfold at a time, to at most 1,
    /// until the factorisation succeeds; the value used is in the result.
    ///
    /// # Errors
    /// If even that is not positive definite: the inputs are not finite.
    pub fn new(moments: &Moments, damp: f32) -> Result<Self> {
        let cols = moments.cols;
        let diagonal = |col: usize| moments.hessian[col * (cols + 1)];
        let mut order: Vec<u32> = (0..cols as u32).collect();
        order.sort_by(|&a, &b| diagonal(b as usize).total_cmp(&diagonal(a as usize)).then(a.cmp(&b)));
        let mut damp = damp.max(1e-6);
        loop {
            let hessian = moments.damped(damp);
            // Cholesky of the reversed order: row i of the factor is step cols - 1 - i.
            let at = |step: usize| order[cols - 1 - step] as usize;
            match Cholesky::new(cols, |row, col| hessian[at(row) * cols + at(col)] as f64) {
                Ok(lower) => {
                    let entry = |j: usize, k: usize| {
                        let (row, col) = (cols - 1 - j, cols - 1 - k);
                        (lower.at(row, col) / lower.at(col, col)) as f32
                    };
                    return Ok(Feedback { panels: panels(cols, entry), order, damp });
                }
                Err(_) if damp < 0.99 => damp = (damp * 10.0).min(1.0),
                Err(_) => bail!("the inputs' second moments are not finite; check the calibration text"),
            }
        }
    }
}

/// Packs `A[j, k]`, j < k, by panels; entries with j ≥ k are zero.
fn panels(cols: usize, entry: impl Fn(usize, usize) -> f32 + Sync) -> Vec<Vec<[f32; PANEL]>> {
    let panel = |start: usize| {
        let row = |j: usize| {
            std::array::from_fn(|i| if j < start + i && start + i < cols { entry(j, start + i) } else { 0.0 })
        };
        (0..cols.min(start + PANEL)).map(row).collect()
    };
    (0..cols.div_ceil(PANEL)).into_par_iter().map(|index| panel(index * PANEL)).collect()
}

/// Chooses the codes of `q`, whose scales are set, for `target` `[rows, cols]`. Rows run in parallel.
pub fn gptq(target: &[f32], q: &mut QTensor, feedback: &Feedback) {
    let cols = q.cols;
    let mut codes = std::mem::take(&mut q.codes);
    let tiles = codes.par_chunks_mut(LANES * cols).zip(target.par_chunks(LANES * cols)).enumerate();
    tiles.for_each(|(tile, (codes, target))| {
        let grids = tile_grids(q, tile * LANES, codes.len() / cols);
        let work = Tile { target, grids: &grids, group_cols: q.group_cols(), cols };
        round_tile(&work, q.scheme.element, feedback, codes);
    });
    q.codes = codes;
}

/// Up to [`LANES`] rows; absent lanes have scale 0.
struct Tile<'a> {
    target: &'a [f32],
    grids: &'a [GridLanes],
    group_cols: usize,
    cols: usize,
}

#[derive(Clone, Copy)]
struct GridLanes {
    scale: Lanes,
    /// 0 where the scale is 0.
    inverse: Lanes,
    offset: Lanes,
}

fn tile_grids(q: &QTensor, first_row: usize, rows: usize) -> Vec<GridLanes> {
    let lane_grid = |group, lane| {
        if lane < rows { q.grid(first_row + lane, group) } else { Grid { scale: 0.0, offset: 0.0 } }
    };
    let group = |group| {
        let grids: [Grid; LANES] = std::array::from_fn(|lane| lane_grid(group, lane));
        GridLanes {
            scale: grids.map(|g| g.scale),
            inverse: grids.map(|g| if g.scale == 0.0 { 0.0 } else { 1.0 / g.scale }),
            offset: grids.map(|g| g.offset),
        }
    };
    (0..q.groups_per_row()).map(group).collect()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn round_tile(tile: &Tile, element: Element, feedback: &Feedback, codes: &mut [u8]) {
    let rows = codes.len() / tile.cols;
    let mut errors: Vec<Lanes> = Vec::with_capacity(tile.cols);
    for (panel, coefficients) in feedback.panels.iter().enumerate() {
        let start = panel * PANEL;
        let mut fed = [[0.0; LANES]; PANEL];
        for (error, coefficient) in errors.iter().zip(coefficients) {
            for (fed, &a) in fed.iter_mut().zip(coefficient) {
                for lane in 0..LANES {
                    fed[lane] = error[lane].mul_add(a, fed[lane]);
                }
            }
        }
        for i in 0..PANEL.min(tile.cols - start) {
            let col = feedback.order[start + i] as usize;
            for j in 0..i {
                let a = coefficients[start + j][i];
                for lane in 0..LANES {
                    fed[i][lane] = errors[start + j][lane].mul_add(a, fed[i][lane]);
                }
            }
            let mut wanted = [0.0; LANES];
            for lane in 0..rows {
                wanted[lane] = tile.target[lane * tile.cols + col];
            }
            let (code, value) = round_lanes(element, &tile.grids[col / tile.group_cols], &wanted, &fed[i]);
            let mut error = [0.0; LANES];
            for lane in 0..rows {
                codes[lane * tile.cols + col] = code[lane];
                error[lane] = value[lane] - wanted[lane];
            }
            errors.push(error);
        }
    }
}

/// Returns the codes nearest to `wanted - fed` and their values. Constant elements let the compiler vectorise.
#[inline(always)]
fn round_lanes(element: Element, grid: &GridLanes, wanted: &Lanes, fed: &Lanes) -> ([u8; LANES], Lanes) {
    match element {
        Element::E2M1 => round_lanes_of(Element::E2M1, grid, wanted, fed),
        Element::E4M3 => round_lanes_of(Element::E4M3, grid, wanted, fed),
        Element::Int(bits) => round_lanes_of(Element::Int(bits), grid, wanted, fed),
        Element::Uint(bits) => round_lanes_of(Element::Uint(bits), grid, wanted, fed),
        Element::Table(table) => round_lanes_of(Element::Table(table), grid, wanted, fed),
    }
}

#[inline(always)]
fn round_lanes_of(element: Element, grid: &GridLanes, wanted: &Lanes, fed: &Lanes) -> ([u8; LANES], Lanes) {
    let mut codes = [0; LANES];
    let mut values = [0.0; LANES];
    for lane in 0..LANES {
        codes[lane] = element.encode((wanted[lane] - fed[lane] - grid.offset[lane]) * grid.inverse[lane]);
        values[lane] = grid.scale[lane] * element.decode(codes[lane]) + grid.offset[lane];
    }
    (codes, values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::testing::{Random, correlated_moments, nearest, proxy_loss};
    use crate::scheme::schemes::*;

    const SYMMETRIC: [crate::scheme::Scheme; 5] = [MXFP4, INT8, Q8_0, Q4_0, Q5_0];

    #[test]
    fn an_identity_hessian_gives_the_nearest_codes() {
        let (rows, cols) = (37, 96);
        let weights = Random::new(3).normal(rows * cols);
        let mut moments = Moments::new(cols);
        (0..cols).for_each(|col| moments.hessian[col * (cols + 1)] = 1.0);
        let feedback = Feedback::new(&moments, 0.01).unwrap();
        for scheme in SYMMETRIC {
            let wanted = nearest(scheme, &weights, rows, cols);
            let mut q = wanted.clone();
            q.codes.fill(0);
            gptq(&weights, &mut q, &feedback);
            let same = q.decode().iter().zip(wanted.decode()).filter(|(a, b)| **a == *b).count();
            // `x · (1 / s)` and `x / s` may round a tie apart; nothing else may differ.
            assert!(rows * cols - same <= 2, "{}: {same} of {}", scheme.name, rows * cols);
        }
    }

    #[test]
    fn feedback_lowers_the_proxy_loss_of_every_scheme() {
        let (rows, cols) = (19, 128);
        let mut random = Random::new(4);
        let weights = random.normal(rows * cols);
        let moments = correlated_moments(&mut random, 512, cols);
        let feedback = Feedback::new(&moments, 0.01).unwrap();
        for scheme in SYMMETRIC {
            let rtn = nearest(scheme, &weights, rows, cols);
            let mut q = rtn.clone();
            gptq(&weights, &mut q, &feedback);
            let (before, after) =
                (proxy_loss(&rtn, &weights, &moments.hessian), proxy_loss(&q, &weights, &moments.hessian));
            assert!(after < 0.7 * before, "{}: {after} against {before}", scheme.name);
        }
    }

    /// The recurrence of the module header, one row at a time in F64, without panels or lanes.
    #[test]
    fn panels_and_lanes_compute_the_textbook_recurrence() {
        let (rows, cols) = (3, 45);
        let mut random = Random::new(5);
        let weights = random.normal(rows * cols);
        let moments = correlated_moments(&mut random, 256, cols);
        let feedback = Feedback::new(&moments, 0.05).unwrap();
        let mut q = nearest(INT8, &weights, rows, cols);
        gptq(&weights, &mut q, &feedback);
        for row in 0..rows {
            let scale = q.grid(row, 0).scale as f64;
            let mut errors: Vec<f64> = Vec::new();
            for k in 0..cols {
                let col = feedback.order[k] as usize;
                let coefficient = |j: usize| feedback.panels[k / PANEL][j][k % PANEL] as f64;
                let fed: f64 = errors.iter().enumerate().map(|(j, e)| e * coefficient(j)).sum();
                let target = weights[row * cols + col] as f64;
                let value = ((target - fed) / scale).round().clamp(-128.0, 127.0) * scale;
                let chosen = scale * INT8.element.decode(q.codes[row * cols + col]) as f64;
                assert!((value - chosen).abs() < scale * 0.5, "row {row} step {k}");
                errors.push(chosen - target);
            }
        }
    }

    #[test]
    fn a_singular_hessian_is_solved_by_damping() {
        let cols = 64;
        let mut random = Random::new(6);
        let moments = correlated_moments(&mut random, 5, cols);
        assert!(Feedback::new(&moments, 0.0).is_ok());
        assert!(Feedback::new(&Moments::new(cols), 0.05).is_ok(), "inputs never seen");
        let mut broken = moments;
        broken.hessian[0] = f32::NAN;
        assert!(Feedback::new(&broken, 0.05).is_err());
    }
}
