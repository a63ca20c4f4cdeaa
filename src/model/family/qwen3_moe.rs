//! Qwen3 mixtures of experts: Qwen3 with a router in place of the feed-forward part of some or all layers (transformers
//! `Qwen3MoeConfig`).

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, GgufMixture, qwen3};
use crate::model::config::json::{flag, required, size};
use crate::model::config::{Config, Experts, Ffn};
use crate::model::router::{Router, Scores};

pub const QWEN3_MOE: Family = Family {
    class: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    gguf: Architecture {
        name: "qwen3moe",
        mixture: Some(GgufMixture {
            scores: Scores::Softmax,
            renormalises: true,
            own_width: true,
            shared: false,
            choice_bias: false,
        }),
        ..Architecture::PLAIN
    },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    qwen3::read(json, config)?;
    // Unlike Qwen3, this class knows no layer types: all layers have the window or none.
    let window = if flag(json, "use_sliding_window")? { size(json, "sliding_window")? } else { None };
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    read_experts(json, config, |experts, _| Ok(experts))
}

/// Puts experts into the layers that have them: those that `mlp_only_layers` does not list, every `decoder_sparse_step`-th.
/// `more` adds what a class has beyond them.
pub(super) fn read_experts(
    json: &Value,
    config: &mut Config,
    more: impl Fn(Experts, &Value) -> Result<Experts>,
) -> Result<()> {
    let experts = match size(json, "num_experts")? {
        Some(experts) => experts,
        None => required(json, "num_local_experts")?,
    };
    let rule = Router {
        experts,
        top_k: required(json, "num_experts_per_tok")?,
        scores: Scores::Softmax,
        groups: None,
        renormalise: flag(json, "norm_topk_prob")?,
        scale: 1.0,
    };
    let width = required(json, "moe_intermediate_size")?;
    let experts = more(Experts { rule, width, choice_bias: false, shared: None }, json)?;
    let step = size(json, "decoder_sparse_step")?.unwrap_or(1);
    ensure!(step > 0, "`decoder_sparse_step` is 0; wanted at least 1");
    let dense = |layer: usize| {
        let listed = json.get("mlp_only_layers").and_then(Value::as_array);
        listed.is_some_and(|layers| layers.iter().any(|listed| listed.as_u64() == Some(layer as u64)))
    };
    for (at, layer) in config.layers.iter_mut().enumerate() {
        if experts.rule.experts > 0 && (at + 1).is_multiple_of(step) && !dense(at) {
            layer.ffn = Ffn::Mixture(experts);
        }
    }
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    qwen3::write(config, json);
    write_experts(config, json);
}

pub(super) fn write_experts(config: &Config, json: &mut Map<String, Value>) {
    let experts = config.layers.iter().find_map(|layer| match layer.ffn {
        Ffn::Mixture(experts) => Some(experts),
        Ffn::Dense { .. } => None,
    });
    let Some(Experts { rule, width, .. }) = experts else { return };
    let dense = config.layers.iter().enumerate().filter(|(_, layer)| matches!(layer.ffn, Ffn::Dense { .. }));
    json.insert("num_experts".into(), json!(rule.experts));
    json.insert("num_experts_per_tok".into(), json!(rule.top_k));
    json.insert("moe_intermediate_size".into(), json!(width));
    json.insert("norm_topk_prob".into(), json!(rule.renormalise));
    json.insert("decoder_sparse_step".into(), json!(1));
    json.insert("mlp_only_layers".into(), dense.map(|(at, _)| at).collect());
}
