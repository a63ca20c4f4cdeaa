//! The CUDA backend against its definition, the CPU backend: one test an operation, named as the kernel.
//!
//! Inputs are bf16 values, so that both sides start from the same numbers; bounds follow from the roundings that
//! `backend/cuda/mod.rs` lists. Without a GPU the tests say so and pass, unless `QUANT_REQUIRE_GPU` is set.

#![allow(clippy::unwrap_used)]

mod gpu;

use gpu::gpu;
use half::f16;
use quant::backend::cpu::Cpu;
use quant::backend::cuda::{Cuda, Float, Precision};
use quant::backend::{AttentionShape, Backend, Batch, Rope, SecondMoments};
use quant::model::kv_cache::KvCache;
use quant::num::{Codec, Element};
use quant::scheme::{Activations, Offset, QTensor, Scheme, schemes};
use quant::tensor::{Dense, Dtype, Matrix};

/// Half a step of F16's 11 significant bits, relative.
const F16: f32 = 1.0 / 2048.0;
/// Half a step of F16's numbers below 2^-14.
const TINY: f32 = 1.0 / (1u32 << 25) as f32;
/// Room for differently ordered F32 arithmetic, relative to the size of what is summed.
const F32: f32 = 1e-5;

/// Runs a test on the GPU in both precisions; the second argument is the rounding of one operation's output.
fn on_gpu(test: impl Fn(&Cuda, f32)) {
    for (precision, rounding) in [(Precision::F16, F16), (Precision::F32, 0.0)] {
        let Some(cuda) = gpu(precision) else { return };
        test(&cuda, rounding);
    }
}

/// A small generator: splitmix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a bf16 value of a bell shape around 0, standard deviation 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
        half::bf16::from_f32(sum * 1.732).to_f32()
    }

    fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }
}

/// Checks `|found - expected| <= bound` everywhere; NaN never passes.
fn assert_close(what: &str, found: &[f32], expected: &[f32], bound: impl Fn(usize) -> f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let (error, bound) = ((found - expected).abs(), bound(i));
        assert!(error <= bound, "{what} at {i}: {found} for {expected}, off by {error}, allowed {bound}");
    }
}

fn dense(rows: usize, cols: usize, values: &[f32], dtype: Dtype) -> Matrix {
    Matrix::Dense(Dense::from_f32(vec![rows, cols], values).cast(dtype))
}

fn absolute(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| value.abs()).collect()
}

/// Returns a tensor with every field random; scales are values their codecs represent.
fn random_weight(scheme: Scheme, rows: usize, cols: usize, random: &mut Random) -> QTensor {
    let mut q = QTensor::zeroed(scheme, rows, cols);
    // E4M3 codes 0x7f and 0xff are NaN and never written.
    let codes = if scheme.element == Element::E4M3 { 0x7f } else { 1 << scheme.element.bits() };
    q.codes.fill_with(|| random.below(codes) as u8);
    let mut draw = |codec: Codec, values: &mut Vec<f32>| {
        values.fill_with(|| match codec {
            Codec::U6 => random.below(64) as f32,
            Codec::I8 => random.below(256) as f32 - 128.0,
            Codec::E8M0 => codec.decode(random.below(20) as u32 + 110),
            _ => codec.round(0.01 * random.normal()),
        });
    };
    draw(scheme.scale, &mut q.scales);
    if let Offset::Added(codec) | Offset::Subtracted(codec) = scheme.offset {
        draw(codec, &mut q.offsets);
    }
    if let Some((_, codec)) = scheme.outer {
        draw(codec, &mut q.outer_scales);
        draw(codec, &mut q.outer_offsets);
    }
    q
}

trait FillWith<T> {
    fn fill_with(&mut self, f: impl FnMut() -> T);
}

impl<T> FillWith<T> for Vec<T> {
    fn fill_with(&mut self, f: impl FnMut() -> T) {
        self.as_mut_slice().fill_with(f);
    }
}

fn all_schemes() -> Vec<Scheme> {
    schemes::ALL.into_iter().chain([schemes::int8_grouped(128)]).collect()
}

fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.to_bits(), expected.to_bits(), "{what} at {i}: {found:e} for {expected:e}");
    }
}

