//! What a forward pass needs to know of a model. [`json`] reads it from `config.json`; anything unknown is refused by name.
//!
//! Field names and defaults are those of the configuration classes of transformers 5.17 (`LlamaConfig`, `MistralConfig`,
//! `Qwen2Config`, `Qwen3Config`). The keys of RoPE are those of
//! [`rope::json`](super::rope::json).

pub(in crate::model) mod json;

use anyhow::{Result, ensure};

use super::family::Family;
use super::rope::RopeParameters;
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
    /// Every layer's queries see at most this many latest positions, themselves included.
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    /// All of them, in the order given.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
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
            self.num_hidden_layers <= u16::MAX as usize,
            "`num_hidden_layers` is {}; at most {} are supported",
            self.num_hidden_layers,
            u16::MAX
        );
        ensure!(
            self.num_attention_heads.is_multiple_of(self.num_key_value_heads),
            "`num_attention_heads` {} is not a multiple of `num_key_value_heads` {}",
            self.num_attention_heads,
            self.num_key_value_heads
        );
        self.rope.validate(self.head_dim)?;
        let eps = self.rms_norm_eps;
        ensure!(eps.is_finite() && eps > 0.0, "`rms_norm_eps` is {eps}; wanted a positive number");
        ensure!(self.sliding_window != Some(0), "`sliding_window` is 0; wanted `null` or a positive number");
        Ok(self)
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
        let q_width = self.num_attention_heads * self.head_dim;
        let kv_width = self.num_key_value_heads * self.head_dim;
        let id = |role| TensorId::in_layer(layer, role);
        let mut linear = |role, out_features: usize, in_features: usize, bias: bool| {
            tensors.push((id(role), vec![out_features, in_features]));
            if bias {
                tensors.push((id(role).bias(), vec![out_features]));
            }
        };
        linear(Role::Q, q_width, hidden, self.qkv_bias);
        linear(Role::K, kv_width, hidden, self.qkv_bias);
        linear(Role::V, kv_width, hidden, self.qkv_bias);
        linear(Role::O, hidden, q_width, self.o_bias);
        linear(Role::Gate, self.intermediate_size, hidden, self.mlp_bias);
        linear(Role::Up, self.intermediate_size, hidden, self.mlp_bias);
        linear(Role::Down, hidden, self.intermediate_size, self.mlp_bias);
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
