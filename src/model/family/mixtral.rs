//! Mixtral: Mistral with a router and experts in place of every feed-forward part (transformers `MixtralConfig`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, GgufMixture, Name, mistral};
use crate::model::config::json::size;
use crate::model::config::{Config, Experts, Ffn};
use crate::model::router::{Router, Scores};
use crate::names::Role;

pub const MIXTRAL: Family = Family {
    class: "MixtralForCausalLM",
    model_type: "mixtral",
    gguf: Architecture {
        mixture: Some(GgufMixture {
            scores: Scores::Softmax,
            renormalises: true,
            own_width: false,
            shared: false,
            choice_bias: false,
        }),
        ..LLAMA.gguf
    },
    names: &[
        Name { role: Role::Router, module: "block_sparse_moe.gate", stem: "ffn_gate_inp" },
        Name { role: Role::Gate, module: "block_sparse_moe.w1", stem: "ffn_gate" },
        Name { role: Role::Up, module: "block_sparse_moe.w3", stem: "ffn_up" },
        Name { role: Role::Down, module: "block_sparse_moe.w2", stem: "ffn_down" },
    ],
    read,
    write,
    ..LLAMA
};

pub(super) fn read(json: &Value, config: &mut Config) -> Result<()> {
    mistral::read(json, config)?;
    let rule = Router {
        experts: size(json, "num_local_experts")?.unwrap_or(8),
        top_k: size(json, "num_experts_per_tok")?.unwrap_or(2),
        scores: Scores::Softmax,
        groups: None,
        renormalise: true,
        scale: 1.0,
    };
    let experts = Experts { rule, width: config.intermediate_size, choice_bias: false, shared: None };
    config.layers.iter_mut().for_each(|layer| layer.ffn = Ffn::Mixture(experts));
    Ok(())
}

pub(super) fn write(config: &Config, json: &mut Map<String, Value>) {
    mistral::write(config, json);
    if let Some(Experts { rule, .. }) = config.layers.iter().find_map(|layer| layer.ffn.experts()) {
        json.insert("num_local_experts".into(), json!(rule.experts));
        json.insert("num_experts_per_tok".into(), json!(rule.top_k));
    }
}
