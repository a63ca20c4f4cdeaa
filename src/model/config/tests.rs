use serde_json::{Value, json};

use super::*;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 1,
        "eos_token_id": [2, 3],
    })
}

fn with(fields: Value) -> Value {
    let mut json = llama();
    for (key, value) in fields.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

fn refusal(fields: Value) -> String {
    format!("{:#}", Config::from_json(&with(fields)).unwrap_err())
}

const LLAMA3: &str = r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0}"#;

#[test]
fn families_differ_in_biases_norms_and_windows_only() {
    let qwen2 = of("Qwen2ForCausalLM", json!({"sliding_window": 8, "use_sliding_window": false}));
    assert_eq!(
        (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, windows(&qwen2)),
        (true, false, None, vec![None; 2])
    );
    let qwen3 = of("Qwen3ForCausalLM", json!({"attention_bias": false}));
    assert_eq!((qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim), (false, Some(QkNorm::Heads), 128));
    let mistral = of("MistralForCausalLM", json!({"sliding_window": 8}));
    assert_eq!((mistral.qkv_bias, windows(&mistral)), (false, vec![Some(8); 2]));
    let biased =
        of("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true, "sliding_window": 8}));
    assert_eq!(
        (biased.qkv_bias, biased.o_bias, biased.mlp_bias, windows(&biased)),
        (true, true, true, vec![None; 2])
    );
}

#[test]
fn every_expected_tensor_has_a_role_and_a_shape_of_the_configuration() {
    let config =
        Config::from_json(&with(json!({"attention_bias": true, "tie_word_embeddings": true}))).unwrap();
    let tensors = config.expected_tensors();
    assert_eq!(tensors.len(), 2 + 2 * (9 + 4));
    let shape = |id: TensorId| &tensors.iter().find(|row| row.0 == id).unwrap().1;
    assert_eq!(shape(TensorId::in_layer(1, Role::K)), &[32, 64]);
    assert_eq!(shape(TensorId::in_layer(1, Role::K).bias()), &[32]);
    assert_eq!(shape(TensorId::in_layer(0, Role::Down)), &[64, 96]);
    assert!(!tensors.iter().any(|row| row.0.role == Role::Head), "a tied model has no head");
}

#[test]
fn the_unknown_is_refused_by_name() {
    for (fields, word) in [
        (json!({"architectures": ["GptOssForCausalLM"]}), "GptOssForCausalLM"),
        (json!({"architectures": null, "model_type": "mamba"}), "mamba"),
        (json!({"architectures": null, "model_type": null}), "architectures"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}), "ntk"),
        (json!({"rope_scaling": {"type": "llama3", "factor": 4.0}}), "low_freq_factor"),
        (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "full_attention"),
        (json!({"rope_parameters": 3}), "rope_parameters"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"hidden_size": null}), "hidden_size"),
        (json!({"hidden_size": -1}), "hidden_size"),
        (json!({"hidden_size": 1u64 << 60}), "hidden_size"),
        (json!({"num_hidden_layers": 1 << 20}), "num_hidden_layers"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"head_dim": 15}), "head_dim"),
        (json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
        (json!({"rope_theta": 0}), "rope_theta"),
        (json!({"eos_token_id": -2}), "eos_token_id"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
    ] {
        let message = refusal(fields);
        assert!(message.contains(word), "{message}");
    }
}

fn windows(config: &Config) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn windows_follow_layer_types_or_begin_at_max_window_layers() {
    let qwen = |extra: Value| {
        let mut json = json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1});
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json["architectures"] = json!(["Qwen2ForCausalLM"]);
        Config::from_json(&with(json))
    };
    assert_eq!(windows(&qwen(json!({})).unwrap()), [None, Some(4)]);
    assert_eq!(windows(&qwen(json!({"max_window_layers": 0})).unwrap()), [Some(4); 2]);
    assert_eq!(windows(&qwen(json!({"max_window_layers": null})).unwrap()), [None; 2]);
    let types = json!({"layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows(&qwen(types).unwrap()), [Some(4), None]);
    for (types, word) in
        [(json!(["full_attention"]), "1 entries"), (json!(["linear_attention", "x"]), "linear")]
    {
        let message = qwen(json!({"layer_types": types})).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
}

/// A configuration of that class, with other keys.
fn of(class: &str, extra: Value) -> Config {
    let mut json = with(extra);
    json["architectures"] = json!([class]);
    Config::from_json(&json).unwrap()
}

#[test]
fn what_is_written_is_read_again_for_every_family() {
    let window = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 0});
    let llama3: Value = serde_json::from_str(LLAMA3).unwrap();
    for config in [
        of("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true, "rope_scaling": llama3})),
        of(
            "LlamaForCausalLM",
            json!({"rms_norm_eps": 1e-6, "eos_token_id": null, "tie_word_embeddings": true}),
        ),
        of("MistralForCausalLM", window.clone()),
        of("Qwen2ForCausalLM", window.clone()),
        of("Qwen2ForCausalLM", json!({"rope_scaling": {"type": "linear", "factor": 1.7}})),
        of("Qwen3ForCausalLM", window),
        of(
            "Qwen2ForCausalLM",
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}),
        ),
        of("Qwen3ForCausalLM", json!({"attention_bias": true, "eos_token_id": 5, "pad_token_id": 7})),
    ] {
        // `to_json` itself compares.
        config.to_json().unwrap();
    }
    let half = Config { qkv_bias: true, ..of("LlamaForCausalLM", json!({})) };
    let message = half.to_json().unwrap_err().to_string();
    assert!(message.contains("`LlamaForCausalLM` cannot say"), "{message}");
}
