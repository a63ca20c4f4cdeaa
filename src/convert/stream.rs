//! Nearest codes in chunks of rows: read, fit, pack, write, in parallel; memory does not grow with the model.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::queue::{self, CHUNK_WEIGHTS, Job};
use super::{pack, write_decided, write_rows};
use crate::calib::imatrix::Imatrix;
use crate::checkpoint::Checkpoint;
use crate::container::{FileHash, Sink};
use crate::method::solve::Outcome;
use crate::names::TensorId;
use crate::plan::{Action, Plan, Step};
use crate::scheme::fit::{self, fit_under};
use crate::scheme::{Distortion, QTensor, Scheme};
use crate::tensor::{Dtype, Matrix, bytes_from_floats, first_non_finite, floats_from_bytes};

/// Returns the memory a conversion takes beside the program itself, whatever the model's size.
pub fn peak_bytes(plan: &Plan, threads: usize) -> u64 {
    let widest = plan.steps.iter().map(|step| step.cols()).max().unwrap_or(0);
    (threads * CHUNK_WEIGHTS.max(widest) * 12) as u64
}

/// Converts every tensor of the plan with nearest codes, errors weighed by `imatrix` where it has the tensor, in parallel
/// over chunks of rows. `hashes` of the source's weight files, in their order, are found on the way; none need be given.
/// Returns the cost of each step, in plan order. `progress` receives how many weights were finished.
pub fn convert(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    imatrix: Option<&Imatrix>,
    hashes: &[FileHash],
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Outcome>> {
    let known = |step: &Step| step.input_scale.is_none_or(|index| plan.outputs[index].fixed.is_some());
    ensure!(
        plan.steps.iter().all(known),
        "`{}` has scales that only calibration finds",
        plan.recipe.format.name
    );
    write_decided(plan, sink)?;
    stream(source, plan, sink, imatrix, hashes, progress, |_| true)
}

/// Converts the chosen steps in parallel over chunks of rows, without calibration.
pub(super) fn stream(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    imatrix: Option<&Imatrix>,
    hashes: &[FileHash],
    progress: &(dyn Fn(u64) + Sync),
    chosen: impl Fn(&Step) -> bool,
) -> Result<Vec<Outcome>> {
    let steps = || plan.steps.iter().enumerate().filter(|(_, step)| chosen(step));
    let globals = shared_factors(source, steps().map(|(_, step)| step))?;
    let jobs = queue::jobs(source, steps(), hashes)?;
    // Taken one by one in their order, not in halves: what one thread reads, the others have in reach.
    let done =
        jobs.iter().enumerate().par_bridge().map_init(Default::default, |(weights, buffer), (at, job)| {
            let (step, rows) = match job {
                Job::Hash { block, ahead } => {
                    ahead.iter().for_each(|ahead| hashes[ahead.file].read_ahead(ahead.start));
                    hashes[block.file].hash_block(block.start, buffer)?;
                    return Ok(None);
                }
                Job::Convert { step, rows } => (*step, rows),
            };
            let step_plan = &plan.steps[step];
            let given = Given {
                global: globals.of(step_plan.id),
                importances: imatrix.map(|m| m.of(step_plan.id, step_plan.cols())).transpose()?.flatten(),
            };
            let distortion = run(source, plan, sink, step_plan, rows.clone(), given, weights)
                .with_context(|| format!("{}: `{}`", source.path.display(), step_plan.id))?;
            progress((rows.len() * step_plan.cols()) as u64);
            Ok(Some((at, step, distortion)))
        });
    let mut done: Vec<_> = done.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    // Summed in job order, so that the last digit does not depend on which thread was faster.
    done.sort_unstable_by_key(|&(at, _, _)| at);
    let mut distortions = vec![Distortion::default(); plan.steps.len()];
    for (_, step, distortion) in done {
        distortions[step] += distortion;
    }
    Ok(distortions.iter().map(|d| Outcome { error: d.relative(), ..Outcome::default() }).collect())
}

/// The factors of schemes that have one for a whole tensor: one for all linears that engines join.
pub struct SharedFactors(BTreeMap<TensorId, f32>);

impl SharedFactors {
    /// Returns a tensor's factor, if its scheme has one.
    pub fn of(&self, id: TensorId) -> Option<f32> {
        self.0.get(&joined(id)).copied()
    }
}

/// Reads the weights of these steps for the factors that their schemes share.
pub fn shared_factors<'a>(
    source: &Checkpoint,
    steps: impl Iterator<Item = &'a Step>,
) -> Result<SharedFactors> {
    let mut members: BTreeMap<TensorId, (Scheme, Vec<&Step>)> = BTreeMap::new();
    for step in steps {
        if let Action::Quantize(scheme) = step.action
            && fit::global_scale(&scheme, 1.0).is_some()
        {
            members.entry(joined(step.id)).or_insert((scheme, vec![])).1.push(step);
        }
    }
    let factor = |(id, (scheme, members)): (TensorId, (Scheme, Vec<&Step>))| {
        let mut amax = 0f32;
        for step in members {
            for rows in queue::chunks(step) {
                amax = amax.max(fit::amax(&source.read_rows(step.id, rows)?.to_f32()));
            }
        }
        Ok((id, fit::global_scale(&scheme, amax).unwrap_or(1.0)))
    };
    Ok(SharedFactors(members.into_par_iter().map(factor).collect::<Result<_>>()?))
}

