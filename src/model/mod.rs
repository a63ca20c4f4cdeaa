//! Config → one forward pass. Flags, never model names.
//!
//! ids → embeddings → layers ([`block`]) → final norm; the loss head is [`Backend::score`] and [`Backend::compare`].

mod added_tokens;
pub mod architecture;
pub mod backward;
pub mod block;
pub mod chat_template;
pub mod config;
pub mod family;
pub mod feed_forward;
pub mod footprint;
pub mod gated;
pub(crate) mod joins;
pub mod kv_cache;
pub mod layers;
pub mod linear;
pub mod mixture;
pub mod norms;
mod older_tokenizers;
pub mod rope;
pub mod router;
pub mod stages;
mod tensors;
pub mod tokenizer;

use anyhow::{Context, Result, ensure};

use self::block::{Layer, LayerConstants};
use self::config::Config;
use self::linear::Observe;
use crate::backend::kv_cache::KvCache;
use crate::backend::{Backend, Batch};
use crate::names::{Role, TensorId};
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// Where a model's tensors come from.
pub trait TensorSource: Sync {
    /// Reads a whole tensor in Hugging Face row order.
    fn read(&self, id: TensorId) -> Result<Matrix>;

    /// Returns what the engine does to the inputs of that linear.
    fn rounding(&self, id: TensorId) -> Activations<f32>;

    /// Returns the scales of a layer's keys and values, if engines keep them in FP8.
    fn kv_scales(&self, _layer: usize) -> Result<Option<[f32; 2]>> {
        Ok(None)
    }
}

/// A decoder whose weights lie with a backend.
pub struct Model<B: Backend> {
    /// Shape and constants.
    pub config: Config,
    /// What the layers share.
    pub constants: LayerConstants,
    /// Token embeddings `[vocab, hidden]`.
    pub embed: B::Weight,
    /// All layers, first to last.
    pub layers: Vec<Layer<B>>,
    /// Gain of the final norm `[hidden]`.
    pub output_norm: B::Tensor,
    /// Output head `[vocab, hidden]`; `None` when the embeddings serve.
    pub untied_head: Option<B::Weight>,
}

