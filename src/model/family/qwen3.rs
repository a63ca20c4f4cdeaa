//! Qwen3: norms on each head of q and k (transformers `Qwen3Config`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{Family, qwen2};
use crate::model::config::Config;
use crate::model::config::json::{flag, size};
use crate::model::rope::json::RopeClass;

pub const QWEN3: Family = Family {
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    gguf: "qwen3",
    gguf_neighbours: false,
    rope: RopeClass::PLAIN,
    read,
    write,
};

pub(super) fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.head_dim = size(json, "head_dim")?.unwrap_or(128);
    config.qkv_bias = flag(json, "attention_bias")?;
    config.o_bias = config.qkv_bias;
    config.qk_norm = true;
    qwen2::read_windows(json, config)
}

pub(super) fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(config.qkv_bias));
    qwen2::write_windows(config, json);
}
