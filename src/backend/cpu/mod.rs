//! The reference backend: F32 storage and accumulation on the CPU; weights stay as stored and are decoded panel by panel.
//!
//! Results are the same bits on every machine and for every number of threads: each sum has one fixed order.

mod attention;
mod decode;
mod decoded;
mod elementwise;
mod gradients;
mod head;
mod rotation;

use anyhow::{Result, ensure};
use ndarray::{Array2, Axis};
use rayon::prelude::*;

pub(crate) use self::elementwise::exp;
use super::{
    Affine, AttentionShape, Backend, Batch, Divergence, MomentSums, Rope, Score, SecondMoments,
    check_add_rows, separately,
};
use crate::backend::kv_cache::KvCache;
use crate::linalg::product::{self, Left, Previous, Wanted, multiply_transposed};
use crate::method::solve::{Knobs, Solver};
use crate::method::statistics::Moments;
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// The CPU, using the threads of the current `rayon` pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Backend for Cpu {
    type Tensor = Array2<f32>;
    type Weight = Matrix;

    fn describe(&self) -> String {
        format!("CPU, {} threads, F32", rayon::current_num_threads())
    }

    /// Two windows of 512: every weight is decoded and packed once for both.
    fn tokens_at_once(&self) -> usize {
        1024
    }

    fn upload(&self, weight: Matrix) -> Result<Matrix> {
        Ok(weight)
    }

    fn tensor(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Array2<f32>> {
        Ok(Array2::from_shape_vec((rows, cols), values.to_vec())?)
    }

    fn read(&self, x: &Array2<f32>) -> Result<Vec<f32>> {
        Ok(x.iter().copied().collect())
    }

    fn rows(&self, x: &Array2<f32>) -> usize {
        x.nrows()
    }

    fn select_rows(&self, x: &Array2<f32>, rows: &[usize]) -> Result<Array2<f32>> {
        ensure!(rows.iter().all(|&row| row < x.nrows()), "row outside a tensor of {} rows", x.nrows());
        Ok(x.select(Axis(0), rows))
    }

    fn embed(&self, table: &Matrix, ids: &[u32]) -> Result<Array2<f32>> {
        let [vocab, hidden] = table.dims();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            anyhow::bail!(
                "token id {id} is outside the vocabulary of {vocab}; the text was tokenized for another model"
            );
        }
        let mut y = Array2::zeros((ids.len(), hidden));
        for (mut row, &id) in y.rows_mut().into_iter().zip(ids) {
            table.decode_rows(id as usize, row.as_slice_mut().unwrap_or(&mut []));
        }
        Ok(y)
    }

    fn rms_norm(&self, x: &Array2<f32>, gain: &Array2<f32>, eps: f32) -> Result<Array2<f32>> {
        let width = gain.len();
        ensure!(width > 0 && x.ncols().is_multiple_of(width), "gain of {width} for rows of {}", x.ncols());
        let gain = slice(gain)?;
        let mut y = zeros(x.dim());
        let rows = slice_mut(&mut y)?.par_chunks_mut(x.ncols()).zip(slice(x)?.par_chunks(x.ncols()));
        rows.for_each(|(y, x)| elementwise::rms_norm(x, gain, eps, y));
        Ok(y)
    }

    fn linear(
        &self,
        x: &Array2<f32>,
        weight: &Matrix,
        bias: Option<&Array2<f32>>,
        rounding: Activations<f32>,
    ) -> Result<Array2<f32>> {
        self.linears(x, [Affine { weight, bias, rounding }]).map(|[y]| y)
    }

    fn linears<const N: usize>(
        &self,
        x: &Array2<f32>,
        linears: [Affine<'_, Self>; N],
    ) -> Result<[Array2<f32>; N]> {
        if linears.iter().any(|linear| linear.rounding != linears[0].rounding) {
            return separately(self, x, linears);
        }
        let mut ys = linears.map(|linear| zeros((x.nrows(), linear.weight.dims()[0])));
        let products = linears.iter().zip(&mut ys).map(|(linear, y)| (linear.weight, y)).collect();
        multiply(x, linears[0].rounding, products, Previous::Replaced)?;
        for (y, linear) in ys.iter_mut().zip(linears) {
            linear.bias.into_iter().for_each(|bias| *y += bias);
        }
        Ok(ys)
    }

    fn linear_add(
        &self,
        x: &mut Array2<f32>,
        input: &Array2<f32>,
        weight: &Matrix,
        bias: Option<&Array2<f32>>,
        rounding: Activations<f32>,
    ) -> Result<()> {
        multiply(input, rounding, vec![(weight, x)], Previous::Kept)?;
        if let Some(bias) = bias {
            *x += bias;
        }
        Ok(())
    }

    fn rope(&self, x: &mut Array2<f32>, rope: &Rope, batch: Batch) -> Result<()> {
        rotation::rope(x, rope, batch);
        Ok(())
    }

    fn attention(
        &self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        sinks: Option<&Array2<f32>>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<Array2<f32>> {
        let sinks = sinks.map(slice).transpose()?;
        if let Some(sinks) = sinks {
            ensure!(sinks.len() == shape.heads, "{} sinks for {} heads", sinks.len(), shape.heads);
        }
        Ok(attention::attention(q, k, v, sinks, shape, batch))
    }

    fn round_cache(&self, x: &mut Array2<f32>, kind: KvCache, head_dim: usize, scale: f32) -> Result<()> {
        if kind != KvCache::Exact {
            let width = x.ncols().max(1);
            slice_mut(x)?.par_chunks_mut(width).for_each(|row| kind.round(row, head_dim, scale));
        }
        Ok(())
    }

    fn swiglu(&self, gate: &Array2<f32>, up: &Array2<f32>) -> Result<Array2<f32>> {
        let mut y = gate.clone();
        self.swiglu_in_place(&mut y, up)?;
        Ok(y)
    }

    fn swiglu_in_place(&self, gate: &mut Array2<f32>, up: &Array2<f32>) -> Result<()> {
        let width = gate.ncols().max(1);
        let rows = slice_mut(gate)?.par_chunks_mut(width).zip(slice(up)?.par_chunks(width));
        rows.for_each(|(gate, up)| elementwise::swiglu(gate, up));
        Ok(())
    }

    fn add(&self, x: &mut Array2<f32>, y: &Array2<f32>) -> Result<()> {
        *x += y;
        Ok(())
    }

    fn add_rows(&self, x: &mut Array2<f32>, rows: &[usize], weights: &[f32], y: &Array2<f32>) -> Result<()> {
        check_add_rows(x.dim(), rows, weights, y.dim())?;
        for ((&row, &weight), y) in rows.iter().zip(weights).zip(y.rows()) {
            x.row_mut(row).scaled_add(weight, &y);
        }
        Ok(())
    }

    fn score(&self, hidden: &Array2<f32>, head: &Matrix, targets: &[u32]) -> Result<Vec<Score>> {
        check_head(hidden, head, targets)?;
        Ok(head::score(hidden, head, targets))
    }

    fn compare(
        &self,
        baseline: (&Array2<f32>, &Matrix),
        model: (&Array2<f32>, &Matrix),
        targets: &[u32],
    ) -> Result<Vec<Divergence>> {
        check_head(baseline.0, baseline.1, targets)?;
        check_head(model.0, model.1, targets)?;
        let (vocab, other) = (baseline.1.dims()[0], model.1.dims()[0]);
        ensure!(vocab == other, "vocabularies differ: the baseline has {vocab} tokens, the model {other}");
        Ok(head::compare(baseline, model, targets))
    }
}

impl SecondMoments for Cpu {
    type Solver<'a> = Solver;

    fn zeros(&self, rows: usize, cols: usize) -> Result<Array2<f32>> {
        Ok(Array2::zeros((rows, cols)))
    }

    fn add_moment(&self, sum: &mut Array2<f32>, a: &Array2<f32>, b: &Array2<f32>) -> Result<()> {
        ensure!(
            a.nrows() == b.nrows() && sum.dim() == (a.ncols(), b.ncols()),
            "moments {:?} of inputs {:?} and {:?}",
            sum.dim(),
            a.dim(),
            b.dim()
        );
        let same = std::ptr::eq(a, b);
        let wanted = if same { Wanted::Lower } else { Wanted::All };
        product::add_product(&Left::pack_columns(a.view()), b.view(), sum.view_mut(), wanted);
        Ok(())
    }

    fn subtract(&self, x: &mut Array2<f32>, y: &Array2<f32>) -> Result<()> {
        *x -= y;
        Ok(())
    }

    fn round_inputs(&self, x: &Array2<f32>, rounding: Activations<f32>) -> Result<Array2<f32>> {
        let mut y = x.clone();
        round_inputs(&mut y, rounding)?;
        Ok(y)
    }

    fn add_maxima(&self, maxima: &mut Array2<f32>, x: &Array2<f32>) -> Result<()> {
        let (maxima, cols) = (slice_mut(maxima)?, x.ncols());
        ensure!(maxima.len() == cols, "maxima of {} columns of inputs of {cols}", maxima.len());
        for row in slice(x)?.chunks_exact(cols.max(1)) {
            // A NaN stays.
            let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
            maxima.iter_mut().zip(row).for_each(|(max, x)| *max = larger(*max, x.abs()));
        }
        Ok(())
    }

    fn divide(&self, sum: &mut Array2<f32>, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()> {
        let (height, width) = sum.dim();
        ensure!(
            rows.is_none_or(|rows| rows.len() == height) && columns.is_none_or(|cols| cols.len() == width),
            "factors that do not fit moments of [{height}, {width}]"
        );
        let factor = |factors: Option<&[f32]>, i: usize| factors.map_or(1.0, |factors| factors[i]);
        sum.indexed_iter_mut().for_each(|((i, j), sum)| *sum /= factor(rows, i) * factor(columns, j));
        Ok(())
    }

    fn solver(&self, moments: MomentSums<Array2<f32>>, knobs: Knobs) -> Result<Solver> {
        let MomentSums { cols, tokens, hessian, cross, drift } = moments;
        let mut hessian = self.read(&hessian)?;
        for row in 0..cols {
            for col in 0..row {
                hessian[col * cols + row] = hessian[row * cols + col];
            }
        }
        let drift = drift.map(|drift| self.read(&drift)).transpose()?;
        Solver::new(Moments { cols, tokens, hessian, cross: self.read(&cross)?, drift }, knobs)
    }
}

/// Replaces inputs by what an engine's product sees of them.
fn round_inputs(x: &mut Array2<f32>, rounding: Activations<f32>) -> Result<()> {
    let round: &(dyn Fn(&mut [f32]) + Sync) = match rounding {
        Activations::Full => return Ok(()),
        Activations::Int8PerToken => &elementwise::quantize_int8,
        Activations::Fp8PerToken => &elementwise::quantize_fp8,
        Activations::Int8PerTensor(scale) => &move |row| elementwise::quantize_int8_by(scale, row),
    };
    let width = x.ncols().max(1);
    slice_mut(x)?.par_chunks_mut(width).for_each(round);
    Ok(())
}

/// y (+)= x · weightᵀ for each weight and its y, with `x` as the engine would quantize it.
fn multiply(
    x: &Array2<f32>,
    rounding: Activations<f32>,
    mut products: Vec<(&Matrix, &mut Array2<f32>)>,
    previous: Previous,
) -> Result<()> {
    for (weight, y) in &products {
        let [out_features, in_features] = weight.dims();
        ensure!(
            x.ncols() == in_features && y.dim() == (x.nrows(), out_features),
            "a linear of [{out_features}, {in_features}] cannot map {:?} to {:?}",
            x.dim(),
            y.dim()
        );
    }
    let rounded = match rounding {
        Activations::Full => None,
        _ => Some(Cpu.round_inputs(x, rounding)?),
    };
    let left = Left::rows_of(rounded.as_ref().unwrap_or(x).view());
    let mut products: Vec<_> = products.iter_mut().map(|(weight, y)| (*weight, y.view_mut())).collect();
    multiply_transposed(&left, &mut products, previous);
    Ok(())
}

/// Returns zeros, written by all threads: most of the time goes into memory that is touched for the first time.
fn zeros((rows, cols): (usize, usize)) -> Array2<f32> {
    const PIECE: usize = 16;
    let pieces = rayon::iter::repeat_n([0.0; PIECE], (rows * cols).div_ceil(PIECE));
    let mut values = pieces.collect::<Vec<_>>().into_flattened();
    values.truncate(rows * cols);
    Array2::from_shape_vec((rows, cols), values).expect("as many values as the shape has")
}

fn check_head(hidden: &Array2<f32>, head: &Matrix, targets: &[u32]) -> Result<()> {
    let [vocab, width] = head.dims();
    ensure!(
        hidden.dim() == (targets.len(), width),
        "hidden states {:?} for a head of width {width}",
        hidden.dim()
    );
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocab) {
        anyhow::bail!(
            "token id {target} is outside the vocabulary of {vocab}; the text was tokenized for another model"
        );
    }
    Ok(())
}

fn slice(x: &Array2<f32>) -> Result<&[f32]> {
    x.as_slice().ok_or_else(|| anyhow::anyhow!("a tensor of shape {:?} is not row-major", x.dim()))
}

fn slice_mut(x: &mut Array2<f32>) -> Result<&mut [f32]> {
    let dim = x.dim();
    x.as_slice_mut().ok_or_else(|| anyhow::anyhow!("a tensor of shape {dim:?} is not row-major"))
}
