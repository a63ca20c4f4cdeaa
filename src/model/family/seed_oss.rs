//! Seed-OSS: Llama with heads of any width and biases on q, k, v (transformers `SeedOssConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, Name};
use crate::model::config::Config;
use crate::model::config::json::{flag, flag_or};
use crate::names::Role;

pub const SEED_OSS: Family = Family {
    class: "SeedOssForCausalLM",
    model_type: "seed_oss",
    gguf: Architecture { name: "seed_oss", ..Architecture::PLAIN },
    names: &[Name { role: Role::FfnNorm, module: "post_attention_layernorm", stem: "post_attention_norm" }],
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = flag_or(json, "attention_bias", true)?;
    config.o_bias = flag(json, "attention_out_bias")?;
    config.mlp_bias = flag(json, "mlp_bias")?;
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(config.qkv_bias));
    json.insert("attention_out_bias".into(), json!(config.o_bias));
    json.insert("mlp_bias".into(), json!(config.mlp_bias));
}
