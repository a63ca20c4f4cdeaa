//! Llama: the plain decoder (transformers `LlamaConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{Architecture, Family};
use crate::model::config::{Config, json::flag};
use crate::model::rope::json::RopeClass;

pub const LLAMA: Family = Family {
    class: "LlamaForCausalLM",
    model_type: "llama",
    gguf: Architecture { name: "llama", neighbours: true, rope_divisors: true, ..Architecture::PLAIN },
    names: &[],
    fused: &[],
    rope: RopeClass::PLAIN,
    read,
    write,
};

pub(super) fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = flag(json, "attention_bias")?;
    config.o_bias = config.qkv_bias;
    config.mlp_bias = flag(json, "mlp_bias")?;
    Ok(())
}

pub(super) fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(config.qkv_bias));
    json.insert("mlp_bias".into(), json!(config.mlp_bias));
}
