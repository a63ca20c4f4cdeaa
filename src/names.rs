//! Which tensor of a model, whatever a file calls it: [`TensorId`] ↔ the names of each ecosystem.
//!
//! The names of this table are Llama's in the Hugging Face layout, by which users know tensors whatever a model's files call
//! them, and those of gguf-py's `tensor_mapping.py`. What a family calls otherwise is its own ([`Family`]).
//!
//! [`Family`]: crate::model::family::Family

use std::fmt;

/// What a tensor does in a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embeddings `[vocab, hidden]`.
    Embed,
    /// RMS norm before attention `[hidden]`.
    AttnNorm,
    /// Query projection `[heads · head_dim, hidden]`.
    Q,
    /// Key projection `[kv_heads · head_dim, hidden]`.
    K,
    /// Value projection `[kv_heads · head_dim, hidden]`.
    V,
    /// Attention output projection `[hidden, heads · head_dim]`.
    O,
    /// Per-head RMS norm of queries `[head_dim]` (Qwen3).
    QNorm,
    /// Per-head RMS norm of keys `[head_dim]` (Qwen3).
    KNorm,
    /// RMS norm before the feed-forward part `[hidden]`.
    FfnNorm,
    /// Gate projection `[intermediate, hidden]`.
    Gate,
    /// Up projection `[intermediate, hidden]`.
    Up,
    /// Down projection `[hidden, intermediate]`.
    Down,
    /// Router of a mixture of experts `[experts, hidden]`.
    Router,
    /// Added to the scores by which experts are chosen `[experts]`.
    ChoiceBias,
    /// Gate projection of the expert that all tokens share `[width, hidden]`.
    SharedGate,
    /// Its up projection `[width, hidden]`.
    SharedUp,
    /// Its down projection `[hidden, width]`.
    SharedDown,
    /// Weighs it for each token `[1, hidden]`.
    SharedRouter,
    /// RMS norm before the head `[hidden]`.
    OutputNorm,
    /// Output head `[vocab, hidden]`; absent when tied to the embeddings.
    Head,
    /// GGUF only: RoPE frequency divisors `[pairs]` (Llama 3 scaling).
    RopeFreqs,
    /// GGUF only: RoPE frequency divisors of long sequences `[pairs]` (LongRoPE).
    RopeFactorsLong,
    /// GGUF only: RoPE frequency divisors of other sequences `[pairs]` (LongRoPE).
    RopeFactorsShort,
}

use Role::*;

/// (role, Hugging Face module, GGUF stem); per-layer rows follow `model.layers.N.` and `blk.N.`.
const NAMES: [(Role, &str, &str); 23] = [
    (Embed, "model.embed_tokens", "token_embd"),
    (AttnNorm, "input_layernorm", "attn_norm"),
    (Q, "self_attn.q_proj", "attn_q"),
    (K, "self_attn.k_proj", "attn_k"),
    (V, "self_attn.v_proj", "attn_v"),
    (O, "self_attn.o_proj", "attn_output"),
    (QNorm, "self_attn.q_norm", "attn_q_norm"),
    (KNorm, "self_attn.k_norm", "attn_k_norm"),
    (FfnNorm, "post_attention_layernorm", "ffn_norm"),
    (Gate, "mlp.gate_proj", "ffn_gate"),
    (Up, "mlp.up_proj", "ffn_up"),
    (Down, "mlp.down_proj", "ffn_down"),
    (Router, "mlp.gate", "ffn_gate_inp"),
    (ChoiceBias, "mlp.gate.e_score_correction_bias", "exp_probs_b"),
    (SharedGate, "mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    (SharedUp, "mlp.shared_expert.up_proj", "ffn_up_shexp"),
    (SharedDown, "mlp.shared_expert.down_proj", "ffn_down_shexp"),
    (SharedRouter, "mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    (OutputNorm, "model.norm", "output_norm"),
    (Head, "lm_head", "output"),
    (RopeFreqs, "rope_freqs", "rope_freqs"),
    (RopeFactorsLong, "rope_factors_long", "rope_factors_long"),
    (RopeFactorsShort, "rope_factors_short", "rope_factors_short"),
];

/// What precedes an expert's number in names.
const EXPERTS: &str = "experts.";

impl Role {
    /// Whether each expert of a mixture has its own.
    pub fn in_experts(self) -> bool {
        matches!(self, Gate | Up | Down)
    }

    /// Whether each layer has its own.
    pub fn in_layer(self) -> bool {
        !matches!(self, Embed | OutputNorm | Head) && !self.is_rope_divisors()
    }

    /// Returns the role that stands for all that engines join into one matrix: q for q, k, v; gate for gate, up.
    pub fn joined(self) -> Role {
        match self {
            Q | K | V => Q,
            Gate | Up => Gate,
            SharedGate | SharedUp => SharedGate,
            other => other,
        }
    }

    /// Whether this is a table of RoPE frequency divisors, which is part of the configuration.
    pub fn is_rope_divisors(self) -> bool {
        matches!(self, RopeFreqs | RopeFactorsLong | RopeFactorsShort)
    }

    /// Whether this is the gain of a norm.
    pub fn is_norm(self) -> bool {
        matches!(self, AttnNorm | FfnNorm | QNorm | KNorm | OutputNorm)
    }

    /// Whether this is a decoder linear `[out_features, in_features]`: what weight-only formats quantize.
    pub fn is_linear(self) -> bool {
        matches!(self, Q | K | V | O | Gate | Up | Down | SharedGate | SharedUp | SharedDown)
    }
}

/// Weight or bias of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorPart {
    /// The matrix, table or gain.
    Weight,
    /// The bias `[out_features]`.
    Bias,
}

impl TensorPart {
    /// Returns what follows the module in names.
    pub fn suffix(self) -> &'static str {
        match self {
            TensorPart::Weight => "weight",
            TensorPart::Bias => "bias",
        }
    }
}

