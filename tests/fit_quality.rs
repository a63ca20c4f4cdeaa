//! Round-to-nearest with searched scales: what `fit` promises for every scheme.

use quant::num::Codec;
use quant::scheme::fit::{ScaleRule, fit};
use quant::scheme::schemes::{self, ALL, MXFP4};
use quant::scheme::{Offset, QTensor, Scheme};

const ROWS: usize = 6;
const COLS: usize = 512;

/// Deterministic numbers in (0, 1).
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::MIN_POSITIVE
    }
}

fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut uniform = Uniform(seed);
    let mut next = || (-2.0 * uniform.next().ln()).sqrt() * (std::f64::consts::TAU * uniform.next()).cos();
    (0..count).map(|_| (0.02 * next()) as f32).collect()
}

fn laplace(seed: u64, count: usize) -> Vec<f32> {
    let mut uniform = Uniform(seed);
    let mut next = || uniform.next().ln() * if uniform.next() < 0.5 { -0.015 } else { 0.015 };
    (0..count).map(|_| next() as f32).collect()
}

fn fitted(scheme: Scheme, weights: &[f32]) -> QTensor {
    fit(scheme, weights, weights.len() / COLS, COLS, None, ScaleRule::Search)
}

fn relative_error(scheme: Scheme, weights: &[f32]) -> f64 {
    fitted(scheme, weights).distortion(weights, None).relative()
}

#[test]
fn every_stored_scale_is_representable_by_its_codec() {
    let weights = laplace(1, ROWS * COLS);
    for scheme in ALL {
        let q = fitted(scheme, &weights);
        let exact = |codec: Codec, values: &[f32]| values.iter().all(|&v| codec.round(v) == v);
        assert!(exact(scheme.scale, &q.scales), "{}", scheme.name);
        if let Some((_, codec)) = scheme.outer {
            assert!(exact(codec, &q.outer_scales) && exact(codec, &q.outer_offsets), "{}", scheme.name);
        }
        if let Offset::Added(codec) | Offset::Subtracted(codec) = scheme.offset {
            assert!(exact(codec, &q.offsets), "{}", scheme.name);
        }
    }
}

#[test]
fn every_code_is_the_nearest_on_its_grid() {
    let weights = gaussian(2, ROWS * COLS);
    for scheme in ALL {
        let q = fitted(scheme, &weights);
        let table = scheme.element.table();
        for (i, (&w, value)) in weights.iter().zip(q.decode()).enumerate() {
            let grid = q.grid(i / COLS, i % COLS / q.group_cols());
            let nearest =
                table.iter().map(|v| (grid.scale * v + grid.offset - w).abs()).fold(f32::MAX, f32::min);
            // Dividing by the scale rounds once, so a weight within one part in 2^22 of a tie may go either way.
            let slack = grid.scale.abs() * 128.0 * f32::EPSILON;
            assert!((value - w).abs() <= nearest + slack, "{} {i}: {w} became {value}", scheme.name);
        }
    }
}

#[test]
fn zeros_become_zeros() {
    for scheme in ALL {
        for zero in [0.0, -0.0] {
            let q = fitted(scheme, &[zero; COLS]);
            assert!(q.decode().iter().all(|&v| v == 0.0), "{}", scheme.name);
            if scheme == MXFP4 {
                assert!(q.codes.iter().all(|&c| c == 0));
            }
        }
    }
}

#[test]
fn one_huge_value_survives_within_half_a_step() {
    for scheme in ALL {
        let mut weights = gaussian(3, COLS);
        weights[40] = 1000.0;
        let value = fitted(scheme, &weights).decode()[40];
        // The coarsest grid at its end is E2M1's, 4 and 6: half a step of 1000 / 5 at most.
        assert!((value - 1000.0).abs() <= 200.0, "{}: {value}", scheme.name);
    }
}

