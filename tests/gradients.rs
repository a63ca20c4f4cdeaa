//! The way back on a GPU against its definition on the CPU, one test an operation, and a whole model.
//!
//! Products read F16 (the other side of `--precise` reads F32), everything else is F32 on both sides. Without a GPU the
//! tests say so and pass, unless `QUANT_REQUIRE_GPU` is set.

#![allow(clippy::unwrap_used)]

mod gpu;

use std::path::Path;

use gpu::gpu;
use quant::backend::cpu::Cpu;
use quant::backend::cuda::{Cuda, Precision};
use quant::backend::gradients::Gradients;
use quant::backend::{AttentionShape, Backend, Batch};
use quant::calib::token_energies::{factors, token_energies};
use quant::checkpoint::Checkpoint;
use quant::model::Model;
use quant::tensor::{Dense, Dtype, Matrix};

/// Half a step of F16's 11 significant bits, relative.
const F16: f32 = 1.0 / 2048.0;
/// Room for differently ordered F32 arithmetic, relative to the size of what is summed.
const F32: f32 = 1e-5;

/// Runs a test on the GPU in both precisions; the second argument is the rounding of what a product reads.
fn on_gpu(test: impl Fn(&Cuda, f32)) {
    for (precision, rounding) in [(Precision::F16, F16), (Precision::F32, 0.0)] {
        let Some(cuda) = gpu(precision) else { return };
        test(&cuda, rounding);
    }
}

/// Returns BF16 values within ±1, the same for the same seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| half::bf16::from_f32(2.0 * random.f32() - 1.0).to_f32()).collect()
}

/// A tensor `[rows, cols]` on both devices.
struct Both(<Cpu as Backend>::Tensor, <Cuda as Backend>::Tensor);

impl Both {
    fn new(cuda: &Cuda, rows: usize, cols: usize, seed: u64) -> Self {
        let values = noise(rows * cols, seed);
        Both(Cpu.tensor(rows, cols, &values).unwrap(), cuda.tensor(rows, cols, &values).unwrap())
    }
}

fn weight(rows: usize, cols: usize, seed: u64) -> Matrix {
    Matrix::Dense(Dense::from_f32(vec![rows, cols], &noise(rows * cols, seed)).cast(Dtype::BF16))
}

/// Checks that the difference's norm is at most `bound` of the expected norm: roundings of many terms add as random numbers
/// do, so relative to the whole they stay what they are for one.
fn assert_close(
    what: &str,
    cuda: &Cuda,
    found: &<Cuda as Backend>::Tensor,
    expected: &<Cpu as Backend>::Tensor,
    bound: f32,
) {
    let found = cuda.read(found).unwrap();
    let expected = Cpu.read(expected).unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| (x as f64).powi(2)).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    let size = norm(&mut expected.iter().copied());
    assert!(error <= bound as f64 * size, "{what}: off by {error} of {size}, allowed {bound}");
}

#[test]
fn linear_gradient() {
    on_gpu(|cuda, rounding| {
        for (rows, out, input) in [(3, 64, 32), (130, 136, 264)] {
            let (dy, w) = (Both::new(cuda, rows, out, 1), weight(out, input, 2));
            let found = cuda.linear_gradient(&dy.1, &cuda.upload(w.clone()).unwrap()).unwrap();
            let expected = Cpu.linear_gradient(&dy.0, &w).unwrap();
            // BF16 factors are exact in F16 within its range; the smallest lose their last bits.
            assert_close("linear_gradient", cuda, &found, &expected, F32 + 0.1 * rounding);
        }
    });
}

#[test]
fn rms_norm_gradient() {
    on_gpu(|cuda, _| {
        for (rows, cols, width) in [(5, 64, 64), (7, 96, 32), (3, 2048, 2048)] {
            let [x, dy, gain] = [(rows, cols, 1), (rows, cols, 2), (1, width, 3)]
                .map(|(rows, cols, seed)| Both::new(cuda, rows, cols, seed));
            let found = cuda.rms_norm_gradient(&x.1, &gain.1, 1e-3, &dy.1).unwrap();
            let expected = Cpu.rms_norm_gradient(&x.0, &gain.0, 1e-3, &dy.0).unwrap();
            assert_close("rms_norm_gradient", cuda, &found, &expected, F32);
            let found = cuda.gain_gradient(&x.1, width, 1e-3, &dy.1).unwrap();
            let expected = Cpu.gain_gradient(&x.0, width, 1e-3, &dy.0).unwrap();
            let found = cuda.tensor(1, width, &found).unwrap();
            assert_close("gain_gradient", cuda, &found, &Cpu.tensor(1, width, &expected).unwrap(), F32);
        }
    });
}

