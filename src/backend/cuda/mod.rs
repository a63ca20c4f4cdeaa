//! The CUDA backend: the operations of [`super::cpu`] at the speed of an NVIDIA GPU.
//!
//! | file | what |
//! |---|---|
//! | `library` | finding CUDA's libraries |
//! | `compile` | kernel sources → machine code, cached on disk |
//! | `device` | memory, launches, one stream |
//! | `weight` | packed weights and their decoding |
//! | `widen` | small matrices with wider codes |
//! | `tensor` | activations |
//! | `gemm` | cuBLASLt |
//! | `linear` | y = x · wᵀ in its variants |
//! | `loss` | logits, likelihoods and divergences |
//! | `matvec` | products of a few tokens |
//! | `decode` | generation over a cache |
//! | `choose` | the next token, most likely or sampled |
//! | `solve` | calibrated rounding |
//!
//! # Rounding
//!
//! Weights decode to the CPU's F32 values bit for bit and are then rounded once to F16; dense ones are rounded as they are
//! uploaded. Embeddings and the residual stream
//! are F32; `linear_add` adds a product's F32 sums to it unrounded. The outputs of norms, linears, rope, swiglu and
//! attention are rounded once each to F16; sums, softmax and everything inside an operation are F32, but attention rounds
//! queries, keys, values and probabilities to F16 for its products. Logits are F32 sums of F16 products.
//!
//! F16 rather than bf16, at the same speed: its steps are 8 times finer, which brings the divergence from the CPU's F32
//! from 1e-4 (measured with bf16: tiny-llama 1.0e-4 as stored, 1.5e-4 in Q4_K) far below what formats differ by. It ends
//! at 65504; with the residual stream in F32 only single activations could pass that, and they show as a loss that is
//! not finite, which is an error, with [`Precision::F32`] as the way out. Weights below 2^-14 lose relative precision, at
//! most 2^-25 absolute.
//! INT8 W8A8 products are exact integers, scaled in F32. With [`Precision::F32`] every
//! activation and weight is F32 and products use F32 arithmetic without TF32.

pub(crate) mod choose;
pub mod compile;
pub mod decode;
pub mod device;
mod gemm;
pub mod library;
mod linear;
mod loss;
mod matvec;
mod solve;
mod tensor;
mod weight;
pub(crate) mod widen;

use std::sync::OnceLock;

use anyhow::{Result, ensure};
use cudarc::driver::CudaContext;

use self::compile::Kernel;
use self::device::{Arg, Device, Geometry};
use self::gemm::{Form, Gemm, Product, Types};
pub use self::solve::CudaSolver;
pub use self::tensor::{Float, Tensor};
pub use self::weight::{Stored, Weight, scheme_defines};
use super::{AttentionShape, Backend, Batch, Divergence, MomentSums, Rope, Score, SecondMoments};
use crate::method::solve::Knobs;
use crate::model::kv_cache::KvCache;
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// Number type of activations between operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// F16, with an F32 residual stream.
    #[default]
    F16,
    /// `--precise`: a slow reference.
    F32,
}

/// Columns of a symmetric sum that are added to together.
const MOMENT_STRIP: usize = 2048;

/// One NVIDIA GPU.
pub struct Cuda {
    device: Device,
    gemm: Gemm,
    /// Number type of what operations write.
    float: Float,
    /// Opened by the first calibration.
    factorizer: OnceLock<solve::Factorizer>,
}

/// Whether there are a GPU and the libraries to use it.
pub fn is_present() -> bool {
    library::load_all().is_ok() && CudaContext::device_count().is_ok_and(|count| count > 0)
}

