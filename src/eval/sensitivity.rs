//! What each tensor costs: one group of tensors at a time is quantized, the rest of the model stays as it is, and the
//! divergence is measured. Groups are ranked by divergence per byte saved, the input of any choice of mixed formats.
//!
//! All windows wait together at one layer while the groups that begin there are tried, then move on, so no layer before
//! a group ever runs twice.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::samples::Samples;
use super::walk::{Pass, passes};
use super::{Estimate, Metric, Protocol, Text};
use crate::backend::{Backend, Batch};
use crate::model::Model;
use crate::names::{Role, TensorId};
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// Tensors that are quantized together.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The matrices, in the order of a forward pass.
    pub tensors: Vec<TensorId>,
}

/// What quantizing one group costs and saves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorGroup {
    /// What reports call it.
    pub name: String,
    /// What its tensors do, `down`.
    pub role: String,
    /// Their layer, if they share one.
    pub layer: Option<usize>,
    /// What they become.
    pub scheme: String,
    /// Number of weights.
    pub weights: u64,
    /// Bytes of the source minus bytes of the artifact.
    pub bytes_saved: u64,
    /// Mean KL(baseline ‖ model) with this group quantized alone.
    pub kld: Estimate,
    /// `kld` divided by the megabytes (10^6 bytes) saved.
    pub kld_per_megabyte: f64,
}

/// A model's groups, the costliest per byte first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// The model's name.
    pub model: String,
    /// The format whose schemes were tried, codes rounded to nearest.
    pub format: String,
    /// How the divergence was measured.
    pub protocol: Protocol,
    /// What was found.
    pub groups: Vec<TensorGroup>,
}

impl Sensitivity {
    /// Sorts by divergence per byte saved, the costliest first.
    pub fn rank(&mut self) {
        self.groups.sort_by(|a, b| b.kld_per_megabyte.total_cmp(&a.kld_per_megabyte));
    }
}

/// Some windows on their way through the model.
struct Convoy<B: Backend> {
    /// Residual stream before the layer that is looked at.
    x: B::Tensor,
    ids: Vec<u32>,
    batch: Batch,
    /// Rows of the scored positions, and their next tokens.
    rows: Vec<usize>,
    targets: Vec<u32>,
    /// The baseline's last hidden states at `rows`.
    baseline: B::Tensor,
}

/// Returns the divergence of every group, in their order. `quantized` makes the matrix that replaces a tensor, and says what
/// the engine does to its inputs.
///
/// # Errors
/// Tensors that the model lacks, and losses that are not finite.
pub fn run<B: Backend>(
    backend: &B,
    model: &mut Model<B>,
    text: &Text,
    groups: &[Group],
    quantized: &dyn Fn(TensorId) -> Result<(Matrix, Activations<f32>)>,
    progress: &dyn Fn(),
) -> Result<Vec<Estimate>> {
    super::check_fits(&model.config, text)?;
    let mut convoys = embark(backend, model, text)?;
    let mut found = vec![Estimate::default(); groups.len()];
    let layers = model.layers.len();
    for layer in 0..=layers {
        for (at, group) in groups.iter().enumerate().filter(|(_, group)| group.first_layer(layers) == layer) {
            let replaced = group
                .tensors
                .iter()
                .map(|&id| {
                    let (matrix, rounding) = quantized(id)?;
                    let weight = backend.upload(matrix).with_context(|| id.to_string())?;
                    Ok(Replaced { id, weight, rounding })
                })
                .collect::<Result<Vec<_>>>()?;
            found[at] = divergence(backend, model, text, &convoys, replaced, layer)?;
            progress();
        }
        for convoy in convoys.iter_mut().filter(|_| layer < layers) {
            model.layer_forward(backend, layer, &mut convoy.x, convoy.batch, &mut |_, _, _| Ok(()))?;
        }
    }
    Ok(found)
}

impl Group {
    /// Returns the first layer that the group changes; that of a head is one past the last.
    fn first_layer(&self, layers: usize) -> usize {
        let first = self.tensors.iter().map(|id| match (id.layer, id.role) {
            (Some(layer), _) => layer.into(),
            (None, Role::Embed) => 0,
            (None, _) => layers,
        });
        first.min().unwrap_or(layers)
    }
}

fn embark<B: Backend>(backend: &B, model: &Model<B>, text: &Text) -> Result<Vec<Convoy<B>>> {
    let protocol = &text.protocol;
    passes(backend.tokens_at_once(), text)
        .map(|Pass { windows, ids }| {
            let batch = Batch { sequences: windows.len(), tokens: protocol.n_ctx };
            let rows = protocol.scored_rows(batch.sequences);
            let targets = rows.iter().map(|&row| ids[row + 1]).collect();
            let baseline = model.hidden_at(backend, &ids, batch, &rows)?;
            Ok(Convoy { x: model.embed(backend, &ids)?, ids, batch, rows, targets, baseline })
        })
        .collect()
}

/// A quantized matrix outside the model, or the original one while the quantized one is inside.
struct Replaced<B: Backend> {
    id: TensorId,
    weight: B::Weight,
    rounding: Activations<f32>,
}

impl<B: Backend> Replaced<B> {
    /// Exchanges the matrix for the model's.
    fn swap(&mut self, model: &mut Model<B>) -> Result<()> {
        let place = match (self.id.layer, self.id.role) {
            (None, Role::Embed) => Some(&mut model.embed),
            (None, Role::Head) => model.untied_head.as_mut(),
            (Some(layer), _) => {
                let linear =
                    model.layers.get_mut(usize::from(layer)).and_then(|layer| layer.linear_mut(self.id));
                linear.map(|linear| {
                    std::mem::swap(&mut linear.rounding, &mut self.rounding);
                    &mut linear.weight
                })
            }
            _ => None,
        };
        let Some(place) = place else { bail!("`{}`: the model has no such matrix", self.id) };
        std::mem::swap(place, &mut self.weight);
        Ok(())
    }
}