/// One tensor of a decoder model. Ordered by layer, then by place in the layer, as a forward pass meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId {
    /// Layer index, `None` outside the layers.
    pub layer: Option<u16>,
    /// Number of the expert that it belongs to, `None` outside mixtures of experts.
    pub expert: Option<u16>,
    /// What the tensor does.
    pub role: Role,
    /// Weight or bias.
    pub part: TensorPart,
}

impl TensorId {
    /// Returns the id of a weight outside the layers.
    pub const fn global(role: Role) -> Self {
        TensorId { layer: None, expert: None, role, part: TensorPart::Weight }
    }

    /// Returns the id of a weight of a layer.
    pub const fn in_layer(layer: usize, role: Role) -> Self {
        TensorId { layer: Some(layer as u16), expert: None, role, part: TensorPart::Weight }
    }

    /// Returns the same tensor of one of the layer's experts.
    pub const fn of_expert(self, expert: usize) -> Self {
        TensorId { expert: Some(expert as u16), ..self }
    }

    /// Returns the same module's bias.
    pub const fn bias(self) -> Self {
        TensorId { part: TensorPart::Bias, ..self }
    }

    /// Returns the Hugging Face module path, without `.weight`.
    pub fn hf_module(&self) -> String {
        self.hf_module_as(NAMES[self.role as usize].1)
    }

    /// Returns the path of the module that is called `module` in its layer (`self_attn.qkv_proj`) or model.
    pub fn hf_module_as(&self, module: &str) -> String {
        match (self.layer, self.expert, module.rsplit_once('.')) {
            (Some(layer), Some(expert), Some((part, linear))) => {
                format!("model.layers.{layer}.{part}.{EXPERTS}{expert}.{linear}")
            }
            (Some(layer), ..) => format!("model.layers.{layer}.{module}"),
            (None, ..) => module.to_string(),
        }
    }

    /// Returns the Hugging Face tensor name.
    pub fn hf_name(&self) -> String {
        self.hf_name_as(NAMES[self.role as usize].1)
    }

    /// Returns the name of this part of the module that is called `module` in its layer or model.
    pub fn hf_name_as(&self, module: &str) -> String {
        format!("{}.{}", self.hf_module_as(module), self.part.suffix())
    }

    /// Returns the GGUF tensor name.
    pub fn gguf_name(&self) -> String {
        self.gguf_name_as(NAMES[self.role as usize].2)
    }

    /// Returns the GGUF name of this part of what is called `stem` in its layer or model.
    pub fn gguf_name_as(&self, stem: &str) -> String {
        match self.layer {
            Some(layer) => format!("blk.{layer}.{stem}.{}", self.part.suffix()),
            None => format!("{stem}.{}", self.part.suffix()),
        }
    }

    /// Parses a Hugging Face tensor name; `None` if no module of a known decoder has it.
    pub fn from_hf(name: &str) -> Option<Self> {
        Self::parse(name, "model.layers.", |row| row.1)
    }

    /// Parses a GGUF tensor name; `None` if no module of a known decoder has it.
    pub fn from_gguf(name: &str) -> Option<Self> {
        Self::parse(name, "blk.", |row| row.2)
    }

    fn parse(
        name: &str,
        layers: &str,
        column: impl Fn(&(Role, &'static str, &'static str)) -> &'static str,
    ) -> Option<Self> {
        let (module, part) = match name.rsplit_once('.')? {
            (module, "weight") => (module, TensorPart::Weight),
            (module, "bias") => (module, TensorPart::Bias),
            _ => return None,
        };
        let (layer, module) = match module.strip_prefix(layers) {
            None => (None, module),
            Some(rest) => {
                let (layer, module) = rest.split_once('.')?;
                (Some(layer.parse().ok()?), module)
            }
        };
        let (expert, module) = match module.split_once(EXPERTS) {
            None => (None, module.to_string()),
            Some((before, rest)) => {
                let (expert, linear) = rest.split_once('.')?;
                (Some(expert.parse().ok()?), format!("{before}{linear}"))
            }
        };
        let row = NAMES.iter().find(|row| column(row) == module && row.0.in_layer() == layer.is_some())?;
        let known = expert.is_none() || row.0.in_experts();
        known.then_some(TensorId { layer, expert, role: row.0, part })
    }
}

/// The Hugging Face name: what users see in plans, errors and reports, whatever the container.
impl fmt::Display for TensorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hf_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_in_both_ecosystems() {
        for (index, &(role, ..)) in NAMES.iter().enumerate() {
            assert_eq!(role as usize, index, "NAMES is in the order of Role");
            let id = if role.in_layer() { TensorId::in_layer(12, role) } else { TensorId::global(role) };
            for id in [id, id.bias()] {
                assert_eq!(TensorId::from_hf(&id.hf_name()), Some(id));
                assert_eq!(TensorId::from_gguf(&id.gguf_name()), Some(id));
            }
        }
        let up = TensorId::in_layer(3, Up).of_expert(7);
        assert_eq!(up.to_string(), "model.layers.3.mlp.experts.7.up_proj.weight");
        assert_eq!(TensorId::from_hf(&up.to_string()), Some(up));
    }

    #[test]
    fn unknown_names_are_not_guessed() {
        for name in [
            "model.layers.0.self_attn.experts.0.q_proj.weight",
            "model.layers.0.mlp.experts.x.up_proj.weight",
            "lm_head",
            "model.layers.x.mlp.up_proj.weight",
            "",
        ] {
            assert_eq!(TensorId::from_hf(name), None, "{name}");
        }
    }
}
