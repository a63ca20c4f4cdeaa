//! Mistral: Llama without biases, all layers behind one sliding window (transformers `MistralConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::Family;
use super::llama::LLAMA;
use crate::model::config::{Config, json::size};

pub const MISTRAL: Family =
    Family { class: "MistralForCausalLM", model_type: "mistral", read, write, ..LLAMA };

pub(super) fn read(json: &Value, config: &mut Config) -> Result<()> {
    let window = size(json, "sliding_window")?;
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(())
}

pub(super) fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("sliding_window".into(), json!(config.layers.first().and_then(|layer| layer.window)));
}
