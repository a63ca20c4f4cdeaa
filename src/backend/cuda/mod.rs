//! The CUDA backend: the operations of [`super::cpu`] at the speed of an NVIDIA GPU.
//!
//! | file | what |
//! |---|---|
//! | `library` | finding CUDA's libraries |
//! | `compile` | kernel sources → machine code, cached on disk |
//! | `device` | memory, launches, one stream |
//! | `weight` | packed weights and their decoding |
//! | `widen` | codes that lie wider than they are stored |
//! | `tensor` | activations |
//! | `gemm` | cuBLASLt |
//! | `linear` | y = x · wᵀ in its variants |
//! | `attention` | rotation, caches, attention |
//! | `loss` | logits, likelihoods and divergences |
//! | `matvec` | products of a few tokens |
//! | `decode` | generation over a cache |
//! | `choose` | the next token, most likely or sampled |
//! | `gradients` | the backward pass |
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

mod attention;
pub mod choose;
pub mod compile;
pub mod decode;
pub mod device;
mod gemm;
mod gradients;
pub mod library;
mod linear;
mod loss;
mod matvec;
pub mod rates;
mod signature;
mod solve;
mod tensor;
mod weight;
pub(crate) mod widen;

use std::sync::OnceLock;

use anyhow::{Result, ensure};
use cudarc::driver::CudaContext;

pub use self::attention::cache_defines;
use self::compile::Kernel;
use self::device::{Arg, Device, Geometry};
use self::gemm::{Form, Gemm, Product, Types};
pub use self::solve::CudaSolver;
pub use self::tensor::{Float, Tensor};
pub use self::weight::{Weight, WeightLayout, scheme_defines};
pub use self::widen::scheme_on_device;
use super::{
    AttentionShape, Backend, Batch, Divergence, MomentSums, Rope, Score, SecondMoments, check_add_rows,
};
use crate::backend::kv_cache::KvCache;
use crate::method::solve::Knobs;
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

    fn round_inputs(&self, x: &Tensor, rounding: Activations<f32>) -> Result<Tensor> {
        match rounding {
            Activations::Full => Ok(x.clone()),
            _ => self.quantized_values(x, rounding),
        }
    }

    fn add_maxima(&self, maxima: &mut Tensor, x: &Tensor) -> Result<()> {
        ensure!(
            maxima.count() == x.cols && maxima.float == Float::F32,
            "maxima of {} columns of inputs of {}",
            maxima.count(),
            x.cols
        );
        maxima.make_unique(&self.device)?;
        self.device.launch(
            Kernel::new("maxima", &[&macro_of("X", x.float)]),
            Geometry { grid: [x.cols.div_ceil(256), x.rows.div_ceil(64), 1], ..Geometry::flat(0, 256) },
            &[
                Arg::Pointer(maxima.at()),
                Arg::Pointer(x.at()),
                Arg::U32(x.rows as u32),
                Arg::U32(x.cols as u32),
            ],
        )
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

    fn rows(&self, x: &Tensor) -> usize {
        x.rows
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
        rounding: Activations<f32>,
    ) -> Result<Tensor> {
        self.product(x, weight, bias, rounding)
    }

    fn linear_add(
        &self,
        x: &mut Tensor,
        input: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        rounding: Activations<f32>,
    ) -> Result<()> {
        self.add_product(x, input, weight, bias, rounding)
    }

    fn rope(&self, x: &mut Tensor, rope: &Rope, batch: Batch) -> Result<()> {
        self.rotate(x, rope, batch)
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
        self.mix([q, k, v], sinks, shape, batch)
    }

    fn round_cache(&self, x: &mut Tensor, kind: KvCache, head_dim: usize, scale: f32) -> Result<()> {
        self.round_runs(x, kind, head_dim, scale)
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

    fn add_rows(&self, x: &mut Tensor, rows: &[usize], weights: &[f32], y: &Tensor) -> Result<()> {
        check_add_rows((x.rows, x.cols), rows, weights, (y.rows, y.cols))?;
        ensure!(x.float == Float::F32, "only the residual stream, which is F32, is added to");
        ensure!(
            x.cols.is_multiple_of(8),
            "{} columns: the GPU wants a multiple of 8; use `--device cpu`",
            x.cols
        );
        if rows.is_empty() {
            return Ok(());
        }
        x.make_unique(&self.device)?;
        let indices = self.device.upload(&u32_bytes(rows.iter().map(|&row| row as u32)))?;
        let weights = self.device.upload_numbers(weights)?;
        self.device.launch(
            Kernel::new("add_rows", &[&macro_of("X", y.float)]),
            Geometry::flat(rows.len(), 128),
            &[
                Arg::Pointer(x.at()),
                Arg::Pointer(y.at()),
                Arg::Pointer(indices.at()),
                Arg::Pointer(weights.at()),
                Arg::U32(x.cols as u32),
            ],
        )
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