#[test]
fn dequantize() {
    on_gpu(|cuda, _| {
        let mut random = Random(1);
        for scheme in all_schemes() {
            for (rows, cols) in [(1, 256), (37, 768), (300, 2048)] {
                let q = random_weight(scheme, rows, cols, &mut random);
                let expected = q.decode();
                let weight = cuda.upload(Matrix::Quantized(q)).unwrap();
                let exact = cuda.read(&cuda.dequantize(&weight, Float::F32).unwrap()).unwrap();
                same_bits(scheme.name, &exact, &expected);
                let rounded: Vec<f32> = expected.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
                let half = cuda.read(&cuda.dequantize(&weight, Float::F16).unwrap()).unwrap();
                same_bits(scheme.name, &half, &rounded);
            }
        }
    });
}

#[test]
fn dequantize_every_e8m0_scale_and_f16_scale() {
    on_gpu(|cuda, _| {
        let mut mx = QTensor::zeroed(schemes::MXFP4, 255, 32);
        for (row, scale) in mx.scales.iter_mut().enumerate() {
            *scale = Codec::E8M0.decode(row as u32);
        }
        let mut q8 = QTensor::zeroed(schemes::Q8_0, 256, 32 * 248);
        for (i, scale) in q8.scales.iter_mut().enumerate() {
            // All finite halves: exponents 0 to 30, both signs.
            let bits = (i % 31744) as u32 | ((i / 31744) as u32) << 15;
            *scale = Codec::F16.decode(bits);
        }
        for mut q in [mx, q8] {
            let codes = 1 << q.scheme.element.bits();
            for (i, code) in q.codes.iter_mut().enumerate() {
                *code = ((i * 5 + i / 32) % codes) as u8;
            }
            let (name, expected) = (q.scheme.name, q.decode());
            let weight = cuda.upload(Matrix::Quantized(q)).unwrap();
            same_bits(name, &cuda.read(&cuda.dequantize(&weight, Float::F32).unwrap()).unwrap(), &expected);
        }
    });
}

#[test]
fn embed() {
    on_gpu(|cuda, _| {
        let mut random = Random(2);
        let (vocab, cols) = (1003, 256);
        let ids: Vec<u32> = (0..77).map(|_| random.below(vocab) as u32).collect();
        let mut tables: Vec<Matrix> = [Dtype::BF16, Dtype::F16, Dtype::F32]
            .map(|dtype| dense(vocab, cols, &random.normals(vocab * cols), dtype))
            .into();
        for scheme in all_schemes() {
            tables.push(Matrix::Quantized(random_weight(scheme, vocab, cols, &mut random)));
        }
        for table in tables {
            let expected = Cpu.embed(&Cpu.upload(table.clone()).unwrap(), &ids).unwrap();
            let found = cuda.embed(&cuda.upload(table).unwrap(), &ids).unwrap();
            same_bits("embed", &cuda.read(&found).unwrap(), &Cpu.read(&expected).unwrap());
        }
        let table = dense(vocab, cols, &random.normals(vocab * cols), Dtype::BF16);
        assert!(
            cuda.embed(&cuda.upload(table).unwrap(), &[vocab as u32]).is_err(),
            "an id past the vocabulary"
        );
    });
}

#[test]
fn gather() {
    on_gpu(|cuda, _| {
        let mut random = Random(3);
        let x = random.normals(50 * 72);
        let rows: Vec<usize> = (0..131).map(|_| random.below(50)).collect();
        let found = cuda.select_rows(&cuda.tensor(50, 72, &x).unwrap(), &rows).unwrap();
        let expected = Cpu.select_rows(&Cpu.tensor(50, 72, &x).unwrap(), &rows).unwrap();
        same_bits("select_rows", &cuda.read(&found).unwrap(), &Cpu.read(&expected).unwrap());
    });
}