#[test]
fn extreme_magnitudes_give_finite_values() {
    for scheme in ALL {
        for magnitude in [1e-45, 1e-40, 1e-30, 1e-7, 1e30, f32::MAX] {
            let weights: Vec<f32> =
                gaussian(4, COLS).iter().map(|w| (w * 10.0).clamp(-1.0, 1.0) * magnitude).collect();
            for value in fitted(scheme, &weights).decode() {
                assert!(value.is_finite(), "{} at {magnitude}", scheme.name);
            }
        }
    }
}

#[test]
fn mxfp4_handles_denormal_blocks() {
    let weights: Vec<f32> = (0..COLS).map(|i| i as f32 * f32::from_bits(1 << 16)).collect();
    let relative = relative_error(MXFP4, &weights);
    assert!(relative < 0.05, "{relative}");
}

#[test]
fn scaling_by_a_power_of_two_scales_the_scales_and_keeps_the_codes() {
    // Large enough that no F16 scale is subnormal, which would round more coarsely.
    let weights: Vec<f32> = laplace(5, ROWS * COLS).iter().map(|w| w * 64.0).collect();
    for scheme in ALL {
        let q = fitted(scheme, &weights);
        for factor in [0.25, 2.0, 16.0] {
            let scaled: Vec<f32> = weights.iter().map(|w| w * factor).collect();
            let other = fitted(scheme, &scaled);
            assert!(q.codes == other.codes, "{} × {factor}", scheme.name);
        }
    }
}

#[test]
fn mxfp4_is_symmetric_in_sign() {
    let weights = laplace(6, ROWS * COLS);
    let negated: Vec<f32> = weights.iter().map(|w| -w).collect();
    let (q, n) = (fitted(MXFP4, &weights), fitted(MXFP4, &negated));
    assert_eq!(q.scales, n.scales);
    assert!(q.decode().iter().zip(n.decode()).all(|(a, b)| *a == -b));
}

#[test]
fn equal_importances_change_nothing() {
    let weights = laplace(7, ROWS * COLS);
    for scheme in ALL {
        let weighed = fit(scheme, &weights, ROWS, COLS, Some(&[1.0; COLS]), ScaleRule::Search);
        assert!(fitted(scheme, &weights) == weighed, "{}", scheme.name);
    }
}

#[test]
fn importances_buy_accuracy_where_they_say() {
    let weights = laplace(8, ROWS * COLS);
    let importances: Vec<f32> = (0..COLS).map(|i| if i % 7 == 0 { 30.0 } else { 1.0 }).collect();
    for scheme in ALL {
        let weighed = fit(scheme, &weights, ROWS, COLS, Some(&importances), ScaleRule::Search);
        let error = |q: &QTensor| q.distortion(&weights, Some(&importances)).error;
        assert!(error(&weighed) <= error(&fitted(scheme, &weights)), "{}", scheme.name);
    }
}

/// The exponent of each rule, from its definition `ceil(log2(amax / T))`, over the mantissas of one binade.
#[test]
fn mxfp4_rules_follow_their_thresholds() {
    let rules = [(ScaleRule::Floor, 8.0), (ScaleRule::Even, 7.0), (ScaleRule::T7_25, 7.25)];
    for (rule, threshold) in rules {
        for step in 0..256 {
            let amax = 1.0 + step as f32 / 256.0;
            let mut weights = [0.0; 32];
            weights[5] = -amax;
            let q = fit(MXFP4, &weights, 1, 32, None, rule);
            let wanted = if amax * 4.0 >= threshold { 0.5 } else { 0.25 };
            assert_eq!(q.scales[0], wanted, "{rule:?} {amax}");
        }
    }
}

#[test]
fn mxfp4_search_finds_the_best_of_all_exponents() {
    let weights = gaussian(9, ROWS * COLS);
    let q = fitted(MXFP4, &weights);
    for (block, &scale) in weights.chunks(32).zip(&q.scales) {
        let error = |scale: f32| -> f64 {
            let nearest = |w: f32| {
                let table = MXFP4.element.table().into_iter();
                table.map(|v| ((v * scale) as f64 - w as f64).powi(2)).fold(f64::MAX, f64::min)
            };
            block.iter().map(|&w| nearest(w)).sum()
        };
        let best = (0..=254).map(|byte| error(Codec::E8M0.decode(byte))).fold(f64::MAX, f64::min);
        assert!(error(scale) <= best * (1.0 + 1e-5));
    }
}

