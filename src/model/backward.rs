//! The way back through a model: from the gradient of a loss in the final hidden states to those inside every layer.
//!
//! A layer is computed again from its input, so that only the residual stream before each layer waits for the backward pass.

use anyhow::{Context, Result};

use super::Model;
use super::block::{Layer, LayerConstants};
use super::linear::Linear;
use super::norms::QkNorm;
use crate::backend::gradients::Gradients;
use crate::backend::{Backend, Batch};
use crate::names::{Role, TensorId};

/// What the backward pass meets.
pub enum Met<'a, T> {
    /// The gradient of a linear's outputs `[n, out_features]`.
    Linear(&'a T),
    /// A norm over runs of `width` values.
    Norm {
        /// What it took `[n, _]`.
        x: &'a T,
        /// The gradient of its outputs `[n, _]`.
        dy: &'a T,
        /// Length of its gain.
        width: usize,
    },
}

/// Sees what is met, with the tensor it belongs to.
pub type Watch<'a, T> = &'a mut dyn FnMut(TensorId, Met<T>) -> Result<()>;

impl<B: Gradients> Model<B> {
    /// Carries `ids`, the sequences of `batch`, to the end, and the gradient that `loss` gives for the final hidden states
    /// `[n, hidden]` back to the first layer.
    ///
    /// # Errors
    /// If the backend fails; the message names the layer.
    pub fn backward(
        &self,
        backend: &B,
        ids: &[u32],
        batch: Batch,
        loss: impl FnOnce(&B::Tensor) -> Result<B::Tensor>,
        watch: Watch<B::Tensor>,
    ) -> Result<()> {
        let (gain, width, eps) = (&self.output_norm, self.config.hidden_size, self.constants.eps);
        let mut x = self.embed(backend, ids)?;
        let mut inputs = Vec::with_capacity(self.layers.len());
        for layer in 0..self.layers.len() {
            inputs.push(x.clone());
            self.layer_forward(backend, layer, &mut x, batch, &mut |_, _, _| Ok(()))?;
        }
        let dy = loss(&backend.rms_norm(&x, gain, eps)?)?;
        watch(TensorId::global(Role::OutputNorm), Met::Norm { x: &x, dy: &dy, width })?;
        let mut dx = backend.rms_norm_gradient(&x, gain, eps, &dy)?;
        for ((at, layer), input) in self.layers.iter().enumerate().zip(inputs).rev() {
            let constants = &self.constants;
            let mut back = Back { backend, constants, layer, at, batch, watch: &mut *watch };
            back.through_layer(&input, &mut dx).with_context(|| format!("layer {at}"))?;
        }
        Ok(())
    }
}

impl<B: Backend> Model<B> {
    /// Returns the gain of a norm, `None` for other tensors and norms that the model does not have.
    pub fn gain_mut(&mut self, id: TensorId) -> Option<&mut B::Tensor> {
        let Some(layer) = id.layer else {
            return (id.role == Role::OutputNorm).then_some(&mut self.output_norm);
        };
        let layer = self.layers.get_mut(usize::from(layer))?;
        match id.role {
            Role::AttnNorm => Some(&mut layer.attn_norm),
            Role::FfnNorm => Some(&mut layer.ffn_norm),
            Role::QNorm => layer.qk_norm.as_mut().map(|(q, _)| q),
            Role::KNorm => layer.qk_norm.as_mut().map(|(_, k)| k),
            _ => None,
        }
    }
}

/// The way back through one layer. Keys and values count as exact.
struct Back<'a, B: Gradients> {
    backend: &'a B,
    constants: &'a LayerConstants,
    layer: &'a Layer<B>,
    /// Its number.
    at: usize,
    batch: Batch,
    watch: Watch<'a, B::Tensor>,
}

