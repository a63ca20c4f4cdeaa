//! Qwen2 mixtures of experts (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with a router in place of the feed-forward part, and an expert
//! beside it that all tokens share, weighed by a router of its own (transformers `Qwen2MoeConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, GgufMixture, qwen2, qwen3_moe};
use crate::model::config::json::{flag, flag_or, size};
use crate::model::config::{Config, Experts, Ffn, SharedExpert};
use crate::model::router::Scores;

pub const QWEN2_MOE: Family = Family {
    class: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    gguf: Architecture {
        name: "qwen2moe",
        mixture: Some(GgufMixture {
            scores: Scores::Softmax,
            renormalises: false,
            own_width: true,
            shared: true,
            choice_bias: false,
        }),
        ..Architecture::PLAIN
    },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = flag_or(json, "qkv_bias", true)?;
    read_windows(json, config)?;
    qwen3_moe::read_experts(json, config, |experts, json| {
        let width = size(json, "shared_expert_intermediate_size")?.unwrap_or(5632);
        Ok(Experts { shared: Some(SharedExpert { width, gated: true }), ..experts })
    })
}

/// As Qwen2's where `layer_types` is given; without, this class counts the other way: every second layer *before*
/// `max_window_layers` has the window.
fn read_windows(json: &Value, config: &mut Config) -> Result<()> {
    if json.get("layer_types").is_some_and(Value::is_array) || !flag(json, "use_sliding_window")? {
        return qwen2::read_windows(json, config);
    }
    let window = size(json, "sliding_window")?;
    let before = size(json, "max_window_layers")?.unwrap_or(28);
    for (at, layer) in config.layers.iter_mut().enumerate() {
        layer.window = window.filter(|_| at < before && at.is_multiple_of(2));
    }
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("qkv_bias".into(), json!(config.qkv_bias));
    qwen2::write_windows(config, json);
    qwen3_moe::write_experts(config, json);
    let shared = config.layers.iter().find_map(|layer| match layer.ffn {
        Ffn::Mixture(Experts { shared, .. }) => shared,
        Ffn::Dense { .. } => None,
    });
    if let Some(SharedExpert { width, .. }) = shared {
        json.insert("shared_expert_intermediate_size".into(), json!(width));
    }
}
