//! Rates of one GPU: what it can do at best (copying, multiplying), and what our kernels reach of that.
//!
//! Each rate is the median of several runs after a warm-up, on random values larger than the cache; a run is timed from
//! an idle device to an idle device and is long enough for the launch to vanish in it.

use std::time::Instant;

use anyhow::Result;

use super::choose::Chooser;
use super::{Cuda, Float, Tensor, Weight};
use crate::backend::{AttentionShape, Backend, Batch};
use crate::generate::Sampling;
use crate::scheme::{Activations, QTensor, Scheme, schemes};
use crate::tensor::{Dense, Dtype, Matrix};

/// A measured rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// What ran.
    pub what: String,
    /// How fast.
    pub value: f64,
    /// `GB/s`, `TFLOP/s`, `tok/s` or `µs`.
    pub unit: &'static str,
    /// Share of the machine's own copy bandwidth or matrix rate.
    pub share: Option<f64>,
}

/// Returns the median seconds of one of `repeats` runs of `work`, each run `inner` times in a row.
pub fn seconds(
    cuda: &Cuda,
    repeats: usize,
    inner: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    work()?;
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        cuda.device().synchronize()?;
        let start = Instant::now();
        for _ in 0..inner {
            work()?;
        }
        cuda.device().synchronize()?;
        times.push(start.elapsed().as_secs_f64() / inner as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[repeats / 2])
}

/// Returns cheap pseudo-random numbers in -0.5 ..= 0.5.
fn noise(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn random_activations(cuda: &Cuda, rows: usize, cols: usize) -> Result<Tensor> {
    cuda.tensor(rows, cols, &noise(rows * cols))
}

/// Returns a matrix of noise: bf16, or of a scheme with all codes used.
pub fn random_weight(cuda: &Cuda, scheme: Option<Scheme>, rows: usize, cols: usize) -> Result<Weight> {
    let Some(scheme) = scheme else {
        let dense = Dense::from_f32(vec![rows, cols], &noise(rows * cols)).cast(Dtype::BF16);
        return cuda.upload(Matrix::Dense(dense));
    };
    let mut q = QTensor::zeroed(scheme, rows, cols);
    for (code, value) in q.codes.iter_mut().zip(noise(rows * cols)) {
        *code = ((value + 0.5) * (1u32 << scheme.element.bits()) as f32) as u8;
    }
    // Effective scales of 2^-9 either way; every codec holds these values.
    let (inner, outer) = if scheme.outer.is_some() { (1.0, 1.0 / 512.0) } else { (1.0 / 512.0, 0.0) };
    q.scales.fill(inner);
    q.outer_scales.fill(outer);
    q.offsets.fill(inner);
    q.outer_offsets.fill(outer);
    cuda.upload(Matrix::Quantized(q))
}

/// Returns the copy bandwidth, bytes read plus bytes written per second.
pub fn copy_bandwidth(cuda: &Cuda) -> Result<f64> {
    let bytes = 1usize << 30;
    let buffer = cuda.device().upload(&vec![1u8; bytes])?;
    let time = seconds(cuda, 9, 4, || cuda.device().duplicate(&buffer).map(|_| ()))?;
    Ok(2.0 * bytes as f64 / time)
}

/// Returns the rate of an 8192³ F16 product, FLOP/s.
pub fn matrix_rate(cuda: &Cuda) -> Result<f64> {
    let n = 8192;
    let weight = random_weight(cuda, None, n, n)?;
    let x = cuda.embed(&weight, &(0..n as u32).collect::<Vec<_>>())?;
    let x = cuda.linear(&x, &weight, None, Activations::Full)?;
    let time = seconds(cuda, 9, 4, || cuda.linear(&x, &weight, None, Activations::Full).map(|_| ()))?;
    Ok(2.0 * (n as f64).powi(3) / time)
}

/// Returns the rates of decoding every scheme to F16, bytes read and written, and their shares of `copy`.
pub fn dequantize(cuda: &Cuda, copy: f64) -> Result<Vec<Rate>> {
    let (rows, cols) = (32768, 8192);
    let mut rates = Vec::new();
    for scheme in schemes::ALL {
        let weight = random_weight(cuda, Some(scheme), rows, cols)?;
        let bytes = weight.bytes() + rows * cols * 2;
        let time = seconds(cuda, 9, 4, || cuda.dequantize(&weight, Float::F16).map(|_| ()))?;
        let value = bytes as f64 / time;
        let what = format!("dequantize {} to F16", scheme.name);
        rates.push(Rate { what, value: value / 1e9, unit: "GB/s", share: Some(value / copy) });
    }
    Ok(rates)
}

/// Returns the rate of causal attention for 32 query and 8 key heads, counting only the products a causal mask keeps.
pub fn attention(cuda: &Cuda, head_dim: usize, tokens: usize, matrix_rate: f64) -> Result<Rate> {
    let (heads, kv_heads, sequences) = (32, 8, 16384 / tokens);
    let batch = Batch { sequences, tokens };
    let scale = (head_dim as f32).powf(-0.5);
    let shape = AttentionShape { heads, kv_heads, head_dim, window: None, scale };
    let [q, k, v] = [heads, kv_heads, kv_heads]
        .map(|count| random_activations(cuda, sequences * tokens, count * head_dim));
    // Products read F16; convert outside the timed part.
    let [q, k, v] = [q?, k?, v?].map(|x| cuda.rounded(&x));
    let (q, k, v) = (q?, k?, v?);
    let time = seconds(cuda, 9, 4, || cuda.attention(&q, &k, &v, None, &shape, batch).map(|_| ()))?;
    let pairs = sequences * heads * tokens * (tokens + 1) / 2;
    let value = 4.0 * (pairs * head_dim) as f64 / time;
    let what = format!("attention, heads of {head_dim}, {sequences} x {tokens} tokens");
    Ok(Rate { what, value: value / 1e12, unit: "TFLOP/s", share: Some(value / matrix_rate) })
}

/// Tokens of the largest vocabularies that are common (Qwen).
const LARGE_VOCABULARY: usize = 151_936;

/// Returns the seconds that choosing the next tokens of `batch` sequences takes, from 151,936 logits each.
pub fn choosing(cuda: &Cuda, batch: usize, sampling: &Sampling) -> Result<f64> {
    let device = cuda.device();
    let mut chooser = Chooser::new(device, batch, LARGE_VOCABULARY, 8)?;
    let logits = noise(batch * LARGE_VOCABULARY).into_iter().flat_map(|x| (20.0 * x).to_le_bytes());
    device.write(&chooser.logits, 0, &logits.collect::<Vec<u8>>())?;
    for sequence in 0..batch {
        chooser.start(device, sequence, &[0], sampling.draw(sequence as u64))?;
    }
    seconds(cuda, 9, 100, || chooser.choose(device, 0, batch))
}
