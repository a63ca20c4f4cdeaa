//! Calibrated rounding on the GPU: the fast copy of [`crate::method::solve::Solver`], step by step.
//!
//! | file | what |
//! |---|---|
//! | `mod` | moments → factors; one matrix from weights to codes |
//! | `factor` | Cholesky by cuSOLVER, F64 |
//! | `grids` | codes and scales on the device |
//! | `feedback` | GPTQ in blocks of columns |
//! | `descent` | coordinate descent in blocks of columns |
//! | `row_scale` | other scales for groups that are whole rows |
//! | `sums` | second moments made whole, divided, widened to F64 |
//!
//! Scales are fitted by the CPU's threads ([`fit_target`]), so that they have one definition; only powers of two, which cost
//! less than their way to the CPU, are fitted here. Everything else that is
//! proportional to columns² is matrix products: inside a block of [`BLOCK`] columns a warp solves a row, and what a block
//! changes reaches all other columns as one product. Factors are F64 as on the CPU; the target and GPTQ's feedback are
//! F32; updates of descent's gradient and the reported errors run in TF32 ([`UPDATES`]). The sums' order differs from the
//! CPU's, so codes differ where two are nearly as good.
//!
//! In memory at a time: two matrices `[cols, cols]` of F32 (three with the mismatch correction) and one of F64, and about
//! 33 bytes for each of at most [`SLAB`] weights.

mod descent;
mod factor;
mod feedback;
mod grids;
mod row_scale;
mod sums;

use std::ops::Range;

use anyhow::{Result, bail, ensure};

pub(super) use self::factor::Factorizer;
use self::grids::Grids;
use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::gemm::{Form, Product, Types};
use super::{Cuda, Float, Tensor, Weight, macro_of};
use crate::backend::{MomentSums, SecondMoments};
use crate::method::mismatch::RIDGE;
use crate::method::solve::{Deviation, Knobs, Outcome, Solve, Solved, fit_target, global_of};
use crate::num::{Codec, Element};
use crate::scheme::fit::ScaleRule;
use crate::scheme::{QTensor, Scheme, Span};
use crate::tensor::Matrix;

/// Columns that one kernel solves, whose coefficients fill 64 KiB of shared memory.
const BLOCK: usize = 128;
/// Columns whose changes reach the columns outside of them together: their product reads and writes everything once, which
/// costs as much as multiplying by this many.
const WIDE: usize = 1024;
/// Rows that share a block's coefficients, a warp each.
const WARPS: usize = 16;
/// Weights whose scales are fitted together, in page-locked memory: 32 MiB.
const FIT_PIECE: usize = 1 << 23;
/// Weights solved at a time.
const SLAB: usize = 1 << 26;
/// Arithmetic of descent's gradient updates and of reported errors. H cut to TF32 is H to 2^-11 of each entry, the same in
/// every product, so descent minimises a loss that differs by that much.
const UPDATES: Types = Types::Tf32;

/// A part of a row-major matrix: its first element's address, and the length of a whole row.
#[derive(Clone, Copy)]
struct View {
    at: u64,
    pitch: usize,
}

impl View {
    /// Returns the part that starts at a row and column of `buffer` `[_, pitch]`, F32.
    fn of(buffer: &Buffer, pitch: usize, row: usize, col: usize) -> Self {
        View { at: buffer.at() + 4 * (row * pitch + col) as u64, pitch }
    }
}

/// The statistics of one input on the device, with everything derived from them that its linears share.
pub struct CudaSolver<'a> {
    cuda: &'a Cuda,
    factorizer: &'a Factorizer,
    cols: usize,
    knobs: Knobs,
    importances: Vec<f32>,
    /// Damped, `[cols, cols]`.
    hessian: Tensor,
    /// What damping added to its diagonal.
    added: f32,
    /// Column to visit at each step of feedback.
    order: Buffer,
    /// Of feedback, `[cols, cols]`.
    coefficients: Buffer,
    correction: Option<Correction>,
    raised_damp: Option<f32>,
}

