//! Codes chosen layer by layer on calibration inputs; kept tensors stream.

use std::cell::Cell;
use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::journal::{FinishedLayer, FinishedTensor, Journal};
use super::stream::stream;
use super::{pack, read_rows, unpack, write_decided, write_rows};
use crate::backend::SecondMoments;
use crate::calib::choose::{Chosen, Search, choose};
use crate::calib::driver::{self, Calibrated, Finished, FinishedLayers, Request};
use crate::calib::settings::Settings;
use crate::calib::token_energies::TokenEnergies;
use crate::calib::tune::{Tuned, Tuning};
use crate::checkpoint::Checkpoint;
use crate::container::Sink;
use crate::method::solve::{Outcome, Solved};
use crate::model::{Model, TensorSource};
use crate::names::TensorId;
use crate::plan::{Action, Plan, Step};
use crate::scheme::{Activations, Choice};
use crate::tensor::{Dense, Matrix, bytes_from_floats, floats_from_bytes};

/// Converts a plan with calibrated codes: kept tensors stream as in [`super::convert`], the others come from
/// [`driver::calibrate`] layer by layer. Layers in `journal` are taken from what `sink` already holds. `progress` receives how
/// many weights were finished, `layer_done` the number of each finished layer. Also returns the KL divergence on held-out
/// calibration windows.
pub fn convert_calibrated<B: SecondMoments>(
    backend: &B,
    source: &Checkpoint,
    output: Draft,
    calibration: Calibration,
    progress: &(dyn Fn(u64) + Sync),
    layer_done: &dyn Fn(usize),
) -> Result<(Vec<Outcome>, Option<f64>)> {
    let Draft { plan, sink, journal } = output;
    write_decided(plan, sink)?;
    let place: BTreeMap<TensorId, usize> = plan.steps.iter().enumerate().map(|(i, s)| (s.id, i)).collect();
    let choices = choices(plan);
    let choice = |id| choices.get(&id).copied();
    let finished = Recovery { output, place: &place, broken: Cell::new(false) };
    let request = Request { finished: Some(&finished), ..calibration.request(plan, &choice) };
    let kept = |step: &Step| !matches!(step.action, Action::Quantize(_)) && !request.rewrites(step.id);
    let mut outcomes = stream(source, plan, sink, None, &[], progress, kept)?;
    let mut layer = Vec::new();
    let held_out = driver::calibrate(backend, &source.config, source, &request, &mut |done| {
        let (at, outcome) = match &done {
            Finished::Layer(index) => {
                let tensors = std::mem::take(&mut layer);
                layer_done(*index);
                let known = *index < journal.layers().len() && !finished.broken.get();
                return match known {
                    true => Ok(()),
                    false => journal.add_layer(FinishedLayer { layer: *index, tensors }),
                };
            }
            Finished::Rewritten(id, _) => (place[id], None),
            Finished::Quantized(done) => (place[&done.id], Some(done.solved.outcome)),
        };
        let step = &plan.steps[at];
        output.write(step, done)?;
        if let Some(outcome) = outcome {
            outcomes[at] = outcome;
            progress((step.rows() * step.cols()) as u64);
        }
        if step.id.layer.is_some() {
            let hash = hash(&output.read(step)?);
            layer.push(FinishedTensor { name: step.id.hf_name(), hash, outcome });
        }
        Ok(())
    })?;
    Ok((outcomes, held_out))
}

/// An output in the making.
#[derive(Clone, Copy)]
pub struct Draft<'a> {
    /// What it will hold.
    pub plan: &'a Plan,
    /// Where its bytes go.
    pub sink: &'a dyn Sink,
    /// What is finished.
    pub journal: &'a Journal,
}

