//! `config.json` ↔ [`Config`]: the keys that all classes share. A class's own are its family's.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::FAMILIES;
use crate::model::config::json::{decimal, flag, number, required, size, token_ids};
use crate::model::config::{Config, Family, LayerKind};
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
            qk_norm: None,
            layers: LayerKind::alike(num_hidden_layers, intermediate_size)?,
            bos_token_id: token_ids(json, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(json, "eos_token_id")?,
            pad_token_id: token_ids(json, "pad_token_id")?.first().copied(),
        };
        (family.read)(json, &mut config)?;
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
            "rope_parameters": rope::json::write(&self.rope, &self.family.rope)?,
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
            (self.family.write)(self, keys);
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

impl Family {
    /// Returns the family that a `config.json` names in `architectures`, or else in `model_type`.
    ///
    /// # Errors
    /// Names the class if it is unknown, or both keys if neither is given.
    pub fn of_json(json: &Value) -> Result<&'static Family> {
        let class = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = json.get("model_type").and_then(Value::as_str);
        let found = match (class, model_type) {
            // A checkpoint of the bare decoder says `LlamaModel`.
            (Some(class), _) => {
                let bare = class.strip_suffix("Model").map(|stem| format!("{stem}ForCausalLM"));
                FAMILIES.iter().find(|family| family.class == bare.as_deref().unwrap_or(class))
            }
            (None, Some(model_type)) => FAMILIES.iter().find(|family| family.model_type == model_type),
            (None, None) => {
                bail!("neither `architectures` nor `model_type` is given; is this a model's config.json?")
            }
        };
        let known = FAMILIES.map(|family| family.class).join(", ");
        let name = class.or(model_type).unwrap_or("");
        found
            .copied()
            .with_context(|| format!("architecture `{name}` is not supported; supported are {known}"))
    }
}
