//! A model's configuration ↔ the `general.*` and `{architecture}.*` keys of a GGUF file.
//!
//! Keys and their types: gguf-py's constants.py; which of them the loader demands and what it assumes without them:
//! llama.cpp src/llama-model.cpp, commit 0c1e57098.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use super::keys::Keys;
use super::{mixture, rope, tokenizer};
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::model::config::{Config, Ffn, LayerKind};
use crate::model::family::{Architecture, FAMILIES, Family};
use crate::model::tokenizer::TokenizerFiles;
use crate::names::{Role, TensorId};

/// (format, `general.file_type`), from llama.h's `llama_ftype`. Informational: loaders go by each tensor's type.
const FILE_TYPES: [(&str, u32); 34] = [
    ("f32", 0),
    ("f16", 1),
    ("bf16", 32),
    ("q4_0", 2),
    ("q4_1", 3),
    ("q8_0", 7),
    ("q5_0", 8),
    ("q5_1", 9),
    ("q2_k", 10),
    ("q3_k_s", 11),
    ("q3_k_m", 12),
    ("q3_k_l", 13),
    ("q4_k_s", 14),
    ("q4_k_m", 15),
    ("q5_k_s", 16),
    ("q5_k_m", 17),
    ("q6_k", 18),
    ("iq2_xxs", 19),
    ("iq2_xs", 20),
    ("q2_k_s", 21),
    ("iq3_xs", 22),
    ("iq3_xxs", 23),
    ("iq1_s", 24),
    ("iq4_nl", 25),
    ("iq3_s", 26),
    ("iq3_m", 27),
    ("iq2_s", 28),
    ("iq2_m", 29),
    ("iq4_xs", 30),
    ("iq1_m", 31),
    ("tq1_0", 36),
    ("tq2_0", 37),
    // There is no number for dense MXFP4; this is the one for MXFP4 experts.
    ("mxfp4", 38),
    // "guessed": no single number says it.
    ("mixed", 1024),
];

/// Returns all keys that llama.cpp needs to load a model: general, architecture, tokenizer. `name` is the model's,
/// `format` the name of the mix (`q4_k_m`, `bf16`, …). Callers add their provenance.
///
/// # Errors
/// Name what GGUF or llama.cpp cannot express: see [`tokenizer::write`].
pub fn write(config: &Config, files: &TokenizerFiles, name: &str, format: &str) -> Result<Metadata> {
    let architecture = &config.family.gguf;
    let file_type = FILE_TYPES.iter().find(|row| row.0 == format).map_or(1024, |row| row.1);
    let mut out = Metadata::default();
    out.set("general.architecture", architecture.name);
    out.set("general.type", "model");
    out.set("general.name", name);
    out.set("general.file_type", file_type);
    out.set("general.quantization_version", 2u32);
    set_model_keys(config, architecture, &mut out)?;
    out.0.extend(tokenizer::write(files, config.vocab_size)?.0);
    Ok(out)
}

/// Returns the format that `general.file_type` names; `None` if it names none that is read here.
pub fn format(metadata: &Metadata) -> Option<&'static str> {
    let file_type = metadata.get("general.file_type")?.as_u64()?;
    FILE_TYPES.iter().find(|row| row.1 as u64 == file_type && row.0 != "mixed").map(|row| row.0)
}

fn set_model_keys(config: &Config, architecture: &Architecture, out: &mut Metadata) -> Result<()> {
    let key = |key: &str| format!("{}.{key}", architecture.name);
    let size = |key: &str, value| {
        u32::try_from(value).with_context(|| format!("`{key}` {value} does not fit GGUF's u32"))
    };
    for (name, value) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.rope.rotary_dim(config.head_dim)),
    ] {
        out.set(&key(name), size(name, value)?);
    }
    if architecture.names_window {
        let name = "attention.sliding_window";
        out.set(&key(name), size(name, config.layers[0].window.unwrap_or(0))?);
    }
    out.set(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    let mut turning = config.layers.clone();
    set_turning(architecture, &mut turning);
    ensure!(
        turning == config.layers,
        "llama.cpp turns queries and keys in other layers of `{}` than this model; choose a format of compressed-tensors",
        architecture.name
    );
    rope::write(&config.rope, config.head_dim, architecture, out)?;
    mixture::write(config, out)
}