#[test]
fn rms_norm() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(4);
        // Whole rows narrow and wide, and heads of a row.
        for (rows, cols, width) in
            [(3, 64, 64), (77, 576, 576), (5, 4096, 4096), (9, 16384, 16384), (33, 1024, 128)]
        {
            let (x, gain) = (random.normals(rows * cols), random.normals(width));
            let eps = 1e-5;
            let expected = Cpu.rms_norm(
                &Cpu.tensor(rows, cols, &x).unwrap(),
                &Cpu.tensor(1, width, &gain).unwrap(),
                eps,
            );
            let expected = Cpu.read(&expected.unwrap()).unwrap();
            let found = cuda.rms_norm(
                &cuda.tensor(rows, cols, &x).unwrap(),
                &cuda.tensor(1, width, &gain).unwrap(),
                eps,
            );
            let found = cuda.read(&found.unwrap()).unwrap();
            assert_close("rms_norm", &found, &expected, |i| (rounding + F32) * expected[i].abs() + TINY);
        }
    });
}

#[test]
fn linear() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(5);
        for (n, out, input) in [(1, 64, 64), (77, 1000, 576), (130, 136, 2048), (512, 1008, 256)] {
            let (x, w, bias) = (random.normals(n * input), random.normals(out * input), random.normals(out));
            // Every partial sum is at most the sum of magnitudes.
            let magnitude = |bias: Option<&[f32]>| {
                let w = Cpu.upload(dense(out, input, &absolute(&w), Dtype::F32)).unwrap();
                let bias = bias.map(|bias| Cpu.tensor(1, out, &absolute(bias)).unwrap());
                let x = Cpu.tensor(n, input, &absolute(&x)).unwrap();
                Cpu.read(&Cpu.linear(&x, &w, bias.as_ref(), Activations::Full).unwrap()).unwrap()
            };
            for bias in [None, Some(&bias[..])] {
                let matrix = dense(out, input, &w, Dtype::BF16);
                let expected = linear_on(&Cpu, &x, n, matrix.clone(), bias, Activations::Full);
                let found = linear_on(cuda, &x, n, matrix, bias, Activations::Full);
                let sizes = magnitude(bias);
                assert_close("linear", &found, &expected, |i| rounding * expected[i].abs() + F32 * sizes[i]);
            }
        }
    });
}

fn linear_on<B: Backend>(
    backend: &B,
    x: &[f32],
    n: usize,
    matrix: Matrix,
    bias: Option<&[f32]>,
    activations: Activations,
) -> Vec<f32> {
    let x = backend.tensor(n, x.len() / n, x).unwrap();
    let bias = bias.map(|bias| backend.tensor(1, bias.len(), bias).unwrap());
    let weight = backend.upload(matrix).unwrap();
    backend.read(&backend.linear(&x, &weight, bias.as_ref(), activations).unwrap()).unwrap()
}

#[test]
fn linear_of_every_scheme() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(6);
        let (n, out, input) = (33, 96, 512);
        let x = random.normals(n * input);
        for scheme in all_schemes() {
            let q = random_weight(scheme, out, input, &mut random);
            let sizes = dense(out, input, &absolute(&q.decode()), Dtype::F32);
            let sizes = linear_on(&Cpu, &absolute(&x), n, sizes, None, Activations::Full);
            for activations in [Activations::Full, Activations::Int8PerToken] {
                let expected = linear_on(&Cpu, &x, n, Matrix::Quantized(q.clone()), None, activations);
                let found = linear_on(cuda, &x, n, Matrix::Quantized(q.clone()), None, activations);
                // The weights are rounded once, each by up to half a step of itself; so is the result.
                let bound = |i: usize| rounding * (expected[i].abs() + sizes[i]) + F32 * sizes[i];
                assert_close(&format!("{} {activations:?}", scheme.name), &found, &expected, bound);
            }
        }
    });
}

#[test]
fn linear_int8_sums_are_exact() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(7);
        for (n, out, input) in [(1, 64, 64), (50, 1000, 1024), (128, 256, 4096)] {
            let (x, bias) = (random.normals(n * input), random.normals(out));
            let q = random_weight(schemes::INT8, out, input, &mut random);
            for bias in [None, Some(&bias[..])] {
                let expected =
                    linear_on(&Cpu, &x, n, Matrix::Quantized(q.clone()), bias, Activations::Int8PerToken);
                let found =
                    linear_on(cuda, &x, n, Matrix::Quantized(q.clone()), bias, Activations::Int8PerToken);
                let sizes = dense(out, input, &absolute(&q.decode()), Dtype::F32);
                let sizes = linear_on(&Cpu, &absolute(&x), n, sizes, bias, Activations::Full);
                assert_close("int8", &found, &expected, |i| {
                    rounding * expected[i].abs() + F32 * sizes[i].abs().max(1.0)
                });
            }
        }
    });
}