/// What the mismatch correction needs.
struct Correction {
    /// `XᵀX̃ - X̃ᵀX̃`
    difference: Tensor,
    drift: Option<Tensor>,
    /// Lower factor of `X̃ᵀX̃ + λI`, F64.
    factor: Buffer,
}

impl<'a> CudaSolver<'a> {
    /// Prepares to quantize the linears that read the input of these moments.
    ///
    /// # Errors
    /// If the moments are not finite, or memory is short.
    pub(super) fn new(cuda: &'a Cuda, moments: MomentSums<Tensor>, knobs: Knobs) -> Result<Self> {
        let MomentSums { cols, tokens, mut hessian, mut cross, drift } = moments;
        let shape = (cols, cols, Float::F32);
        for sum in [&hessian, &cross] {
            ensure!((sum.rows, sum.cols, sum.float) == shape, "moments [{}, {}]", sum.rows, sum.cols);
        }
        let factorizer = cuda.factorizer()?;
        let diagonal = cuda.symmetrize(&mut hessian, 0.0)?;
        let mean = diagonal.iter().map(|&h| f64::from(h)).sum::<f64>() / cols.max(1) as f64;
        ensure!(mean.is_finite(), "the inputs' second moments are not finite; check the calibration text");
        let added = |damp: f32| if mean > 0.0 { (f64::from(damp) * mean) as f32 } else { 1.0 };
        let scarcity = cols as f32 / tokens.max(1) as f32;

        let mut order: Vec<u32> = (0..cols as u32).collect();
        order.sort_by(|&a, &b| diagonal[b as usize].total_cmp(&diagonal[a as usize]).then(a.cmp(&b)));
        let order = cuda.device.upload_numbers(&order)?;
        let wide = cuda.device.allocate(8 * cols * cols)?;
        let asked = knobs.first_damp(scarcity);
        let mut damp = asked;
        loop {
            cuda.widen(&wide, &hessian, Some(&order), added(damp))?;
            if factorizer.factor(&cuda.device, &wide, cols)? {
                break;
            }
            ensure!(damp < 0.99, "the inputs' second moments are not finite; check the calibration text");
            damp = (damp * 10.0).min(1.0);
        }
        let coefficients = cuda.device.allocate(4 * cols * cols)?;
        let args = [Arg::Pointer(coefficients.at()), Arg::Pointer(wide.at()), Arg::U32(cols as u32)];
        cuda.device.launch(Kernel::new("coefficients", &[]), by_rows(cols, cols), &args)?;

        let drift = drift.filter(|_| knobs.strength.residual != 0.0);
        let correction = if (knobs.strength.inputs == 0.0 && drift.is_none()) || tokens == 0 {
            None
        } else {
            cuda.subtract(&mut cross, &hessian)?;
            cuda.widen(&wide, &hessian, None, added(RIDGE + scarcity))?;
            if !factorizer.factor(&cuda.device, &wide, cols)? {
                bail!("input-mismatch correction: calibration inputs are not finite");
            }
            Some(Correction { difference: cross, drift, factor: wide })
        };
        cuda.symmetrize(&mut hessian, added(damp))?;
        let importances = diagonal.iter().map(|h| h / tokens.max(1) as f32).collect();
        let added = added(damp);
        Ok(CudaSolver {
            cuda,
            factorizer,
            cols,
            knobs,
            importances,
            hessian,
            added,
            order,
            coefficients,
            correction,
            raised_damp: (damp != asked).then_some(damp),
        })
    }

