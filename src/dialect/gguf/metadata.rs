//! A model's configuration ↔ the `general.*` and `{architecture}.*` keys of a GGUF file.
//!
//! Keys and their types: gguf-py's constants.py; which of them the loader demands and what it assumes without them:
//! llama.cpp src/llama-model.cpp, commit 0c1e57098.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use super::tokenizer;
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::model::config::Config;
use crate::model::family::{FAMILIES, Family};
use crate::model::rope::RopeScaling;
use crate::model::tokenizer::TokenizerFiles;
use crate::names::{Role, TensorId};
use crate::tensor::{Dtype, floats_from_bytes};

/// (format, `general.file_type`), from llama.h's `llama_ftype`. Informational: loaders go by each tensor's type.
const FILE_TYPES: [(&str, u32); 12] = [
    ("f32", 0),
    ("f16", 1),
    ("bf16", 32),
    ("q4_0", 2),
    ("q8_0", 7),
    ("q4_k_s", 14),
    ("q4_k_m", 15),
    ("q5_k_s", 16),
    ("q5_k_m", 17),
    ("q6_k", 18),
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
    let architecture = config.family.gguf;
    let file_type = FILE_TYPES.iter().find(|row| row.0 == format).map_or(1024, |row| row.1);
    let mut out = Metadata::default();
    out.set("general.architecture", architecture);
    out.set("general.type", "model");
    out.set("general.name", name);
    out.set("general.file_type", file_type);
    out.set("general.quantization_version", 2u32);
    set_model_keys(config, architecture, &mut out)?;
    out.0.extend(tokenizer::write(files, config.vocab_size)?.0);
    Ok(out)
}

/// Returns the format that `general.file_type` names; `None` if it names none of this project's.
pub fn format(metadata: &Metadata) -> Option<&'static str> {
    let file_type = metadata.get("general.file_type")?.as_u64()?;
    FILE_TYPES.iter().find(|row| row.1 as u64 == file_type && row.0 != "mixed").map(|row| row.0)
}

fn set_model_keys(config: &Config, architecture: &str, out: &mut Metadata) -> Result<()> {
    for (key, value) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ] {
        let value =
            u32::try_from(value).with_context(|| format!("`{key}` {value} does not fit GGUF's u32"))?;
        out.set(&format!("{architecture}.{key}"), value);
    }
    out.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    out.set(&format!("{architecture}.rope.freq_base"), config.rope_theta);
    match config.rope_scaling {
        // Llama 3 scaling, like any other table of divisors, is the tensor `rope_freqs.weight`.
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {}
        RopeScaling::Linear { factor } => {
            out.set(&format!("{architecture}.rope.scaling.type"), "linear");
            out.set(&format!("{architecture}.rope.scaling.factor"), factor);
        }
    }
    Ok(())
}

