//! A model's configuration ↔ the `general.*` and `{architecture}.*` keys of a GGUF file.
//!
//! Keys and their types: gguf-py's constants.py; which of them the loader demands and what it assumes without them:
//! llama.cpp src/llama-model.cpp, commit 0c1e57098.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use super::{rope, tokenizer};
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::model::config::{Config, LayerKind};
use crate::model::family::{FAMILIES, Family};
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
    ensure!(
        !config.has_experts(),
        "GGUF files of mixtures of experts are not written yet; choose a format of compressed-tensors"
    );
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

/// Returns the format that `general.file_type` names; `None` if it names none that is read here.
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
        ("rope.dimension_count", config.rope.rotary_dim(config.head_dim)),
    ] {
        let value =
            u32::try_from(value).with_context(|| format!("`{key}` {value} does not fit GGUF's u32"))?;
        out.set(&format!("{architecture}.{key}"), value);
    }
    out.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    rope::write(&config.rope, config.head_dim, architecture, out)?;
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
    let intermediate_size = size("feed_forward_length")?;
    let num_hidden_layers = size("block_count")?;
    let head_dim = size_or("attention.key_length", hidden_size / heads.max(1))?;
    let value_width = size_or("attention.value_length", head_dim)?;
    ensure!(
        value_width == head_dim,
        "GGUF key `{}` is {value_width}, wanted the head size {head_dim}",
        key("attention.value_length")
    );
    let max_position_embeddings = size("context_length")?;
    let experts = size_or("expert_count", 0)?;
    ensure!(
        experts == 0,
        "GGUF key `{}` is {experts}; mixtures of experts are not supported",
        key("expert_count")
    );
    refuse_unread(metadata, name)?;
    let token = |name: &str| {
        let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_u64);
        id.and_then(|id| u32::try_from(id).ok())
    };
    Config {
        family,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: size_or("attention.head_count_kv", heads)?,
        head_dim,
        vocab_size: embedding_rows(file)?,
        max_position_embeddings,
        rms_norm_eps: metadata.float(&key("attention.layer_norm_rms_epsilon"))?,
        rope: rope::read(file, name, head_dim, max_position_embeddings)?,
        tie_word_embeddings: !has(TensorId::global(Role::Head)),
        qkv_bias: has_bias(Role::Q),
        o_bias: has_bias(Role::O),
        mlp_bias: has_bias(Role::Up),
        qk_norm: has(TensorId::in_layer(0, Role::QNorm)),
        layers: LayerKind::alike(num_hidden_layers, intermediate_size)?,
        bos_token_id: token("bos"),
        eos_token_ids: token("eos").into_iter().collect(),
        pad_token_id: token("padding"),
    }
    .validated()
}

