//! Products and sums of products.

use super::*;

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

pub fn linear_on<B: Backend>(
    backend: &B,
    x: &[f32],
    n: usize,
    matrix: Matrix,
    bias: Option<&[f32]>,
    rounding: Activations<f32>,
) -> Vec<f32> {
    let x = backend.tensor(n, x.len() / n, x).unwrap();
    let bias = bias.map(|bias| backend.tensor(1, bias.len(), bias).unwrap());
    let weight = backend.upload(matrix).unwrap();
    backend.read(&backend.linear(&x, &weight, bias.as_ref(), rounding).unwrap()).unwrap()
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
