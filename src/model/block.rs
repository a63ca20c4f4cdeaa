//! One decoder layer: attention and a gated feed-forward part, each behind an RMS norm and added to the residual stream.

use anyhow::{Context, Result};

use super::config::Config;
use super::feed_forward::FeedForward;
use super::linear::{Linear, Observe};
use super::norms::QkNorm;
use super::stages::Half;
use super::{TensorSource, read_vector};
use crate::backend::kv_cache::KvCache;
use crate::backend::{AttentionShape, Backend, Batch, Rope};
use crate::names::{Role, TensorId};

/// What every layer of a model shares.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConstants {
    /// Heads and their width.
    pub attention: AttentionShape,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rotary angles, all scaling applied.
    pub rope: Rope,
    /// What the norms of q and k go over.
    pub qk_norm: Option<QkNorm>,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// How keys and values are kept.
    pub kv_cache: KvCache,
}

impl LayerConstants {
    /// Returns the constants of a configuration.
    pub fn new(config: &Config) -> Self {
        let attention = AttentionShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            // A layer's own.
            window: None,
            scale: (config.head_dim as f64).powf(-0.5) as f32,
        };
        LayerConstants {
            attention,
            hidden: config.hidden_size,
            rope: config.rope(),
            qk_norm: config.qk_norm,
            eps: config.rms_norm_eps,
            kv_cache: KvCache::Exact,
        }
    }

    /// Returns the same, with keys and values kept as the model's files ask for.
    pub fn of_source(config: &Config, source: &impl TensorSource) -> Result<Self> {
        let kv_cache = if source.kv_scales(0)?.is_some() { KvCache::Fp8 } else { KvCache::Exact };
        Ok(LayerConstants { kv_cache, ..LayerConstants::new(config) })
    }
}

impl LayerConstants {
    /// Returns the constants with keys and values as `kv_cache` keeps them; [`KvCache::Exact`] leaves that to the model.
    pub fn with_cache(&self, kv_cache: KvCache) -> Self {
        let kv_cache = if kv_cache == KvCache::Exact { self.kv_cache } else { kv_cache };
        LayerConstants { kv_cache, ..self.clone() }
    }

    /// Returns the constants for sequences that may grow to `tokens` tokens: [`Rope::for_length`].
    pub fn for_length(&self, tokens: usize) -> Self {
        LayerConstants { rope: self.rope.for_length(tokens), ..self.clone() }
    }
}

// A derived implementation would ask for backends that can be cloned.
impl<B: Backend> Clone for Layer<B> {
    fn clone(&self) -> Self {
        let Layer { window, turns, attn_norm, q, k, v, o, qk_norm, sinks, kv_scales, ffn_norm, ffn } = self;
        Layer {
            window: *window,
            turns: *turns,
            attn_norm: attn_norm.clone(),
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            o: o.clone(),
            qk_norm: qk_norm.clone(),
            sinks: sinks.clone(),
            kv_scales: *kv_scales,
            ffn_norm: ffn_norm.clone(),
            ffn: ffn.clone(),
        }
    }
}

/// The weights of one decoder layer. Fields are public so that calibration can exchange a linear for its quantized form.
#[allow(missing_docs)]
pub struct Layer<B: Backend> {
    /// Queries see at most this many latest positions, themselves included.
    pub window: Option<usize>,
    /// Whether queries and keys turn by their position.
    pub turns: bool,
    pub attn_norm: B::Tensor,
    pub q: Linear<B>,
    pub k: Linear<B>,
    pub v: Linear<B>,
    pub o: Linear<B>,
    /// Norms of q and k, for models that have them.
    pub qk_norm: Option<(B::Tensor, B::Tensor)>,
    /// `[heads]`, for models whose attention has sinks ([`Backend::attention`]); no architecture read so far has them.
    pub sinks: Option<B::Tensor>,
    /// Scales of keys and values in an FP8 cache.
    pub kv_scales: [f32; 2],
    pub ffn_norm: B::Tensor,
    pub ffn: FeedForward<B>,
}