#[test]
fn linear_fp8_inputs_are_those_of_the_definition() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(16);
        for (n, out, input) in [(1, 64, 64), (50, 1000, 1024)] {
            let x = random.normals(n * input);
            let q = Matrix::Quantized(random_weight(schemes::FP8, out, input, &mut random));
            let expected = linear_on(&Cpu, &x, n, q.clone(), None, Activations::Fp8PerToken);
            let found = linear_on(cuda, &x, n, q.clone(), None, Activations::Fp8PerToken);
            let sizes = dense(out, input, &absolute(&q.to_f32()), Dtype::F32);
            let sizes = linear_on(&Cpu, &absolute(&x), n, sizes, None, Activations::Full);
            // Weights are rounded to F16 before they multiply, the result after.
            assert_close("fp8", &found, &expected, |i| {
                rounding * (expected[i].abs() + sizes[i]) + F32 * sizes[i].max(1.0)
            });
        }
    });
}

#[test]
fn linear_add() {
    on_gpu(|cuda, _| {
        let mut random = Random(8);
        let (n, out, input) = (65, 256, 384);
        let (x, w, residual) =
            (random.normals(n * input), random.normals(out * input), random.normals(n * out));
        fn run<B: Backend>(
            backend: &B,
            x: &[f32],
            w: Matrix,
            residual: &[f32],
            n: usize,
        ) -> (Vec<f32>, Vec<f32>) {
            let mut y = backend.tensor(n, residual.len() / n, residual).unwrap();
            let before = y.clone();
            let x = backend.tensor(n, x.len() / n, x).unwrap();
            backend.linear_add(&mut y, &x, &backend.upload(w).unwrap(), None, Activations::Full).unwrap();
            (backend.read(&y).unwrap(), backend.read(&before).unwrap())
        }
        let matrix = dense(out, input, &w, Dtype::BF16);
        let (expected, _) = run(&Cpu, &x, matrix.clone(), &residual, n);
        let (found, before) = run(cuda, &x, matrix, &residual, n);
        same_bits("a clone made before", &before, &residual);
        // No rounding: sums of 384 products of about 1 each.
        assert_close("linear_add", &found, &expected, |_| F32 * input as f32);
    });
}

#[test]
fn rope() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(9);
        for (heads, head_dim) in [(3, 64), (2, 80), (4, 128), (1, 256)] {
            let batch = Batch { sequences: 2, tokens: 300 };
            let n = batch.sequences * batch.tokens;
            let x = random.normals(n * heads * head_dim);
            let frequency = |i: usize| 10000f32.powf(-2.0 * i as f32 / head_dim as f32);
            let rope = Rope { inverse_frequencies: (0..head_dim / 2).map(frequency).collect() };
            let mut expected = Cpu.tensor(n, heads * head_dim, &x).unwrap();
            Cpu.rope(&mut expected, &rope, batch).unwrap();
            let expected = Cpu.read(&expected).unwrap();
            let mut found = cuda.tensor(n, heads * head_dim, &x).unwrap();
            cuda.rope(&mut found, &rope, batch).unwrap();
            // An angle of up to 300 radians carries 2^-16 of F32 rounding if the two sides multiply differently.
            let bound = |i: usize| rounding * expected[i].abs() + 1e-4 * (1.0 + expected[i].abs());
            assert_close("rope", &cuda.read(&found).unwrap(), &expected, bound);
        }
    });
}

