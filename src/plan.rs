//! What will be done: every tensor's final scheme, every size, every refusal and every fallback, decided from headers
//! before the first weight byte is read.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use crate::checkpoint::{Checkpoint, Stored, TensorInfo};
use crate::container::{Storage, TensorSpec};
use crate::dialect::StoredPart;
use crate::model::config::Config;
use crate::names::TensorId;
use crate::num::Codec;
use crate::recipe::Recipe;
use crate::recipe::formats::fallback;
use crate::recipe::rules::{self, Rule};
use crate::rows::Place;
use crate::scheme::{Activations, Choice, Scheme};
use crate::tensor::Dtype;

/// What happens to one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Plain floats, as this number type.
    Keep(Dtype),
    /// Rounded to this scheme.
    Quantize(Scheme),
    /// Its codes and scales as they are stored, which mean the same in this scheme.
    Copy(Scheme),
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Which tensor.
    pub id: TensorId,
    /// Row-major shape in the source.
    pub shape: Vec<usize>,
    /// What happens to it.
    pub action: Action,
    /// What engines do to the inputs of its linear.
    pub inputs: Activations,
    /// Why it is not what the format asks for.
    pub fallback: Option<String>,
    /// Where the output keeps it.
    pub place: Place,
    /// The content, where it does not come from the source.
    pub values: Option<Vec<f32>>,
    /// Indices into [`Plan::outputs`] of the stored tensors it becomes.
    pub parts: Range<usize>,
    /// Index of the scale of its linear's inputs, where calibration fixes one.
    pub input_scale: Option<usize>,
}

/// A stored tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedTensor {
    /// Name, number type, shape.
    pub spec: TensorSpec,
    /// The bytes, where they are known before any weight is read.
    pub fixed: Option<Vec<u8>>,
}

/// A conversion, decided.
pub struct Plan {
    /// What was asked for.
    pub recipe: Recipe,
    /// What happens, in output order.
    pub steps: Vec<Step>,
    /// Stored tensors of the output, in file order.
    pub outputs: Vec<PlannedTensor>,
    /// What the output cannot say of the model ([`Dialect::losses`](crate::dialect::Dialect::losses)).
    pub losses: Vec<String>,
    /// Whether the output asks for an FP8 cache of keys and values.
    pub fp8_cache: bool,
}

impl Plan {
    /// Decides everything from the source's headers. Errors name the tensor and the cure.
    pub fn new(source: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        let losses = recipe.dialect.losses(&source.config);
        let mut plan =
            Plan { recipe: *recipe, steps: Vec::new(), outputs: Vec::new(), losses, fp8_cache: false };
        let config = &source.config;
        let rules = recipe.rules(config);
        for (&id, info) in &source.tensors {
            let dtype = match (recipe.format.base.dtype(), info.stored) {
                (Some(dtype), _) | (None, Stored::Dense(dtype)) => dtype,
                // What the tensor becomes if a mix keeps it dense.
                (None, Stored::Quantized(..)) => Dtype::BF16,
            };
            let choice = chosen(&rules, id, config);
            let (action, inputs, fallback) = decide(recipe, choice, id, &info.shape, dtype)?;
            let action = copied(recipe, action, inputs, info)
                .with_context(|| format!("{}: `{id}`", source.path.display()))?;
            let place = recipe.dialect.place(id, info.shape[0], config);
            let step = Step { inputs, fallback, ..Step::new(id, info.shape.clone(), action, place) };
            plan.push(step, info.rounding.scale())?;
        }
        plan.losses.extend(plan.losses_of(source));
        for (id, values) in recipe.dialect.computed_tensors(config) {
            let place = recipe.dialect.place(id, values.len(), config);
            let step = Step::new(id, vec![values.len()], Action::Keep(Dtype::F32), place);
            plan.push(Step { values: Some(values), ..step }, None)?;
        }
        Ok(plan)
    }

    /// Returns what the source says beside its weights and the output does not.
    fn losses_of(&self, source: &Checkpoint) -> Vec<String> {
        let rounded = |step: &&Step| {
            let rounding = source.tensors.get(&step.id).map(|info| info.rounding);
            step.inputs == Activations::Full && rounding.is_some_and(|rounding| rounding != Activations::Full)
        };
        let rounded = match self.steps.iter().filter(rounded).count() {
            0 => None,
            count => Some(format!(
                "engines round the inputs of {count} linears of the source, but not of the output"
            )),
        };
        let cache = !source.kv_scales().is_empty() && self.recipe.dialect.kv_scales(0).is_none();
        let cache =
            cache.then(|| "the source's scales of keys and values in an FP8 cache have no place".to_string());
        rounded.into_iter().chain(cache).collect()
    }

