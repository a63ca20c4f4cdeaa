//! Elementwise mathematics and normalisation, written so that the compiler vectorises it.

use multiversion::multiversion;

use crate::num::Element;

/// Lanes of partial sums: as wide as the widest vectors, and a fixed order of summation on every machine.
const LANES: usize = 16;

/// e^x to within 2 units in the last place; 0 below -87.33 and +∞ above 88.72.
///
/// e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; ln 2 is split in two so that n · ln 2 is exact, and e^r is
/// a polynomial of degree 6 (the coefficients of `expf` in Cephes, S. Moshier).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2^23 rounds to an integer that then sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_84);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let p = 1.987_569_1e-4f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    let e_r = (r * r).mul_add(p, r) + 1.0;
    // Two half-steps reach 2^-126 and 2^128 without leaving the exponent's range. Wrapping, because an overflow check
    // would keep the loop around from being vectorised.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = e_r * power(half) * power(n.wrapping_sub(half));
    // A NaN survives the clamp and every product; only the far left end needs a hand.
    if x < -87.336_54 { 0.0 } else { y }
}

/// gate\[i\] = silu(gate\[i\]) · up\[i\], silu(x) = x / (1 + e^-x).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, &up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Given the gradient of [`swiglu`]'s output twice, turns one into that of `gate` and one into that of `up`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn swiglu_gradient(gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    for (((dgate, dup), &gate), &up) in dgate.iter_mut().zip(dup).zip(gate).zip(up) {
        let share = 1.0 / (1.0 + exp(-gate));
        *dgate *= up * share * (1.0 + gate * (1.0 - share));
        *dup *= gate * share;
    }
}

/// Replaces a row by its softmax: exp(scale · x) over the sum of all and exp(sink).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn softmax(row: &mut [f32], scale: f32, sink: Option<f32>) {
    let shift = max(row);
    row.iter_mut().for_each(|x| *x = exp((*x - shift) * scale));
    let sink = sink.map_or(0.0, |sink| f64::from(sink - shift * scale).exp());
    let share = (1.0 / (sum(row, f64::from) + sink)) as f32;
    row.iter_mut().for_each(|x| *x *= share);
}

/// Turns the gradient of [`rms_norm`]'s output into that of `x`, with `factor` = (mean(x²) + eps)^-½.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn rms_norm_gradient(x: &[f32], gain: &[f32], factor: f32, dx: &mut [f32]) {
    let mut lanes = [0f64; LANES];
    for ((x, gain), dy) in x.chunks(LANES).zip(gain.chunks(LANES)).zip(dx.chunks(LANES)) {
        for (((lane, &x), &gain), &dy) in lanes.iter_mut().zip(x).zip(gain).zip(dy) {
            *lane += (x * gain) as f64 * dy as f64;
        }
    }
    let along = ((factor as f64).powi(3) * lanes.iter().sum::<f64>() / x.len() as f64) as f32;
    for ((dx, &x), &gain) in dx.iter_mut().zip(x).zip(gain) {
        *dx = factor * gain * *dx - x * along;
    }
}

/// Returns Σ x².
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn squares(x: &[f32]) -> f64 {
    sum(x, |v| v as f64 * v as f64)
}

/// out = x / sqrt(mean(x²) + eps) · gain for each run of `gain.len()` values; `x` and `out` hold some.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
        let squares = sum(x, |v| (v as f64) * (v as f64));
        let scale = (1.0 / (squares / x.len() as f64 + eps as f64).sqrt()) as f32;
        for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
            *out = x * scale * gain;
        }
    }
}

/// Returns the largest value; -∞ for an empty slice.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// Returns Σ f(x\[i\]) in F64.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f64) -> f64 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f(v);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&v| f(v)).sum::<f64>()
}

/// Replaces every row by what an INT8 engine computes with: scale · round(x / scale), scale = max|x| / 127, ties to even
/// ([`crate::scheme::Activations::Int8PerToken`]).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn quantize_int8(row: &mut [f32]) {
    let amax = row.iter().fold(0.0f32, |a, &v| a.max(v.abs()));
    let scale = amax / 127.0;
    if scale > 0.0 {
        for v in row {
            *v = (*v / scale).round_ties_even().clamp(-127.0, 127.0) * scale;
        }
    }
}

/// Replaces values by what an INT8 engine computes with under a fixed scale: scale · round(x / scale), ties to even, codes
/// clamped to -128 and 127 ([`crate::scheme::Activations::Int8PerTensor`]). What is not finite becomes NaN, so that it stays visible.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn quantize_int8_by(scale: f32, row: &mut [f32]) {
    for v in row {
        let code = (*v / scale).round_ties_even().clamp(-128.0, 127.0);
        *v = if v.is_finite() { code * scale } else { f32::NAN };
    }
}

/// Replaces every row by what an FP8 engine computes with: scale · e4m3(x / scale), scale = max|x| / 448, ties to even
/// ([`crate::scheme::Activations::Fp8PerToken`]).
pub fn quantize_fp8(row: &mut [f32]) {
    let amax = row.iter().fold(0.0f32, |a, &v| a.max(v.abs()));
    let scale = amax / 448.0;
    if scale > 0.0 {
        for v in row {
            *v = Element::E4M3.decode(Element::E4M3.encode(*v / scale)) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place_everywhere() {
        let mut worst = 0.0f64;
        for bits in (0..u32::MAX).step_by(977) {
            let x = f32::from_bits(bits);
            if (-87.0..88.7).contains(&x) {
                let exact = (x as f64).exp();
                let ulp = (f32::from_bits((exact as f32).to_bits() + 1) - exact as f32) as f64;
                worst = worst.max((exp(x) as f64 - exact).abs() / ulp);
            }
        }
        assert!(worst <= 2.0, "{worst} units");
    }

    #[test]
    fn exp_has_the_right_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1000.0) > 3e38);
    }

    #[test]
    fn fp8_inputs_have_the_values_of_the_definition() {
        let mut row = [448.0, -448.0, 17.0, 0.001, 300.0];
        quantize_fp8(&mut row);
        // 17 lies between 16 and 18, a tie; 0.001 below half of the smallest, 2^-9; 300 between 288 and 320.
        assert_eq!(row, [448.0, -448.0, 16.0, 1.0 / 512.0, 288.0]);
        let mut zeros = [0.0; 3];
        quantize_fp8(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }

    #[test]
    fn int8_inputs_of_a_fixed_scale_have_the_codes_of_the_definition() {
        let mut row = [-64.0, -64.5, 63.5, 64.0, 0.25, 0.75, 1e30, -0.3, f32::INFINITY, f32::NAN];
        quantize_int8_by(0.5, &mut row);
        // 0.25 and 0.75 are ties between codes 0 and 1, 1 and 2; codes end at -128 and 127.
        assert_eq!(row[..8], [-64.0, -64.0, 63.5, 63.5, 0.0, 1.0, 63.5, -0.5]);
        assert!(row[8].is_nan() && row[9].is_nan());
    }

    #[test]
    fn int8_inputs_have_the_codes_of_the_definition() {
        let mut row = [127.0, -127.0, 0.5, 1.5, 2.49, -0.51];
        quantize_int8(&mut row);
        assert_eq!(row, [127.0, -127.0, 0.0, 2.0, 2.0, -1.0]);
        let mut zeros = [0.0; 3];
        quantize_int8(&mut zeros);
        assert_eq!(zeros, [0.0; 3]);
    }
}
