//! Norms and elementwise operations.

use super::*;

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
fn add_rows() {
    on_gpu(|cuda, _| {
        let mut random = Random(13);
        let (x, y, weights) = (random.normals(37 * 136), random.normals(3 * 136), random.normals(3));
        let rows = [30, 0, 7];
        fn run<B: Backend>(backend: &B, x: &[f32], y: &[f32], rows: &[usize], weights: &[f32]) -> Vec<f32> {
            let mut x = backend.tensor(37, 136, x).unwrap();
            let y = backend.tensor(rows.len(), 136, y).unwrap();
            backend.add_rows(&mut x, rows, weights, &y).unwrap();
            assert!(backend.add_rows(&mut x, &[37], &[1.0], &y).is_err(), "a row past the last");
            backend.read(&x).unwrap()
        }
        let found = run(cuda, &x, &y, &rows, &weights);
        // The device adds a fused product, rounded once where the CPU rounds twice: half a step of each.
        for ((found, expected), before) in found.iter().zip(run(&Cpu, &x, &y, &rows, &weights)).zip(&x) {
            let bound = f32::EPSILON * (expected.abs() + before.abs() + (expected - before).abs());
            assert!((found - expected).abs() <= bound, "{found} {expected}");
        }
    });
}
