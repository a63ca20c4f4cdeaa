//! Carries a plan out: read, fit, choose codes, pack, write.
//!
//! - [`stream`](mod@stream): nearest codes in chunks of rows, in parallel, so that memory does not grow with the model.
//! - `queue`: the pieces of work of a stream and their order.
//! - [`calibrated`]: codes chosen layer by layer on calibration inputs.
//! - [`journal`]: what a calibrated conversion has finished, for the next run if this one is killed.

pub mod calibrated;
pub mod journal;
mod queue;
pub mod stream;

use std::ops::Range;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::container::Sink;
use crate::method::solve::Deviation;
use crate::plan::{Plan, Step};
use crate::scheme::{QTensor, Scheme};
use crate::tensor::{Dtype, bytes_from_floats};

pub use calibrated::{Calibration, Output, choose_settings, convert_calibrated, tune_gains};
pub use stream::{convert, peak_bytes};

/// What rounding cost one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Relative squared error of what was written, weighed as the method weighs it; 0 for kept tensors.
    pub error: f64,
    /// The same for codes rounded to nearest on the same scales, where the method chose others.
    pub error_nearest: Option<f64>,
    /// How strongly its input was smoothed (the α of [`crate::calib::smoothing`]).
    pub smoothing: Option<f32>,
    /// The scale of its input, where that is static.
    pub input_scale: Option<f32>,
    /// What calibration did not do as asked.
    #[serde(default)]
    pub deviation: Deviation,
}

/// Writes what the plan alone decides: computed tensors and parts of fixed content.
fn write_decided(plan: &Plan, sink: &dyn Sink) -> Result<()> {
    for step in &plan.steps {
        if let Some(values) = &step.values {
            sink.write(step.parts.start, 0, &bytes_from_floats(Dtype::F32, values))?;
        }
    }
    for (index, output) in plan.outputs.iter().enumerate() {
        if let Some(bytes) = &output.fixed {
            sink.write(index, 0, bytes)?;
        }
    }
    Ok(())
}

/// Returns the packed parts of some rows (whole runs of reordered ones) in the output's row order.
fn pack(q: QTensor, plan: &Plan, step: &Step) -> Result<Vec<Vec<u8>>> {
    let activations = step.inputs;
    match &step.row_order {
        None => plan.recipe.dialect.pack(&q, activations),
        Some(order) => {
            let run = order.len();
            let order: Vec<usize> = (0..q.rows).map(|row| row / run * run + order[row % run]).collect();
            plan.recipe.dialect.pack(&q.permute_rows(&order), activations)
        }
    }
}

/// Inverse of [`pack`] for all rows of a step.
fn unpack(scheme: Scheme, parts: &[Vec<u8>], plan: &Plan, step: &Step) -> Result<QTensor> {
    let activations = step.inputs;
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let q = plan.recipe.dialect.unpack(&scheme, activations, step.rows(), step.cols(), &parts)?;
    let Some(order) = &step.row_order else { return Ok(q) };
    let run = order.len();
    let mut place = vec![0; run];
    order.iter().enumerate().for_each(|(stored, &row)| place[row] = stored);
    let order: Vec<usize> = (0..q.rows).map(|row| row / run * run + place[row % run]).collect();
    Ok(q.permute_rows(&order))
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
        let spec = &plan.outputs[index].spec;
        if spec.shape.len() < step.shape.len() {
            // Of the whole tensor: every chunk of rows packs the same.
            if rows.start == 0 {
                sink.write(index, 0, bytes)?;
            }
            continue;
        }
        let row_bytes = spec.bytes() / step.rows() as u64;
        debug_assert_eq!(bytes.len() as u64, row_bytes * rows.len() as u64);
        sink.write(index, rows.start as u64 * row_bytes, bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::embedded;
    use crate::plan::Action;
    use crate::recipe::Recipe;
    use crate::recipe::formats::FORMATS;
    use crate::scheme::fit::{ScaleRule, fit};

    #[test]
    fn every_format_reads_back_the_tensors_that_it_packs() {
        let source = Checkpoint::open(&embedded::model_folder().unwrap()).unwrap();
        let mut reordered = 0;
        for format in
            FORMATS.iter().flat_map(|format| format.dialects.iter().map(move |d| (format.name, d.0)))
        {
            let plan = Plan::new(&source, &Recipe::new(format.0, Some(format.1), None).unwrap()).unwrap();
            for step in plan.steps.iter().filter(|step| step.id.layer.is_none_or(|layer| layer == 0)) {
                let Action::Quantize(scheme) = step.action else { continue };
                let weights = source.read(step.id).unwrap().to_f32();
                let q = fit(scheme, &weights, step.rows(), step.cols(), None, ScaleRule::Search);
                let parts = pack(q.clone(), &plan, step).unwrap();
                assert!(unpack(scheme, &parts, &plan, step).unwrap() == q, "{format:?}: {}", step.id);
                reordered += usize::from(step.row_order.is_some());
            }
        }
        assert!(reordered > 0);
    }
}
