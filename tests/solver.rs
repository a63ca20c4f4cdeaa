//! Calibrated rounding on the GPU against its definition on the CPU. Without a GPU the tests say so and pass, unless
//! `QUANT_REQUIRE_GPU` is set.

#![allow(clippy::unwrap_used)] // tests: a failed unwrap is a failed test

mod gpu;

use gpu::gpu;
use quant::backend::cpu::Cpu;
use quant::backend::cuda::Precision;
use quant::backend::{Backend, MomentSums, SecondMoments};
use quant::method::mismatch::Strength;
use quant::method::solve::{Knobs, Solve, Solved};
use quant::scheme::fit::ScaleRule;
use quant::scheme::{Scheme, schemes};
use quant::tensor::{Dense, Matrix};

const KNOBS: Knobs = Knobs {
    strength: Strength { inputs: 0.6, residual: 0.35 },
    damp: 0.05,
    sweeps: 2,
    scale_rule: ScaleRule::Search,
};

fn normals(random: &mut fastrand::Rng, count: usize) -> Vec<f32> {
    // Twelve uniform numbers have variance 1.
    (0..count).map(|_| (0..12).map(|_| random.f32()).sum::<f32>() - 6.0).collect()
}

/// Inputs of both models and weights, as calibration meets them: correlated columns of different sizes.
struct Problem {
    rows: usize,
    cols: usize,
    tokens: usize,
    full: Vec<f32>,
    quantized: Vec<f32>,
    drift: Vec<f32>,
    weights: Vec<f32>,
}

impl Problem {
    fn random(rows: usize, cols: usize, tokens: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let mut full = normals(&mut random, tokens * cols);
        for row in full.chunks_mut(cols) {
            for col in 1..cols {
                row[col] += 0.8 * row[col - 1];
            }
            row.iter_mut().enumerate().for_each(|(col, x)| *x *= 1.0 + (col % 7) as f32);
        }
        let quantized = full.iter().map(|x| x + 0.1 * (random.f32() - 0.5) * (1.0 + x.abs())).collect();
        let drift = normals(&mut random, tokens * rows);
        Problem { rows, cols, tokens, full, quantized, drift, weights: normals(&mut random, rows * cols) }
    }

    /// Solves on a backend, moments uploaded from the CPU's sums, so that both start from the same bits.
    fn solve<B: SecondMoments>(&self, backend: &B, scheme: Scheme, knobs: Knobs) -> Solved {
        let Problem { rows, cols, tokens, .. } = *self;
        let tensor = |width: usize, values: &[f32]| Cpu.tensor(tokens, width, values).unwrap();
        let (full, quantized) = (tensor(cols, &self.full), tensor(cols, &self.quantized));
        let sum = |height: usize, a: &_, b: &_| {
            let mut sum = Cpu.zeros(height, cols).unwrap();
            Cpu.add_moment(&mut sum, a, b).unwrap();
            backend.tensor(height, cols, &Cpu.read(&sum).unwrap()).unwrap()
        };
        let moments = MomentSums {
            cols,
            tokens,
            hessian: sum(cols, &quantized, &quantized),
            cross: sum(cols, &full, &quantized),
            drift: Some(sum(rows, &tensor(rows, &self.drift), &quantized)),
        };
        let weights = Matrix::Dense(Dense::from_f32(vec![rows, cols], &self.weights));
        backend.solver(moments, knobs).unwrap().quantize(&weights, scheme, None).unwrap().0
    }
}

fn all_schemes() -> Vec<Scheme> {
    let grouped = [schemes::int8_grouped(128), schemes::int4_grouped(64), schemes::int4_grouped(32)];
    schemes::ALL.into_iter().chain(grouped).collect()
}