/// ggml's reference quantizers, from their description: the values they would decode to.
fn reference(scheme: Scheme, block: &[f32]) -> Vec<f32> {
    let f16 = |x: f32| Codec::F16.round(x);
    let signed_max = block.iter().fold(0f32, |a, &w| if w.abs() > a.abs() { w } else { a });
    let (low, high) = block.iter().fold((f32::MAX, f32::MIN), |(a, b), &w| (a.min(w), b.max(w)));
    let divide = |w: f32, d: f32| if d == 0.0 { 0.0 } else { w / d };
    let symmetric = |half: f32| -> Vec<f32> {
        let d = signed_max / -half;
        let code = |w: f32| (divide(w, d) + half + 0.5).trunc().min(2.0 * half - 1.0);
        block.iter().map(|&w| f16(d) * (code(w) - half)).collect()
    };
    let affine = |steps: f32| -> Vec<f32> {
        let d = (high - low) / steps;
        block.iter().map(|&w| f16(d) * (divide(w - low, d) + 0.5).trunc().min(steps) + f16(low)).collect()
    };
    match scheme.name {
        "q8_0" => {
            let d = signed_max.abs() / 127.0;
            block.iter().map(|&w| f16(d) * divide(w, d).round()).collect()
        }
        "q4_0" => symmetric(8.0),
        "q5_0" => symmetric(16.0),
        "q4_1" => affine(15.0),
        "q5_1" => affine(31.0),
        other => panic!("{other} has no reference here"),
    }
}

#[test]
fn errors_are_below_those_of_the_reference_quantizers() {
    for (weights, name) in [(gaussian(10, 32 * COLS), "gaussian"), (laplace(11, 32 * COLS), "laplace")] {
        for scheme in [schemes::Q8_0, schemes::Q4_0, schemes::Q5_0, schemes::Q4_1, schemes::Q5_1] {
            let values = weights.chunks(32).flat_map(|block| reference(scheme, block));
            let error: f64 = weights.iter().zip(values).map(|(&w, v)| (w as f64 - v as f64).powi(2)).sum();
            let ours = fitted(scheme, &weights).distortion(&weights, None).error;
            assert!(ours < error, "{} {name}: {ours} against {error}", scheme.name);
        }
    }
}

#[test]
fn int8_rows_are_never_worse_than_without_clipping() {
    let weights = laplace(12, ROWS * COLS);
    for (scheme, span) in [(schemes::INT8, COLS), (schemes::int8_grouped(128), 128)] {
        let q = fitted(scheme, &weights);
        for (i, (group, values)) in weights.chunks(span).zip(q.decode().chunks(span)).enumerate() {
            let scale = Codec::BF16.round(group.iter().fold(0f32, |a, w| a.max(w.abs())) / 127.0);
            let square = |a: f32, b: f32| (a as f64 - b as f64).powi(2);
            let plain: f64 = group.iter().map(|&w| square(w, scale * (w / scale).round())).sum();
            let ours: f64 = group.iter().zip(values).map(|(&w, &v)| square(w, v)).sum();
            assert!(ours <= plain, "group {i}: {ours} against {plain}");
        }
    }
}

#[test]
fn rows_are_fitted_independently_of_how_they_are_split() {
    let weights = laplace(13, ROWS * COLS);
    for scheme in ALL {
        let whole = fitted(scheme, &weights);
        let mut joined = QTensor::zeroed(scheme, ROWS, COLS);
        for (first, count) in [(0, 1), (1, 3), (4, 2)] {
            joined.set_rows(first, &fitted(scheme, &weights[first * COLS..(first + count) * COLS]));
        }
        assert!(whole == joined, "{}", scheme.name);
    }
}