#[test]
fn round_cache() {
    on_gpu(|cuda, _| {
        let mut random = Random(31);
        let (n, heads, head_dim) = (37, 3, 80);
        // Exact in F16, so that both sides round the same numbers; a run of zeros among them.
        let mut x: Vec<f32> =
            random.normals(n * heads * head_dim).iter().map(|x| f16::from_f32(9.0 * x).to_f32()).collect();
        x[..head_dim].fill(0.0);
        let kinds =
            [KvCache::Bf16, KvCache::Fp8, KvCache::Int8 { group: None }, KvCache::Int8 { group: Some(16) }];
        for (kind, scale) in kinds.into_iter().flat_map(|kind| [(kind, 1.0), (kind, 0.043)]) {
            let mut expected = x.clone();
            expected.chunks_mut(heads * head_dim).for_each(|row| kind.round(row, head_dim, scale));
            for float in [Float::F32, Float::F16] {
                let mut found = cuda.tensor(n, heads * head_dim, &x).unwrap();
                if float == Float::F16 {
                    found = cuda.cast(&found, None, float).unwrap();
                }
                cuda.round_cache(&mut found, kind, head_dim, scale).unwrap();
                let stored = |x: f32| if float == Float::F16 { f16::from_f32(x).to_f32() } else { x };
                let expected: Vec<f32> = expected.iter().map(|x| stored(*x)).collect();
                assert_close(&format!("{kind}"), &cuda.read(&found).unwrap(), &expected, |_| 0.0);
            }
        }
    });
}

/// Runs attention on a backend.
fn attention_on<B: Backend>(
    backend: &B,
    qkv: &[Vec<f32>; 3],
    shape: &AttentionShape,
    batch: Batch,
) -> Vec<f32> {
    let n = batch.sequences * batch.tokens;
    let [q, k, v] = qkv.each_ref().map(|x| backend.tensor(n, x.len() / n, x).unwrap());
    backend.read(&backend.attention(&q, &k, &v, shape, batch).unwrap()).unwrap()
}

#[test]
fn attention() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(10);
        for head_dim in [64, 80, 96, 128, 256] {
            for (heads, kv_heads, sequences, tokens, window) in [
                (1, 1, 1, 1, None),
                (4, 2, 2, 63, None),
                (2, 2, 1, 129, None),
                (6, 2, 2, 257, Some(100)),
                (2, 1, 1, 300, Some(64)),
                (2, 1, 3, 512, None),
                (1, 1, 2, 200, Some(1)),
            ] {
                let batch = Batch { sequences, tokens };
                let scale = (head_dim as f32).powf(-0.5);
                let shape = AttentionShape { heads, kv_heads, head_dim, window, scale };
                let n = sequences * tokens;
                let mut qkv = [heads, kv_heads, kv_heads].map(|heads| random.normals(n * heads * head_dim));
                // Sharper scores than random vectors give, so that maxima move and small probabilities occur.
                qkv[0].iter_mut().for_each(|x| *x *= 4.0);
                let expected = attention_on(&Cpu, &qkv, &shape, batch);
                let found = attention_on(cuda, &qkv, &shape, batch);
                // Probabilities are rounded before they multiply values, the result after; scores of up to about 50 are
                // off by 2^-18 in F32, which moves every probability by as much.
                qkv[2] = absolute(&qkv[2]);
                let sizes = attention_on(&Cpu, &qkv, &shape, batch);
                let bound = |i: usize| rounding * (sizes[i] + expected[i].abs()) + 5e-5 * sizes[i] + 1e-6;
                assert_close(&format!("{shape:?} {batch:?}"), &found, &expected, bound);
            }
        }
    });
}

#[test]
fn what_f16_cannot_hold_never_goes_unseen() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let batch = Batch { sequences: 1, tokens: 2 };
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 64, window: None, scale: 0.125 };
    let ones = || cuda.tensor(2, 64, &[1.0; 128]).unwrap();
    for huge in [70_000.0, -70_000.0] {
        let mut values = vec![1.0; 128];
        values[70] = huge;
        let x = cuda.rounded(&cuda.tensor(2, 64, &values).unwrap()).unwrap();
        let mut key = x.clone();
        let rope = Rope { inverse_frequencies: vec![1.0; 32] };
        cuda.rope(&mut key, &rope, batch).unwrap();
        let mixed = cuda.attention(&ones(), &key, &ones(), &shape, batch).unwrap();
        assert!(cuda.read(&mixed).unwrap()[64..].iter().any(|y| y.is_nan()), "a key of {huge}");
        let codes = QTensor::zeroed(schemes::INT8, 64, 64);
        let weight = cuda.upload(Matrix::Quantized(codes)).unwrap();
        let y = cuda.linear(&x, &weight, None, Activations::Int8PerToken).unwrap();
        assert!(cuda.read(&y).unwrap()[64..].iter().all(|y| y.is_nan()), "a quantized input of {huge}");
        let y = cuda.swiglu(&x, &ones()).unwrap();
        assert!(!cuda.read(&y).unwrap()[70].is_finite(), "a gate of {huge}");
    }
}