impl Cuda {
    /// Opens GPU number `ordinal`. Errors, with the cure, without a driver, NVRTC, cuBLASLt or a supported GPU.
    pub fn new(ordinal: usize, precision: Precision) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let gemm = Gemm::new(&device)?;
        let float = match precision {
            Precision::F16 => Float::F16,
            Precision::F32 => Float::F32,
        };
        Ok(Cuda { device, gemm, float, factorizer: OnceLock::new() })
    }

    /// Returns the device, for measurements.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns a weight's values: F32 bit for bit as on the CPU, others rounded once.
    pub fn dequantize(&self, weight: &Weight, float: Float) -> Result<Tensor> {
        Ok(Tensor::new(weight.rows, weight.cols, float, weight.dequantize(&self.device, float)?))
    }

    /// Returns `x` in the number type products read.
    pub fn rounded(&self, x: &Tensor) -> Result<Tensor> {
        if x.float == self.float {
            return Ok(x.clone());
        }
        self.cast(x, None, self.float)
    }

    /// Queues y = norm(x) for `runs` runs of the gain's width. `x` and `y` are addresses and number types; they may be the
    /// same.
    fn norm_into(
        &self,
        (x, from): (u64, Float),
        gain: &Tensor,
        (y, to): (u64, Float),
        runs: usize,
        eps: f32,
    ) -> Result<()> {
        let width = gain.count();
        let geometry = match width {
            ..=1024 => Geometry { grid: [runs.div_ceil(8), 1, 1], block: [32, 8], shared: 0 },
            _ => Geometry::flat(runs, 256),
        };
        self.device.launch_overlapping(
            Kernel::new("rms_norm", &[&macro_of("X", from), &macro_of("Y", to)]),
            geometry,
            &[
                Arg::Pointer(x),
                Arg::Pointer(gain.at()),
                Arg::Pointer(y),
                Arg::U32(runs as u32),
                Arg::U32(width as u32),
                Arg::F32(eps),
            ],
        )
    }

    fn add_signed(&self, x: &mut Tensor, y: &Tensor, sign: &str) -> Result<()> {
        ensure!(x.rows == y.rows && x.cols == y.cols, "the sum of differing shapes");
        ensure!(x.float == Float::F32, "only the residual stream, which is F32, is added to");
        x.make_unique(&self.device)?;
        self.device.launch(
            Kernel::new("add", &[&macro_of("X", y.float), sign]),
            elementwise(x)?,
            &[Arg::Pointer(x.at()), Arg::Pointer(y.at()), Arg::U64(x.count() as u64)],
        )
    }

    /// Returns x + bias as `float`.
    pub fn cast(&self, x: &Tensor, bias: Option<&Tensor>, float: Float) -> Result<Tensor> {
        if let Some(bias) = bias {
            ensure!(
                bias.float == Float::F32 && bias.cols == x.cols,
                "bias of {} for {} columns",
                bias.cols,
                x.cols
            );
        }
        let y = Tensor::empty(&self.device, x.rows, x.cols, float)?;
        self.device.launch(
            Kernel::new("cast", &[&macro_of("X", x.float), &macro_of("Y", float)]),
            elementwise(x)?,
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(bias.map_or(0, Tensor::at)),
                Arg::Pointer(y.at()),
                Arg::U64(x.count() as u64),
                Arg::U32(x.cols as u32),
            ],
        )?;
        Ok(y)
    }
}

impl SecondMoments for Cuda {
    type Solver<'a> = CudaSolver<'a>;

    fn zeros(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(Tensor::new(rows, cols, Float::F32, self.device.zeros(4 * rows * cols)?))
    }

    fn divide(&self, sum: &mut Tensor, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()> {
        self.divide_sum(sum, rows, columns)
    }

    fn solver(&self, moments: MomentSums<Tensor>, knobs: Knobs) -> Result<CudaSolver<'_>> {
        CudaSolver::new(self, moments, knobs)
    }

    fn subtract(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        self.add_signed(x, y, "SIGN=-1.0f")
    }