impl<B: Backend> Layer<B> {
    /// Reads layer `layer`.
    pub fn load(backend: &B, config: &Config, source: &impl TensorSource, layer: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let linear = |role| {
            let spec = config.linears_of(layer).find(|spec| spec.id.role == role);
            let spec = spec.with_context(|| format!("layer {layer} has no {role:?}"))?;
            Linear::load(backend, source, spec)
        };
        let norm = |role, len| read_vector(backend, source, TensorId::in_layer(layer, role), len);
        Ok(Layer {
            window: config.layers[layer].window,
            turns: config.layers[layer].turns,
            attn_norm: norm(Role::AttnNorm, hidden)?,
            q: linear(Role::Q)?,
            k: linear(Role::K)?,
            v: linear(Role::V)?,
            o: linear(Role::O)?,
            qk_norm: match config.qk_norm {
                Some(of) => {
                    let width = |heads| of.width(heads, config.head_dim);
                    let [q, k] = [config.num_attention_heads, config.num_key_value_heads].map(width);
                    Some((norm(Role::QNorm, q)?, norm(Role::KNorm, k)?))
                }
                None => None,
            },
            sinks: None,
            kv_scales: source.kv_scales(layer)?.unwrap_or([1.0; 2]),
            ffn_norm: norm(Role::FfnNorm, hidden)?,
            ffn: FeedForward::load(backend, config, source, layer)?,
        })
    }

    /// Returns the shape of its attention.
    pub fn attention(&self, constants: &LayerConstants) -> AttentionShape {
        AttentionShape { window: self.window, ..constants.attention }
    }

    /// Returns the linear with that weight, `None` if the layer has none such.
    pub fn linear_mut(&mut self, id: TensorId) -> Option<&mut Linear<B>> {
        match id.role {
            Role::Q => Some(&mut self.q),
            Role::K => Some(&mut self.k),
            Role::V => Some(&mut self.v),
            Role::O => Some(&mut self.o),
            _ => self.ffn.linear_mut(id),
        }
    }

    /// Carries the residual stream `x` `[n, hidden]` through the layer.
    ///
    /// `observe` sees the input of every linear before it runs, with the number of its expert, if it is one's, in the order Q,
    /// K, V, O, Gate, Up, Down. K and V see Q's input, Up sees Gate's; an expert's up and k, v need not be shown.
    pub fn forward(
        &self,
        backend: &B,
        constants: &LayerConstants,
        x: &mut B::Tensor,
        batch: Batch,
        observe: Observe<B>,
    ) -> Result<()> {
        let normed = backend.rms_norm(x, &self.attn_norm, constants.eps)?;
        for role in [Role::Q, Role::K, Role::V] {
            observe(role, None, &normed)?;
        }
        let mixed = self.attend(backend, constants, &normed, batch)?;
        observe(Role::O, None, &mixed)?;
        self.o.add_forward(backend, x, &mixed)?;

        let normed = backend.rms_norm(x, &self.ffn_norm, constants.eps)?;
        self.ffn.add_forward(backend, x, &normed, observe)
    }

    /// Returns the residual stream after the layer at some rows of `x` only, `[rows.len(), hidden]`: attention mixes all
    /// rows, the rest of the layer leaves the others out.
    pub fn forward_at(
        &self,
        backend: &B,
        constants: &LayerConstants,
        x: &B::Tensor,
        batch: Batch,
        rows: &[usize],
    ) -> Result<B::Tensor> {
        let normed = backend.rms_norm(x, &self.attn_norm, constants.eps)?;
        let mixed = self.attend(backend, constants, &normed, batch)?;
        let mut x = backend.select_rows(x, rows)?;
        self.finish(backend, constants, &mut x, &backend.select_rows(&mixed, rows)?)?;
        Ok(x)
    }

    /// Carries the residual stream `x` `[n, hidden]` through what follows attention, given the values it mixed.
    pub fn finish(
        &self,
        backend: &B,
        constants: &LayerConstants,
        x: &mut B::Tensor,
        mixed: &B::Tensor,
    ) -> Result<()> {
        self.o.add_forward(backend, x, mixed)?;
        let normed = backend.rms_norm(x, &self.ffn_norm, constants.eps)?;
        self.ffn.add_forward(backend, x, &normed, &mut |_, _, _| Ok(()))
    }

