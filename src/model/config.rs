//! What a forward pass needs to know of a model. `json` reads it from `config.json`; anything unknown is refused by name.
//!
//! Field names and defaults are those of the configuration classes of transformers 5.17 (`LlamaConfig`, `MistralConfig`,
//! `Qwen2Config`, `Qwen3Config`). The keys of RoPE are those of
//! [`rope::json`](super::rope::json).

pub(in crate::model) mod json;

use anyhow::{Result, ensure};

use super::family::Family;
use super::rope::RopeParameters;
use super::router::Router;
use super::stages::LinearSpec;
use crate::backend::Rope;
use crate::names::{Role, TensorId};

/// A decoder's shape and constants; names as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Config {
    pub family: &'static Family,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeParameters,
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// RMS norms on each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// What each layer is, first to last.
    pub layers: Vec<LayerKind>,
    pub bos_token_id: Option<u32>,
    /// All of them, in the order given.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// What a layer is made of, where layers of one model may differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerKind {
    /// Queries see at most this many latest positions, themselves included.
    pub window: Option<usize>,
    /// What mixes tokens.
    pub mixer: Mixer,
    /// What follows.
    pub ffn: Ffn,
}

/// What mixes the tokens of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mixer {
    /// Grouped-query attention: q, k, v; o.
    Attention,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ffn {
    /// Gate, up; down.
    Dense {
        /// Values between them.
        width: usize,
    },
    /// A router, and experts of which each token takes a few.
    Mixture(Experts),
}

/// The experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// How many there are, and how the router chooses.
    pub rule: Router,
    /// Values between gate, up and down of each.
    pub width: usize,
    /// Whether a bias `[experts]` is added to the scores that choose.
    pub choice_bias: bool,
    /// The expert that all tokens share.
    pub shared: Option<SharedExpert>,
}

/// An expert that all tokens share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExpert {
    /// Values between its gate, up and down.
    pub width: usize,
    /// Whether a router of its own weighs it for each token.
    pub gated: bool,
}

impl Ffn {
    /// Returns the experts; `None` of a dense layer.
    pub fn experts(&self) -> Option<Experts> {
        match self {
            Ffn::Mixture(experts) => Some(*experts),
            Ffn::Dense { .. } => None,
        }
    }
}

impl LayerKind {
    /// Returns `count` layers of full attention and a feed-forward part of `width`.
    ///
    /// # Errors
    /// If there are more than ids can number.
    pub(crate) fn alike(count: usize, width: usize) -> Result<Vec<LayerKind>> {
        let most = u16::MAX as usize;
        ensure!(count <= most, "`num_hidden_layers` is {count}; at most {most} are supported");
        let kind = LayerKind { window: None, mixer: Mixer::Attention, ffn: Ffn::Dense { width } };
        Ok(vec![kind; count])
    }
}

impl Config {
    /// Returns the configuration if its numbers can describe a model, whatever file they came from.
    ///
    /// # Errors
    /// Names the number that is zero, too large, or does not fit another.
    pub fn validated(self) -> Result<Self> {
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            ensure!(value > 0, "`{name}` is 0; wanted a positive number");
            // Keeps every product of two sizes far below 2^64.
            ensure!(value <= 1 << 28, "`{name}` is {value}; no model is that large, so the file is damaged");
        }
        ensure!(
            self.num_attention_heads.is_multiple_of(self.num_key_value_heads),
            "`num_attention_heads` {} is not a multiple of `num_key_value_heads` {}",
            self.num_attention_heads,
            self.num_key_value_heads
        );
        self.rope.validate(self.head_dim)?;
        let eps = self.rms_norm_eps;
        ensure!(eps.is_finite() && eps > 0.0, "`rms_norm_eps` is {eps}; wanted a positive number");
        for layer in &self.layers {
            if let Ffn::Mixture(experts) = layer.ffn {
                experts.rule.validated()?;
                ensure!(experts.rule.experts <= u16::MAX as usize, "{} experts", experts.rule.experts);
            }
        }
        ensure!(
            self.layers.iter().all(|layer| layer.window != Some(0)),
            "`sliding_window` is 0; wanted `null` or a positive number"
        );
        Ok(self)
    }

    /// Whether any layer is a mixture of experts.
    pub fn has_experts(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.ffn, Ffn::Mixture(_)))
    }

    /// Returns every tensor that a checkpoint must hold with its shape, in the order of a forward pass.
    pub fn expected_tensors(&self) -> Vec<(TensorId, Vec<usize>)> {
        let mut tensors = vec![(TensorId::global(Role::Embed), vec![self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            self.push_layer_tensors(layer, &mut tensors);
        }
        tensors.push((TensorId::global(Role::OutputNorm), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push((TensorId::global(Role::Head), vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    fn push_layer_tensors(&self, layer: usize, tensors: &mut Vec<(TensorId, Vec<usize>)>) {
        let hidden = self.hidden_size;
        let id = |role| TensorId::in_layer(layer, role);
        for LinearSpec { id, shape, bias } in self.linears_of(layer) {
            tensors.push((id, shape.to_vec()));
            if bias {
                tensors.push((id.bias(), vec![shape[0]]));
            }
        }
        if let Ffn::Mixture(experts) = self.layers[layer].ffn {
            let count = experts.rule.experts;
            tensors.push((id(Role::Router), vec![count, hidden]));
            if experts.choice_bias {
                tensors.push((id(Role::ChoiceBias), vec![count]));
            }
            if experts.shared.is_some_and(|shared| shared.gated) {
                tensors.push((id(Role::SharedRouter), vec![1, hidden]));
            }
        }
        tensors.push((id(Role::AttnNorm), vec![hidden]));
        tensors.push((id(Role::FfnNorm), vec![hidden]));
        if self.qk_norm {
            tensors.push((id(Role::QNorm), vec![self.head_dim]));
            tensors.push((id(Role::KNorm), vec![self.head_dim]));
        }
    }

    /// Returns the rotation of every head.
    pub fn rope(&self) -> Rope {
        self.rope.rope(self.head_dim)
    }
}

#[cfg(test)]
mod tests;