#[test]
fn swiglu() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(11);
        let (gate, up) = (random.normals(37 * 136), random.normals(37 * 136));
        let gate: Vec<f32> = gate.iter().map(|x| x * 8.0).collect();
        fn run<B: Backend>(backend: &B, gate: &[f32], up: &[f32]) -> Vec<f32> {
            let [gate, up] = [gate, up].map(|x| backend.tensor(37, 136, x).unwrap());
            backend.read(&backend.swiglu(&gate, &up).unwrap()).unwrap()
        }
        let (found, expected) = (run(cuda, &gate, &up), run(&Cpu, &gate, &up));
        assert_close("swiglu", &found, &expected, |i| (rounding + F32) * expected[i].abs() + TINY);
    });
}

#[test]
fn add() {
    on_gpu(|cuda, _| {
        let mut random = Random(12);
        let (x, y) = (random.normals(37 * 136), random.normals(37 * 136));
        fn run<B: Backend>(backend: &B, x: &[f32], y: &[f32]) -> Vec<f32> {
            let mut x = backend.tensor(37, 136, x).unwrap();
            backend.add(&mut x, &backend.tensor(37, 136, y).unwrap()).unwrap();
            backend.read(&x).unwrap()
        }
        same_bits("add", &run(cuda, &x, &y), &run(&Cpu, &x, &y));
    });
}

#[test]
fn moments() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(15);
        let (n, a_cols, b_cols) = (300, 136, 72);
        let values =
            [random.normals(n * a_cols), random.normals(n * b_cols), random.normals(a_cols * b_cols)];
        /// Sums twice, the second time of a difference in F32; `prepare` makes what linears read.
        fn run<B: SecondMoments>(
            backend: &B,
            [a, b, sum]: &[Vec<f32>; 3],
            n: usize,
            prepare: impl Fn(&B, B::Tensor) -> B::Tensor,
        ) -> [Vec<f32>; 2] {
            let a = backend.tensor(n, a.len() / n, a).unwrap();
            let b = prepare(backend, backend.tensor(n, b.len() / n, b).unwrap());
            let cols = b.clone();
            let rows = sum.len() * n / backend.read(&cols).unwrap().len();
            let mut sum = backend.tensor(rows, sum.len() / rows, sum).unwrap();
            backend.add_moment(&mut sum, &prepare(backend, a.clone()), &b).unwrap();
            let first = backend.read(&sum).unwrap();
            let mut difference = a.clone();
            backend
                .subtract(&mut difference, &backend.tensor(n, rows, &vec![0.25; n * rows]).unwrap())
                .unwrap();
            backend.add_moment(&mut sum, &difference, &b).unwrap();
            [first, backend.read(&sum).unwrap()]
        }
        let found = run(cuda, &values, n, |cuda, x| cuda.rounded(&x).unwrap());
        let expected = run(&Cpu, &values, n, |_, x| x);
        // Inputs are exact in F16, so only the order of 300 sums of about 1 differs; differences are cut to as many bits.
        assert_close("moments", &found[0], &expected[0], |_| F32 * n as f32);
        assert_close("moments", &found[1], &expected[1], |_| (F32 + 2.0 * rounding) * n as f32);
    });
}

/// Returns a random head and hidden states whose logits have a standard deviation of about 3.
fn head(random: &mut Random, n: usize, vocab: usize, hidden: usize) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let scale = 4.0 / (hidden as f32).sqrt();
    let states = random.normals(n * hidden);
    let weights =
        random.normals(vocab * hidden).iter().map(|w| half::bf16::from_f32(w * scale).to_f32()).collect();
    (states, weights, (0..n).map(|_| random.below(vocab) as u32).collect())
}

