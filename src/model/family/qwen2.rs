//! Qwen2 and Qwen2.5: biases on q, k, v; sliding windows from some layer on (transformers `Qwen2Config`).

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family};
use crate::model::config::Config;
use crate::model::config::json::{flag, size};

pub const QWEN2: Family = Family {
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: Architecture { name: "qwen2", ..Architecture::PLAIN },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = true;
    read_windows(json, config)
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    write_windows(config, json);
}

/// Sets the window of the layers that `layer_types` names, or of those from `max_window_layers` on; only where
/// `use_sliding_window` is set.
pub(super) fn read_windows(json: &Value, config: &mut Config) -> Result<()> {
    if !flag(json, "use_sliding_window")? {
        return Ok(());
    }
    let window = size(json, "sliding_window")?;
    let slides: Vec<bool> = match json.get("layer_types") {
        Some(Value::Array(types)) => types.iter().map(slides).collect::<Result<_>>()?,
        _ => {
            let first = size(json, "max_window_layers")?.unwrap_or(28);
            (0..config.layers.len()).map(|layer| layer >= first).collect()
        }
    };
    ensure!(
        slides.len() == config.layers.len(),
        "`layer_types` has {} entries for {} layers",
        slides.len(),
        config.layers.len()
    );
    for (layer, slides) in config.layers.iter_mut().zip(slides) {
        layer.window = window.filter(|_| slides);
    }
    Ok(())
}

/// Whether a layer of that type has the window.
fn slides(layer_type: &Value) -> Result<bool> {
    match layer_type.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => bail!(
            "`layer_types` has `{layer_type}`; supported are \"sliding_attention\" and \"full_attention\""
        ),
    }
}

pub(super) fn write_windows(config: &Config, json: &mut Map<String, Value>) {
    let window = config.layers.iter().find_map(|layer| layer.window);
    let types = config.layers.iter().map(|layer| match layer.window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    });
    json.insert("use_sliding_window".into(), json!(window.is_some()));
    json.insert("sliding_window".into(), json!(window));
    json.insert("layer_types".into(), types.collect());
}