    /// Inputs of linears are F16 already, so their products are exact and only sums are rounded, in F32. Where one side is
    /// F32 (residual streams), products run in TF32, which holds the F16 side exactly and cuts the other to as many bits;
    /// under `--precise` everything is F32.
    fn add_moment(&self, sum: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        ensure!(
            a.rows == b.rows && sum.rows == a.cols && sum.cols == b.cols && sum.float == Float::F32,
            "moments [{}, {}] of inputs [{}, {}] and [{}, {}]",
            sum.rows,
            sum.cols,
            a.rows,
            a.cols,
            b.rows,
            b.cols
        );
        sum.make_unique(&self.device)?;
        let (types, float) = match (a.float, b.float) {
            (Float::F16, Float::F16) => (Types::F16ToF32, Float::F16),
            (Float::F32, Float::F32) => (Types::F32, Float::F32),
            _ => (Types::Tf32, Float::F32),
        };
        let as_float = |x: &Tensor| if x.float == float { Ok(x.clone()) } else { self.cast(x, None, float) };
        let symmetric = a.at() == b.at();
        let (a, b) = (as_float(a)?, as_float(b)?);
        // Of a symmetric sum only what lies at and below the diagonal, in strips of columns.
        let strip = if symmetric { MOMENT_STRIP } else { b.cols };
        for first in (0..b.cols).step_by(strip) {
            let (top, width) = (if symmetric { first } else { 0 }, strip.min(b.cols - first));
            let form = Form::Moment([b.cols, a.cols, sum.cols]);
            let input = a.cols - top;
            let product = Product { n: a.rows, out: width, input, types, accumulate: true, form };
            let part = |x: &Tensor, col: usize| x.at() + (col * x.float.bytes()) as u64;
            let y = sum.at() + 4 * (top * sum.cols + first) as u64;
            self.gemm.multiply(&self.device, product, part(&b, first), part(&a, top), y)?;
        }
        Ok(())
    }
}

/// Returns `struct Frequencies` of the kernels: 128 floats, of which the first `head_dim / 2` matter.
fn frequencies(rope: &Rope) -> [u64; 64] {
    let mut words = [0u64; 64];
    for (word, pair) in words.iter_mut().zip(rope.inverse_frequencies.chunks(2)) {
        let bits = |value: Option<&f32>| u64::from(value.map_or(0, |value| value.to_bits()));
        *word = bits(pair.first()) | bits(pair.get(1)) << 32;
    }
    words
}

/// Returns how many values a cache rounds together, and the definitions of `cache.cuh`.
pub fn cache_defines(kind: KvCache, head_dim: usize) -> (usize, Vec<String>) {
    let (name, run, bits) = match kind {
        KvCache::Exact => ("EXACT", head_dim, 32),
        KvCache::Bf16 => ("BF16", head_dim, 32),
        KvCache::Fp8 => ("FP8", head_dim, 32),
        KvCache::Int8 { group: None } => ("INT8", head_dim, 32),
        KvCache::Int8 { group: Some(group) } => ("INT8", group, 16),
    };
    (run, vec![format!("KV={name}"), format!("RUN={run}"), format!("SCALE_BITS={bits}")])
}

/// Returns how many latest positions a query sees; none at all is a number that no position plus it overflows.
fn window_argument(window: Option<usize>) -> u32 {
    window.map_or(1 << 30, |window| window.min(1 << 30) as u32)
}

/// Returns the definition for attention with or without sinks.
fn sinks_define(sinks: Option<&Tensor>) -> String {
    format!("SINKS={}", u8::from(sinks.is_some()))
}

/// Returns the definition that gives a kernel's type parameter its type.
fn macro_of(parameter: &str, float: Float) -> String {
    format!("{parameter}={}", float.c_name())
}

/// Returns the geometry of kernels that take eight values a thread.
fn elementwise(x: &Tensor) -> Result<Geometry> {
    ensure!(
        x.cols.is_multiple_of(8),
        "{} columns: the GPU wants a multiple of 8; use `--device cpu`",
        x.cols
    );
    Ok(Geometry::flat(x.count().div_ceil(2048), 256))
}

