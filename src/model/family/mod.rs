//! The decoder families: one file and one row of [`FAMILIES`] each.
//!
//! All that a family's name decides stands here: what its files call things, and what its configuration class means by its
//! keys. The forward pass sees only what [`Config`] says.

mod llama;
mod mistral;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use std::fmt;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use super::config::Config;
use super::rope::json::RopeClass;

/// What a family's files call things, and what its configuration class means by its keys.
pub struct Family {
    /// Entry of `architectures`.
    pub class: &'static str,
    /// `model_type`
    pub model_type: &'static str,
    /// `general.architecture` of GGUF files.
    pub gguf: &'static str,
    /// Whether llama.cpp rotates neighbours (2i, 2i + 1) of q and k for that architecture, so that GGUF files keep the rows
    /// of each head in that order.
    pub gguf_neighbours: bool,
    /// What the class means by the keys of rotary embedding.
    pub(super) rope: RopeClass,
    /// Sets what the class's own keys and defaults say in a configuration whose common keys are read.
    read: fn(&Value, &mut Config) -> Result<()>,
    /// Inverse of `read`: adds the class's own keys.
    write: fn(&Config, &mut Map<String, Value>),
}

/// All families. Of those that share a GGUF architecture, the first is what such files are read as.
pub const FAMILIES: [&Family; 6] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &qwen2_moe::QWEN2_MOE,
    &qwen3_moe::QWEN3_MOE,
];

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

    /// Returns the family that GGUF files of an architecture are read as; `None` if no family here has that name.
    pub fn of_gguf(architecture: &str) -> Option<&'static Family> {
        FAMILIES.into_iter().find(|family| family.gguf == architecture)
    }

    /// Sets what the class's own keys of a `config.json` say.
    pub(super) fn read_own(&self, json: &Value, config: &mut Config) -> Result<()> {
        (self.read)(json, config)
    }

    /// Adds the class's own keys to a `config.json`.
    pub(super) fn write_own(&self, config: &Config, json: &mut Map<String, Value>) {
        (self.write)(config, json);
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
