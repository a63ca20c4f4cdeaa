//! The decoder families: one file and one row of [`FAMILIES`] each.
//!
//! All that a family's name decides stands here: what its files call things, and what its configuration class means by its
//! keys. The forward pass sees only what [`Config`] says.

mod architecture;
mod llama;
mod mistral;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use std::fmt;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

pub use self::architecture::{Architecture, GgufMixture};
use super::config::Config;
use super::rope::json::RopeClass;
use crate::names::{Role, TensorId};
use crate::rows::{Place, RowMap};

/// What a family's files call things, and what its configuration class means by its keys.
pub struct Family {
    /// Entry of `architectures`.
    pub class: &'static str,
    /// `model_type`
    pub model_type: &'static str,
    /// What llama.cpp makes of it.
    pub gguf: Architecture,
    /// What its files call otherwise than Llama's.
    names: &'static [Name],
    /// Stored tensors that hold several of its matrices.
    fused: &'static [Fused],
    /// What the class means by the keys of rotary embedding.
    pub(super) rope: RopeClass,
    /// Sets what the class's own keys and defaults say in a configuration whose common keys are read.
    read: fn(&Value, &mut Config) -> Result<()>,
    /// Inverse of `read`: adds the class's own keys.
    write: fn(&Config, &mut Map<String, Value>),
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

/// Where a fused tensor keeps the rows of one of its matrices.
pub struct Share {
    /// The fused tensor.
    pub fused: &'static Fused,
    /// The matrix's first row in it.
    pub first: usize,
    /// All its rows.
    pub rows: usize,
}

/// All families. Of those that share a GGUF architecture, the first is what such files are read as; the first with experts, if
/// the files have some.
pub const FAMILIES: [&Family; 8] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mixtral::MIXTRAL,
    &phi3::PHI3,
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

    /// Returns the family that GGUF files of an architecture are read as, whose layers have experts or have none; `None` if no
    /// family here has that name.
    pub fn of_gguf(architecture: &str, experts: bool) -> Option<&'static Family> {
        let named = || FAMILIES.into_iter().filter(|family| family.gguf.name == architecture);
        named().find(|family| family.gguf.mixture.is_some() == experts).or_else(|| named().next())
    }

    /// Returns what Hugging Face checkpoints call a tensor that is stored on its own.
    pub fn hf_name(&self, id: TensorId) -> String {
        self.name(id.role).map_or_else(|| id.hf_name(), |name| id.hf_name_as(name.module))
    }

    /// Returns what GGUF files call a tensor that is stored on its own.
    pub fn gguf_name(&self, id: TensorId) -> String {
        self.name(id.role).map_or_else(|| id.gguf_name(), |name| id.gguf_name_as(name.stem))
    }

    fn name(&self, role: Role) -> Option<&'static Name> {
        self.names.iter().find(|name| name.role == role)
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

impl Share {
    /// Returns the place in the fused tensor, which is stored under that name.
    pub fn place(&self, name: String) -> Place {
        Place { name, axes: vec![self.rows], rows: RowMap::slice(self.first) }
    }
}

impl Config {
    /// Returns where a tensor's rows lie that is stored together with others; `None` if it is stored on its own.
    pub fn share(&self, id: TensorId) -> Option<Share> {
        let fused = self.family.fused.iter().find(|fused| fused.roles.contains(&id.role))?;
        let linears: Vec<_> = self.linears_of(usize::from(id.layer?)).collect();
        let rows = |&role: &Role| {
            let linear =
                linears.iter().find(|linear| linear.id.role == role && linear.id.expert == id.expert);
            linear.map_or(0, |linear| linear.shape[0])
        };
        let before = fused.roles.iter().take_while(|&&role| role != id.role);
        Some(Share { fused, first: before.map(rows).sum(), rows: fused.roles.iter().map(rows).sum() })
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