/// Solves every scheme on both and prints how they compare.
fn compare(knobs: Knobs, problem: &Problem, bound: f64) {
    let Some(cuda) = gpu(Precision::F16) else { return };
    for scheme in all_schemes() {
        let (expected, found) = (problem.solve(&Cpu, scheme, knobs), problem.solve(&cuda, scheme, knobs));
        let same = expected.q.codes.iter().zip(&found.q.codes).filter(|(a, b)| a == b).count();
        let share = same as f64 / expected.q.codes.len() as f64;
        let (expected, found) = (expected.outcome, found.outcome);
        let ratio = found.error / expected.error;
        let name = scheme.name;
        eprintln!("{name}: {:.2} % of codes equal, error ratio {:.6}", 100.0 * share, ratio);
        let nearest = found.error_nearest.unwrap() / expected.error_nearest.unwrap();
        // Both fit scales on the CPU, to targets that differ in the last bits: a search may tip over in one block of hundreds.
        assert!((nearest - 1.0).abs() < 1e-2, "{name}: nearest codes {nearest}");
        assert!((ratio - 1.0).abs() < bound, "{name}: {} for {}", found.error, expected.error);
        assert!(share > 0.97, "{name}: {share} of the codes");
        assert!(found.error <= found.error_nearest.unwrap(), "{name}");
    }
}

/// A tie that falls the other way changes all later codes of its row, to others as good: what has to agree is the error.
#[test]
fn every_scheme_ends_with_the_error_of_the_cpu() {
    compare(KNOBS, &Problem::random(160, 1280, 2600), 1e-3);
}

/// Scales of powers of two are the only ones that the GPU fits itself.
#[test]
fn every_rule_gives_the_scales_of_the_cpu() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let problem = Problem::random(64, 512, 1100);
    for scale_rule in [ScaleRule::Floor, ScaleRule::Even, ScaleRule::T7_25, ScaleRule::Search] {
        let strength = Strength { inputs: 0.0, residual: 0.0 };
        let knobs = Knobs { scale_rule, sweeps: 0, strength, ..KNOBS };
        let scales = |solved: Solved| solved.q.scales;
        let expected = scales(problem.solve(&Cpu, schemes::MXFP4, knobs));
        let found = scales(problem.solve(&cuda, schemes::MXFP4, knobs));
        let differ = expected.iter().zip(&found).filter(|(a, b)| a != b).count();
        // Errors of two candidates summed in another order: one tie in a thousand would be many.
        let allowed = if scale_rule == ScaleRule::Search { 1 } else { 0 };
        assert!(differ <= allowed, "{scale_rule}: {differ} of {} scales", found.len());
    }
}

#[test]
fn feedback_alone_agrees_too() {
    compare(Knobs { sweeps: 0, ..KNOBS }, &Problem::random(48, 768, 1600), 1e-3);
}

/// With the identity for a Hessian no error is fed back, and codes are the nearest ones on both.
#[test]
fn uncorrelated_inputs_give_equal_codes() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let (rows, cols) = (33, 512);
    let mut problem = Problem::random(rows, cols, cols);
    problem.full = (0..cols * cols).map(|i| f32::from(u8::from(i / cols == i % cols))).collect();
    problem.quantized = problem.full.clone();
    let knobs = Knobs { strength: Strength { inputs: 0.5, residual: 0.0 }, sweeps: 0, ..KNOBS };
    for scheme in all_schemes() {
        let (expected, found) = (problem.solve(&Cpu, scheme, knobs), problem.solve(&cuda, scheme, knobs));
        assert_eq!(expected.q, found.q, "{}", scheme.name);
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let problem = Problem::random(96, 512, 1100);
    for scheme in [schemes::MXFP4, schemes::INT8, schemes::Q4_K] {
        let (first, second) = (problem.solve(&cuda, scheme, KNOBS), problem.solve(&cuda, scheme, KNOBS));
        assert_eq!(first, second, "{}", scheme.name);
    }
}

#[test]
fn a_singular_hessian_is_damped_and_one_that_is_not_finite_refused() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let mut problem = Problem::random(16, 256, 5);
    let found = problem.solve(&cuda, schemes::MXFP4, KNOBS).outcome;
    assert!(found.error.is_finite() && found.error <= found.error_nearest.unwrap());
    problem.quantized[3] = f32::NAN;
    let mut hessian = vec![0.0; 256 * 256];
    hessian[3 * 257] = f32::NAN;
    let sum = |values: &[f32]| cuda.tensor(256, 256, values).unwrap();
    let moments =
        MomentSums { cols: 256, tokens: 5, hessian: sum(&hessian), cross: sum(&hessian), drift: None };
    let error = cuda.solver(moments, KNOBS).err().unwrap();
    assert!(format!("{error:#}").contains("not finite"), "{error:#}");
}
