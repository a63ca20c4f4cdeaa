//! Phi-3, Phi-3.5 and Phi-4: q, k, v and gate, up are stored as one matrix each; a part of each head turns, by LongRoPE in the
//! long models; all layers behind one sliding window (transformers `Phi3Config`).

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::llama::LLAMA;
use super::{Architecture, Family, Fused};
use crate::model::config::Config;
use crate::model::config::json::size;
use crate::model::rope::RopeScaling;
use crate::model::rope::json::RopeClass;
use crate::names::Role;

/// `original_max_position_embeddings` and `max_position_embeddings` where no key says them.
const CONTEXT: usize = 4096;

pub const PHI3: Family = Family {
    class: "Phi3ForCausalLM",
    model_type: "phi3",
    gguf: Architecture {
        name: "phi3",
        partial_rotation: true,
        rope_divisors: true,
        names_window: true,
        ..Architecture::PLAIN
    },
    fused: &[
        Fused { roles: &[Role::Q, Role::K, Role::V], module: "self_attn.qkv_proj", stem: "attn_qkv" },
        Fused { roles: &[Role::Gate, Role::Up], module: "mlp.gate_up_proj", stem: "ffn_up" },
    ],
    rope: RopeClass {
        context: CONTEXT,
        original_context: Some(CONTEXT),
        partial: true,
        renamed: &[("yarn", "longrope")],
        ..RopeClass::PLAIN
    },
    read,
    write,
    ..LLAMA
};

fn read(json: &Value, config: &mut Config) -> Result<()> {
    // The class knows no other width of heads.
    let head_dim = config.hidden_size / config.num_attention_heads;
    ensure!(config.head_dim == head_dim, "`head_dim` is {}; this class takes {head_dim}", config.head_dim);
    if json.get("rms_norm_eps").is_none_or(Value::is_null) {
        config.rms_norm_eps = 1e-5;
    }
    config.max_position_embeddings = size(json, "max_position_embeddings")?.unwrap_or(CONTEXT);
    let window = size(json, "sliding_window")?;
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(())
}

fn write(config: &Config, json: &mut Map<String, Value>) {
    json.insert("sliding_window".into(), json!(config.layers.first().and_then(|layer| layer.window)));
    if let RopeScaling::LongRope(long) = &config.rope.scaling {
        // Beside the object it wins over the same key inside.
        json.insert("original_max_position_embeddings".into(), json!(long.original_context));
    }
}