    /// Returns what rows of a matrix are rounded towards, `[part.len(), cols]`.
    fn target(&self, weights: &Matrix, part: Range<usize>) -> Result<Buffer> {
        let (device, cols) = (&self.cuda.device, self.cols);
        let (first, rows, count) = (part.start, part.len(), part.len() * cols);
        let target = Weight::rows_as_f32(device, weights, part)?;
        let Some(Correction { difference, drift, factor }) = &self.correction else { return Ok(target) };
        let product = device.allocate(4 * count)?;
        let view = |buffer: &Buffer| View::of(buffer, cols, 0, 0);
        self.multiply(
            Types::F32,
            [rows, cols, cols],
            view(&target),
            view(difference.buffer()),
            view(&product),
            false,
        )?;
        let missing = device.allocate(8 * count)?;
        let drift = match drift {
            Some(drift) => {
                ensure!(drift.cols == cols && first + rows <= drift.rows, "drift of {} rows", drift.rows);
                drift.at() + 4 * (first * cols) as u64
            }
            None => 0,
        };
        let flat = Geometry::flat(count.div_ceil(256), 256);
        device.launch(
            Kernel::new("missing", &[]),
            flat,
            &[
                Arg::Pointer(missing.at()),
                Arg::Pointer(product.at()),
                Arg::Pointer(drift),
                Arg::F32(self.knobs.strength.inputs),
                Arg::F32(self.knobs.strength.residual),
                Arg::U64(count as u64),
            ],
        )?;
        drop(product);
        self.factorizer.solve_right(device, factor, cols, &missing, rows)?;
        let args = [Arg::Pointer(target.at()), Arg::Pointer(missing.at()), Arg::U64(count as u64)];
        device.launch(Kernel::new("correct", &[]), flat, &args)?;
        Ok(target)
    }

    /// Queues y = x · w, or y +=, for x `[n, input]`, w `[input, out]`, y `[n, out]`, F32.
    fn multiply(
        &self,
        types: Types,
        [n, input, out]: [usize; 3],
        x: View,
        w: View,
        y: View,
        accumulate: bool,
    ) -> Result<()> {
        if n * input * out == 0 {
            return Ok(());
        }
        let form = Form::Plain([w.pitch, x.pitch, y.pitch]);
        let product = Product { n, out, input, types, accumulate, form };
        self.cuda.gemm.multiply(&self.cuda.device, product, w.at, x.at, y.at)
    }

    /// Queues y = a · H for a `[rows, cols]`.
    fn with_hessian(&self, types: Types, a: &Buffer, rows: usize) -> Result<Buffer> {
        let y = self.cuda.device.allocate(4 * rows * self.cols)?;
        let view = |buffer: &Buffer| View::of(buffer, self.cols, 0, 0);
        let shape = [rows, self.cols, self.cols];
        self.multiply(types, shape, view(a), view(self.hessian.buffer()), view(&y), false)?;
        Ok(y)
    }

    /// Queues changes to the gradient: columns `changed` moved by `changes` (from column `at` on), of which columns
    /// `reached` hear.
    fn spread(
        &self,
        (changes, pitch, at): (&Buffer, usize, usize),
        changed: Range<usize>,
        gradient: &Buffer,
        reached: Range<usize>,
        rows: usize,
    ) -> Result<()> {
        let cols = self.cols;
        self.multiply(
            UPDATES,
            [rows, changed.len(), reached.len()],
            View::of(changes, pitch, 0, at),
            View::of(self.hessian.buffer(), cols, changed.start, reached.start),
            View::of(gradient, cols, 0, reached.start),
            true,
        )
    }

    /// Returns values less `target` where there is one, F32 `[rows, cols]`; units instead of values if `what` is `UNIT`.
    fn values(&self, q: &Grids, what: &str, target: Option<&Buffer>) -> Result<Buffer> {
        self.values_as(q, what, target, Float::F32)
    }

    fn values_as(&self, q: &Grids, what: &str, target: Option<&Buffer>, float: Float) -> Result<Buffer> {
        let y = self.cuda.device.allocate(float.bytes() * q.rows * q.cols)?;
        self.cuda.device.launch(
            q.kernel("values", &[&format!("WHAT={what}"), &macro_of("Y", float)]),
            by_rows(q.rows, q.cols),
            &[
                Arg::Struct(&q.words()),
                Arg::Pointer(target.map_or(0, Buffer::at)),
                Arg::Pointer(y.at()),
                Arg::U32(q.rows as u32),
            ],
        )?;
        Ok(y)
    }

