//! Codes chosen layer by layer on calibration inputs; kept tensors stream.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::stream::stream;
use super::{Cost, pack, write_decided, write_rows};
use crate::backend::SecondMoments;
use crate::calib::choose::{Choice, Effort, Trial, choose};
use crate::calib::driver::{self, Finished};
use crate::calib::settings::Settings;
use crate::checkpoint::Checkpoint;
use crate::container::Sink;
use crate::names::TensorId;
use crate::plan::{Action, Plan, Step};
use crate::scheme::Scheme;
use crate::tensor::bytes_from_floats;

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
    let place: BTreeMap<TensorId, usize> = plan.steps.iter().enumerate().map(|(i, s)| (s.id, i)).collect();
    let schemes = schemes(plan);
    let scheme = |id| schemes.get(&id).copied();
    let request = calibration.request(plan, &scheme);
    let kept = |step: &Step| matches!(step.action, Action::Keep(_)) && !request.rewrites(step.id);
    let mut costs = stream(source, plan, sink, None, progress, kept)?;
    let held_out = driver::calibrate(backend, &source.config, source, &request, &mut |finished| {
        let tensor = match finished {
            Finished::Quantized(tensor) => tensor,
            Finished::Rewritten(id, values) => {
                return write_vector(plan, sink, &plan.steps[place[&id]], &values);
            }
        };
        let at = place[&tensor.id];
        let step = &plan.steps[at];
        costs[at] = match tensor.solved.error.is_finite() {
            true => Cost {
                error: tensor.solved.error,
                error_nearest: Some(tensor.solved.error_nearest),
                smoothing: tensor.smoothing,
            },
            // Embeddings have no input to weigh errors with.
            false => Cost {
                error: tensor.solved.q.distortion(&source.read(step.id)?.to_f32(), None).relative(),
                ..Cost::default()
            },
        };
        let parts = pack(tensor.solved.q, plan, step)?;
        write_rows(plan, sink, step, 0..step.rows(), &parts)?;
        progress((step.rows() * step.cols()) as u64);
        Ok(())
    })?;
    Ok((costs, held_out))
}

/// Returns the settings that suit the source under this plan, found on `calibration`'s windows, from its settings on.
pub fn choose_settings<B: SecondMoments>(
    backend: &B,
    source: &Checkpoint,
    plan: &Plan,
    calibration: Calibration,
    effort: Effort,
    tell: &dyn Fn(&Trial),
) -> Result<Choice> {
    let schemes = schemes(plan);
    let scheme = |id| schemes.get(&id).copied();
    let request = calibration.request(plan, &scheme);
    choose(backend, &source.config, source, &request, effort, tell)
}

/// Returns the scheme of every tensor that is quantized.
fn schemes(plan: &Plan) -> BTreeMap<TensorId, Scheme> {
    let quantized = plan.steps.iter().filter_map(|step| match step.action {
        Action::Quantize(scheme) => Some((step.id, scheme)),
        Action::Keep(_) => None,
    });
    quantized.collect()
}

impl<'a> Calibration<'a> {
    fn request(
        &self,
        plan: &Plan,
        scheme: &'a (dyn Fn(TensorId) -> Option<Scheme> + Sync),
    ) -> driver::Request<'a> {
        driver::Request {
            windows: self.windows,
            held_out: self.held_out,
            scheme,
            activations: plan.recipe.format.activations,
            settings: self.settings,
        }
    }
}

/// Writes a kept vector whose values are not the source's.
fn write_vector(plan: &Plan, sink: &dyn Sink, step: &Step, values: &[f32]) -> Result<()> {
    let Action::Keep(dtype) = step.action else { bail!("`{}` is no kept tensor", step.id) };
    write_rows(plan, sink, step, 0..step.rows(), &[bytes_from_floats(dtype, values)])
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
