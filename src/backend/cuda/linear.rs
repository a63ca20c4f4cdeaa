//! y = x · wᵀ + bias for every storage of w and both treatments of x.
//!
//! Weights that a product cannot read as they lie are decoded into scratch memory first, which lives until the product is
//! done. INT8 W8A8 runs as engines run it: inputs quantized, exact integer sums, scales applied after. FP8 inputs
//! multiply as the F16 numbers they are.

use anyhow::{Result, bail, ensure};

use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::gemm::{Form, Product, Types};
use super::{Cuda, Float, Tensor, Weight, WeightLayout, macro_of};
use crate::backend::Backend;
use crate::scheme::Activations;
use crate::tensor::Dtype;

impl Cuda {
    /// Returns x · wᵀ + bias.
    pub(super) fn product(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        rounding: Activations<f32>,
    ) -> Result<Tensor> {
        check(x, weight)?;
        if rounding != Activations::Full {
            return self.quantized_product(x, weight, bias, rounding);
        }
        let x = self.rounded(x)?;
        // With a bias the sums stay F32 until it is added, so that the result is rounded once.
        let (types, float) = match (self.float, bias) {
            (Float::F32, _) => (Types::F32, Float::F32),
            (_, Some(_)) => (Types::F16ToF32, Float::F32),
            (_, None) => (Types::F16, Float::F16),
        };
        let mut y = Tensor::empty(&self.device, x.rows, weight.rows, float)?;
        self.multiply(&x, weight, types, &mut y, false)?;
        if bias.is_some() { self.cast(&y, bias, self.float) } else { Ok(y) }
    }

    /// x += input · wᵀ + bias, without rounding the product where x is the F32 residual stream.
    pub(super) fn add_product(
        &self,
        x: &mut Tensor,
        input: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        rounding: Activations<f32>,
    ) -> Result<()> {
        check(input, weight)?;
        ensure!(x.rows == input.rows && x.cols == weight.rows, "the sum of differing shapes");
        ensure!(x.float == Float::F32, "only the residual stream, which is F32, is added to");
        if bias.is_some() || rounding != Activations::Full {
            let y = self.product(input, weight, bias, rounding)?;
            return self.add(x, &y);
        }
        x.make_unique(&self.device)?;
        let types = if self.float == Float::F32 { Types::F32 } else { Types::F16ToF32 };
        self.multiply(&self.rounded(input)?, weight, types, x, true)
    }

    /// Queues y = x · wᵀ, or y +=, for `x` in the number type of `types`.
    fn multiply(
        &self,
        x: &Tensor,
        weight: &Weight,
        types: Types,
        y: &mut Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let product = Product {
            n: x.rows,
            out: weight.rows,
            input: weight.cols,
            types,
            accumulate,
            form: Form::Linear,
        };
        let decoded = self.decoded(weight)?;
        let w = decoded.as_ref().unwrap_or(weight.codes());
        self.gemm.multiply(&self.device, product, w.at(), x.at(), y.at())
    }

    /// Returns the weight decoded to what products read, or `None` if it lies so already.
    pub(super) fn decoded(&self, weight: &Weight) -> Result<Option<Buffer>> {
        match (weight.stored, self.float) {
            (WeightLayout::Dense(Dtype::F16), Float::F16) | (WeightLayout::Dense(Dtype::F32), Float::F32) => {
                Ok(None)
            }
            _ => weight.dequantize(&self.device, self.float).map(Some),
        }
    }

    /// Queues the quantization of rows of `[rows, cols]` values to numbers of type `code` and F32 scales.
    pub(super) fn quantize_rows(
        &self,
        x: (u64, Float),
        (code, rounding): (&str, Activations<f32>),
        codes: &Buffer,
        scales: &Buffer,
        shape: [usize; 2],
    ) -> Result<()> {
        self.launch_quantize_rows(x, ("KEEP=CODES", code, rounding), codes.at(), scales.at(), shape)
    }