/// Keys of an architecture that change the numbers, which no forward pass here honours, and the value with which they do not.
const UNREAD: [(&str, f64); 14] = [
    ("attention.scale", 0.0),
    ("attention.output_scale", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.sliding_window", 0.0),
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

/// Refuses keys of [`UNREAD`] that say something.
fn refuse_unread(metadata: &Metadata, architecture: &str) -> Result<()> {
    for (suffix, neutral) in UNREAD {
        let key = format!("{architecture}.{suffix}");
        let Some(value) = metadata.get(&key) else { continue };
        let number = value.as_f64().or(value.as_u64().map(|x| x as f64)).or(value.as_bool().map(f64::from));
        ensure!(number == Some(neutral), "GGUF key `{key}` is {value:?}, which no forward pass here honours");
    }
    Ok(())
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
mod tests {
    use serde_json::json;

    use super::*;
    use crate::container::gguf::GgufSink;
    use crate::container::{Opening, Sink, Storage, TensorSpec};
    use crate::dialect::Dialect;
    use crate::model::rope::RopeScaling;
    use crate::tensor::Dtype;

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

    fn scaled(class: &str, scaling: serde_json::Value) -> Config {
        config(class, &[("rope_scaling", scaling)])
    }

    #[test]
    fn rope_scaling_survives_a_round_trip() {
        let table = json!([1.0, 1.1, 2.5, 9.0]);
        for config in [
            scaled("LlamaForCausalLM", json!({"type": "yarn", "factor": 4.0})),
            scaled("Qwen2ForCausalLM", json!({"type": "yarn", "factor": 3.3, "attention_factor": 1.0})),
            scaled(
                "Qwen3ForCausalLM",
                json!({"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.9,
                "beta_fast": 8, "beta_slow": 2.5, "original_max_position_embeddings": 64}),
            ),
            scaled(
                "LlamaForCausalLM",
                json!({"type": "longrope", "short_factor": table, "long_factor": table,
                "original_max_position_embeddings": 64}),
            ),
            scaled(
                "LlamaForCausalLM",
                json!({"type": "longrope", "short_factor": table, "long_factor": table,
                "factor": 1.0}),
            ),
            scaled("Qwen2ForCausalLM", json!({"type": "linear", "factor": 1.7})),
        ] {
            assert_eq!(read(&written(&config, |_| ())).unwrap(), config);
        }
    }

    #[test]
    fn what_gguf_cannot_say_of_rope_is_told_or_refused() {
        let gguf = crate::dialect::gguf::Gguf;
        let dynamic = scaled("Qwen2ForCausalLM", json!({"type": "dynamic", "factor": 2.0}));
        assert!(gguf.losses(&dynamic)[0].contains("beyond 512 tokens only"));
        assert_eq!(read(&written(&dynamic, |_| ())).unwrap(), config("Qwen2ForCausalLM", &[]));
        let fractions = scaled("LlamaForCausalLM", json!({"type": "yarn", "factor": 2.0, "truncate": false}));
        assert!(gguf.losses(&fractions)[0].contains("`truncate` is false"));
        // Only some architectures look for tables of divisors, and llama.cpp refuses tensors that nobody asks for.
        for scaling in [
            json!({"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
            json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1]}),
        ] {
            let qwen = scaled("Qwen2ForCausalLM", scaling);
            let error = write(&qwen, &files(&qwen), "x", "f32").unwrap_err().to_string();
            assert!(error.contains("no scaling for `qwen2`"), "{error}");
        }
    }

    #[test]
    fn rope_keys_mean_what_llama_cpp_takes_them_for() {
        let plain = config("LlamaForCausalLM", &[]);
        let rope = |change: &dyn Fn(&mut Metadata)| read(&written(&plain, change)).unwrap().rope;
        let key = |name: &str| format!("llama.rope.{name}");
        assert_eq!(
            rope(&|m| m.set(&key("scale_linear"), 4.0f32)).scaling,
            RopeScaling::Linear { factor: 4.0 }
        );
        let none = rope(&|m| {
            m.set(&key("scaling.type"), "none");
            m.set(&key("scaling.factor"), 4.0f32);
            m.set(&key("scaling.finetuned"), true);
        });
        assert_eq!(none.scaling, RopeScaling::None);
        let yarn = rope(&|m| {
            m.set(&key("scaling.type"), "yarn");
            m.set(&key("scaling.factor"), 4.0f32);
            m.set(&key("scaling.yarn_log_multiplier"), 0.5f32);
            m.set(&key("scaling.attn_factor"), 2.0f32);
        });
        let magnitude = 2.0 * (0.1 * 4f32.ln() + 1.0) / (0.05 * 4f32.ln() + 1.0);
        assert!((yarn.magnitude() - magnitude).abs() < 1e-6, "{}", yarn.magnitude());
        let RopeScaling::Yarn(yarn) = yarn.scaling else { panic!("{yarn:?}") };
        assert_eq!((yarn.original_context, yarn.beta_fast, yarn.beta_slow), (512, 32.0, 1.0));
        for (name, value) in [
            ("rope.scaling.yarn_ext_factor", 1.0),
            ("rope.scaling.alpha", 1000.0),
            ("rope.freq_base_swa", 1e4),
            ("rope.scaling.attn_factor", 1.5),
            ("attention.scale", 0.5),
            ("final_logit_softcapping", 30.0),
        ] {
            let message = refusal(|m| m.set(&format!("llama.{name}"), value as f32));
            assert!(message.contains(&format!("`llama.{name}`")), "{message}");
        }
        assert!(refusal(|m| m.set("llama.attention.sliding_window", 128u32)).contains("sliding_window"));
        assert!(refusal(|m| m.set("llama.rope.scaling.type", "longrope")).contains("rope_factors_long"));
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
        let rounded: Vec<f32> = config.rope.divisors(8).into_iter().map(|x| x as f32).collect();
        assert_eq!(rounded.last(), Some(&32.0));
        assert_eq!(back.rope.scaling, RopeScaling::Divisors(rounded));
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
            refusal(|m| m.set("llama.rope.scaling.type", "ntk"))
                .contains("`llama.rope.scaling.type` is `ntk`")
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