#[test]
fn score() {
    on_gpu(|cuda, _| {
        let mut random = Random(13);
        for (n, vocab, hidden) in [(1, 64, 64), (300, 1003, 128), (129, 49152, 64), (2100, 128256, 16)] {
            let (states, weights, targets) = head(&mut random, n, vocab, hidden);
            let matrix = dense(vocab, hidden, &weights, Dtype::BF16);
            fn run<B: Backend>(
                backend: &B,
                states: &[f32],
                matrix: Matrix,
                targets: &[u32],
            ) -> Vec<quant::backend::Score> {
                let states = backend.tensor(targets.len(), states.len() / targets.len(), states).unwrap();
                backend.score(&states, &backend.upload(matrix).unwrap(), targets).unwrap()
            }
            let expected = run(&Cpu, &states, matrix.clone(), &targets);
            let found = run(cuda, &states, matrix, &targets);
            let nll =
                |scores: &[quant::backend::Score]| scores.iter().map(|score| score.nll).collect::<Vec<_>>();
            assert_close("nll", &nll(&found), &nll(&expected), |_| 2e-4);
            let differ = found.iter().zip(&expected).filter(|(a, b)| a.top != b.top).count();
            assert!(
                differ * 200 <= n,
                "{differ} of {n} most likely tokens differ: more than near ties explain"
            );
        }
    });
}

#[test]
fn the_lowest_id_wins_a_tie() {
    on_gpu(|cuda, _| {
        // Every fifth token has the same, largest logit.
        let (vocab, hidden) = (40_000, 64);
        let weights: Vec<f32> =
            (0..vocab * hidden).map(|i| if i / hidden % 5 == 3 { 0.5 } else { 0.25 }).collect();
        let states = cuda.tensor(2, hidden, &vec![1.0; 2 * hidden]).unwrap();
        let weight = cuda.upload(dense(vocab, hidden, &weights, Dtype::BF16)).unwrap();
        let found = cuda.score(&states, &weight, &[7, 8]).unwrap();
        assert!(found.iter().all(|score| score.top == 3), "{found:?}");
    });
}

#[test]
fn compare() {
    on_gpu(|cuda, _| {
        let mut random = Random(14);
        for (n, vocab, hidden) in [(1, 64, 64), (300, 1003, 128), (129, 49152, 64), (1100, 128256, 16)] {
            let (states, weights, targets) = head(&mut random, n, vocab, hidden);
            // A model close to its baseline: weights off by up to a few bf16 steps.
            let nudged: Vec<f32> = weights
                .iter()
                .map(|w| half::bf16::from_f32(w * (1.0 + 0.02 * random.normal())).to_f32())
                .collect();
            fn run<B: Backend>(
                backend: &B,
                states: &[f32],
                heads: [Matrix; 2],
                targets: &[u32],
            ) -> Vec<quant::backend::Divergence> {
                let states = backend.tensor(targets.len(), states.len() / targets.len(), states).unwrap();
                let [baseline, model] = heads.map(|head| backend.upload(head).unwrap());
                backend.compare((&states, &baseline), (&states, &model), targets).unwrap()
            }
            let heads = [&weights, &nudged].map(|w| dense(vocab, hidden, w, Dtype::BF16));
            let expected = run(&Cpu, &states, heads.clone(), &targets);
            let found = run(cuda, &states, heads, &targets);
            let differ = found.iter().zip(&expected).filter(|(a, b)| a.rank != b.rank).count();
            assert!(differ * 200 <= n, "{differ} of {n} ranks differ: more than near ties explain");
            for (found, expected) in found.iter().zip(&expected) {
                let bound = 2e-6 + 1e-3 * expected.kld;
                assert!((found.kld - expected.kld).abs() <= bound, "{found:?} for {expected:?}");
                assert_eq!(found.rank == 0, found.model.top == found.baseline.top, "{found:?}");
                assert!((found.model.nll - expected.model.nll).abs() <= 2e-4, "{found:?} for {expected:?}");
                assert!(
                    (found.baseline.nll - expected.baseline.nll).abs() <= 2e-4,
                    "{found:?} for {expected:?}"
                );
            }
        }
    });
}
