//! Carries a plan out: read, fit, choose codes, pack, write, in chunks of rows, so that memory does not grow with the
//! model.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use rayon::prelude::*;

use crate::backend::SecondMoments;
use crate::calib::driver;
use crate::calib::settings::Settings;
use crate::checkpoint::Checkpoint;
use crate::container::Sink;
use crate::names::TensorId;
use crate::plan::{Action, Plan, Step};
use crate::scheme::fit::fit;
use crate::scheme::{Distortion, QTensor, Scheme};
use crate::tensor::{Dtype, Matrix, bytes_from_floats, first_non_finite};

/// Weights decoded at a time by one thread: with source bytes, codes and packed bytes about 12 bytes each.
const CHUNK_WEIGHTS: usize = 1 << 20;

/// Returns the memory a conversion takes beside the program itself, whatever the model's size.
pub fn peak_bytes(plan: &Plan, threads: usize) -> u64 {
    let widest = plan.steps.iter().map(|step| step.cols()).max().unwrap_or(0);
    (threads * CHUNK_WEIGHTS.max(widest) * 12) as u64
}

/// What rounding cost one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Relative squared error of what was written, weighed as the method weighs it; 0 for kept tensors.
    pub error: f64,
    /// The same for codes rounded to nearest on the same scales, where the method chose others.
    pub error_nearest: Option<f64>,
}

