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
    let dialect = crate::dialect::gguf::Gguf;
    let dense = config.expected_tensors().into_iter().map(|(id, shape)| (id, shape, None));
    let computed = dialect.computed_tensors(config).into_iter();
    let computed = computed.map(|(id, values)| (id, vec![values.len()], Some(values)));
    let mut tensors: Vec<(TensorSpec, Vec<f32>)> = Vec::new();
    for (id, shape, values) in dense.chain(computed) {
        let place = dialect.place(id, shape[0], config);
        if tensors.iter().any(|(spec, _)| spec.name == place.name) {
            continue;
        }
        let shape = place.shape(shape.get(1).copied());
        let values = values.unwrap_or_else(|| vec![0.0; shape.iter().product()]);
        tensors.push((TensorSpec { name: place.name, storage: Storage::Plain(Dtype::F32), shape }, values));
    }
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let sink = GgufSink::create(&path, Opening::default(), &metadata, &specs).unwrap();
    for (i, (_, values)) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        sink.write(i, 0, &bytes).unwrap();
    }
    Box::new(sink).finish().unwrap();
    Gguf::open(&path).unwrap()
}

fn refusal(change: impl Fn(&mut Metadata)) -> String {
    format!("{:#}", read(&written(&config("LlamaForCausalLM", &[]), change)).unwrap_err())
}

/// Keys of 3 experts, of which a token goes to 2.
fn experts(more: &[(&'static str, serde_json::Value)]) -> Vec<(&'static str, serde_json::Value)> {
    let keys =
        [("num_experts", json!(3)), ("num_experts_per_tok", json!(2)), ("moe_intermediate_size", json!(24))];
    keys.iter().chain(more).cloned().collect()
}

#[test]
fn routers_that_llama_cpp_does_not_have_are_refused_by_name() {
    for (class, more, wanted) in [
        ("Qwen3MoeForCausalLM", ("norm_topk_prob", json!(false)), "always divides the weights"),
        ("Qwen2MoeForCausalLM", ("norm_topk_prob", json!(true)), "never divides the weights"),
        ("Qwen3MoeForCausalLM", ("mlp_only_layers", json!([1])), "layer 1 has no experts"),
        ("SmolLM3ForCausalLM", ("no_rope_layers", json!([1, 0])), "turns queries and keys in other layers"),
        ("Glm4MoeForCausalLM", ("n_routed_experts", json!(4)), "are not known here"),
    ] {
        let config = config(class, &experts(&[more]));
        let error = write(&config, &files(&config), "x", "f32").unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("compressed-tensors"), "{error}");
    }
}

#[test]
fn every_architecture_survives_a_round_trip() {
    for config in [
        config("LlamaForCausalLM", &[]),
        config("LlamaForCausalLM", &[("attention_bias", json!(true)), ("mlp_bias", json!(true))]),
        config("LlamaForCausalLM", &[("rope_scaling", json!({"type": "linear", "factor": 4.0}))]),
        config("Qwen2ForCausalLM", &[("tie_word_embeddings", json!(true))]),
        config("Qwen3ForCausalLM", &[("head_dim", json!(16))]),
        config("Phi3ForCausalLM", &[("partial_rotary_factor", json!(0.75)), ("sliding_window", json!(7))]),
        config("MixtralForCausalLM", &experts(&[("num_local_experts", json!(3))])),
        config(
            "MiniMaxM2ForCausalLM",
            &experts(&[("num_local_experts", json!(3)), ("partial_rotary_factor", json!(0.5))]),
        ),
        config("SeedOssForCausalLM", &[("attention_out_bias", json!(true))]),
        config("SmolLM3ForCausalLM", &[("num_hidden_layers", json!(5))]),
        config("Ernie4_5ForCausalLM", &[("use_bias", json!(true))]),
        config("Qwen2MoeForCausalLM", &experts(&[("shared_expert_intermediate_size", json!(40))])),
        config("Qwen3MoeForCausalLM", &experts(&[("norm_topk_prob", json!(true))])),
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
    assert_eq!(rope(&|m| m.set(&key("scale_linear"), 4.0f32)).scaling, RopeScaling::Linear { factor: 4.0 });
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
        refusal(|m| m.set("llama.rope.scaling.type", "ntk")).contains("`llama.rope.scaling.type` is `ntk`")
    );
    assert!(refusal(|m| m.set("llama.expert_count", 8u32)).contains("`llama.expert_used_count` is missing"));
    assert!(refusal(|m| m.set("llama.rope.dimension_count", 4u32)).contains("is 4, wanted the head size 8"));
    assert!(refusal(|m| m.set("llama.block_count", 0u32)).contains("`num_hidden_layers` is 0"));
    assert!(refusal(|m| m.0.retain(|(key, _)| key != "llama.context_length")).contains("context_length"));
    assert!(refusal(|m| m.set("llama.embedding_length", "x")).contains("wanted a non-negative integer"));
}
