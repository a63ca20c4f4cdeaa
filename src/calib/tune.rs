//! Tunes the gains of norms so that a quantized model's predictions come nearer to the full model's.
//!
//! Codes are fixed by then; gains are what a format leaves in higher precision, and they change no layout. The mean KL
//! divergence over calibration windows falls along its gradient ([`crate::model::backward`]) by Adam (Kingma and Ba, arXiv
//! 1412.6980) on gains relative to where they start. Windows kept out decide how far: the text's own windows would let the
//! divergence fall on them alone. What is judged is what will be stored, rounded to its number type.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::CHUNK_TOKENS;
use crate::backend::Batch;
use crate::backend::gradients::Gradients;
use crate::model::Model;
use crate::model::backward::Met;
use crate::names::TensorId;

/// Steps at most.
pub const STEPS: usize = 60;
/// Tokens a step looks at.
const STEP_TOKENS: usize = 4096;
/// Relative change of a gain in a step, at first; it falls to nothing with the cosine.
const RATE: f64 = 5e-4;
/// Adam's memories.
const BETAS: [f64; 2] = [0.9, 0.95];
/// Steps between two looks at the windows kept out.
const LOOK: usize = 10;
/// One of this many windows is kept out.
const KEPT_OUT: usize = 8;
/// Looks without gain after which it ends.
const PATIENCE: usize = 2;

/// Gains that are better than those they came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    /// The new values, as they are stored.
    pub gains: Vec<(TensorId, Vec<f32>)>,
    /// Mean divergence on the windows kept out, nats, before and after.
    pub kld: [f64; 2],
    /// Steps that led there.
    pub steps: usize,
}

/// A gain on its way.
struct Gain {
    start: Vec<f32>,
    /// Relative changes so far, and Adam's running mean and square of their gradient.
    change: Vec<f64>,
    mean: Vec<f64>,
    square: Vec<f64>,
}

/// What is tuned, and what judges it.
pub struct Tuning<'a, B: Gradients> {
    /// Runs both models.
    pub backend: &'a B,
    /// The model to come near to.
    pub full: &'a Model<B>,
    /// Windows of one length.
    pub windows: &'a [Vec<u32>],
    /// Returns the values that are stored for a gain.
    pub stored: &'a dyn Fn(TensorId, &[f32]) -> Vec<f32>,
    /// Hears of each step.
    pub step_done: &'a dyn Fn(),
}

impl<B: Gradients> Tuning<'_, B> {
    /// Tunes the gains of `model`; `None` if nothing better was found, or the windows are too few.
    ///
    /// # Errors
    /// If the backend fails or a gradient is not finite.
    pub fn run(&self, model: &mut Model<B>) -> Result<Option<Tuned>> {
        let tokens = self.windows.first().map_or(1, Vec::len);
        let (kept_out, seen): (Vec<_>, Vec<_>) =
            self.windows.iter().enumerate().partition(|(at, _)| at % KEPT_OUT == KEPT_OUT - 1);
        let each = (STEP_TOKENS / tokens).max(1).min(seen.len());
        if kept_out.is_empty() {
            return Ok(None);
        }
        let kept_out: Vec<u32> = kept_out.iter().flat_map(|(_, window)| window.iter().copied()).collect();
        let before = self.divergence(model, &kept_out, tokens)?;
        let mut tuned = Tuned { gains: Vec::new(), kld: [before, before], steps: 0 };
        let mut gains = BTreeMap::new();
        for step in 0..STEPS {
            let picked = (0..each).flat_map(|i| seen[(step * each + i) % seen.len()].1.iter().copied());
            let gradients = self.gradients(model, &picked.collect::<Vec<_>>(), tokens)?;
            self.descend(model, &mut gains, gradients, step)?;
            (self.step_done)();
            if (step + 1) % LOOK == 0 {
                let stored = self.as_stored(model, &gains)?;
                let kld = self.divergence(model, &kept_out, tokens)?;
                if kld < tuned.kld[1] {
                    tuned = Tuned { gains: stored, kld: [before, kld], steps: step + 1 };
                } else if step + 1 >= tuned.steps + PATIENCE * LOOK {
                    break;
                }
            }
        }
        Ok((tuned.steps > 0).then_some(tuned))
    }

    /// Returns the gradients of the mean divergence over `ids`, sequences of `tokens` tokens, in all gains.
    fn gradients(
        &self,
        model: &Model<B>,
        ids: &[u32],
        tokens: usize,
    ) -> Result<BTreeMap<TensorId, Vec<f64>>> {
        let (backend, eps) = (self.backend, model.constants.eps);
        let mut gradients = BTreeMap::new();
        for Windows { ids: part, batch } in parts(backend, ids, tokens) {
            let part = &ids[part];
            let wanted = self.full.hidden(backend, part, batch)?;
            let loss =
                |found: &_| backend.divergence_gradient((&wanted, self.full.head()), (found, model.head()));
            model.backward(backend, part, batch, loss, &mut |id, met| {
                let Met::Norm { x, dy, width } = met else { return Ok(()) };
                let found = backend.gain_gradient(x, width, eps, dy)?;
                ensure!(found.iter().all(|g| g.is_finite()), "the gradient of `{id}` is not finite");
                let sum = gradients.entry(id).or_insert_with(|| vec![0.0; width]);
                sum.iter_mut().zip(found).for_each(|(sum, g)| *sum += g as f64 / ids.len() as f64);
                Ok(())
            })?;
        }
        Ok(gradients)
    }

    /// Takes one step of Adam.
    fn descend(
        &self,
        model: &mut Model<B>,
        gains: &mut BTreeMap<TensorId, Gain>,
        gradients: BTreeMap<TensorId, Vec<f64>>,
        step: usize,
    ) -> Result<()> {
        let rate = RATE * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / STEPS as f64).cos());
        let [fade_mean, fade_square] = BETAS.map(|beta| 1.0 - beta.powi(step as i32 + 1));
        for (id, gradient) in gradients {
            let place = gain_of(model, id)?;
            let gain = match gains.entry(id) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => {
                    let start = self.backend.read(place)?;
                    let [change, mean, square] = [(); 3].map(|()| vec![0.0; start.len()]);
                    entry.insert(Gain { start, change, mean, square })
                }
            };
            let Gain { start, change, mean, square } = gain;
            for (at, slope) in gradient.into_iter().enumerate() {
                let slope = slope * start[at] as f64;
                mean[at] = BETAS[0] * mean[at] + (1.0 - BETAS[0]) * slope;
                square[at] = BETAS[1] * square[at] + (1.0 - BETAS[1]) * slope * slope;
                let size = (square[at] / fade_square).sqrt();
                if size > 0.0 {
                    change[at] -= rate * mean[at] / fade_mean / size;
                }
            }
            let values: Vec<f32> = gain.values().collect();
            *place = self.backend.tensor(1, values.len(), &values)?;
        }
        Ok(())
    }

    /// Rounds the gains as they are stored, and puts them into the model.
    fn as_stored(
        &self,
        model: &mut Model<B>,
        gains: &BTreeMap<TensorId, Gain>,
    ) -> Result<Vec<(TensorId, Vec<f32>)>> {
        let mut stored = Vec::with_capacity(gains.len());
        for (&id, gain) in gains {
            let values = (self.stored)(id, &gain.values().collect::<Vec<_>>());
            *gain_of(model, id)? = self.backend.tensor(1, values.len(), &values)?;
            stored.push((id, values));
        }
        Ok(stored)
    }

    /// Returns the mean divergence over sequences of `tokens` tokens.
    fn divergence(&self, model: &Model<B>, ids: &[u32], tokens: usize) -> Result<f64> {
        let mut sum = 0.0;
        for Windows { ids: part, batch } in parts(self.backend, ids, tokens) {
            let part = &ids[part];
            let wanted = self.full.hidden(self.backend, part, batch)?;
            let found = model.hidden(self.backend, part, batch)?;
            // Which tokens come next does not matter to a divergence.
            let compared = self.backend.compare((&wanted, self.full.head()), (&found, model.head()), part)?;
            sum += compared.iter().map(|position| position.kld as f64).sum::<f64>();
        }
        Ok(sum / ids.len() as f64)
    }
}

