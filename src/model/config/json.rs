//! `config.json` ↔ [`Config`]: the keys that all classes share. A class's own are its family's.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Config, LayerKind};
use crate::model::family::Family;
use crate::model::rope;

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or malformed, or the architecture, activation, RoPE type or attention pattern
    /// that no forward pass here covers.
    pub fn from_json(json: &Value) -> Result<Self> {
        let family = Family::of_json(json)?;
        let act = json.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        ensure!(act == "silu", "`hidden_act` is `{act}`; only `silu` (SwiGLU) is supported");

        let hidden_size = required(json, "hidden_size")?;
        let num_attention_heads = required(json, "num_attention_heads")?;
        ensure!(num_attention_heads > 0, "`num_attention_heads` is 0; wanted at least one head");
        let intermediate_size = required(json, "intermediate_size")?;
        let num_hidden_layers = required(json, "num_hidden_layers")?;
        let mut config = Config {
            family,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: size(json, "num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim: size(json, "head_dim")?.unwrap_or(hidden_size / num_attention_heads),
            vocab_size: required(json, "vocab_size")?,
            max_position_embeddings: size(json, "max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: number(json, "rms_norm_eps")?.unwrap_or(1e-6),
            rope: rope::json::read(json, &family.rope)?.shared()?,
            tie_word_embeddings: flag(json, "tie_word_embeddings")?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            layers: LayerKind::alike(num_hidden_layers, intermediate_size)?,
            bos_token_id: token_ids(json, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(json, "eos_token_id")?,
            pad_token_id: token_ids(json, "pad_token_id")?.first().copied(),
        };
        family.read_own(json, &mut config)?;
        config.validated()
    }

    /// Returns the `config.json` that [`Config::from_json`] takes for this configuration again, in the spelling of
    /// transformers 5.
    ///
    /// # Errors
    /// If the family's class has no keys that say the same: for a table of RoPE divisors, or biases in some places only.
    pub fn to_json(&self) -> Result<Value> {
        let mut out = json!({
            "architectures": [self.family.class],
            "model_type": self.family.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": decimal(self.rms_norm_eps),
            "rope_parameters": rope::json::write(&self.rope)?,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => json!(id),
                ref ids => json!(ids),
            },
            "pad_token_id": self.pad_token_id,
        });
        if let Value::Object(keys) = &mut out {
            self.family.write_own(self, keys);
        }
        let back = Config::from_json(&out)?;
        ensure!(
            back == *self,
            "`config.json` of a `{}` cannot say what this model is: wanted {self:?}, it would be read as {back:?}",
            self.family.class
        );
        Ok(out)
    }
}

/// Returns a number with the digits that an F32 needs; as an F64 it would print its rounding.
pub(in crate::model) fn decimal(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

pub(in crate::model) fn required(json: &Value, name: &str) -> Result<usize> {
    size(json, name)?.with_context(|| format!("`{name}` is missing"))
}

/// Returns a size, or `None` where the field is absent or null.
pub(in crate::model) fn size(json: &Value, name: &str) -> Result<Option<usize>> {
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

pub(in crate::model) fn flag(json: &Value, name: &str) -> Result<bool> {
    flag_or(json, name, false)
}

/// Returns a flag, or `default` where the field is absent or null.
pub(in crate::model) fn flag_or(json: &Value, name: &str, default: bool) -> Result<bool> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(default),
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
    let given = match json.get(name) {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(ids)) => ids,
        Some(value) => std::slice::from_ref(value),
    };
    // -1 is none, as the original LLaMA conversions and their fine-tunes have it.
    given.iter().filter(|value| value.as_i64() != Some(-1)).map(id).collect()
}