impl<B: Backend> Model<B> {
    /// Reads all tensors and hands them to the backend.
    ///
    /// # Errors
    /// Names the tensor that is missing, has another shape than the configuration says, or does not fit the device.
    pub fn load(backend: &B, config: &Config, source: &impl TensorSource) -> Result<Self> {
        let table = [config.vocab_size, config.hidden_size];
        let head = TensorId::global(Role::Head);
        Ok(Model {
            config: config.clone(),
            constants: LayerConstants::of_source(config, source)?,
            embed: Self::load_embeddings(backend, config, source)?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| Layer::load(backend, config, source, layer))
                .collect::<Result<_>>()?,
            output_norm: read_vector(
                backend,
                source,
                TensorId::global(Role::OutputNorm),
                config.hidden_size,
            )?,
            untied_head: match config.tie_word_embeddings {
                true => None,
                false => Some(read_weight(backend, source, head, table)?),
            },
        })
    }

    /// Returns the output head `[vocab, hidden]`.
    pub fn head(&self) -> &B::Weight {
        self.untied_head.as_ref().unwrap_or(&self.embed)
    }

    /// Reads the token embeddings `[vocab, hidden]` alone and hands them to the backend.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_embeddings(backend: &B, config: &Config, source: &impl TensorSource) -> Result<B::Weight> {
        let table = [config.vocab_size, config.hidden_size];
        read_weight(backend, source, TensorId::global(Role::Embed), table)
    }

    /// Reads the output head `[vocab, hidden]` alone and hands it to the backend.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_head(backend: &B, config: &Config, source: &impl TensorSource) -> Result<B::Weight> {
        let role = if config.tie_word_embeddings { Role::Embed } else { Role::Head };
        read_weight(backend, source, TensorId::global(role), [config.vocab_size, config.hidden_size])
    }

    /// Returns the embeddings of `ids` `[n, hidden]`: what the first layer takes.
    pub fn embed(&self, backend: &B, ids: &[u32]) -> Result<B::Tensor> {
        backend.embed(&self.embed, ids)
    }

    /// Carries the residual stream through layer `layer`; see [`Layer::forward`] for `observe`.
    pub fn layer_forward(
        &self,
        backend: &B,
        layer: usize,
        x: &mut B::Tensor,
        batch: Batch,
        observe: Observe<B>,
    ) -> Result<()> {
        self.layers[layer]
            .forward(backend, &self.constants, x, batch, observe)
            .with_context(|| format!("layer {layer}"))
    }

    /// Returns the final hidden states `[n, hidden]`, normed: what the head takes. `ids` holds `batch`'s sequences one
    /// after another.
    pub fn hidden(&self, backend: &B, ids: &[u32], batch: Batch) -> Result<B::Tensor> {
        let mut x = self.embed_batch(backend, ids, batch)?;
        for layer in 0..self.layers.len() {
            self.layer_forward(backend, layer, &mut x, batch, &mut |_, _, _| Ok(()))?;
        }
        backend.rms_norm(&x, &self.output_norm, self.constants.eps)
    }

    /// Returns the final hidden states of some rows, `[rows.len(), hidden]`, bit for bit those of [`Model::hidden`]: the
    /// last layer's feed-forward part leaves the other rows out.
    pub fn hidden_at(&self, backend: &B, ids: &[u32], batch: Batch, rows: &[usize]) -> Result<B::Tensor> {
        self.hidden_at_with(backend, ids, batch, rows, KvCache::Exact)
    }

    /// Returns the same with keys and values as `kv_cache` keeps them; [`KvCache::Exact`] leaves that to the model.
    pub fn hidden_at_with(
        &self,
        backend: &B,
        ids: &[u32],
        batch: Batch,
        rows: &[usize],
        kv_cache: KvCache,
    ) -> Result<B::Tensor> {
        let constants = self.constants.with_cache(kv_cache);
        self.finish(backend, &constants, 0, self.embed_batch(backend, ids, batch)?, batch, rows)
    }

    /// Returns what [`Model::hidden_at`] does for a residual stream `x` `[n, hidden]` that layer `first` takes.
    pub fn hidden_from(
        &self,
        backend: &B,
        first: usize,
        x: B::Tensor,
        batch: Batch,
        rows: &[usize],
    ) -> Result<B::Tensor> {
        self.finish(backend, &self.constants, first, x, batch, rows)
    }

    /// Carries a residual stream through the layers from `first` on, the last at some rows only, and the final norm.
    fn finish(
        &self,
        backend: &B,
        constants: &LayerConstants,
        first: usize,
        mut x: B::Tensor,
        batch: Batch,
        rows: &[usize],
    ) -> Result<B::Tensor> {
        let last = self.layers.len() - 1;
        for at in first..last {
            self.layers[at]
                .forward(backend, constants, &mut x, batch, &mut |_, _, _| Ok(()))
                .with_context(|| format!("layer {at}"))?;
        }
        let x = self.layers[last].forward_at(backend, constants, &x, batch, rows)?;
        backend.rms_norm(&x, &self.output_norm, constants.eps)
    }

    /// Returns the embeddings of a batch, if there are as many ids as it says.
    fn embed_batch(&self, backend: &B, ids: &[u32], batch: Batch) -> Result<B::Tensor> {
        ensure!(
            ids.len() == batch.sequences * batch.tokens,
            "{} ids for {} sequences of {}",
            ids.len(),
            batch.sequences,
            batch.tokens
        );
        self.embed(backend, ids)
    }
}

/// Reads a matrix and hands it to the backend, if it has the shape that the configuration says.
fn read_weight<B: Backend>(
    backend: &B,
    source: &impl TensorSource,
    id: TensorId,
    shape: [usize; 2],
) -> Result<B::Weight> {
    let matrix = source.read(id)?;
    let found = matrix.dims();
    ensure!(found == shape, "{id}: shape {found:?}; wanted {shape:?} by the configuration");
    backend.upload(matrix).with_context(|| id.to_string())
}

/// Reads a bias or a norm's gain as one row.
fn read_vector<B: Backend>(
    backend: &B,
    source: &impl TensorSource,
    id: TensorId,
    len: usize,
) -> Result<B::Tensor> {
    let values = source.read(id)?.to_f32();
    ensure!(values.len() == len, "{id}: {} values; wanted {len} by the configuration", values.len());
    backend.tensor(1, len, &values).with_context(|| id.to_string())
}