impl Gain {
    fn values(&self) -> impl Iterator<Item = f32> {
        self.start.iter().zip(&self.change).map(|(start, change)| (*start as f64 * (1.0 + change)) as f32)
    }
}

fn gain_of<B: Gradients>(model: &mut Model<B>, id: TensorId) -> Result<&mut B::Tensor> {
    model.gain_mut(id).with_context(|| format!("`{id}` is no gain of this model"))
}

/// Sequences that go through both models together.
struct Windows {
    ids: Range<usize>,
    batch: Batch,
}

fn parts<B: Gradients>(backend: &B, ids: &[u32], tokens: usize) -> Vec<Windows> {
    let together = (backend.tokens_at_once().min(CHUNK_TOKENS) / tokens).max(1) * tokens;
    let part = |first: usize| {
        let end = ids.len().min(first + together);
        Windows { ids: first..end, batch: Batch { sequences: (end - first) / tokens, tokens } }
    };
    (0..ids.len()).step_by(together).map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn gains_that_were_disturbed_find_their_way_back() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits/qwen3");
        let source = Checkpoint::open(&folder).unwrap();
        let full = Model::load(&Cpu, &source.config, &source).unwrap();
        let mut model = Model::load(&Cpu, &source.config, &source).unwrap();
        // Every second channel of every norm 1 % off.
        for layer in &mut model.layers {
            for gain in [&mut layer.attn_norm, &mut layer.ffn_norm] {
                gain.iter_mut().step_by(2).for_each(|g| *g *= 1.01);
            }
        }
        let windows: Vec<Vec<u32>> =
            (0..16u32).map(|w| (0..32).map(|i| (i * 97 + w * 31 + i * i * (w + 1)) % 64).collect()).collect();
        let (backend, stored, step_done) = (&Cpu, &|_, values: &[f32]| values.to_vec(), &|| ());
        let tuning = Tuning { backend, full: &full, windows: &windows, stored, step_done };
        let tuned = tuning.run(&mut model).unwrap().unwrap();
        assert!(tuned.kld[1] < 0.2 * tuned.kld[0], "{:?} after {}", tuned.kld, tuned.steps);
        assert_eq!(tuned.gains.len(), 1 + 4 * full.layers.len());
        // A model that is right already stays as it is.
        let mut same = Model::load(&Cpu, &source.config, &source).unwrap();
        assert_eq!(tuning.run(&mut same).unwrap(), None);
    }
}
