//! A model as evaluation walks through it: embeddings, one layer after another, norm, head; all of it in memory
//! ([`Model`]), or each part read from the files when it is needed ([`Streamed`]).

use std::ops::Deref;

use anyhow::{Context, Result};

use super::block::{Layer, LayerConstants};
use super::config::Config;
use super::{Model, TensorSource, read_vector};
use crate::backend::Backend;
use crate::names::{Role, TensorId};

/// A part of a model: the model's own, or read for this use.
pub enum Held<'a, T> {
    /// The model's.
    Lent(&'a T),
    /// Dropped after use.
    Read(T),
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Held::Lent(part) => part,
            Held::Read(part) => part,
        }
    }
}

/// What is done with a layer of that number.
pub type Visit<'a, B> = &'a mut dyn FnMut(usize, &Layer<B>) -> Result<()>;

/// A model that is walked through from front to back.
pub trait Layers<B: Backend> {
    /// Returns shape and constants.
    fn config(&self) -> &Config;

    /// Returns what the layers share.
    fn constants(&self) -> &LayerConstants;

    /// Returns the token embeddings `[vocab, hidden]`.
    ///
    /// # Errors
    /// As [`Model::load`], here and below.
    fn embeddings(&self, backend: &B) -> Result<Held<'_, B::Weight>>;

    /// Visits every layer in order.
    fn each_layer(&self, backend: &B, visit: Visit<B>) -> Result<()>;

    /// Returns the gain of the final norm `[hidden]`.
    fn final_norm(&self, backend: &B) -> Result<Held<'_, B::Tensor>>;

    /// Returns the output head `[vocab, hidden]`.
    fn output_head(&self, backend: &B) -> Result<Held<'_, B::Weight>>;
}

impl<B: Backend> Layers<B> for Model<B> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn constants(&self) -> &LayerConstants {
        &self.constants
    }

    fn embeddings(&self, _: &B) -> Result<Held<'_, B::Weight>> {
        Ok(Held::Lent(&self.embed))
    }

    fn each_layer(&self, _: &B, visit: Visit<B>) -> Result<()> {
        self.layers.iter().enumerate().try_for_each(|(at, layer)| visit(at, layer))
    }

    fn final_norm(&self, _: &B) -> Result<Held<'_, B::Tensor>> {
        Ok(Held::Lent(&self.output_norm))
    }

    fn output_head(&self, _: &B) -> Result<Held<'_, B::Weight>> {
        Ok(Held::Lent(self.head()))
    }
}

/// A model whose weights stay in its files. Two layers are in memory at a time: while one is visited, another thread of the
/// pool reads the next and hands it to the backend.
pub struct Streamed<'a, S> {
    config: &'a Config,
    constants: LayerConstants,
    source: &'a S,
}

impl<'a, S: TensorSource> Streamed<'a, S> {
    /// Prepares a model; nothing is read yet but the scales of its cache.
    pub fn new(config: &'a Config, source: &'a S) -> Result<Self> {
        let constants = LayerConstants::of_source(config, source)?;
        Ok(Streamed { config, constants, source })
    }
}

impl<B: Backend, S: TensorSource> Layers<B> for Streamed<'_, S> {
    fn config(&self) -> &Config {
        self.config
    }

    fn constants(&self) -> &LayerConstants {
        &self.constants
    }

    fn embeddings(&self, backend: &B) -> Result<Held<'_, B::Weight>> {
        Model::load_embeddings(backend, self.config, self.source).map(Held::Read)
    }

    fn each_layer(&self, backend: &B, visit: Visit<B>) -> Result<()> {
        let layers = self.config.num_hidden_layers;
        let load =
            |at| Layer::load(backend, self.config, self.source, at).with_context(|| format!("layer {at}"));
        let mut next = (layers > 0).then(|| load(0));
        for at in 0..layers {
            let Some(layer) = next.take().transpose()? else { break };
            rayon::in_place_scope(|scope| {
                if at + 1 < layers {
                    scope.spawn(|_| next = Some(load(at + 1)));
                }
                visit(at, &layer)
            })?;
        }
        Ok(())
    }

    fn final_norm(&self, backend: &B) -> Result<Held<'_, B::Tensor>> {
        let id = TensorId::global(Role::OutputNorm);
        read_vector(backend, self.source, id, self.config.hidden_size).map(Held::Read)
    }

    fn output_head(&self, backend: &B) -> Result<Held<'_, B::Weight>> {
        Model::load_head(backend, self.config, self.source).map(Held::Read)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::bail;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Checkpoint;

    fn checkpoint() -> Checkpoint {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits/qwen3");
        Checkpoint::open(&folder).unwrap()
    }

    #[test]
    fn a_streamed_model_has_the_parts_of_a_loaded_one() {
        let source = checkpoint();
        let model = Model::load(&Cpu, &source.config, &source).unwrap();
        let streamed = Streamed::new(&source.config, &source).unwrap();
        let mut seen = Vec::new();
        let visit: Visit<Cpu> = &mut |at, layer| {
            let down = |layer: &Layer<Cpu>| layer.ffn.dense("down").unwrap().down.weight.clone();
            assert_eq!(down(layer), down(&model.layers[at]));
            assert_eq!(layer.ffn_norm, model.layers[at].ffn_norm);
            seen.push(at);
            Ok(())
        };
        streamed.each_layer(&Cpu, visit).unwrap();
        assert_eq!(seen, (0..model.layers.len()).collect::<Vec<_>>());
        assert_eq!(*streamed.embeddings(&Cpu).unwrap(), model.embed);
        assert_eq!(*streamed.output_head(&Cpu).unwrap(), *model.head());
        assert_eq!(*streamed.final_norm(&Cpu).unwrap(), model.output_norm);
    }

    #[test]
    fn a_visit_that_fails_ends_the_walk() {
        let source = checkpoint();
        let streamed = Streamed::new(&source.config, &source).unwrap();
        let visit: Visit<Cpu> = &mut |at, _| bail!("enough at {at}");
        assert_eq!(streamed.each_layer(&Cpu, visit).unwrap_err().to_string(), "enough at 0");
    }
}