/// Returns the tensor that stands for all that engines join with this one.
fn joined(id: TensorId) -> TensorId {
    TensorId { role: id.role.joined(), ..id }
}

/// What a fit takes beside the weights.
#[derive(Clone, Copy)]
struct Given<'a> {
    /// The factor that the whole tensor shares.
    global: Option<f32>,
    /// `[cols]`
    importances: Option<&'a [f32]>,
}

/// Converts rows of one step; `weights` is memory to decode them in, kept from chunk to chunk.
fn run(
    source: &Checkpoint,
    plan: &Plan,
    sink: &dyn Sink,
    step: &Step,
    rows: Range<usize>,
    given: Given,
    weights: &mut Vec<f32>,
) -> Result<Distortion> {
    let matrix = source.read_rows(step.id, rows.clone())?;
    if let Action::Copy(scheme) = step.action {
        let parts = copy(source, matrix, scheme, plan, step, rows.clone())?;
        write_rows(plan, sink, step, rows, &parts)?;
        return Ok(Distortion::default());
    }
    let [chunk_rows, cols] = matrix.dims();
    weights.resize(chunk_rows * cols, 0.0);
    matrix.decode_rows(0, weights);
    let first_row = rows.start;
    let (distortion, parts) = match step.action {
        Action::Copy(_) => bail!("codes are copied, not converted"),
        Action::Keep(dtype) => {
            ensure_finite(weights, first_row, cols)?;
            let bytes = keep(&matrix, weights, dtype);
            let distortion = match &matrix {
                Matrix::Dense(dense) if dense.dtype == dtype => Distortion::default(),
                _ => rounding(weights, dtype, &bytes)?,
            };
            (distortion, vec![bytes])
        }
        Action::Quantize(scheme) => {
            let (rule, importances) = (plan.recipe.scale_rule, given.importances);
            let q = fit_under(given.global, scheme, weights, chunk_rows, cols, importances, rule);
            let distortion = q.distortion(weights, importances);
            // The sum of all squares (in F64, which holds the square of any F32) is finite exactly if all weights are.
            if !distortion.power.is_finite() {
                ensure_finite(weights, first_row, cols)?;
            }
            (distortion, pack(&q, plan, step)?)
        }
    };
    write_rows(plan, sink, step, rows, &parts)?;
    Ok(distortion)
}

/// Returns the parts of rows whose codes and scales stay as they are: the stored bytes where source and output spell them
/// alike, else the same numbers in the other spelling.
fn copy(
    source: &Checkpoint,
    matrix: Matrix,
    scheme: Scheme,
    plan: &Plan,
    step: &Step,
    rows: Range<usize>,
) -> Result<Vec<Vec<u8>>> {
    if source.spells(step.id, plan.recipe.dialect, step.inputs) {
        return Ok(source.read_parts(step.id, rows)?.into_iter().map(Into::into).collect());
    }
    match matrix {
        Matrix::Quantized(q) => pack(&QTensor { scheme, ..q }, plan, step),
        Matrix::Dense(_) => bail!("plain floats have no codes to copy"),
    }
}

/// Returns what a number type loses of finite values.
///
/// # Errors
/// Names the first value beyond the type's range.
fn rounding(weights: &[f32], dtype: Dtype, bytes: &[u8]) -> Result<Distortion> {
    let mut stored = vec![0.0; weights.len()];
    floats_from_bytes(dtype, bytes, &mut stored);
    if let Some(at) = first_non_finite(&stored) {
        bail!("{} lies beyond the range of {dtype}; use `--format bf16` or `f32`", weights[at]);
    }
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error = weights.iter().zip(&stored).map(|(x, y)| square(x - y)).sum();
    Ok(Distortion { error, power: weights.iter().map(|&x| square(x)).sum() })
}

/// Refuses NaN and infinities.
fn ensure_finite(weights: &[f32], first_row: usize, cols: usize) -> Result<()> {
    let Some(at) = first_non_finite(weights) else { return Ok(()) };
    bail!(
        "row {}, column {}: found {}, wanted finite weights; the checkpoint is damaged or was saved from a diverged run",
        first_row + at / cols,
        at % cols,
        weights[at]
    )
}

/// Returns the bytes of kept rows in the output's number type.
fn keep(matrix: &Matrix, weights: &[f32], dtype: Dtype) -> Vec<u8> {
    match matrix {
        Matrix::Dense(dense) if dense.dtype == dtype => dense.bytes.to_vec(),
        _ => bytes_from_floats(dtype, weights),
    }
}