/// How much the squared error of each weight of a super-block counts: `√(σ² + x²)`, `σ²` twice the mean square.
fn error_weights(block: &[f32]) -> Vec<f64> {
    let square = |&x: &f32| x as f64 * x as f64;
    let variance = 2.0 * block.iter().map(square).sum::<f64>() / block.len() as f64;
    block.iter().map(|x| (variance + square(x)).sqrt()).collect()
}

/// ggml's search for one sub-block of Q4_K, from its description: 21 scales around the one that spans the range, each
/// refitted by least squares with an offset of at most zero. Returns scale and offset.
fn reference_sub_block(block: &[f32], weights: &[f64], steps: f64) -> (f64, f64) {
    let low = block.iter().fold(0f32, |a, &x| a.min(x)) as f64;
    let high = block.iter().fold(f32::MIN, |a, &x| a.max(x)) as f64;
    let fit = |units: f64| {
        let codes =
            block.iter().map(|&x| ((x as f64 - low) * units / (high - low)).round().clamp(0.0, steps));
        let [mut w, mut q, mut qq, mut x, mut xq] = [0.0; 5];
        for ((&value, &weight), code) in block.iter().zip(weights).zip(codes.clone()) {
            let value = value as f64;
            w += weight;
            q += weight * code;
            qq += weight * code * code;
            x += weight * value;
            xq += weight * value * code;
        }
        let mut scale = (w * xq - x * q) / (w * qq - q * q);
        let mut offset = (x - scale * q) / w;
        if offset > 0.0 {
            (scale, offset) = (xq / qq, 0.0);
        }
        let square = |(&x, code): (&f32, f64)| (x as f64 - scale * code - offset).powi(2);
        let squares = block.iter().zip(codes).map(square);
        (squares.zip(weights).map(|(square, weight)| weight * square).sum::<f64>(), scale, offset)
    };
    let fits = (-10..=10).map(|i| fit(steps + 0.1 * i as f64));
    let (_, scale, offset) = fits.min_by(|a, b| a.0.total_cmp(&b.0)).expect("21 fits");
    (scale, offset)
}

/// The values of a super-block under ggml's Q4_K: sub-block fits rounded to 6 bits under their maxima.
fn reference_q4_k(block: &[f32]) -> Vec<f64> {
    let weights = error_weights(block);
    let subs = || block.chunks(32).zip(weights.chunks(32));
    let fits: Vec<_> = subs().map(|(sub, weights)| reference_sub_block(sub, weights, 15.0)).collect();
    let f16 = |x: f64| Codec::F16.round(x as f32) as f64;
    let d = f16(fits.iter().fold(0.0, |a, f| f64::max(a, f.0)) / 63.0);
    let dmin = f16(fits.iter().fold(0.0, |a, f| f64::max(a, -f.1)) / 63.0);
    let decode = |(sub, &(scale, offset)): (&[f32], &(f64, f64))| -> Vec<f64> {
        let scale = d * (scale / d).round().min(63.0);
        let offset = -dmin * (-offset / dmin).round().min(63.0);
        let value = |&x: &f32| scale * ((x as f64 - offset) / scale).round().clamp(0.0, 15.0) + offset;
        sub.iter().map(value).collect()
    };
    block.chunks(32).zip(&fits).flat_map(decode).collect()
}

#[test]
fn q4_k_errors_are_below_those_of_ggmls_search() {
    for (weights, name) in [(gaussian(14, 32 * COLS), "gaussian"), (laplace(15, 32 * COLS), "laplace")] {
        let [mut reference, mut ours] = [0.0; 2];
        let values = fitted(schemes::Q4_K, &weights).decode();
        for (block, values) in weights.chunks(256).zip(values.chunks(256)) {
            let others = reference_q4_k(block);
            for (i, weight) in error_weights(block).into_iter().enumerate() {
                reference += weight * (block[i] as f64 - others[i]).powi(2);
                ours += weight * (block[i] as f64 - values[i] as f64).powi(2);
            }
        }
        assert!(ours < 0.99 * reference, "{name}: {ours} against {reference}");
    }
}
