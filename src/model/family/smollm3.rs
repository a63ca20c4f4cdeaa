//! SmolLM3: Llama whose every fourth layer does not turn queries and keys by their position (transformers `SmolLM3Config`).

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::llama::LLAMA;
use super::{Architecture, Family, llama, qwen2};
use crate::model::config::Config;
use crate::model::config::json::size;

/// `no_rope_layer_interval` where no key says it.
const INTERVAL: usize = 4;

pub const SMOLLM3: Family = Family {
    class: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    gguf: Architecture {
        name: "smollm3",
        neighbours: true,
        still_layers: Some(INTERVAL),
        ..Architecture::PLAIN
    },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    llama::read(json, config)?;
    if json.get("tie_word_embeddings").is_none_or(Value::is_null) {
        config.tie_word_embeddings = true;
    }
    qwen2::read_windows(json, config)?;
    let interval = size(json, "no_rope_layer_interval")?.unwrap_or(INTERVAL);
    ensure!(interval > 0, "`no_rope_layer_interval` is 0; wanted at least 1");
    let listed = match json.get("no_rope_layers") {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) => Some(list),
        Some(other) => bail!("`no_rope_layers` is `{other}`; wanted a list"),
    };
    for (at, layer) in config.layers.iter_mut().enumerate() {
        // Despite the name, 1 stands for layers that turn.
        layer.turns = match listed {
            None => !(at + 1).is_multiple_of(interval),
            Some(list) => {
                let turns = list.get(at).and_then(Value::as_u64);
                turns.with_context(|| format!("`no_rope_layers` has no number for layer {at}"))? != 0
            }
        };
    }
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    llama::write(config, json);
    qwen2::write_windows(config, json);
    let turns = config.layers.iter().map(|layer| u8::from(layer.turns));
    json.insert("no_rope_layers".into(), turns.collect());
}