/// Returns the configuration of an opened GGUF file; what no key says is taken from the tensors it has.
///
/// # Errors
/// Name the key that is missing or malformed, or the architecture, RoPE type or head shape that no forward pass here
/// covers.
pub fn read(file: &Gguf) -> Result<Config> {
    let name = file.metadata.str("general.architecture")?;
    let keys = Keys::new(&file.metadata, format!("{name}."));
    let experts = keys.size("expert_count")?.is_some_and(|experts| experts > 0);
    let Some(family) = Family::of_gguf(name, experts) else {
        let known: BTreeSet<_> = FAMILIES.iter().map(|family| family.gguf.name).collect();
        let known: Vec<_> = known.into_iter().collect();
        bail!("`general.architecture` is `{name}`; known are {}", known.join(", "));
    };
    let has = |id: TensorId| {
        let name = family.gguf_name(id);
        file.tensors.iter().any(|tensor| tensor.spec.name == name)
    };
    let has_bias = |role| has(TensorId::in_layer(0, role).bias());
    let (hidden_size, heads) = (keys.required("embedding_length")?, keys.required("attention.head_count")?);
    let intermediate_size = keys.required("feed_forward_length")?;
    let num_hidden_layers = keys.required("block_count")?;
    let max_position_embeddings = keys.required("context_length")?;
    let head_dim = head_dim(&keys, hidden_size / heads.max(1))?;
    refuse_unread(&keys, &family.gguf)?;
    let mut layers = LayerKind::alike(num_hidden_layers, intermediate_size)?;
    let window = keys.size("attention.sliding_window")?.filter(|&window| window > 0);
    layers.iter_mut().for_each(|layer| layer.window = window);
    set_turning(&family.gguf, &mut layers);
    if let Some(experts) = mixture::read(&keys, &family.gguf, intermediate_size)? {
        layers.iter_mut().for_each(|layer| layer.ffn = Ffn::Mixture(experts));
    }
    let token = |name: &str| {
        let id = file.metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_u64);
        id.and_then(|id| u32::try_from(id).ok())
    };
    Config {
        family,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab_size: embedding_rows(file)?,
        max_position_embeddings,
        rms_norm_eps: file.metadata.float(&keys.name("attention.layer_norm_rms_epsilon"))?,
        rope: rope::read(file, family, head_dim, max_position_embeddings)?,
        tie_word_embeddings: !has(TensorId::global(Role::Head)),
        qkv_bias: has_bias(Role::Q),
        o_bias: has_bias(Role::O),
        mlp_bias: has_bias(Role::Up),
        qk_norm: has(TensorId::in_layer(0, Role::QNorm)).then_some(family.gguf.qk_norm),
        layers,
        bos_token_id: token("bos"),
        eos_token_ids: token("eos").into_iter().collect(),
        pad_token_id: token("padding"),
    }
    .validated()
}

/// Sets which layers turn queries and keys by their position, which no key says.
fn set_turning(architecture: &Architecture, layers: &mut [LayerKind]) {
    for (at, layer) in layers.iter_mut().enumerate() {
        layer.turns = architecture.still_layers.is_none_or(|every| !(at + 1).is_multiple_of(every));
    }
}

/// Returns the width of a head; `usual` is that of heads that share the hidden size.
fn head_dim(keys: &Keys, usual: usize) -> Result<usize> {
    let head_dim = keys.size("attention.key_length")?.unwrap_or(usual);
    let value_width = keys.size("attention.value_length")?.unwrap_or(head_dim);
    ensure!(
        value_width == head_dim,
        "GGUF key `{}` is {value_width}, wanted the head size {head_dim}",
        keys.name("attention.value_length")
    );
    Ok(head_dim)
}

/// Keys of an architecture that change the numbers, which no forward pass here honours, and the value with which they do not.
const UNREAD: [(&str, f64); 13] = [
    ("attention.scale", 0.0),
    ("attention.output_scale", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.causal", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("router_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("use_parallel_residual", 0.0),
];

/// Refuses keys of [`UNREAD`] that say something, and a window where files of that architecture name none.
fn refuse_unread(keys: &Keys, architecture: &Architecture) -> Result<()> {
    if !architecture.names_window {
        keys.refuse_others(&[("attention.sliding_window", 0.0)])?;
    }
    keys.refuse_others(&UNREAD)
}

/// `{architecture}.vocab_size` is optional, and the embedding table is what counts.
fn embedding_rows(file: &Gguf) -> Result<usize> {
    let name = TensorId::global(Role::Embed).gguf_name();
    let tensor = file.tensors.iter().find(|tensor| tensor.spec.name == name);
    let shape = tensor.map(|tensor| tensor.spec.shape.as_slice());
    match shape {
        Some(&[rows, _]) => Ok(rows),
        _ => bail!("`{name}` has shape {shape:?}, wanted a matrix"),
    }
}

#[cfg(test)]
mod tests;
