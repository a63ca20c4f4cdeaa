//! Qwen2 and Qwen2.5: biases on q, k, v; sliding windows from some layer on (transformers `Qwen2Config`).

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::Family;
use crate::model::config::Config;
use crate::model::config::json::{flag, size};
use crate::model::rope::json::RopeClass;

pub const QWEN2: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: "qwen2",
    gguf_neighbours: false,
    rope: RopeClass::PLAIN,
    read,
    write,
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = true;
    config.sliding_window = window(json, config.num_hidden_layers)?;
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    write_window(config, json);
}

/// Returns the window that all layers share: only when `use_sliding_window` is set, in the layers that `layer_types` names,
/// or from layer `max_window_layers` on.
pub(super) fn window(json: &Value, layers: usize) -> Result<Option<usize>> {
    if !flag(json, "use_sliding_window")? {
        return Ok(None);
    }
    let sliding = match json.get("layer_types") {
        Some(Value::Array(types)) => types.iter().filter(|kind| *kind == "sliding_attention").count(),
        _ => layers.saturating_sub(size(json, "max_window_layers")?.unwrap_or(28)),
    };
    match sliding {
        0 => Ok(None),
        n if n == layers => size(json, "sliding_window"),
        n => bail!(
            "{n} of {layers} layers use sliding-window attention; supported are all or none \
             (set `use_sliding_window` to false to evaluate without)"
        ),
    }
}

pub(super) fn write_window(config: &Config, json: &mut Map<String, Value>) {
    json.insert("use_sliding_window".into(), json!(config.sliding_window.is_some()));
    json.insert("sliding_window".into(), json!(config.sliding_window));
    json.insert("max_window_layers".into(), json!(0));
}