impl Draft<'_> {
    /// Writes what calibration has finished of a step.
    fn write(&self, step: &Step, done: Finished) -> Result<()> {
        let Draft { plan, sink, .. } = *self;
        let Solved { q, outcome } = match done {
            Finished::Layer(_) => return Ok(()),
            Finished::Rewritten(_, values) => return write_vector(plan, sink, step, &values),
            Finished::Quantized(done) => done.solved,
        };
        ensure!(
            !(outcome.deviation.kept_nearest && plan.recipe.no_fallback),
            "`{}` ends with the codes nearest to its weights, since {}; give more `--calib-tokens`, or leave \
             `--no-fallback` away",
            step.id,
            match outcome.tokens {
                Some(0) => "no token of the calibration text reached it",
                _ => "calibrated ones were worse",
            }
        );
        write_rows(plan, sink, step, 0..step.rows(), &pack(&q, plan, step)?)?;
        if let Some(index) = step.input_scale {
            let scale = outcome.input_scale;
            let scale = scale.with_context(|| format!("no input scale was found for `{}`", step.id))?;
            sink.write(index, 0, &scale.to_le_bytes())?;
        }
        Ok(())
    }

    /// Reads back the parts of a step that are not fixed.
    fn read(&self, step: &Step) -> Result<Vec<Vec<u8>>> {
        read_rows(self.plan, self.sink, step)
    }
}

fn hash(parts: &[Vec<u8>]) -> String {
    let mut hash = blake3::Hasher::new();
    parts.iter().for_each(|part| {
        hash.update(part);
    });
    hash.finalize().to_hex().to_string()
}

/// The layers that an interrupted run has written.
struct Recovery<'a> {
    output: Draft<'a>,
    place: &'a BTreeMap<TensorId, usize>,
    /// Whether bytes were found that are not what the journal says: that layer and all later ones are made again.
    broken: Cell<bool>,
}

impl FinishedLayers for Recovery<'_> {
    fn layer(&self, layer: usize) -> Result<Option<Vec<Finished>>> {
        let Some(record) = self.output.journal.layers().get(layer) else { return Ok(None) };
        let mut tensors = Vec::new();
        for tensor in &record.tensors {
            match self.tensor(tensor)? {
                Some(tensor) if !self.broken.get() => tensors.push(tensor),
                _ => {
                    self.broken.set(true);
                    return Ok(None);
                }
            }
        }
        Ok(Some(tensors))
    }
}

impl Recovery<'_> {
    /// Reads a tensor back; `None` if its bytes are not those that were noted.
    fn tensor(&self, tensor: &FinishedTensor) -> Result<Option<Finished>> {
        let plan = self.output.plan;
        let found = TensorId::from_hf(&tensor.name).and_then(|id| self.place.get(&id));
        let step =
            &plan.steps[*found.with_context(|| format!("the journal has an unknown `{}`", tensor.name))?];
        let parts = self.output.read(step)?;
        if hash(&parts) != tensor.hash {
            return Ok(None);
        }
        Ok(Some(match (step.action, tensor.outcome) {
            (Action::Keep(dtype), None) => {
                let mut values = vec![0.0; step.rows()];
                floats_from_bytes(dtype, &parts[0], &mut values);
                Finished::Rewritten(step.id, values)
            }
            (Action::Quantize(scheme), Some(outcome)) => {
                let q = unpack(scheme, &parts, plan, step)?;
                Finished::Quantized(Calibrated { id: step.id, solved: Solved { q, outcome } })
            }
            _ => bail!("the journal says of `{}` what the plan does not", tensor.name),
        }))
    }
}

/// Returns the settings that suit the source under this plan, found on `calibration`'s windows, from its settings on.
pub fn choose_settings<B: SecondMoments>(
    backend: &B,
    source: &Checkpoint,
    plan: &Plan,
    calibration: Calibration,
    search: &Search,
) -> Result<Chosen> {
    let choices = choices(plan);
    let choice = |id| choices.get(&id).copied();
    let request = calibration.request(plan, &choice);
    choose(backend, &source.config, source, &request, search)
}

/// Returns what every tensor that is quantized becomes.
fn choices(plan: &Plan) -> BTreeMap<TensorId, Choice> {
    let quantized = plan.steps.iter().filter_map(|step| match step.action {
        Action::Quantize(scheme) => Some((step.id, Choice { scheme, inputs: step.inputs })),
        Action::Keep(_) | Action::Copy(_) => None,
    });
    quantized.collect()
}