fn u32_bytes(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(u32::to_le_bytes).collect()
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Weight = Weight;

    fn describe(&self) -> String {
        let precision = match self.float {
            Float::F32 => "F32",
            _ => "F16 activations, F32 sums and residual stream",
        };
        format!("{}, {precision}", self.device.name())
    }

    fn value_bytes(&self) -> usize {
        self.float.bytes()
    }

    fn wait(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Weights are decoded once a pass, which 16,384 tokens hide; their activations take 2 to 3 GB with an 8B model.
    fn tokens_at_once(&self) -> usize {
        16_384
    }

    fn upload(&self, weight: Matrix) -> Result<Weight> {
        let weight = Weight::upload(&self.device, &weight)?;
        if self.float == Float::F32 { Ok(weight) } else { weight.rounded_if_dense(&self.device) }
    }

    fn tensor(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Tensor> {
        ensure!(values.len() == rows * cols, "{} values for [{rows}, {cols}]", values.len());
        Ok(Tensor::new(rows, cols, Float::F32, self.device.upload_numbers(values)?))
    }

    fn read(&self, x: &Tensor) -> Result<Vec<f32>> {
        let mut values = vec![0.0; x.count()];
        self.read_into(x, &mut values)?;
        Ok(values)
    }

    fn read_into(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.resize(x.count(), 0.0);
        let x = if x.float == Float::F32 { x.clone() } else { self.cast(x, None, Float::F32)? };
        self.device.download_numbers(x.buffer(), out)
    }

    fn select_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        ensure!(rows.iter().all(|&row| row < x.rows), "a row past the last of {}", x.rows);
        let row_bytes = x.cols * x.float.bytes();
        ensure!(
            row_bytes.is_multiple_of(16),
            "{} columns: the GPU wants a multiple of 8; use `--device cpu`",
            x.cols
        );
        let y = Tensor::empty(&self.device, rows.len(), x.cols, x.float)?;
        let indices = self.device.upload(&u32_bytes(rows.iter().map(|&row| row as u32)))?;
        self.device.launch(
            Kernel::new("gather", &[]),
            Geometry::flat(rows.len(), 128),
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(indices.at()),
                Arg::Pointer(y.at()),
                Arg::U32(row_bytes as u32),
            ],
        )?;
        Ok(y)
    }

    fn embed(&self, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= table.rows) {
            anyhow::bail!("token {id} is outside the vocabulary of {}", table.rows);
        }
        let uploaded = self.device.upload(&u32_bytes(ids.iter().copied()))?;
        let values = table.embed(&self.device, &uploaded, ids.len())?;
        Ok(Tensor::new(ids.len(), table.cols, Float::F32, values))
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor> {
        let width = gain.count();
        ensure!(gain.float == Float::F32, "gains are F32");
        ensure!(
            width.is_multiple_of(8) && x.cols.is_multiple_of(width),
            "a gain of {width} for {} columns",
            x.cols
        );
        let y = Tensor::empty(&self.device, x.rows, x.cols, self.float)?;
        self.norm_into((x.at(), x.float), gain, (y.at(), y.float), x.count() / width, eps)?;
        Ok(y)
    }

    fn linear(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        activations: Activations,
    ) -> Result<Tensor> {
        self.product(x, weight, bias, activations)
    }

    fn linear_add(
        &self,
        x: &mut Tensor,
        input: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        activations: Activations,
    ) -> Result<()> {
        self.add_product(x, input, weight, bias, activations)
    }

    fn rope(&self, x: &mut Tensor, rope: &Rope, batch: Batch) -> Result<()> {
        let half = rope.inverse_frequencies.len();
        ensure!(
            half.is_multiple_of(4) && (1..=128).contains(&half),
            "head size {}: the GPU takes multiples of 8 up to 256",
            2 * half
        );
        ensure!(x.cols.is_multiple_of(2 * half), "{} columns in heads of {}", x.cols, 2 * half);
        ensure!(x.rows == batch.sequences * batch.tokens, "{} rows for {batch:?}", x.rows);
        x.make_unique(&self.device)?;
        self.device.launch(
            Kernel::new("rope", &[&macro_of("X", x.float)]),
            Geometry::flat(x.rows, 256),
            &[
                Arg::Pointer(x.at()),
                Arg::Struct(&frequencies(rope)),
                Arg::U32((x.cols / (2 * half)) as u32),
                Arg::U32(half as u32),
                Arg::U32(batch.tokens as u32),
                Arg::U32(0),
            ],
        )
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sinks: Option<&Tensor>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<Tensor> {
        let AttentionShape { heads, kv_heads, head_dim, window, scale } = *shape;
        ensure!(
            head_dim % 16 == 0 && head_dim <= 256,
            "head size {head_dim}: the GPU takes multiples of 16 up to 256"
        );
        ensure!(kv_heads > 0 && heads % kv_heads == 0, "{heads} query heads for {kv_heads} key heads");
        ensure!(window != Some(0), "a sliding window of 0 sees nothing");
        for (x, count) in [(q, heads), (k, kv_heads), (v, kv_heads)] {
            ensure!(
                x.rows == batch.sequences * batch.tokens && x.cols == count * head_dim,
                "[{}, {}] for {shape:?}",
                x.rows,
                x.cols
            );
        }
        if let Some(sinks) = sinks {
            ensure!(
                sinks.float == Float::F32 && sinks.count() == heads,
                "{} sinks for {heads} heads",
                sinks.count()
            );
        }
        let (q, k, v) = (self.rounded(q)?, self.rounded(k)?, self.rounded(v)?);
        let y = Tensor::empty(&self.device, q.rows, q.cols, self.float)?;
        let (mut kernel, block_rows, geometry) = match self.float {
            Float::F32 => {
                (Kernel::new("attention_precise", &[&format!("D={head_dim}")]), 8, Geometry::flat(0, 256))
            }
            _ => flash_attention(head_dim),
        };
        kernel.defines.push(sinks_define(sinks));
        let grid = [batch.tokens.div_ceil(block_rows), heads, batch.sequences];
        self.device.launch(
            kernel,
            Geometry { grid, ..geometry },
            &[
                Arg::Pointer(q.at()),
                Arg::Pointer(k.at()),
                Arg::Pointer(v.at()),
                Arg::Pointer(sinks.map_or(0, Tensor::at)),
                Arg::Pointer(y.at()),
                Arg::U32(batch.tokens as u32),
                Arg::U32(heads as u32),
                Arg::U32(kv_heads as u32),
                Arg::U32(window_argument(window)),
                Arg::F32(scale),
            ],
        )?;
        Ok(y)
    }

    fn round_cache(&self, x: &mut Tensor, kind: KvCache, head_dim: usize, scale: f32) -> Result<()> {
        if kind == KvCache::Exact {
            return Ok(());
        }
        ensure!(x.cols.is_multiple_of(head_dim), "{} columns in heads of {head_dim}", x.cols);
        x.make_unique(&self.device)?;
        let (run, mut defines) = cache_defines(kind, head_dim);
        defines.push(macro_of("X", x.float));
        let runs = x.count() / run;
        self.device.launch(
            Kernel { name: "round_cache", defines },
            Geometry::flat(runs.div_ceil(8), 256),
            &[Arg::Pointer(x.at()), Arg::U64(runs as u64), Arg::F32(scale)],
        )
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        ensure!(gate.rows == up.rows && gate.cols == up.cols, "gate and up differ in shape");
        let (gate, up) = (self.rounded(gate)?, self.rounded(up)?);
        let y = Tensor::empty(&self.device, gate.rows, gate.cols, self.float)?;
        self.device.launch(
            Kernel::new("swiglu", &[&macro_of("X", self.float)]),
            elementwise(&gate)?,
            &[
                Arg::Pointer(gate.at()),
                Arg::Pointer(up.at()),
                Arg::Pointer(y.at()),
                Arg::U64(y.count() as u64),
            ],
        )?;
        Ok(y)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        self.add_signed(x, y, "SIGN=1.0f")
    }

    fn score(&self, hidden: &Tensor, head: &Weight, targets: &[u32]) -> Result<Vec<Score>> {
        self.score_rows(hidden, head, targets)
    }

    fn compare(
        &self,
        baseline: (&Tensor, &Weight),
        model: (&Tensor, &Weight),
        targets: &[u32],
    ) -> Result<Vec<Divergence>> {
        self.compare_rows(baseline, model, targets)
    }
}

/// Returns the kernel for a head size, the queries a block takes, and its geometry without the grid. Heads past 128 take
/// smaller tiles, so that output, scores and queries of a warp stay in registers.
fn flash_attention(head_dim: usize) -> (Kernel, usize, Geometry) {
    let (tile, warps) = if head_dim <= 128 { (64, 8) } else { (32, 4) };
    let defines = [format!("D={head_dim}"), format!("BC={tile}"), format!("WARPS={warps}")];
    let shared = 4 * tile * (head_dim + 8) * 2;
    let geometry = Geometry { grid: [0; 3], block: [32 * warps, 1], shared: shared as u32 };
    (Kernel { name: "attention", defines: defines.to_vec() }, 16 * warps as usize, geometry)
}
