//! What linears do to their inputs, and what calibration asks of them.

use super::products::linear_on;
use super::*;

/// Values past the ends of the range, and ties between codes.
fn inputs_for_a_fixed_scale(count: usize, random: &mut Random) -> (Vec<f32>, Activations<f32>) {
    let x = random.normals(count).into_iter().enumerate().map(|(i, x)| match i % 3 {
        0 => (x * 32.0).round() / 64.0,
        _ => x * if i % 7 == 0 { 4.0 } else { 1.0 },
    });
    (x.collect(), Activations::Int8PerTensor(1.0 / 64.0))
}

#[test]
fn linear_int8_inputs_of_a_fixed_scale_have_exact_sums() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(17);
        // Rows of 200 do not fit integer matrix units: the same numbers multiply as floats.
        for (n, out, input) in [(1, 64, 64), (50, 1000, 1024), (7, 96, 200)] {
            let (x, fixed) = inputs_for_a_fixed_scale(n * input, &mut random);
            let q = Matrix::Quantized(random_weight(schemes::INT8, out, input, &mut random));
            let expected = linear_on(&Cpu, &x, n, q.clone(), None, fixed);
            let found = linear_on(cuda, &x, n, q.clone(), None, fixed);
            let sizes = dense(out, input, &absolute(&q.to_f32()), Dtype::F32);
            let sizes = linear_on(&Cpu, &absolute(&x), n, sizes, None, Activations::Full);
            assert_close("int8 static", &found, &expected, |i| {
                rounding * (expected[i].abs() + sizes[i]) + F32 * sizes[i].max(1.0)
            });
        }
    });
}

#[test]
fn round_inputs() {
    on_gpu(|cuda, _| {
        let mut random = Random(18);
        let (n, cols) = (37, 264);
        let (mut x, fixed) = inputs_for_a_fixed_scale(n * cols, &mut random);
        x[..cols].fill(0.0);
        for rounding in [Activations::Full, Activations::Int8PerToken, Activations::Fp8PerToken, fixed] {
            // What the device holds is rounded from there.
            let on_device = cuda.rounded(&cuda.tensor(n, cols, &x).unwrap()).unwrap();
            let held = cuda.read(&on_device).unwrap();
            let held = Cpu.tensor(n, cols, &held).unwrap();
            let expected = Cpu.read(&Cpu.round_inputs(&held, rounding).unwrap()).unwrap();
            let found = cuda.round_inputs(&on_device, rounding).unwrap();
            let stored = cuda.tensor(n, cols, &expected).unwrap();
            let stored = cuda.read(&cuda.rounded(&stored).unwrap()).unwrap();
            assert_eq!(cuda.read(&found).unwrap(), stored, "{rounding:?}");
        }
    });
}

#[test]
fn maxima() {
    on_gpu(|cuda, _| {
        let mut random = Random(19);
        let (n, cols) = (150, 300);
        let mut x = random.normals(n * cols);
        x[149 * 300 + 7] = -1000.0;
        x[33 * 300 + 8] = f32::NAN;
        fn run<B: SecondMoments>(backend: &B, x: &[f32], n: usize) -> Vec<f32> {
            let x = backend.tensor(n, x.len() / n, x).unwrap();
            let mut maxima = backend.zeros(1, 300).unwrap();
            backend.add_maxima(&mut maxima, &x).unwrap();
            // Again: nothing is larger.
            backend.add_maxima(&mut maxima, &x).unwrap();
            backend.read(&maxima).unwrap()
        }
        let (found, expected) = (run(cuda, &x, n), run(&Cpu, &x, n));
        assert!(found[8].is_nan() && expected[8].is_nan() && expected[7] == 1000.0);
        let others = |values: &[f32]| [&values[..8], &values[9..]].concat();
        assert_eq!(others(&found), others(&expected));
    });
}