    /// Returns the gain of a half's norm `[hidden]`.
    pub fn norm(&self, half: Half) -> &B::Tensor {
        match half {
            Half::Attention => &self.attn_norm,
            Half::FeedForward => &self.ffn_norm,
        }
    }

    /// Returns the gain of a half's norm, to exchange it.
    pub fn norm_mut(&mut self, half: Half) -> &mut B::Tensor {
        match half {
            Half::Attention => &mut self.attn_norm,
            Half::FeedForward => &mut self.ffn_norm,
        }
    }

    /// Returns the linear with which a half adds to the residual stream.
    ///
    /// # Errors
    /// If the half is a mixture of experts, here and in [`Layer::mixed`].
    pub fn output(&self, half: Half) -> Result<&Linear<B>> {
        match half {
            Half::Attention => Ok(&self.o),
            Half::FeedForward => Ok(&self.ffn.dense("one output")?.down),
        }
    }

    /// Returns what a half's output linear takes, for the residual stream `x` `[n, hidden]`.
    pub fn mixed(
        &self,
        backend: &B,
        constants: &LayerConstants,
        half: Half,
        x: &B::Tensor,
        batch: Batch,
    ) -> Result<B::Tensor> {
        let normed = backend.rms_norm(x, self.norm(half), constants.eps)?;
        match half {
            Half::Attention => self.attend(backend, constants, &normed, batch),
            Half::FeedForward => self.ffn.dense("one input")?.mixed(backend, &normed),
        }
    }

    /// Returns the values mixed by attention `[n, heads · head_dim]`, what `o` takes, for normed inputs `[n, hidden]`.
    pub fn attend(
        &self,
        backend: &B,
        constants: &LayerConstants,
        normed: &B::Tensor,
        batch: Batch,
    ) -> Result<B::Tensor> {
        let [q, k, v] = self.queries_keys_values(backend, constants, normed, batch)?;
        self.mix(backend, constants, [&q, &k, &v], batch)
    }

    /// Returns the values mixed by attention for what [`Layer::queries_keys_values`] returned.
    pub fn mix(
        &self,
        backend: &B,
        constants: &LayerConstants,
        [q, k, v]: [&B::Tensor; 3],
        batch: Batch,
    ) -> Result<B::Tensor> {
        backend.attention(q, k, v, self.sinks.as_ref(), &self.attention(constants), batch)
    }

    /// Returns what attention takes, rotated, keys and values as a cache gives them back: queries `[n, heads · head_dim]`,
    /// keys and values `[n, kv_heads · head_dim]`.
    pub fn queries_keys_values(
        &self,
        backend: &B,
        constants: &LayerConstants,
        normed: &B::Tensor,
        batch: Batch,
    ) -> Result<[B::Tensor; 3]> {
        let [mut q, mut k, mut v] = self.projections(backend, constants, normed)?;
        self.turn(backend, [&mut q, &mut k], &constants.rope, batch)?;
        let LayerConstants { kv_cache, attention, .. } = constants;
        backend.round_cache(&mut k, *kv_cache, attention.head_dim, self.kv_scales[0])?;
        backend.round_cache(&mut v, *kv_cache, attention.head_dim, self.kv_scales[1])?;
        Ok([q, k, v])
    }

    /// Turns queries and keys by their positions, where the layer does that.
    pub fn turn(&self, backend: &B, qk: [&mut B::Tensor; 2], rope: &Rope, batch: Batch) -> Result<()> {
        if self.turns {
            for x in qk {
                backend.rope(x, rope, batch)?;
            }
        }
        Ok(())
    }

    /// Returns queries, keys and values as [`Layer::queries_keys_values`] does, not yet rotated.
    pub fn projections(
        &self,
        backend: &B,
        constants: &LayerConstants,
        normed: &B::Tensor,
    ) -> Result<[B::Tensor; 3]> {
        let [mut q, mut k, v] = backend.linears(normed, [&self.q, &self.k, &self.v].map(Linear::affine))?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = backend.rms_norm(&q, q_norm, constants.eps)?;
            k = backend.rms_norm(&k, k_norm, constants.eps)?;
        }
        Ok([q, k, v])
    }
}
