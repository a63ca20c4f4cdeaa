//! What a forward pass needs to know of a model, and the [`Family`] that a configuration belongs to. The families read it from
//! `config.json` ([`super::family`]); anything unknown is refused by name.
//!
//! Field names and defaults are those of the configuration classes of transformers 5.17 (`LlamaConfig`, `MistralConfig`,
//! `Qwen2Config`, `Qwen3Config`). The keys of RoPE are those of
//! [`rope::json`](super::rope::json).

pub(in crate::model) mod json;

use std::fmt;

use anyhow::{Result, ensure};
use serde_json::{Map, Value};

use super::architecture::Architecture;
use super::norms::QkNorm;
use super::rope::RopeParameters;
use super::rope::json::RopeClass;
use super::router::Router;
use crate::backend::{Pairing, Rope};
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
    /// RMS norms of q and k, before they turn.
    pub qk_norm: Option<QkNorm>,
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
    /// Whether queries and keys turn by their position.
    pub turns: bool,
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
        let kind =
            LayerKind { window: None, turns: true, mixer: Mixer::Attention, ffn: Ffn::Dense { width } };
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

    /// Returns the rotation of every head.
    pub fn rope(&self) -> Rope {
        self.rope.rope(self.head_dim)
    }
}

/// What a family's files call things, and what its configuration class means by its keys.
pub struct Family {
    /// Entry of `architectures`.
    pub class: &'static str,
    /// `model_type`
    pub model_type: &'static str,
    /// What llama.cpp makes of it.
    pub gguf: Architecture,
    /// What its files call otherwise than Llama's.
    pub(super) names: &'static [Name],
    /// Stored tensors that hold several of its matrices.
    pub(super) fused: &'static [Fused],
    /// What the class means by the keys of rotary embedding.
    pub(super) rope: RopeClass,
    /// Sets what the class's own keys and defaults say in a configuration whose common keys are read.
    pub(super) read: fn(&Value, &mut Config) -> Result<()>,
    /// Inverse of `read`: adds the class's own keys.
    pub(super) write: fn(&Config, &mut Map<String, Value>),
}

/// What a family's files call a tensor.
pub struct Name {
    /// Which tensor.
    pub role: Role,
    /// Module within its layer, or within the model, in Hugging Face checkpoints.
    pub module: &'static str,
    /// Stem of its name in GGUF files.
    pub stem: &'static str,
}

/// Matrices that are stored as one, the rows of each after those of the one before.
pub struct Fused {
    /// Which ones, in their order.
    pub roles: &'static [Role],
    /// Module within its layer in Hugging Face checkpoints.
    pub module: &'static str,
    /// Stem of its name in GGUF files.
    pub stem: &'static str,
}

impl Family {
    /// Returns what Hugging Face checkpoints call a tensor that is stored on its own.
    pub fn hf_name(&self, id: TensorId) -> String {
        let module = self.name(id.role).map_or_else(|| id.hf_module(), |name| id.hf_module_as(name.module));
        match id.role {
            // A parameter of its own, no part of a module.
            Role::ChoiceBias => module,
            _ => format!("{module}.{}", id.part.suffix()),
        }
    }

    /// Returns what GGUF files call a tensor that is stored on its own.
    pub fn gguf_name(&self, id: TensorId) -> String {
        let id = if id.role == Role::ChoiceBias { id.bias() } else { id };
        self.name(id.role).map_or_else(|| id.gguf_name(), |name| id.gguf_name_as(name.stem))
    }

    /// Returns which values of a head turn together.
    pub fn pairing(&self) -> Pairing {
        self.rope.pairing
    }

    fn name(&self, role: Role) -> Option<&'static Name> {
        self.names.iter().find(|name| name.role == role)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Family) -> bool {
        self.class == other.class
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.class)
    }
}

#[cfg(test)]
mod tests;