#[test]
fn swiglu_gradient() {
    on_gpu(|cuda, _| {
        let [gate, up, dy] = [1, 2, 3].map(|seed| Both::new(cuda, 9, 272, seed));
        let found = cuda.swiglu_gradient(&gate.1, &up.1, &dy.1).unwrap();
        let expected = Cpu.swiglu_gradient(&gate.0, &up.0, &dy.0).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert_close("swiglu_gradient", cuda, found, expected, F32);
        }
    });
}

#[test]
fn attention_gradient() {
    on_gpu(|cuda, rounding| {
        for (heads, kv_heads, head_dim, tokens, window) in
            [(4, 2, 16, 67, None), (6, 2, 64, 130, Some(40)), (2, 2, 128, 512, None), (3, 1, 80, 33, Some(1))]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, window, scale: 0.3 };
            let batch = Batch { sequences: 2, tokens };
            let n = 2 * tokens;
            let wide = [1, 2].map(|seed| Both::new(cuda, n, heads * head_dim, seed));
            let narrow = [3, 4].map(|seed| Both::new(cuda, n, kv_heads * head_dim, seed));
            let [(q, dy), (k, v)] = [wide.into(), narrow.into()];
            let sinks = Both::new(cuda, 1, heads, 5);
            let sinks = if window.is_some() { (Some(&sinks.0), Some(&sinks.1)) } else { (None, None) };
            let found = cuda.attention_gradient([&q.1, &k.1, &v.1], sinks.1, &dy.1, &shape, batch).unwrap();
            let expected = Cpu.attention_gradient([&q.0, &k.0, &v.0], sinks.0, &dy.0, &shape, batch).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                // Probabilities and the gradient of scores are rounded once each; with window 1 scores have no gradient.
                if expected.iter().any(|x| x.abs() > 1e-6) {
                    assert_close("attention_gradient", cuda, found, expected, 2.0 * rounding + 3.0 * F32);
                }
            }
        }
    });
}

#[test]
fn loss_gradients() {
    on_gpu(|cuda, rounding| {
        let (rows, hidden, vocab) = (37, 64, 1112);
        let (x, other) = (Both::new(cuda, rows, hidden, 1), Both::new(cuda, rows, hidden, 2));
        let heads = [weight(vocab, hidden, 3), weight(vocab, hidden, 4)];
        let [head, base] = heads.clone().map(|head| cuda.upload(head).unwrap());
        let found = cuda.divergence_gradient((&other.1, &base), (&x.1, &head)).unwrap();
        let expected = Cpu.divergence_gradient((&other.0, &heads[1]), (&x.0, &heads[0])).unwrap();
        assert_close("divergence_gradient", cuda, &found, &expected, rounding + 3.0 * F32);
        let found = cuda.fisher_gradient(&x.1, &head, 5).unwrap();
        let expected = Cpu.fisher_gradient(&x.0, &heads[0], 5).unwrap();
        assert_close("fisher_gradient", cuda, &found, &expected, rounding + 3.0 * F32);
    });
}

#[test]
fn rows_are_measured_and_scaled() {
    on_gpu(|cuda, _| {
        let x = Both::new(cuda, 19, 264, 1);
        let as_row = |values: &[f32]| cuda.tensor(1, values.len(), values).unwrap();
        let expected = Cpu.row_energies(&x.0).unwrap();
        let found = as_row(&cuda.row_energies(&x.1).unwrap());
        assert_close("row_energies", cuda, &found, &Cpu.tensor(1, 19, &expected).unwrap(), F32);
        let factors = noise(19, 2);
        let found = cuda.scale_rows(&x.1, &factors).unwrap();
        assert_close("scale_rows", cuda, &found, &Cpu.scale_rows(&x.0, &factors).unwrap(), 0.0);
    });
}

/// Factors are square roots of what a whole way back gives, so that a relative error of 2 % there is 1 % here.
#[test]
fn a_whole_model_finds_the_tokens_that_matter() {
    on_gpu(|cuda, rounding| {
        for name in ["qwen3", "llama3"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
            let source = Checkpoint::open(&folder).unwrap();
            let windows: Vec<Vec<u32>> =
                (0..6).map(|w| (0..16).map(|i| (i * 7 + w) % 64).collect()).collect();
            let model = Model::load(&Cpu, &source.config, &source).unwrap();
            let expected = token_energies(&Cpu, &model, &windows, &|_| ()).unwrap();
            let model = Model::load(cuda, &source.config, &source).unwrap();
            let found = token_energies(cuda, &model, &windows, &|_| ()).unwrap();
            for stage in source.config.stages(0) {
                let [found, expected] =
                    [&found, &expected].map(|energies| factors(energies, &stage, 1.0).unwrap());
                for (found, expected) in found.iter().zip(expected) {
                    let bound = 20.0 * rounding + 30.0 * F32;
                    assert!(
                        (found - expected).abs() <= bound,
                        "{name} {}: {found} {expected}",
                        stage.leader()
                    );
                }
            }
        }
    });
}