impl<B: Gradients> Back<'_, B> {
    fn see(&mut self, role: Role, met: Met<B::Tensor>) -> Result<()> {
        (self.watch)(TensorId::in_layer(self.at, role), met)
    }

    /// Turns `dx`, the gradient of the residual stream after the layer, into that before it, for the stream `x`
    /// `[n, hidden]` that the layer took.
    fn through_layer(&mut self, x: &B::Tensor, dx: &mut B::Tensor) -> Result<()> {
        let (backend, layer) = (self.backend, self.layer);
        let attended = self.attention_inputs(x)?;
        let [q, k, v] = &attended.rotated;
        let mixed = layer.mix(backend, self.constants, [q, k, v], self.batch)?;
        let mut middle = x.clone();
        layer.o.add_forward(backend, &mut middle, &mixed)?;
        self.through_feed_forward(&middle, dx)?;
        self.see(Role::O, Met::Linear(dx))?;
        let dmixed = backend.linear_gradient(dx, &layer.o.weight)?;
        self.through_attention(&attended, x, &dmixed, dx)
    }

    /// The part after attention, for the stream `x` that it took.
    fn through_feed_forward(&mut self, x: &B::Tensor, dx: &mut B::Tensor) -> Result<()> {
        let (backend, layer, eps) = (self.backend, self.layer, self.constants.eps);
        let normed = backend.rms_norm(x, &layer.ffn_norm, eps)?;
        let ffn = layer.ffn.dense("the gradient")?;
        let (gate, up) = (ffn.gate.forward(backend, &normed)?, ffn.up.forward(backend, &normed)?);
        self.see(Role::Down, Met::Linear(dx))?;
        let dgated = backend.linear_gradient(dx, &ffn.down.weight)?;
        let [dgate, dup] = backend.swiglu_gradient(&gate, &up, &dgated)?;
        self.see(Role::Gate, Met::Linear(&dgate))?;
        self.see(Role::Up, Met::Linear(&dup))?;
        let mut dy = backend.linear_gradient(&dgate, &ffn.gate.weight)?;
        backend.add(&mut dy, &backend.linear_gradient(&dup, &ffn.up.weight)?)?;
        self.see(Role::FfnNorm, Met::Norm { x, dy: &dy, width: self.constants.hidden })?;
        backend.add(dx, &backend.rms_norm_gradient(x, &layer.ffn_norm, eps, &dy)?)
    }

    /// The part before o: `dmixed` is the gradient of what attention mixed, `x` the stream that the layer took.
    fn through_attention(
        &mut self,
        attended: &Attended<B>,
        x: &B::Tensor,
        dmixed: &B::Tensor,
        dx: &mut B::Tensor,
    ) -> Result<()> {
        let (backend, layer, constants) = (self.backend, self.layer, self.constants);
        let (shape, eps, back) = (&layer.attention(constants), constants.eps, constants.rope.reversed());
        let (qkv, sinks) = (attended.rotated.each_ref(), layer.sinks.as_ref());
        let [mut dq, mut dk, dv] = backend.attention_gradient(qkv, sinks, dmixed, shape, self.batch)?;
        layer.turn(backend, [&mut dq, &mut dk], &back, self.batch)?;
        if let Some((q_gain, k_gain)) = &layer.qk_norm {
            let [q, k] = &attended.projected;
            let norm = constants.qk_norm.unwrap_or(QkNorm::Heads);
            let (of_q, of_k) =
                (norm.width(shape.heads, shape.head_dim), norm.width(shape.kv_heads, shape.head_dim));
            self.see(Role::QNorm, Met::Norm { x: q, dy: &dq, width: of_q })?;
            self.see(Role::KNorm, Met::Norm { x: k, dy: &dk, width: of_k })?;
            dq = backend.rms_norm_gradient(q, q_gain, eps, &dq)?;
            dk = backend.rms_norm_gradient(k, k_gain, eps, &dk)?;
        }
        self.see(Role::Q, Met::Linear(&dq))?;
        self.see(Role::K, Met::Linear(&dk))?;
        self.see(Role::V, Met::Linear(&dv))?;
        let mut dy = backend.linear_gradient(&dq, &layer.q.weight)?;
        backend.add(&mut dy, &backend.linear_gradient(&dk, &layer.k.weight)?)?;
        backend.add(&mut dy, &backend.linear_gradient(&dv, &layer.v.weight)?)?;
        self.see(Role::AttnNorm, Met::Norm { x, dy: &dy, width: constants.hidden })?;
        backend.add(dx, &backend.rms_norm_gradient(x, &layer.attn_norm, eps, &dy)?)
    }

    fn attention_inputs(&self, x: &B::Tensor) -> Result<Attended<B>> {
        let (backend, layer, constants) = (self.backend, self.layer, self.constants);
        let normed = backend.rms_norm(x, &layer.attn_norm, constants.eps)?;
        let project = |linear: &Linear<B>| linear.forward(backend, &normed);
        let (q, k, v) = (project(&layer.q)?, project(&layer.k)?, project(&layer.v)?);
        let (mut turned_q, mut turned_k) = match &layer.qk_norm {
            Some((q_gain, k_gain)) => {
                (backend.rms_norm(&q, q_gain, constants.eps)?, backend.rms_norm(&k, k_gain, constants.eps)?)
            }
            None => (q.clone(), k.clone()),
        };
        layer.turn(backend, [&mut turned_q, &mut turned_k], &constants.rope, self.batch)?;
        Ok(Attended { projected: [q, k], rotated: [turned_q, turned_k, v] })
    }
}

