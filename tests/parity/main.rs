//! The CUDA backend against its definition, the CPU backend: one test an operation, named as the kernel.
//!
//! Inputs are bf16 values, so that both sides start from the same numbers; bounds follow from the roundings that
//! `backend/cuda/mod.rs` lists. Without a GPU the tests say so and pass, unless `QUANT_REQUIRE_GPU` is set.

#![allow(clippy::unwrap_used)]

mod attention;
mod choice;
mod elementwise;
#[path = "../gpu/mod.rs"]
mod gpu;
mod inputs;
mod loss;
mod products;
mod weights;

use gpu::gpu;
use half::f16;
use quant::backend::cpu::Cpu;
use quant::backend::cuda::{Cuda, Float, Precision};
use quant::backend::kv_cache::KvCache;
use quant::backend::{AttentionShape, Backend, Batch, LongAngles, Pairing, Rope, SecondMoments};
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

fn all_schemes() -> Vec<Scheme> {
    schemes::ALL.into_iter().chain([schemes::int8_grouped(128)]).collect()
}

fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.to_bits(), expected.to_bits(), "{what} at {i}: {found:e} for {expected:e}");
    }
}
