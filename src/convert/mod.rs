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

use crate::container::Sink;
use crate::plan::{Plan, Step};
use crate::rows::Place;
use crate::scheme::{QTensor, Scheme};
use crate::tensor::{Dtype, bytes_from_floats};

pub use calibrated::{Calibration, Draft, choose_settings, convert_calibrated, tune_gains};
pub use stream::{SharedFactors, convert, peak_bytes, shared_factors};

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

/// Returns the packed parts of some rows.
fn pack(q: &QTensor, plan: &Plan, step: &Step) -> Result<Vec<Vec<u8>>> {
    plan.recipe.dialect.pack(q, step.inputs)
}

/// Inverse of [`pack`] for all rows of a step.
fn unpack(scheme: Scheme, parts: &[Vec<u8>], plan: &Plan, step: &Step) -> Result<QTensor> {
    let activations = step.inputs;
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    plan.recipe.dialect.unpack(&scheme, activations, step.rows(), step.cols(), &parts)
}

/// Writes those rows of each part where the output keeps them. What a part says of the whole stored tensor is the same for
/// every row, and written with the first.
fn write_rows(
    plan: &Plan,
    sink: &dyn Sink,
    step: &Step,
    rows: Range<usize>,
    parts: &[Vec<u8>],
) -> Result<()> {
    let Place { rows: map, .. } = &step.place;
    for (index, bytes) in streamed(plan, step).zip(parts) {
        let Some(row_bytes) = row_bytes(plan, step, index) else {
            if map.stored(rows.start) == 0 {
                sink.write(index, 0, bytes)?;
            }
            continue;
        };
        debug_assert_eq!(bytes.len(), row_bytes * rows.len());
        let write = |row: usize, piece: &[u8]| sink.write(index, (row * row_bytes) as u64, piece);
        map.scatter(rows.clone(), row_bytes, bytes, write)?;
    }
    Ok(())
}

/// Inverse of [`write_rows`] for all rows.
fn read_rows(plan: &Plan, sink: &dyn Sink, step: &Step) -> Result<Vec<Vec<u8>>> {
    let Place { rows: map, .. } = &step.place;
    let read = |index| {
        let bytes = sink.read(index)?;
        let Some(row_bytes) = row_bytes(plan, step, index) else { return Ok(bytes) };
        if map.is_contiguous() && step.rows() == step.place.stored_rows() {
            return Ok(bytes);
        }
        let span = map.span(0..step.rows());
        Ok(map.gather(0..step.rows(), row_bytes, &bytes[span.start * row_bytes..span.end * row_bytes]))
    };
    streamed(plan, step).map(read).collect()
}

/// The stored tensors of a step that are written row by row or once, not those of fixed content.
fn streamed(plan: &Plan, step: &Step) -> impl Iterator<Item = usize> {
    step.parts.clone().filter(|&index| plan.outputs[index].fixed.is_none())
}

/// Returns the bytes of a row; `None` where the stored tensor has one value for all rows.
fn row_bytes(plan: &Plan, step: &Step, output: usize) -> Option<usize> {
    let spec = &plan.outputs[output].spec;
    let of_rows = spec.shape.len() >= step.shape.len();
    of_rows.then(|| (spec.bytes() / step.place.stored_rows().max(1) as u64) as usize)
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
                let parts = pack(&q, &plan, step).unwrap();
                assert!(unpack(scheme, &parts, &plan, step).unwrap() == q, "{format:?}: {}", step.id);
                reordered += usize::from(!step.place.rows.is_contiguous());
            }
        }
        assert!(reordered > 0);
    }
}
