//! Mistral: Llama without biases, all layers behind one sliding window (transformers `MistralConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::Family;
use crate::model::config::{Config, json::size};
use crate::model::rope::json::RopeClass;

pub const MISTRAL: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    gguf: "llama",
    gguf_neighbours: true,
    rope: RopeClass::PLAIN,
    read,
    write,
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    let window = size(json, "sliding_window")?;
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("sliding_window".into(), json!(config.layers.first().and_then(|layer| layer.window)));
}