impl<'a> Calibration<'a> {
    fn request(&self, plan: &Plan, choice: &'a (dyn Fn(TensorId) -> Option<Choice> + Sync)) -> Request<'a> {
        Request {
            windows: self.windows,
            energies: self.energies,
            held_out: self.held_out,
            choice,
            rounds_inputs: plan.rounds_inputs(),
            settings: self.settings,
            finished: None,
            room: self.room,
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
    /// How much each token of each window matters; none if all count alike.
    pub energies: &'a [TokenEnergies],
    /// How many of them, the last ones, are kept out of the statistics.
    pub held_out: usize,
    /// How codes are chosen.
    pub settings: Settings,
    /// Device memory for what waits between two uses, bytes; `None`: as much as it takes.
    pub room: Option<u64>,
}

/// Tunes the gains of a written output's norms and writes them; `None` if that found nothing better. `step_done` hears of
/// each of at most [`crate::calib::tune::STEPS`] steps; `outcomes` are those of the written tensors.
///
/// # Errors
/// If the output cannot be read back, or the backend fails.
pub fn tune_gains<B: SecondMoments>(
    backend: &B,
    source: &Checkpoint,
    output: Draft,
    outcomes: &[Outcome],
    windows: &[Vec<u32>],
    step_done: &dyn Fn(),
) -> Result<Option<Tuned>> {
    let plan = output.plan;
    let place: BTreeMap<TensorId, &Step> = plan.steps.iter().map(|step| (step.id, step)).collect();
    let mut roundings = BTreeMap::new();
    for (step, outcome) in plan.steps.iter().zip(outcomes) {
        if let Action::Quantize(_) = step.action {
            let scale = || outcome.input_scale.with_context(|| format!("`{}` has no input scale", step.id));
            roundings.insert(step.id, step.inputs.with_scale(scale)?);
        }
    }
    let written = Written { plan, sink: output.sink, source, place: &place, roundings };
    let full = Model::load(backend, &source.config, source)?;
    let mut model = Model::load(backend, &source.config, &written)?;
    let stored = |id: TensorId, values: &[f32]| match place.get(&id).map(|step| step.action) {
        Some(Action::Keep(dtype)) => {
            let mut stored = vec![0.0; values.len()];
            floats_from_bytes(dtype, &bytes_from_floats(dtype, values), &mut stored);
            stored
        }
        _ => values.to_vec(),
    };
    let tuned = Tuning { backend, full: &full, windows, stored: &stored, step_done }.run(&mut model)?;
    for (id, values) in tuned.iter().flat_map(|tuned| &tuned.gains) {
        let step = place.get(id).with_context(|| format!("the plan has no `{id}`"))?;
        let Action::Keep(dtype) = step.action else { bail!("`{id}` is no kept tensor") };
        output.sink.replace(step.parts.start, &bytes_from_floats(dtype, values))?;
    }
    Ok(tuned)
}

/// The model as it is written so far: quantized tensors and norms from the output, the rest from the source.
struct Written<'a> {
    plan: &'a Plan,
    sink: &'a dyn Sink,
    source: &'a Checkpoint,
    place: &'a BTreeMap<TensorId, &'a Step>,
    /// What happens to the inputs of quantized linears.
    roundings: BTreeMap<TensorId, Activations<f32>>,
}

impl TensorSource for Written<'_> {
    fn read(&self, id: TensorId) -> Result<Matrix> {
        let Some(step) = self.place.get(&id) else { return self.source.read(id) };
        let parts = || read_rows(self.plan, self.sink, step);
        match step.action {
            Action::Quantize(scheme) => unpack(scheme, &parts()?, self.plan, step).map(Matrix::Quantized),
            Action::Keep(dtype) if id.role.is_norm() => {
                let mut values = vec![0.0; step.rows()];
                floats_from_bytes(dtype, &parts()?[0], &mut values);
                Ok(Matrix::Dense(Dense::from_f32(vec![values.len()], &values)))
            }
            Action::Keep(_) | Action::Copy(_) => self.source.read(id),
        }
    }

    fn rounding(&self, id: TensorId) -> Activations<f32> {
        self.roundings.get(&id).copied().unwrap_or_default()
    }
}