/// What attention took.
struct Attended<B: Gradients> {
    /// Queries and keys before their norms.
    projected: [B::Tensor; 2],
    /// Queries, keys and values.
    rotated: [B::Tensor; 3],
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use ndarray::Array2;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::{Backend, LongAngles, Pairing, Rope};
    use crate::checkpoint::Checkpoint;

    fn model(name: &str) -> Model<Cpu> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
        let source = Checkpoint::open(&folder).unwrap();
        Model::load(&Cpu, &source.config, &source).unwrap()
    }

    const BATCH: Batch = Batch { sequences: 2, tokens: 12 };

    fn ids() -> Vec<u32> {
        (0..24u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect()
    }

    /// Σ KL(baseline ‖ model) over all positions.
    fn loss(model: &Model<Cpu>, baseline: &Array2<f32>) -> f64 {
        let hidden = model.hidden(&Cpu, &ids(), BATCH).unwrap();
        let pairs = ((baseline, model.head()), (&hidden, model.head()));
        Cpu.compare(pairs.0, pairs.1, &ids()).unwrap().iter().map(|found| found.kld as f64).sum()
    }

    #[test]
    fn gradients_of_all_gains_are_the_derivatives_of_the_loss_of_every_architecture() {
        for name in ["llama2", "llama3", "llama_biases", "mistral", "qwen2", "qwen2_windows", "qwen3"] {
            let mut model = model(name);
            if name == "llama2" {
                // Heads of 8, of which 6 turn, by the angles of long sequences.
                let long = Some(LongAngles { beyond: 8, inverse_frequencies: vec![0.5, 0.1, 0.01] });
                let (angles, pairing) = (vec![1.0, 0.3, 0.1], Pairing::Neighbours);
                model.constants.rope =
                    Rope { head_dim: 8, pairing, long, magnitude: 1.2, ..Rope::plain(angles) };
            }
            let baseline = model.hidden(&Cpu, &ids(), BATCH).unwrap().mapv(|x| x + x.cos());
            let (mut found, mut linears) = (BTreeMap::new(), BTreeMap::new());
            let loss_gradient =
                |hidden: &_| Cpu.divergence_gradient((&baseline, model.head()), (hidden, model.head()));
            model
                .backward(&Cpu, &ids(), BATCH, loss_gradient, &mut |id, met| {
                    match met {
                        Met::Norm { x, dy, width } => {
                            found.insert(id, Cpu.gain_gradient(x, width, 0.0, dy)?);
                        }
                        Met::Linear(dy) => _ = linears.insert(id, Cpu.row_energies(dy)?),
                    }
                    Ok(())
                })
                .unwrap();
            let layers = model.layers.len();
            assert_eq!(
                found.len(),
                1 + layers * if model.config.qk_norm.is_some() { 4 } else { 2 },
                "{name}"
            );
            assert!(linears.len() == 7 * layers && linears.values().all(|rows| rows.len() == 24), "{name}");
            for (id, gradient) in found {
                // Along the gradient itself; the loss is an F32 sum of 24 terms near 4, so a difference of .02 has an error
                // of a few 1e-5.
                let size: f64 = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
                let step = 0.01 / size;
                let mut moved = |sign: f64| {
                    let gain = model.gain_mut(id).unwrap();
                    let before = gain.clone();
                    gain.iter_mut()
                        .zip(&gradient)
                        .for_each(|(g, d)| *g += (sign * step * *d as f64 / size) as f32);
                    let loss = loss(&model, &baseline);
                    *model.gain_mut(id).unwrap() = before;
                    loss
                };
                let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
                assert!((slope - size).abs() < 0.02 * size, "{name} {id}: {slope} {size}");
            }
        }
    }
}