    /// Appends a step and the stored tensors it becomes; `input_scale` is the source's fixed scale of the inputs, if it has
    /// one.
    fn push(&mut self, mut step: Step, input_scale: Option<f32>) -> Result<()> {
        let outputs = self.outputs_of(&step)?;
        if let Some(other) = self.stored_already(&step, &outputs)? {
            (step.parts, step.input_scale) = (other.parts.clone(), other.input_scale);
            self.steps.push(step);
            return Ok(());
        }
        step.parts = self.outputs.len()..self.outputs.len() + outputs.len();
        self.outputs.extend(outputs);
        if step.inputs.is_static() {
            let scale = self.recipe.dialect.input_scale();
            let scale = scale.with_context(|| {
                format!("dialect `{}` has no place for the scales of inputs", self.recipe.dialect.name())
            })?;
            let name = format!("{}{scale}", step.place.prefix());
            let spec = TensorSpec { name, storage: Storage::Plain(Dtype::F32), shape: vec![1] };
            step.input_scale = Some(self.outputs.len());
            let copied = input_scale.filter(|_| matches!(step.action, Action::Copy(_)));
            self.outputs
                .push(PlannedTensor { spec, fixed: copied.map(|scale| scale.to_le_bytes().to_vec()) });
        }
        self.steps.push(step);
        Ok(())
    }

    /// Returns the stored tensors that a step becomes.
    fn outputs_of(&self, step: &Step) -> Result<Vec<PlannedTensor>> {
        let place = &step.place;
        let scheme = match step.action {
            Action::Quantize(scheme) | Action::Copy(scheme) => scheme,
            Action::Keep(dtype) => {
                let shape = place.shape(step.shape.get(1).copied());
                let spec = TensorSpec { name: place.name.clone(), storage: Storage::Plain(dtype), shape };
                return Ok(vec![PlannedTensor { spec, fixed: None }]);
            }
        };
        let parts = self.recipe.dialect.parts(&scheme, step.inputs, place.stored_rows(), step.cols())?;
        let output = |part: StoredPart| {
            let name = format!("{}{}", place.prefix(), part.suffix);
            let spec = TensorSpec { name, storage: part.storage, shape: part.shape_at(place) };
            PlannedTensor { spec, fixed: part.fixed }
        };
        Ok(parts.into_iter().map(output).collect())
    }

    /// Returns the earlier step that shares its stored tensors with this one (fused q, k, v), if there is one.
    fn stored_already(&self, step: &Step, outputs: &[PlannedTensor]) -> Result<Option<&Step>> {
        if step.place == Place::whole(step.place.name.clone(), step.rows()) {
            return Ok(None);
        }
        let mut in_layer = self.steps.iter().rev().take_while(|other| other.id.layer == step.id.layer);
        let Some(other) = in_layer.find(|other| other.place.name == step.place.name) else {
            return Ok(None);
        };
        ensure!(
            self.outputs[other.parts.clone()] == *outputs && other.inputs == step.inputs,
            "`{}` and `{}` are stored in one tensor (`{}`), but one becomes {} and the other {}; choose one format for \
             both",
            other.id,
            step.id,
            step.place.name,
            other.action.name(),
            step.action.name()
        );
        Ok(Some(other))
    }

    /// Asks for an FP8 cache with these scales of every layer's keys and values.
    ///
    /// # Errors
    /// If the dialect has no place for them.
    pub fn add_kv_scales(&mut self, scales: &[[f32; 2]]) -> Result<()> {
        for (layer, pair) in scales.iter().enumerate() {
            let names = self.recipe.dialect.kv_scales(layer);
            let names = names.context("the dialect has no place for the scales of keys and values")?;
            for (name, scale) in names.into_iter().zip(pair) {
                let spec = TensorSpec { name, storage: Storage::Plain(Dtype::F32), shape: vec![1] };
                self.outputs.push(PlannedTensor { spec, fixed: Some(scale.to_le_bytes().to_vec()) });
            }
        }
        self.fp8_cache = true;
        Ok(())
    }

    /// Whether codes of any tensor are copied.
    pub fn copies(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.action, Action::Copy(_)))
    }

    /// Returns the stored tensors in file order.
    pub fn specs(&self) -> Vec<TensorSpec> {
        self.outputs.iter().map(|output| output.spec.clone()).collect()
    }

    /// Returns the steps that do not get what the format asks for, with the reason.
    pub fn fallbacks(&self) -> impl Iterator<Item = (&Step, &str)> {
        self.steps.iter().filter_map(|step| Some((step, step.fallback.as_deref()?)))
    }

    /// Whether engines round the inputs of any linear.
    pub fn rounds_inputs(&self) -> bool {
        self.steps.iter().any(|step| step.inputs != Activations::Full)
    }

    /// Returns the number of weights.
    pub fn weights(&self) -> u64 {
        self.steps.iter().map(|s| (s.rows() * s.cols()) as u64).sum()
    }

    /// Returns the bytes of all tensors, without headers and padding.
    pub fn payload_bytes(&self) -> u64 {
        self.outputs.iter().map(|output| output.spec.bytes()).sum()
    }
}