/// Returns the divergence of the model with some matrices replaced, which is as before afterwards.
fn divergence<B: Backend>(
    backend: &B,
    model: &mut Model<B>,
    text: &Text,
    convoys: &[Convoy<B>],
    mut replaced: Vec<Replaced<B>>,
    layer: usize,
) -> Result<Estimate> {
    replaced.iter_mut().try_for_each(|matrix| matrix.swap(model))?;
    let samples = samples(backend, model, text, convoys, &replaced, layer);
    replaced.iter_mut().try_for_each(|matrix| matrix.swap(model))?;
    samples?.measures().get(Metric::Kld).context("no divergence was measured")
}

fn samples<B: Backend>(
    backend: &B,
    model: &Model<B>,
    text: &Text,
    convoys: &[Convoy<B>],
    replaced: &[Replaced<B>],
    layer: usize,
) -> Result<Samples> {
    let head_role = if model.untied_head.is_some() { Role::Head } else { Role::Embed };
    let original = |role| replaced.iter().find(|matrix| matrix.id == TensorId::global(role));
    let baseline_head = original(head_role).map_or(model.head(), |matrix| &matrix.weight);
    let embeddings_changed = original(Role::Embed).is_some();
    let mut samples = Samples::new(text.protocol.scored().len(), true);
    for Convoy { x, ids, batch, rows, targets, baseline } in convoys {
        let hidden = match layer == model.layers.len() {
            true => baseline.clone(),
            false => {
                let x = if embeddings_changed { model.embed(backend, ids)? } else { x.clone() };
                model.hidden_from(backend, layer, x, *batch, rows)?
            }
        };
        samples.add(backend.compare((baseline, baseline_head), (&hidden, model.head()), targets)?)?;
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::kv_cache::KvCache;
    use crate::checkpoint::Checkpoint;
    use crate::eval::{self, Schedule, Scored, Subject};
    use crate::model::TensorSource;
    use crate::tensor::Dense;

    fn open(name: &str) -> Checkpoint {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
        Checkpoint::open(&folder).unwrap()
    }

    fn text() -> Text {
        let tokens: Vec<u32> = (0..64u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect();
        let protocol = Protocol::new(Scored::All, 16, None, "text", &tokens, None).unwrap();
        Text { name: "text".into(), tokens, protocol }
    }

    /// Every weight off by a quarter.
    fn damaged(checkpoint: &Checkpoint, id: TensorId) -> (Matrix, Activations<f32>) {
        let matrix = checkpoint.read(id).unwrap();
        let values: Vec<f32> = matrix.to_f32().iter().map(|w| w * 1.25).collect();
        (Matrix::Dense(Dense::from_f32(matrix.dims().to_vec(), &values)), Activations::Full)
    }

    /// A checkpoint with one group damaged, as a whole model sees it.
    struct Damaged<'a>(&'a Checkpoint, &'a Group);

    impl TensorSource for Damaged<'_> {
        fn read(&self, id: TensorId) -> Result<Matrix> {
            match self.1.tensors.contains(&id) {
                true => Ok(damaged(self.0, id).0),
                false => self.0.read(id),
            }
        }

        fn rounding(&self, _: TensorId) -> Activations<f32> {
            Activations::Full
        }
    }

    #[test]
    fn a_groups_divergence_is_that_of_the_whole_model_with_the_group_replaced() {
        for name in ["qwen3", "llama2"] {
            let checkpoint = open(name);
            let mut model = Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap();
            let head = if model.untied_head.is_some() { Role::Head } else { Role::Embed };
            let groups = [
                vec![TensorId::in_layer(1, Role::Down)],
                vec![TensorId::in_layer(0, Role::Q), TensorId::in_layer(1, Role::Gate)],
                vec![TensorId::global(head)],
                vec![TensorId::global(Role::Embed)],
                vec![],
            ]
            .map(|tensors| Group { tensors });
            let done = Cell::new(0);
            let quantized = |id| Ok(damaged(&checkpoint, id));
            let progress = || done.set(done.get() + 1);
            let found = run(&Cpu, &mut model, &text(), &groups, &quantized, &progress).unwrap();
            assert_eq!(done.get(), groups.len());
            for (group, found) in groups.iter().zip(found) {
                let other = Model::load(&Cpu, &checkpoint.config, &Damaged(&checkpoint, group)).unwrap();
                let subject = |model| Subject {
                    name: String::new(),
                    format: String::new(),
                    bytes: 1,
                    bits_per_weight: 1.0,
                    model,
                    kv_cache: KvCache::Exact,
                };
                let schedule = Schedule::resident(&Cpu);
                let samples =
                    eval::run(&Cpu, schedule, Some(&subject(&model)), &[subject(&other)], &text(), &|_| ())
                        .unwrap();
                assert_eq!(samples[1].measures().get(Metric::Kld), Some(found), "{name}: {group:?}");
                assert_eq!(found.value > 0.0, !group.tensors.is_empty(), "{name}: {group:?}");
            }
        }
    }

    #[test]
    fn a_tensor_that_the_model_lacks_is_refused_by_name() {
        let checkpoint = open("qwen3");
        let mut model = Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap();
        let group = Group { tensors: vec![TensorId::in_layer(0, Role::AttnNorm)] };
        let quantized = |_| Ok(damaged(&checkpoint, TensorId::in_layer(0, Role::Q)));
        let refusal = run(&Cpu, &mut model, &text(), &[group], &quantized, &|| ()).unwrap_err();
        assert!(refusal.to_string().contains("input_layernorm"), "{refusal}");
    }
}