    /// Returns Σ a ∘ b of each row, for `[rows, cols]`.
    fn row_dots(&self, a: &Buffer, b: &Buffer, rows: usize) -> Result<Vec<f64>> {
        let device = &self.cuda.device;
        let sums = device.allocate(8 * rows)?;
        device.launch(
            Kernel::new("row_dots", &[]),
            Geometry::flat(rows, 256),
            &[
                Arg::Pointer(a.at()),
                Arg::Pointer(b.at()),
                Arg::Pointer(sums.at()),
                Arg::U32(self.cols as u32),
            ],
        )?;
        let mut found = vec![0.0; rows];
        device.download_numbers(&sums, &mut found)?;
        Ok(found)
    }

    /// Returns tr(a H aᵀ) for `a` `[rows, cols]`, with the Hessian as it was before damping.
    fn energy(&self, a: &Buffer, rows: usize) -> Result<f64> {
        let product = self.with_hessian(UPDATES, a, rows)?;
        let damped: f64 = self.row_dots(a, &product, rows)?.iter().sum();
        let squares: f64 = self.row_dots(a, a, rows)?.iter().sum();
        Ok(damped - f64::from(self.added) * squares)
    }

    /// Returns the scales that `target` `[rows, cols]` is rounded with, and the codes nearest to it.
    fn fit(&self, target: &Buffer, rows: usize, scheme: Scheme, global: Option<f32>) -> Result<Grids> {
        let (device, cols, rule) = (&self.cuda.device, self.cols, self.knobs.scale_rule);
        if (scheme.element, scheme.scale, scheme.group) == (Element::E2M1, Codec::E8M0, Span::Cols(32)) {
            return self.fit_power_of_two(target, rows, scheme);
        }
        let mut q = QTensor::zeroed(scheme, rows, cols);
        let piece = (FIT_PIECE / cols).max(1) * cols;
        device.read_pieces(target, rows * cols, piece, &mut |first, values| {
            q.set_rows(
                first / cols,
                &fit_target(values, cols, scheme, global, Some(&self.importances), rule),
            );
            Ok(())
        })?;
        Grids::upload(device, &q)
    }

    fn fit_power_of_two(&self, target: &Buffer, rows: usize, scheme: Scheme) -> Result<Grids> {
        let device = &self.cuda.device;
        let q = Grids::empty(device, scheme, rows, self.cols)?;
        let importances = device.upload_numbers(&self.importances)?;
        let rule = self.knobs.scale_rule;
        device.launch(
            q.kernel("fit_power_of_two", &[]),
            Geometry { block: [32, 8], ..Geometry::flat((rows * self.cols / 32).div_ceil(8), 32) },
            &[
                Arg::Struct(&q.words()),
                Arg::Pointer(target.at()),
                Arg::Pointer(importances.at()),
                Arg::U32(rule.carry()),
                Arg::U32(u32::from(rule == ScaleRule::Search)),
                Arg::U32(rows as u32),
            ],
        )?;
        Ok(q)
    }

