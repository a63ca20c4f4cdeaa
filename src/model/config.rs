//! `config.json` → what a forward pass needs. Anything unknown is refused by name.
//!
//! Field names and defaults are those of the configuration classes of transformers 5.17 (`LlamaConfig`, `MistralConfig`,
//! `Qwen2Config`, `Qwen3Config`). Both spellings of RoPE are read: `rope_theta` + `rope_scaling` (transformers 4) and
//! `rope_parameters` (transformers 5).

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::rope::RopeScaling;
use crate::backend::Rope;
use crate::names::{Role, TensorId};

/// The decoder families that share one forward pass; differences are flags of [`Config`], never names in the pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// (architecture, `architectures` entry, `model_type`)
const ARCHITECTURES: [(Architecture, &str, &str); 4] = [
    (Architecture::Llama, "LlamaForCausalLM", "llama"),
    (Architecture::Mistral, "MistralForCausalLM", "mistral"),
    (Architecture::Qwen2, "Qwen2ForCausalLM", "qwen2"),
    (Architecture::Qwen3, "Qwen3ForCausalLM", "qwen3"),
];

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
    /// Every layer's queries see at most this many latest positions, themselves included.
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    /// All of them, in the order given.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or the architecture, activation, RoPE type or attention pattern
    /// that no forward pass here covers.
    pub fn from_json(json: &Value) -> Result<Self> {
        let architecture = architecture(json)?;
        let act = json.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        ensure!(act == "silu", "`hidden_act` is `{act}`; only `silu` (SwiGLU) is supported");

        let hidden_size = required(json, "hidden_size")?;
        let num_attention_heads = required(json, "num_attention_heads")?;
        ensure!(num_attention_heads > 0, "`num_attention_heads` is 0; wanted at least one head");
        let attention_bias = flag(json, "attention_bias")?;
        let head_dim = match (size(json, "head_dim")?, architecture) {
            (Some(head_dim), _) => head_dim,
            (None, Architecture::Qwen3) => 128,
            (None, _) => hidden_size / num_attention_heads,
        };
        let (rope_theta, rope_scaling) = rope_fields(json)?;
        Config {
            architecture,
            hidden_size,
            intermediate_size: required(json, "intermediate_size")?,
            num_hidden_layers: required(json, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: size(json, "num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: required(json, "vocab_size")?,
            max_position_embeddings: size(json, "max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: number(json, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: flag(json, "tie_word_embeddings")?,
            qkv_bias: match architecture {
                Architecture::Llama | Architecture::Qwen3 => attention_bias,
                Architecture::Qwen2 => true,
                Architecture::Mistral => false,
            },
            o_bias: attention_bias && matches!(architecture, Architecture::Llama | Architecture::Qwen3),
            mlp_bias: architecture == Architecture::Llama && flag(json, "mlp_bias")?,
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: sliding_window(json, architecture)?,
            bos_token_id: token_ids(json, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(json, "eos_token_id")?,
            pad_token_id: token_ids(json, "pad_token_id")?.first().copied(),
        }
        .validated()
    }

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
        ensure!(self.head_dim.is_multiple_of(2), "`head_dim` {} is odd; RoPE rotates pairs", self.head_dim);
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            ensure!(value.is_finite() && value > 0.0, "`{name}` is {value}; wanted a positive number");
        }
        if let RopeScaling::Divisors(divisors) = &self.rope_scaling {
            let wanted = self.head_dim / 2;
            ensure!(divisors.len() == wanted, "{} RoPE divisors, wanted {wanted}", divisors.len());
            let wrong = divisors.iter().find(|x| !(x.is_finite() && **x > 0.0));
            ensure!(wrong.is_none(), "a RoPE divisor is {}; wanted positive numbers", wrong.unwrap_or(&0.0));
        }
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

    /// Returns the rotary angles with scaling applied.
    pub fn rope(&self) -> Rope {
        self.rope_scaling.apply(self.rope_theta, self.head_dim)
    }

    /// Returns what scaling divides each frequency by, `[head_dim / 2]`; for Llama 3 these are GGUF's `rope_freqs`.
    pub fn rope_divisors(&self) -> Vec<f64> {
        self.rope_scaling.divisors(self.rope_theta, self.head_dim)
    }
}

fn architecture(json: &Value) -> Result<Architecture> {
    let class = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let model_type = json.get("model_type").and_then(Value::as_str);
    let found = match (class, model_type) {
        (Some(class), _) => ARCHITECTURES.iter().find(|row| row.1 == class),
        (None, Some(model_type)) => ARCHITECTURES.iter().find(|row| row.2 == model_type),
        (None, None) => {
            bail!("neither `architectures` nor `model_type` is given; is this a model's config.json?")
        }
    };
    let known = ARCHITECTURES.map(|row| row.1).join(", ");
    let found = found.with_context(|| {
        format!(
            "architecture `{}` is not supported; supported are {known}",
            class.or(model_type).unwrap_or("")
        )
    })?;
    Ok(found.0)
}

/// Reads θ and the scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling`.
fn rope_fields(json: &Value) -> Result<(f32, RopeScaling)> {
    let (key, rope) = match (json.get("rope_parameters"), json.get("rope_scaling")) {
        (Some(rope @ Value::Object(_)), _) => ("rope_parameters", rope),
        (_, Some(rope @ Value::Object(_))) => ("rope_scaling", rope),
        (None | Some(Value::Null), None | Some(Value::Null)) => ("rope_parameters", &Value::Null),
        _ => bail!("`rope_parameters` or `rope_scaling` is neither an object nor null"),
    };
    let theta = match number(rope, "rope_theta").context(key)? {
        Some(theta) => theta,
        None => number(json, "rope_theta")?.unwrap_or(10_000.0),
    };
    for owner in [json, rope] {
        let share = number(owner, "partial_rotary_factor")?.unwrap_or(1.0);
        ensure!(
            share == 1.0,
            "`partial_rotary_factor` is {share}; only fully rotated heads (1.0) are supported"
        );
    }
    if let Some((name, _)) = rope.as_object().into_iter().flatten().find(|(_, value)| value.is_object()) {
        bail!(
            "`{key}.{name}`: RoPE parameters per layer type are not supported; wanted one set for all layers"
        );
    }
    let kind =
        rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
    let need = |name: &str| -> Result<f32> {
        let value =
            number(rope, name)?.with_context(|| format!("`{key}.{name}` is missing for type `{kind}`"))?;
        ensure!(value.is_finite() && value > 0.0, "`{key}.{name}` is {value}; wanted a positive number");
        Ok(value)
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original_context: need("original_max_position_embeddings")? as usize,
        },
        other => bail!("`{key}` has type `{other}`; supported are `default`, `linear` and `llama3`"),
    };
    if let RopeScaling::Llama3 { low, high, .. } = scaling {
        ensure!(low < high, "`{key}.low_freq_factor` {low} is not below `high_freq_factor` {high}");
    }
    Ok((theta, scaling))
}

/// Returns the window that all layers share. Mistral applies `sliding_window` everywhere; Qwen only when
/// `use_sliding_window` is set and only from layer `max_window_layers` on; Llama has none.
fn sliding_window(json: &Value, architecture: Architecture) -> Result<Option<usize>> {
    let window = size(json, "sliding_window")?;
    let layers = required(json, "num_hidden_layers")?;
    let sliding = match architecture {
        Architecture::Llama => 0,
        Architecture::Mistral => layers,
        Architecture::Qwen2 | Architecture::Qwen3 if !flag(json, "use_sliding_window")? => 0,
        Architecture::Qwen2 | Architecture::Qwen3 => match json.get("layer_types") {
            Some(Value::Array(types)) => types.iter().filter(|kind| *kind == "sliding_attention").count(),
            _ => layers.saturating_sub(size(json, "max_window_layers")?.unwrap_or(28)),
        },
    };
    match sliding {
        0 => Ok(None),
        n if n == layers => Ok(window),
        n => bail!(
            "{n} of {layers} layers use sliding-window attention; supported are all or none \
             (set `use_sliding_window` to false to evaluate without)"
        ),
    }
}

fn required(json: &Value, name: &str) -> Result<usize> {
    size(json, name)?.with_context(|| format!("`{name}` is missing"))
}

/// Returns a size, or `None` where the field is absent or null.
fn size(json: &Value, name: &str) -> Result<Option<usize>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(value) => Ok(Some(value as usize)),
            None => bail!("`{name}` is `{value}`; wanted a whole number"),
        },
    }
}

