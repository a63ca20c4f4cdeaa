//! MiniMax M2: q and k normed over all heads together, of which a part turns; experts in every layer, chosen by the logistic
//! function of their logits and a bias (transformers `MiniMaxM2Config`).

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::mixtral::MIXTRAL;
use super::{Architecture, Family, GgufMixture, Name, mixtral};
use crate::model::config::json::size;
use crate::model::config::{Config, Ffn};
use crate::model::norms::QkNorm;
use crate::model::rope::json::RopeClass;
use crate::model::router::Scores;
use crate::names::Role;

pub const MINIMAX_M2: Family = Family {
    class: "MiniMaxM2ForCausalLM",
    model_type: "minimax_m2",
    gguf: Architecture {
        name: "minimax-m2",
        partial_rotation: true,
        qk_norm: QkNorm::Row,
        mixture: Some(GgufMixture {
            scores: Scores::Sigmoid,
            renormalises: true,
            own_width: true,
            shared: false,
            choice_bias: true,
        }),
        ..Architecture::PLAIN
    },
    names: &[
        Name { role: Role::Router, module: "block_sparse_moe.gate", stem: "ffn_gate_inp" },
        Name {
            role: Role::ChoiceBias,
            module: "block_sparse_moe.e_score_correction_bias",
            stem: "exp_probs_b",
        },
        Name { role: Role::Gate, module: "block_sparse_moe.w1", stem: "ffn_gate" },
        Name { role: Role::Up, module: "block_sparse_moe.w3", stem: "ffn_up" },
        Name { role: Role::Down, module: "block_sparse_moe.w2", stem: "ffn_down" },
    ],
    rope: RopeClass { theta: 5_000_000.0, partial: true, ..RopeClass::PLAIN },
    read,
    write,
    ..MIXTRAL
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    mixtral::read(json, config)?;
    config.qk_norm = Some(QkNorm::Row);
    for layer in &mut config.layers {
        // The class has no window.
        layer.window = None;
        if let Ffn::Mixture(experts) = &mut layer.ffn {
            experts.rule.scores = Scores::Sigmoid;
            experts.choice_bias = true;
        }
    }
    if let Some(rotary) = size(json, "rotary_dim")? {
        let found = config.rope.rotary_dim(config.head_dim);
        ensure!(
            found == rotary,
            "`rotary_dim` is {rotary}, but `partial_rotary_factor` turns {found} values of a head; make both say the same"
        );
    }
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    mixtral::write(config, json);
    json.remove("sliding_window");
    json.insert("rotary_dim".into(), json!(config.rope.rotary_dim(config.head_dim)));
}
