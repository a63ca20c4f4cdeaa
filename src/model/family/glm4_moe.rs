//! GLM-4.5 to 4.7: half of each head turns; after some dense layers, mixtures of experts with a shared one beside them, chosen by
//! the logistic function of their logits and a bias, within groups (transformers `Glm4MoeConfig`).

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, Name};
use crate::model::config::json::{decimal, flag, flag_or, number, required, size};
use crate::model::config::{Config, Experts, Ffn, SharedExpert};
use crate::model::norms::QkNorm;
use crate::model::rope::json::RopeClass;
use crate::model::router::{GroupScore, Groups, Router, Scores};
use crate::names::Role;

pub const GLM4_MOE: Family = Family {
    class: "Glm4MoeForCausalLM",
    model_type: "glm4_moe",
    gguf: Architecture { name: "glm4moe", partial_rotation: true, ..Architecture::PLAIN },
    names: &[
        Name { role: Role::FfnNorm, module: "post_attention_layernorm", stem: "post_attention_norm" },
        Name { role: Role::SharedGate, module: "mlp.shared_experts.gate_proj", stem: "ffn_gate_shexp" },
        Name { role: Role::SharedUp, module: "mlp.shared_experts.up_proj", stem: "ffn_up_shexp" },
        Name { role: Role::SharedDown, module: "mlp.shared_experts.down_proj", stem: "ffn_down_shexp" },
    ],
    rope: RopeClass { partial: true, share: 0.5, ..RopeClass::PLAIN },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    config.qkv_bias = flag(json, "attention_bias")?;
    config.qk_norm = flag(json, "use_qk_norm")?.then_some(QkNorm::Heads);
    if json.get("rms_norm_eps").is_none_or(Value::is_null) {
        config.rms_norm_eps = 1e-5;
    }
    let next = size(json, "num_nextn_predict_layers")?.unwrap_or(0);
    ensure!(
        next == 0,
        "`num_nextn_predict_layers` is {next}: layers that predict the token after the next are not read here"
    );
    let rule = Router {
        experts: required(json, "n_routed_experts")?,
        top_k: required(json, "num_experts_per_tok")?,
        scores: Scores::Sigmoid,
        groups: match size(json, "n_group")?.unwrap_or(1) {
            1 => None,
            count => {
                let kept = size(json, "topk_group")?.unwrap_or(1);
                Some(Groups { count, kept, score: GroupScore::BestTwo })
            }
        },
        renormalise: flag_or(json, "norm_topk_prob", true)?,
        scale: number(json, "routed_scaling_factor")?.unwrap_or(1.0),
    };
    let width = required(json, "moe_intermediate_size")?;
    let shared = size(json, "n_shared_experts")?.unwrap_or(1);
    let shared = (shared > 0).then_some(SharedExpert { width: width * shared, gated: false });
    let experts = Ffn::Mixture(Experts { rule, width, choice_bias: true, shared });
    let dense = size(json, "first_k_dense_replace")?.unwrap_or(1);
    config.layers.iter_mut().skip(dense).for_each(|layer| layer.ffn = experts);
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(config.qkv_bias));
    json.insert("use_qk_norm".into(), json!(config.qk_norm.is_some()));
    let dense = config.layers.iter().take_while(|layer| layer.ffn.experts().is_none()).count();
    json.insert("first_k_dense_replace".into(), json!(dense));
    json.insert("num_nextn_predict_layers".into(), json!(0));
    let Some(Experts { rule, width, shared, .. }) =
        config.layers.iter().find_map(|layer| layer.ffn.experts())
    else {
        return;
    };
    let groups = rule.groups.unwrap_or(Groups { count: 1, kept: 1, score: GroupScore::BestTwo });
    json.insert("n_routed_experts".into(), json!(rule.experts));
    json.insert("num_experts_per_tok".into(), json!(rule.top_k));
    json.insert("n_group".into(), json!(groups.count));
    json.insert("topk_group".into(), json!(groups.kept));
    json.insert("norm_topk_prob".into(), json!(rule.renormalise));
    json.insert("routed_scaling_factor".into(), decimal(rule.scale));
    json.insert("moe_intermediate_size".into(), json!(width));
    json.insert("n_shared_experts".into(), json!(shared.map_or(0, |shared| shared.width / width)));
}