fn number(json: &Value, name: &str) -> Result<Option<f32>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(value) => Ok(Some(value as f32)),
            None => bail!("`{name}` is `{value}`; wanted a number"),
        },
    }
}

fn flag(json: &Value, name: &str) -> Result<bool> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(value) => bail!("`{name}` is `{value}`; wanted `true` or `false`"),
    }
}

/// Returns the ids of a field that may be a number, a list of numbers, or null.
fn token_ids(json: &Value, name: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => bail!("`{name}` is `{value}`; wanted token ids"),
    };
    match json.get(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 1,
            "eos_token_id": [2, 3],
        })
    }

    fn with(fields: Value) -> Value {
        let mut json = llama();
        for (key, value) in fields.as_object().into_iter().flatten() {
            json[key] = value.clone();
        }
        json
    }

    fn refusal(fields: Value) -> String {
        format!("{:#}", Config::from_json(&with(fields)).unwrap_err())
    }

    const LLAMA3: &str = r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0}"#;

    #[test]
    fn both_spellings_of_rope_give_one_configuration() {
        let scaling: Value = serde_json::from_str(LLAMA3).unwrap();
        let old = Config::from_json(&with(json!({"rope_scaling": scaling}))).unwrap();
        let new = Config::from_json(&with(json!({"rope_parameters": scaling, "rope_theta": null}))).unwrap();
        assert_eq!(old, new);
        let RopeScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original_context: 8192 } =
            old.rope_scaling
        else {
            panic!("{:?}", old.rope_scaling)
        };
        let plain =
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": null});
        assert_eq!(Config::from_json(&with(plain)).unwrap(), Config::from_json(&llama()).unwrap());
    }

    #[test]
    fn llama3_scaling_keeps_short_wavelengths_and_divides_long_ones() {
        let scaling: Value = serde_json::from_str(LLAMA3).unwrap();
        let config = Config::from_json(&with(json!({"rope_scaling": scaling, "head_dim": 64}))).unwrap();
        let divisors = config.rope_divisors();
        assert_eq!((divisors[0], divisors[31]), (1.0, 32.0));
        assert!(divisors.is_sorted());
        // Pair 16: wavelength 2π·√500000 = 4442.9 lies between 8192 / 4 and 8192 / 1.
        let kept = (8192.0 / 4442.8829f64 - 1.0) / 3.0;
        assert!((divisors[16] - 1.0 / ((1.0 - kept) / 32.0 + kept)).abs() < 1e-6, "{}", divisors[16]);
        let expected = (500000f64.powf(-0.5) / divisors[16]) as f32;
        assert_eq!(config.rope().inverse_frequencies[16], expected);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let linear = json!({"rope_scaling": {"type": "linear", "factor": 4.0}});
        let scaled = Config::from_json(&with(linear)).unwrap().rope();
        let plain = Config::from_json(&llama()).unwrap().rope();
        for (scaled, plain) in scaled.inverse_frequencies.iter().zip(&plain.inverse_frequencies) {
            assert_eq!(scaled * 4.0, *plain);
        }
    }

    #[test]
    fn families_differ_in_biases_norms_and_windows_only() {
        let of = |class: &str, extra: Value| {
            let mut json = with(extra);
            json["architectures"] = json!([class]);
            Config::from_json(&json).unwrap()
        };
        let qwen2 = of("Qwen2ForCausalLM", json!({"sliding_window": 8, "use_sliding_window": false}));
        assert_eq!(
            (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.sliding_window),
            (true, false, false, None)
        );
        let qwen3 = of("Qwen3ForCausalLM", json!({"attention_bias": false}));
        assert_eq!((qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim), (false, true, 128));
        let mistral = of("MistralForCausalLM", json!({"sliding_window": 8}));
        assert_eq!((mistral.qkv_bias, mistral.sliding_window), (false, Some(8)));
        let biased =
            of("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true, "sliding_window": 8}));
        assert_eq!(
            (biased.qkv_bias, biased.o_bias, biased.mlp_bias, biased.sliding_window),
            (true, true, true, None)
        );
    }

    #[test]
    fn every_expected_tensor_has_a_role_and_a_shape_of_the_configuration() {
        let config =
            Config::from_json(&with(json!({"attention_bias": true, "tie_word_embeddings": true}))).unwrap();
        let tensors = config.expected_tensors();
        assert_eq!(tensors.len(), 2 + 2 * (9 + 4));
        let shape = |id: TensorId| &tensors.iter().find(|row| row.0 == id).unwrap().1;
        assert_eq!(shape(TensorId::in_layer(1, Role::K)), &[32, 64]);
        assert_eq!(shape(TensorId::in_layer(1, Role::K).bias()), &[32]);
        assert_eq!(shape(TensorId::in_layer(0, Role::Down)), &[64, 96]);
        assert!(!tensors.iter().any(|row| row.0.role == Role::Head), "a tied model has no head");
    }

    #[test]
    fn the_unknown_is_refused_by_name() {
        for (fields, word) in [
            (json!({"architectures": ["GptOssForCausalLM"]}), "GptOssForCausalLM"),
            (json!({"architectures": null, "model_type": "mamba"}), "mamba"),
            (json!({"architectures": null, "model_type": null}), "architectures"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
            (json!({"rope_scaling": {"type": "llama3", "factor": 4.0}}), "low_freq_factor"),
            (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "full_attention"),
            (json!({"rope_parameters": 3}), "rope_parameters"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"hidden_size": null}), "hidden_size"),
            (json!({"hidden_size": -1}), "hidden_size"),
            (json!({"hidden_size": 1u64 << 60}), "hidden_size"),
            (json!({"num_hidden_layers": 1 << 20}), "num_hidden_layers"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"head_dim": 15}), "head_dim"),
            (json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"eos_token_id": -2}), "eos_token_id"),
            (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        ] {
            let message = refusal(fields);
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn a_window_in_some_layers_only_is_refused() {
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 4,
            "max_window_layers": 1});
        assert!(refusal(qwen.clone()).contains("1 of 2 layers"));
        let mut everywhere = with(qwen);
        everywhere["max_window_layers"] = json!(0);
        assert_eq!(Config::from_json(&everywhere).unwrap().sliding_window, Some(4));
    }
}
