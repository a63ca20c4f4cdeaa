//! ERNIE 4.5, dense: Llama that turns neighbouring values of a head together (transformers `Ernie4_5Config`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family};
use crate::backend::Pairing;
use crate::model::config::Config;
use crate::model::config::json::{flag, flag_or};
use crate::model::rope::json::RopeClass;

pub const ERNIE4_5: Family = Family {
    class: "Ernie4_5ForCausalLM",
    model_type: "ernie4_5",
    gguf: Architecture { name: "ernie4_5", neighbours: true, ..Architecture::PLAIN },
    rope: RopeClass { theta: 500_000.0, pairing: Pairing::Neighbours, ..RopeClass::PLAIN },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    let biases = flag(json, "use_bias")?;
    (config.qkv_bias, config.o_bias, config.mlp_bias) = (biases, biases, biases);
    config.tie_word_embeddings = flag_or(json, "tie_word_embeddings", true)?;
    if json.get("rms_norm_eps").is_none_or(Value::is_null) {
        config.rms_norm_eps = 1e-5;
    }
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("use_bias".into(), json!(config.qkv_bias));
}
