//! Codes chosen layer by layer on calibration inputs; kept tensors stream.

use std::collections::BTreeMap;

use anyhow::Result;

use super::stream::stream;
use super::{Cost, pack, write_decided, write_rows};
use crate::backend::SecondMoments;
use crate::calib::driver;
use crate::calib::settings::Settings;
use crate::checkpoint::Checkpoint;
use crate::container::Sink;
use crate::names::TensorId;
use crate::plan::{Action, Plan};

/// Converts a plan with calibrated codes: kept tensors stream as in [`super::convert`], the others come from
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
