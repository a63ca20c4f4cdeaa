//! Rotation, caches and attention.

use super::*;

#[test]
fn rope() {
    on_gpu(|cuda, rounding| {
        let mut random = Random(9);
        use Pairing::{Halves, Neighbours};
        for (heads, head_dim, rotary, pairing) in [
            (3, 64, 64, Halves),
            (2, 80, 80, Halves),
            (4, 128, 128, Halves),
            (1, 256, 256, Halves),
            (2, 96, 72, Halves),
            (3, 80, 20, Halves),
            (2, 64, 64, Neighbours),
            (2, 128, 64, Neighbours),
        ] {
            let batch = Batch { sequences: 2, tokens: 300 };
            let n = batch.sequences * batch.tokens;
            let x = random.normals(n * heads * head_dim);
            let frequency = |i: usize| 10000f32.powf(-2.0 * i as f32 / rotary as f32);
            let inverse_frequencies: Vec<f32> = (0..rotary / 2).map(frequency).collect();
            let slower = inverse_frequencies.iter().map(|angle| 0.25 * angle).collect();
            let long = Some(LongAngles { beyond: 299, inverse_frequencies: slower });
            for (long, magnitude) in [(None, 1.0), (long, 1.25)] {
                let angles = inverse_frequencies.clone();
                let rope = Rope { head_dim, pairing, long, magnitude, ..Rope::plain(angles) };
                for rope in [rope.reversed(), rope] {
                    let mut expected = Cpu.tensor(n, heads * head_dim, &x).unwrap();
                    Cpu.rope(&mut expected, &rope, batch).unwrap();
                    let expected = Cpu.read(&expected).unwrap();
                    let mut found = cuda.tensor(n, heads * head_dim, &x).unwrap();
                    cuda.rope(&mut found, &rope, batch).unwrap();
                    // An angle of up to 300 radians carries 2^-16 of F32 rounding if the two sides multiply differently.
                    let bound = |i: usize| rounding * expected[i].abs() + 1e-4 * (1.0 + expected[i].abs());
                    assert_close("rope", &cuda.read(&found).unwrap(), &expected, bound);
                }
            }
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
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    batch: Batch,
) -> Vec<f32> {
    let n = batch.sequences * batch.tokens;
    let [q, k, v] = qkv.each_ref().map(|x| backend.tensor(n, x.len() / n, x).unwrap());
    let sinks = sinks.map(|sinks| backend.tensor(1, sinks.len(), sinks).unwrap());
    backend.read(&backend.attention(&q, &k, &v, sinks.as_ref(), shape, batch).unwrap()).unwrap()
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
                let mut sizes = qkv.clone();
                sizes[2] = absolute(&qkv[2]);
                // A head whose sink counts for little, one whose sink takes most, in turns.
                let sinks: Vec<f32> = (0..heads).map(|head| if head % 2 == 0 { 1.0 } else { 12.0 }).collect();
                for sinks in [None, Some(&sinks[..])] {
                    let expected = attention_on(&Cpu, &qkv, sinks, &shape, batch);
                    let found = attention_on(cuda, &qkv, sinks, &shape, batch);
                    // Probabilities are rounded before they multiply values, the result after; scores of up to about 50
                    // are off by 2^-18 in F32, which moves every probability by as much.
                    let sizes = attention_on(&Cpu, &sizes, sinks, &shape, batch);
                    let bound = |i: usize| rounding * (sizes[i] + expected[i].abs()) + 5e-5 * sizes[i] + 1e-6;
                    assert_close(&format!("{shape:?} {batch:?} {sinks:?}"), &found, &expected, bound);
                }
            }
        }
    });
}

#[test]
fn a_huge_sink_takes_everything_and_none_is_minus_infinity() {
    on_gpu(|cuda, _| {
        let mut random = Random(17);
        let batch = Batch { sequences: 1, tokens: 70 };
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 64, window: Some(50), scale: 0.125 };
        let qkv = [2, 1, 1].map(|heads| random.normals(70 * heads * 64));
        let without = attention_on(cuda, &qkv, None, &shape, batch);
        for huge in [1e3, 1e38, f32::INFINITY] {
            let found = attention_on(cuda, &qkv, Some(&[f32::NEG_INFINITY, huge]), &shape, batch);
            for (found, without) in found.chunks(128).zip(without.chunks(128)) {
                same_bits("a sink of minus infinity", &found[..64], &without[..64]);
                assert!(found[64..].iter().all(|&x| x == 0.0), "a sink of {huge}");
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
        let rope = Rope::plain(vec![1.0; 32]);
        cuda.rope(&mut key, &rope, batch).unwrap();
        let mixed = cuda.attention(&ones(), &key, &ones(), None, &shape, batch).unwrap();
        assert!(cuda.read(&mixed).unwrap()[64..].iter().any(|y| y.is_nan()), "a key of {huge}");
        let codes = QTensor::zeroed(schemes::INT8, 64, 64);
        let weight = cuda.upload(Matrix::Quantized(codes)).unwrap();
        for rounding in [Activations::Int8PerToken, Activations::Int8PerTensor(0.25)] {
            let y = cuda.linear(&x, &weight, None, rounding).unwrap();
            assert!(cuda.read(&y).unwrap()[64..].iter().all(|y| y.is_nan()), "a quantized input of {huge}");
        }
        let y = cuda.swiglu(&x, &ones()).unwrap();
        assert!(!cuda.read(&y).unwrap()[70].is_finite(), "a gate of {huge}");
    }
}