    /// Returns the values that quantized products see of `x`.
    pub(super) fn quantized_values(&self, x: &Tensor, rounding: Activations<f32>) -> Result<Tensor> {
        let y = Tensor::empty(&self.device, x.rows, x.cols, self.float)?;
        let code = if self.float == Float::F32 { "float" } else { "f16" };
        let kind = ("KEEP=VALUES", code, rounding);
        self.launch_quantize_rows((x.at(), x.float), kind, y.at(), 0, [x.rows, x.cols])?;
        Ok(y)
    }

    fn launch_quantize_rows(
        &self,
        (x, float): (u64, Float),
        (keep, code, rounding): (&str, &str, Activations<f32>),
        to: u64,
        scales: u64,
        [rows, cols]: [usize; 2],
    ) -> Result<()> {
        let (grid, given) = match rounding {
            Activations::Full => bail!("inputs that stay as they are have no codes"),
            Activations::Int8PerToken => ("TO=INT8", 0.0),
            Activations::Fp8PerToken => ("TO=E4M3", 0.0),
            Activations::Int8PerTensor(scale) => ("TO=INT8", scale),
        };
        self.device.launch(
            Kernel::new("quantize_rows", &[&macro_of("X", float), &format!("C={code}"), grid, keep]),
            Geometry::flat(rows, 256),
            &[
                Arg::Pointer(x),
                Arg::Pointer(to),
                Arg::Pointer(scales),
                Arg::U32(cols as u32),
                Arg::F32(given),
            ],
        )
    }

    /// Returns x · wᵀ + bias with x quantized.
    fn quantized_product(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        rounding: Activations<f32>,
    ) -> Result<Tensor> {
        // Integer matrix units want rows of a multiple of 16 bytes; other shapes and schemes multiply the same numbers
        // as floats, which hold them exactly.
        let whole = weight.cols.is_multiple_of(16) && weight.rows.is_multiple_of(4);
        let row_scales = weight.row_scales().filter(|_| whole && rounding != Activations::Fp8PerToken);
        let (code, code_bytes, sum, types) = match (row_scales, self.float) {
            (Some(_), _) => ("i8", 1, "int", Types::Int8),
            (None, Float::F32) => ("float", 4, "float", Types::F32),
            (None, _) => ("f16", 2, "float", Types::F16ToF32),
        };
        let codes = Tensor::new(x.rows, x.cols, self.float, self.device.allocate(x.count() * code_bytes)?);
        let x_scales = self.device.allocate(x.rows * 4)?;
        let to = (code, rounding);
        self.quantize_rows((x.at(), x.float), to, codes.buffer(), &x_scales, [x.rows, x.cols])?;
        let mut sums = Tensor::empty(&self.device, x.rows, weight.rows, Float::F32)?;
        if types == Types::Int8 {
            let product = Product {
                n: x.rows,
                out: weight.rows,
                input: weight.cols,
                types,
                accumulate: false,
                form: Form::Linear,
            };
            self.gemm.multiply(&self.device, product, weight.codes().at(), codes.at(), sums.at())?;
        } else {
            self.multiply(&codes, weight, types, &mut sums, false)?;
        }
        let y = Tensor::empty(&self.device, x.rows, weight.rows, self.float)?;
        ensure!(
            weight.rows.is_multiple_of(4),
            "{} outputs: the GPU wants a multiple of 4; use `--device cpu`",
            weight.rows
        );
        self.device.launch(
            Kernel::new("rescale", &[&format!("S={sum}"), &macro_of("Y", self.float)]),
            Geometry { grid: [x.rows, weight.rows.div_ceil(1024), 1], ..Geometry::flat(0, 256) },
            &[
                Arg::Pointer(sums.at()),
                Arg::Pointer(x_scales.at()),
                Arg::Pointer(row_scales.map_or(0, Buffer::at)),
                Arg::Pointer(bias.map_or(0, Tensor::at)),
                Arg::Pointer(y.at()),
                Arg::U32(weight.rows as u32),
                Arg::U32(0),
            ],
        )?;
        Ok(y)
    }
}

fn check(x: &Tensor, weight: &Weight) -> Result<()> {
    ensure!(x.cols == weight.cols, "{} input features for a weight of {}", x.cols, weight.cols);
    Ok(())
}