/// Returns what the rules choose for a tensor. Matrices that are stored as one become what the rules choose for the most
/// precise of them, as in llama.cpp, whose mixes take a fused q, k, v for v.
fn chosen(rules: &[Rule], id: TensorId, config: &Config) -> Option<Choice> {
    let Some(share) = config.share(id) else { return rules::choose(rules, id) };
    let together = share.fused.roles.iter().map(|&role| rules::choose(rules, TensorId { role, ..id }));
    let bits = |choice: &Choice| choice.scheme.stored_bits(1, choice.scheme.block_cols().max(256));
    together.collect::<Option<Vec<_>>>()?.into_iter().max_by_key(bits)
}

/// Returns what happens to a tensor, and why if it is not what the format asks for.
fn decide(
    recipe: &Recipe,
    choice: Option<Choice>,
    id: TensorId,
    shape: &[usize],
    stored: Dtype,
) -> Result<(Action, Activations, Option<String>)> {
    let keep = Action::Keep(recipe.dialect.kept_dtype(id, shape, stored));
    let (Some(Choice { scheme: wanted, inputs }), &[_, cols]) = (choice, shape) else {
        return Ok((keep, Activations::Full, None));
    };
    let got = fallback(wanted, cols);
    if got == Some(wanted) {
        return Ok((Action::Quantize(wanted), inputs, None));
    }
    // A linear that stays as it is has its inputs left alone too.
    let inputs = if got.is_some() { inputs } else { Activations::Full };
    let action = got.map_or(keep, Action::Quantize);
    let note = format!(
        "rows of {cols} columns are no multiple of {}: {} instead of {}",
        wanted.block_cols(),
        action.name(),
        wanted.name
    );
    if recipe.no_fallback {
        bail!("`{id}`: {note}; drop `--no-fallback` to accept it, or choose a format with smaller blocks");
    }
    Ok((action, inputs, Some(note)))
}

/// Returns the action for a tensor that may be quantized already: its codes are copied where they mean what is wanted.
///
/// # Errors
/// If codes would have to be chosen anew and the recipe does not accept that.
fn copied(recipe: &Recipe, action: Action, inputs: Activations, info: &TensorInfo) -> Result<Action> {
    let (Action::Quantize(wanted), Stored::Quantized(stored, _)) = (action, info.stored) else {
        return Ok(action);
    };
    // The same grid under the wanted name. A dialect that takes any float for scales takes the stored type.
    let same = Scheme { name: wanted.name, ..stored };
    let float = |codec| matches!(codec, Codec::F32 | Codec::F16 | Codec::BF16);
    let alike = Scheme { scale: wanted.scale, ..same } == wanted
        && (stored.scale == wanted.scale || float(stored.scale) && float(wanted.scale));
    let spelled = || recipe.dialect.parts(&same, inputs, info.shape[0], info.shape[1]).is_ok();
    let inputs_known = !inputs.is_static() || info.rounding.is_static();
    if alike && inputs_known && spelled() {
        return Ok(Action::Copy(same));
    }
    ensure!(
        recipe.allow_requantize,
        "already quantized ({}), and not on the grid of {}; start from the original model, pass `--allow-requantize` and \
         lose quality twice, or unpack it with `--format bf16`",
        stored.name,
        wanted.name
    );
    Ok(action)
}

impl Step {
    fn new(id: TensorId, shape: Vec<usize>, action: Action, place: Place) -> Self {
        let (inputs, fallback, values) = (Activations::Full, None, None);
        Step { id, shape, action, inputs, fallback, place, values, parts: 0..0, input_scale: None }
    }

    /// Returns the rows; a vector is a column of one-element rows, so that its elements can be reordered like rows.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Returns the columns; 1 for a vector.
    pub fn cols(&self) -> usize {
        self.shape[1..].iter().product()
    }
}

impl Action {
    /// Returns the scheme's or number type's name.
    pub fn name(&self) -> String {
        match self {
            Action::Keep(dtype) => dtype.to_string().to_lowercase(),
            Action::Quantize(scheme) => scheme.name.to_string(),
            Action::Copy(scheme) => format!("{}, copied", scheme.name),
        }
    }

    /// Returns the scheme of codes; `None` for plain floats.
    pub fn scheme(self) -> Option<Scheme> {
        match self {
            Action::Keep(_) => None,
            Action::Quantize(scheme) | Action::Copy(scheme) => Some(scheme),
        }
    }
}