    /// Returns codes and scales for some rows of a matrix, with their errors' and their target's energy.
    fn solve(
        &self,
        weights: &Matrix,
        rows: Range<usize>,
        scheme: Scheme,
        global: Option<f32>,
    ) -> Result<SolvedRows> {
        let device = &self.cuda.device;
        let count = rows.len();
        let target = self.target(weights, rows)?;
        let energy = self.energy(&target, count)?;
        ensure!(
            energy.is_finite(),
            "weights or calibration inputs are not finite; check the calibration text"
        );
        let mut grids = self.fit(&target, count, scheme, global)?;
        let nearest = self.energy(&self.values(&grids, "VALUE", Some(&target))?, count)?;
        let nearest_grids = grids.duplicate(device)?;
        self.feed_back(&target, &grids)?;
        self.descend(&target, &mut grids)?;
        let mut error = self.energy(&self.values(&grids, "VALUE", Some(&target))?, count)?;
        let kept_nearest = error > nearest;
        if kept_nearest {
            (grids, error) = (nearest_grids, nearest);
        }
        let mut q = QTensor::zeroed(scheme, count, self.cols);
        grids.download(device, &mut q)?;
        let float = self.cuda.float;
        let dense = self.values_as(&grids, "VALUE", None, float)?;
        Ok(SolvedRows {
            q,
            energy,
            nearest,
            error,
            kept_nearest,
            dense: Weight::of_floats(count, self.cols, float, dense),
        })
    }
}

/// Some rows of a solved matrix.
struct SolvedRows {
    q: QTensor,
    dense: Weight,
    energy: f64,
    nearest: f64,
    error: f64,
    kept_nearest: bool,
}

impl Solve for CudaSolver<'_> {
    type Weight = Weight;

    fn cols(&self) -> usize {
        self.cols
    }

    fn quantize(&self, weights: &Matrix, scheme: Scheme, global: Option<f32>) -> Result<(Solved, Weight)> {
        let [rows, cols] = weights.dims();
        ensure!(cols == self.cols, "{cols} columns for moments of {}", self.cols);
        let global = global_of(weights, &scheme, global);
        let slabs = pieces(0..rows, (SLAB / cols).max(1));
        let parts =
            slabs.map(|rows| self.solve(weights, rows, scheme, global)).collect::<Result<Vec<_>>>()?;
        let sum = |of: fn(&SolvedRows) -> f64| parts.iter().map(of).sum::<f64>();
        let energy = sum(|part| part.energy).max(f64::MIN_POSITIVE);
        let (error_nearest, error) = (sum(|part| part.nearest) / energy, sum(|part| part.error) / energy);
        let kept_nearest = parts.iter().any(|part| part.kept_nearest);
        let deviation = Deviation { raised_damp: self.raised_damp, kept_nearest };
        let (q, dense) = match <[SolvedRows; 1]>::try_from(parts) {
            Ok([part]) => (part.q, Some(part.dense)),
            Err(parts) => (joined(scheme, rows, cols, &parts), None),
        };
        // INT8 products read codes; all others read the values, which need not be packed only to be decoded again.
        let weight = match dense.filter(|_| (scheme.element, scheme.group) != (Element::Int(8), Span::Row)) {
            Some(dense) => dense,
            None => Weight::upload_quantized(&self.cuda.device, &q)?,
        };
        let outcome = Outcome { error, error_nearest: Some(error_nearest), deviation, ..Outcome::default() };
        Ok((Solved { q, outcome }, weight))
    }
}

/// Returns one matrix of parts of its rows.
fn joined(scheme: Scheme, rows: usize, cols: usize, parts: &[SolvedRows]) -> QTensor {
    let mut q = QTensor::zeroed(scheme, rows, cols);
    let mut first = 0;
    for part in parts {
        q.set_rows(first, &part.q);
        first += part.q.rows;
    }
    q
}

/// Returns the geometry of kernels that walk rows: 256 columns a block, rows in steps of the grid.
fn by_rows(rows: usize, cols: usize) -> Geometry {
    Geometry { grid: [cols.div_ceil(256), rows.min(4096), 1], block: [256, 1], shared: 0 }
}

/// Returns the geometry of kernels that solve a row a warp with a block's coefficients in shared memory.
fn by_warps(rows: usize) -> Geometry {
    Geometry {
        grid: [rows.div_ceil(WARPS), 1, 1],
        block: [32, WARPS as u32],
        shared: (4 * BLOCK * BLOCK) as u32,
    }
}

/// Returns the ranges of `length` columns that cover `range`, the last one shorter.
fn pieces(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(length).map(move |start| start..range.end.min(start + length))
}