/// Converts every tensor of the plan with nearest codes, in parallel over chunks of rows. Returns the cost of each step,
/// in plan order. `progress` is told how many weights were finished.
pub fn convert(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Cost>> {
    write_decided(plan, sink)?;
    stream(source, plan, sink, progress, |_| true)
}

/// Converts a plan with calibrated codes: kept tensors stream as in [`convert`], the others come from
/// [`driver::calibrate`] layer by layer. Also returns the KL divergence on held-out calibration windows.
pub fn convert_calibrated<B: SecondMoments>(
    backend: &B,
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    calibration: Calibration,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(Vec<Cost>, Option<f64>)> {
    write_decided(plan, sink)?;
    let mut costs = stream(source, plan, sink, progress, |step| matches!(step.action, Action::Keep(_)))?;
    let place: BTreeMap<TensorId, usize> = plan.steps.iter().enumerate().map(|(i, s)| (s.id, i)).collect();
    let scheme = |id| match plan.steps[*place.get(&id)?].action {
        Action::Quantize(scheme) => Some(scheme),
        Action::Keep(_) => None,
    };
    let request = driver::Request {
        windows: calibration.windows,
        held_out: calibration.held_out,
        scheme: &scheme,
        activations: plan.recipe.format.activations,
        settings: calibration.settings,
    };
    let held_out = driver::calibrate(backend, &source.config, source, &request, &mut |tensor| {
        let at = place[&tensor.id];
        let step = &plan.steps[at];
        costs[at] = match tensor.solved.error.is_finite() {
            true => Cost { error: tensor.solved.error, error_nearest: Some(tensor.solved.error_nearest) },
            // Embeddings have no input to weigh errors with.
            false => Cost {
                error: tensor.solved.q.distortion(&source.read(step.id)?.to_f32(), None).relative(),
                error_nearest: None,
            },
        };
        let parts = pack(tensor.solved.q, plan, step)?;
        write_rows(plan, sink, step, 0..step.rows(), &parts)?;
        progress((step.rows() * step.cols()) as u64);
        Ok(())
    })?;
    Ok((costs, held_out))
}

/// What calibrated codes are based on.
#[derive(Clone, Copy, Debug)]
pub struct Calibration<'a> {
    /// Token windows of one length.
    pub windows: &'a [Vec<u32>],
    /// How many of them, the last ones, are kept out of the statistics.
    pub held_out: usize,
    /// How codes are chosen.
    pub settings: Settings,
}

/// Converts the chosen steps in parallel over chunks of rows, without calibration.
fn stream(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    progress: &(dyn Fn(u64) + Sync),
    chosen: impl Fn(&Step) -> bool,
) -> Result<Vec<Cost>> {
    let steps = plan.steps.iter().enumerate().filter(|(_, step)| chosen(step));
    let jobs: Vec<Job> = steps.flat_map(|(i, step)| jobs(i, step)).collect();
    let done: Vec<Distortion> = jobs
        .par_iter()
        .map(|job| {
            let step = &plan.steps[job.step];
            let distortion = run(source, plan, sink, step, job.rows.clone())
                .with_context(|| format!("{}: `{}`", source.path.display(), step.id))?;
            progress((job.rows.len() * step.cols()) as u64);
            Ok(distortion)
        })
        .collect::<Result<_>>()?;
    // Summed in job order, so that the last digit does not depend on which thread was faster.
    let mut distortions = vec![Distortion::default(); plan.steps.len()];
    for (job, distortion) in jobs.iter().zip(done) {
        distortions[job.step] += distortion;
    }
    Ok(distortions.iter().map(|d| Cost { error: d.relative(), error_nearest: None }).collect())
}

/// Some rows of one step.
struct Job {
    step: usize,
    rows: Range<usize>,
}

/// Cuts a step into chunks of whole rows, never across a run of rows that is reordered.
fn jobs(index: usize, step: &Step) -> Vec<Job> {
    if step.values.is_some() {
        return Vec::new();
    }
    let rows = step.rows();
    if step.shape.len() == 1 {
        return vec![Job { step: index, rows: 0..rows }];
    }
    let run = step.row_order.as_ref().map_or(1, Vec::len);
    let chunk = (CHUNK_WEIGHTS / step.cols().max(1)).max(1).next_multiple_of(run).min(rows.max(1));
    (0..rows).step_by(chunk).map(|r| Job { step: index, rows: r..(r + chunk).min(rows) }).collect()
}

/// Writes what the plan alone decides: computed tensors and parts of fixed content.
fn write_decided(plan: &Plan, sink: &dyn Sink) -> Result<()> {
    for step in &plan.steps {
        if let Some(values) = &step.values {
            sink.write(step.parts.start, 0, &bytes_from_floats(Dtype::F32, values))?;
        }
        for index in step.parts.clone() {
            if let Some(bytes) = &plan.outputs[index].fixed {
                sink.write(index, 0, bytes)?;
            }
        }
    }
    Ok(())
}

fn run(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    step: &Step,
    rows: Range<usize>,
) -> Result<Distortion> {
    let matrix = source.read_rows(step.id, rows.clone())?;
    let [chunk_rows, cols] = matrix.dims();
    let mut weights = vec![0.0; chunk_rows * cols];
    matrix.decode_rows(0, &mut weights);
    if let Some(at) = first_non_finite(&weights) {
        bail!(
            "row {}, column {}: found {}, wanted finite weights; the checkpoint is damaged or was saved from a diverged \
             run",
            rows.start + at / cols,
            at % cols,
            weights[at]
        );
    }
    let (distortion, parts) = match step.action {
        Action::Keep(dtype) => (Distortion::default(), vec![keep(&matrix, &weights, dtype, step)]),
        Action::Quantize(scheme) => quantize(&weights, cols, scheme, plan, step)?,
    };
    write_rows(plan, sink, step, rows, &parts)?;
    Ok(distortion)
}

/// Returns the bytes of kept rows in the output's number type and row order.
fn keep(matrix: &Matrix, weights: &[f32], dtype: Dtype, step: &Step) -> Vec<u8> {
    let bytes = match matrix {
        Matrix::Dense(dense) if dense.dtype == dtype => dense.bytes.clone(),
        _ => bytes_from_floats(dtype, weights),
    };
    let row_bytes = step.cols() * dtype.bytes();
    match &step.row_order {
        None => bytes,
        Some(order) => bytes
            .chunks(row_bytes * order.len())
            .flat_map(|run| order.iter().flat_map(|&row| &run[row * row_bytes..(row + 1) * row_bytes]))
            .copied()
            .collect(),
    }
}

/// Returns what rounding to nearest costs, and the packed parts in the output's row order.
fn quantize(
    weights: &[f32],
    cols: usize,
    scheme: Scheme,
    plan: &Plan,
    step: &Step,
) -> Result<(Distortion, Vec<Vec<u8>>)> {
    let rows = weights.len() / cols;
    let q = fit(scheme, weights, rows, cols, None, plan.recipe.scale_rule);
    Ok((q.distortion(weights, None), pack(q, plan, step)?))
}

/// Returns the packed parts of some rows (whole runs of reordered ones) in the output's row order.
fn pack(q: QTensor, plan: &Plan, step: &Step) -> Result<Vec<Vec<u8>>> {
    let activations = plan.recipe.activations(step.id);
    match &step.row_order {
        None => plan.recipe.dialect.pack(&q, activations),
        Some(order) => {
            let run = order.len();
            let order: Vec<usize> = (0..q.rows).map(|row| row / run * run + order[row % run]).collect();
            plan.recipe.dialect.pack(&q.permute_rows(&order), activations)
        }
    }
}

/// Writes those rows of each part.
fn write_rows(
    plan: &Plan,
    sink: &dyn Sink,
    step: &Step,
    rows: Range<usize>,
    parts: &[Vec<u8>],
) -> Result<()> {
    let streamed = step.parts.clone().filter(|&index| plan.outputs[index].fixed.is_none());
    for (index, bytes) in streamed.zip(parts) {
        let row_bytes = plan.outputs[index].spec.bytes() / step.rows() as u64;
        debug_assert_eq!(bytes.len() as u64, row_bytes * rows.len() as u64);
        sink.write(index, rows.start as u64 * row_bytes, bytes)?;
    }
    Ok(())
}