/// Returns the configuration of an opened GGUF file; what no key says is taken from the tensors it has.
///
/// # Errors
/// Name the key that is missing or malformed, or the architecture, RoPE type or head shape that no forward pass here
/// covers.
pub fn read(file: &Gguf) -> Result<Config> {
    let metadata = &file.metadata;
    let name = metadata.str("general.architecture")?;
    let Some(family) = Family::of_gguf(name) else {
        let known: BTreeSet<_> = FAMILIES.iter().map(|family| family.gguf).collect();
        let known: Vec<_> = known.into_iter().collect();
        bail!("`general.architecture` is `{name}`; known are {}", known.join(", "));
    };
    let key = |key: &str| format!("{name}.{key}");
    let size = |suffix: &str| metadata.size(&key(suffix));
    let size_or = |suffix: &str, default: usize| match metadata.get(&key(suffix)) {
        None => Ok(default),
        Some(_) => size(suffix),
    };
    let has = |id: TensorId| file.tensors.iter().any(|tensor| tensor.spec.name == id.gguf_name());
    let has_bias = |role| has(TensorId::in_layer(0, role).bias());
    let (hidden_size, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = size_or("attention.key_length", hidden_size / heads.max(1))?;
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        let found = size_or(suffix, head_dim)?;
        ensure!(found == head_dim, "GGUF key `{}` is {found}, wanted the head size {head_dim}", key(suffix));
    }
    let experts = size_or("expert_count", 0)?;
    ensure!(
        experts == 0,
        "GGUF key `{}` is {experts}; mixtures of experts are not supported",
        key("expert_count")
    );
    let token = |name: &str| {
        let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_u64);
        id.and_then(|id| u32::try_from(id).ok())
    };
    Config {
        family,
        hidden_size,
        intermediate_size: size("feed_forward_length")?,
        num_hidden_layers: size("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: size_or("attention.head_count_kv", heads)?,
        head_dim,
        vocab_size: embedding_rows(file)?,
        max_position_embeddings: size("context_length")?,
        rms_norm_eps: metadata.float(&key("attention.layer_norm_rms_epsilon"))?,
        rope_theta: match metadata.get(&key("rope.freq_base")) {
            None => 10_000.0,
            Some(_) => metadata.float(&key("rope.freq_base"))?,
        },
        rope_scaling: rope_scaling(file, name)?,
        tie_word_embeddings: !has(TensorId::global(Role::Head)),
        qkv_bias: has_bias(Role::Q),
        o_bias: has_bias(Role::O),
        mlp_bias: has_bias(Role::Up),
        qk_norm: has(TensorId::in_layer(0, Role::QNorm)),
        sliding_window: None,
        bos_token_id: token("bos"),
        eos_token_ids: token("eos").into_iter().collect(),
        pad_token_id: token("padding"),
    }
    .validated()
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

fn rope_scaling(file: &Gguf, architecture: &str) -> Result<RopeScaling> {
    let name = TensorId::global(Role::RopeFreqs).gguf_name();
    let divisors = match file.tensors.iter().find(|tensor| tensor.spec.name == name) {
        None => None,
        Some(tensor) => {
            ensure!(
                tensor.spec.storage == crate::container::Storage::Plain(Dtype::F32),
                "`{name}` is {:?}, wanted F32",
                tensor.spec.storage
            );
            let bytes = file.files[tensor.file].read(tensor.start, tensor.spec.bytes())?;
            let mut divisors = vec![0.0; bytes.len() / 4];
            floats_from_bytes(Dtype::F32, &bytes, &mut divisors);
            Some(divisors)
        }
    };
    let scaling = |suffix: &str| format!("{architecture}.rope.scaling.{suffix}");
    // The loader's default type is `linear`, and a factor of 0 or none at all means 1.
    let kind = file.metadata.get(&scaling("type")).and_then(Value::as_str).unwrap_or("linear");
    let factor = file.metadata.get(&scaling("factor")).and_then(Value::as_f64).unwrap_or(0.0) as f32;
    match (kind, divisors) {
        ("none", None) => Ok(RopeScaling::None),
        ("none", Some(divisors)) => Ok(RopeScaling::Divisors(divisors)),
        ("linear", Some(divisors)) if factor == 0.0 || factor == 1.0 => Ok(RopeScaling::Divisors(divisors)),
        ("linear", None) if factor == 0.0 || factor == 1.0 => Ok(RopeScaling::None),
        ("linear", None) => Ok(RopeScaling::Linear { factor }),
        ("linear", Some(_)) => {
            bail!("`{name}` together with `{}` {factor} is not supported", scaling("factor"))
        }
        (kind, _) => bail!("GGUF key `{}` is `{kind}`; supported are `none` and `linear`", scaling("type")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::container::gguf::GgufSink;
    use crate::container::{Opening, Sink, Storage, TensorSpec};
    use crate::dialect::Dialect;

    fn config(class: &str, extra: &[(&str, serde_json::Value)]) -> Config {
        let mut json = json!({
            "architectures": [class], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 10,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2,
        });
        for (key, value) in extra {
            json[key] = value.clone();
        }
        Config::from_json(&json).unwrap()
    }

    fn files(config: &Config) -> TokenizerFiles {
        TokenizerFiles {
            tokenizer: json!({
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
            }),
            config: json!({"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids,
                           "pad_token_id": config.pad_token_id}),
            ..TokenizerFiles::default()
        }
    }

    /// Writes a model of that configuration, zeros but for computed tensors, with some keys changed; opens it again.
    fn written(config: &Config, change: impl Fn(&mut Metadata)) -> Gguf {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut metadata = write(config, &files(config), "test", "f32").unwrap();
        change(&mut metadata);
        let dense = config.expected_tensors().into_iter().map(|(id, shape)| {
            let zeros = vec![0.0; shape.iter().product()];
            (id, shape, zeros)
        });
        let computed = crate::dialect::gguf::Gguf.computed_tensors(config).into_iter();
        let tensors: Vec<_> =
            dense.chain(computed.map(|(id, values)| (id, vec![values.len()], values))).collect();
        let spec = |(id, shape, _): &(TensorId, Vec<usize>, Vec<f32>)| TensorSpec {
            name: id.gguf_name(),
            storage: Storage::Plain(Dtype::F32),
            shape: shape.clone(),
        };
        let specs: Vec<_> = tensors.iter().map(spec).collect();
        let sink = GgufSink::create(&path, Opening::default(), &metadata, &specs).unwrap();
        for (i, (_, _, values)) in tensors.iter().enumerate() {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            sink.write(i, 0, &bytes).unwrap();
        }
        Box::new(sink).finish().unwrap();
        Gguf::open(&path).unwrap()
    }

    fn refusal(change: impl Fn(&mut Metadata)) -> String {
        format!("{:#}", read(&written(&config("LlamaForCausalLM", &[]), change)).unwrap_err())
    }

    #[test]
    fn every_architecture_survives_a_round_trip() {
        for config in [
            config("LlamaForCausalLM", &[]),
            config("LlamaForCausalLM", &[("attention_bias", json!(true)), ("mlp_bias", json!(true))]),
            config("LlamaForCausalLM", &[("rope_scaling", json!({"type": "linear", "factor": 4.0}))]),
            config("Qwen2ForCausalLM", &[("tie_word_embeddings", json!(true))]),
            config("Qwen3ForCausalLM", &[("head_dim", json!(16))]),
        ] {
            assert_eq!(read(&written(&config, |_| ())).unwrap(), config);
        }
    }

    #[test]
    fn mistral_is_read_as_llama_without_a_window() {
        let mistral = config("MistralForCausalLM", &[("sliding_window", json!(8))]);
        assert_eq!(read(&written(&mistral, |_| ())).unwrap(), config("LlamaForCausalLM", &[]));
    }

    #[test]
    fn llama3_scaling_is_read_as_its_divisors() {
        let llama3 = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192});
        let config = config("LlamaForCausalLM", &[("rope_scaling", llama3)]);
        let back = read(&written(&config, |_| ())).unwrap();
        let rounded: Vec<f32> = config.rope_divisors().into_iter().map(|x| x as f32).collect();
        assert_eq!(rounded.last(), Some(&32.0));
        assert_eq!(back.rope_scaling, RopeScaling::Divisors(rounded));
        let again = read(&written(&back, |_| ())).unwrap();
        assert_eq!(again, back, "a table of divisors survives");
    }

    #[test]
    fn keys_have_the_names_and_types_llama_cpp_checks() {
        let metadata = written(&config("Qwen3ForCausalLM", &[]), |_| ()).metadata;
        for (key, value) in [
            ("general.architecture", Value::from("qwen3")),
            ("general.quantization_version", Value::U32(2)),
            ("general.file_type", Value::U32(0)),
            ("qwen3.context_length", Value::U32(512)),
            ("qwen3.attention.head_count_kv", Value::U32(2)),
            ("qwen3.attention.key_length", Value::U32(8)),
            ("qwen3.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("qwen3.rope.freq_base", Value::F32(500_000.0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        ] {
            assert_eq!(metadata.get(key), Some(&value), "{key}");
        }
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        assert!(refusal(|m| m.set("general.architecture", "gemma2")).contains("`gemma2`; known are"));
        assert!(
            refusal(|m| m.set("llama.rope.scaling.type", "yarn"))
                .contains("`llama.rope.scaling.type` is `yarn`")
        );
        assert!(refusal(|m| m.set("llama.expert_count", 8u32)).contains("mixtures of experts"));
        assert!(
            refusal(|m| m.set("llama.rope.dimension_count", 4u32)).contains("is 4, wanted the head size 8")
        );
        assert!(refusal(|m| m.set("llama.block_count", 0u32)).contains("`num_hidden_layers` is 0"));
        assert!(refusal(|m| m.0.retain(|(key, _)| key != "llama.context_length")).contains("context_length"));
        assert!(refusal(|m| m.set("llama.embedding_length", "x")).contains("wanted a non-negative integer"));
    }
}
