//! Qwen3: norms on each head of q and k (transformers `Qwen3Config`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, qwen2};
use crate::model::config::Config;
use crate::model::config::json::{flag, size};
use crate::model::norms::QkNorm;

pub const QWEN3: Family = Family {
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    gguf: Architecture { name: "qwen3", ..Architecture::PLAIN },
    read,
    write,
    ..LLAMA
};

pub(super) fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.head_dim = size(json, "head_dim")?.unwrap_or(128);
    config.qkv_bias = flag(json, "attention_bias")?;
    config.o_bias = config.qkv_bias;
    config.qk_norm = Some(QkNorm::Heads);
    qwen2::read_windows(json, config)
}

pub(super) fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(config.qkv_bias));
    qwen2::write_windows(config, json);
}
