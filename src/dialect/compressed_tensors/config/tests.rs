use super::*;
use crate::scheme::schemes::{FP8, INT8, MXFP4, int4_grouped, int8_grouped};

const UP: &str = "model.layers.0.mlp.up_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

fn plan(rows: &[(&str, Option<(Scheme, Activations)>)]) -> Quantization {
    let rows: Vec<_> = rows.iter().map(|(module, stored)| (module.to_string(), *stored)).collect();
    Quantization::of_plan(&rows).unwrap()
}

fn error_of(edit: impl Fn(&mut Value)) -> String {
    let mut json = plan(&[(UP, Some((MXFP4, Activations::Full)))]).to_json();
    edit(&mut json);
    format!("{:#}", Quantization::parse(&json).unwrap_err())
}

#[test]
fn what_is_written_parses_to_the_same_modules() {
    let w8a8 = Some((INT8, Activations::Int8PerToken));
    let grouped = Some((int8_grouped(128), Activations::Full));
    let mxfp4 = Some((MXFP4, Activations::Full));
    let nvfp4 = Some((NVFP4, Activations::Full));
    let w8a8_static = Some((INT8, Activations::Int8PerTensor(())));
    let fp8 = Some((FP8, Activations::Fp8PerToken));
    let int4 = Some((int4_grouped(64), Activations::Full));
    for (up, down) in [
        (nvfp4, fp8),
        (int4, int4),
        (mxfp4, mxfp4),
        (w8a8, None),
        (w8a8_static, w8a8),
        (grouped, mxfp4),
        (None, w8a8),
        (None, None),
    ] {
        let rows = [(UP, up), (DOWN, down), ("lm_head", None)];
        let parsed = Quantization::parse(&plan(&rows).to_json()).unwrap();
        for (module, stored) in rows {
            assert_eq!(parsed.of(module, true), stored, "{module}");
        }
        for kept in ["model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"] {
            assert_eq!(parsed.of(kept, false), None);
        }
    }
}

#[test]
fn one_scheme_targets_linear_and_ignores_what_is_kept() {
    let json = plan(&[(UP, Some((MXFP4, Activations::Full))), (DOWN, None), ("lm_head", None)]).to_json();
    assert_eq!(json["format"], "mxfp4-pack-quantized");
    assert_eq!(json["config_groups"]["group_0"]["targets"], json!(["Linear"]));
    assert_eq!(json["ignore"], json!(["lm_head", DOWN]));
}

#[test]
fn exact_paths_win_over_patterns_and_patterns_over_classes() {
    let mut json =
        plan(&[(UP, Some((MXFP4, Activations::Full))), (DOWN, Some((INT8, Activations::Full)))]).to_json();
    json["config_groups"]["group_0"]["targets"] = json!(["Linear", r"re:.*\.up_proj"]);
    json["config_groups"]["group_1"]["targets"] = json!([UP, r"re:layers\.0"]);
    json["ignore"] = json!(["lm_head", r"re:.*layers\.2\."]);
    let parsed = Quantization::parse(&json).unwrap();
    let linear = |module: &str| module != "model.embed_tokens";
    let name = |module| parsed.of(module, linear(module)).map(|(scheme, _)| scheme.name);
    assert_eq!(name(UP), Some("int8"));
    assert_eq!(name("model.layers.1.mlp.up_proj"), Some("mxfp4"));
    // `re:layers` does not match from the start of the path.
    assert_eq!(name(DOWN), Some("mxfp4"));
    assert_eq!(name("model.layers.2.mlp.up_proj"), None);
    assert_eq!(name("lm_head"), None);
    assert_eq!(name("model.embed_tokens"), None);
}

#[test]
fn absent_fields_have_the_librarys_defaults() {
    let json = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": null, "version": "0.17.0",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 64}}},
    });
    assert_eq!(Quantization::parse(&json).unwrap().of(UP, true), Some((int8_grouped(64), Activations::Full)));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let group = |json: &mut Value, field: &str, value: Value| json["config_groups"]["group_0"][field] = value;
    for (field, value, wanted) in [
        ("kv_cache_scheme", json!({"num_bits": 8}), "`kv_cache_scheme`"),
        ("transform_config", json!({"config_groups": {}}), "`transform_config`"),
        ("quant_method", json!("gptq"), "`gptq`"),
        ("config_groups", json!({"MXFP4A16": ["Linear"]}), "`config_groups.MXFP4A16`: named presets"),
        ("ignore", json!(["re:(?=x)"]), "`ignore`: `re:(?=x)`"),
    ] {
        let error = error_of(|json| json[field] = value.clone());
        assert!(error.contains(wanted), "{error}");
    }
    for (field, value, wanted) in [
        ("format", json!("int-quantized"), "stored as `mxfp4-pack-quantized`"),
        ("output_activations", json!({"num_bits": 8}), "`output_activations`"),
        ("surprise", json!(1), "unknown field `surprise`"),
        ("weights", json!({"num_bits": 3}), "3-bit `int`"),
        ("weights", json!({"group_size": 128, "symmetric": false}), "asymmetric"),
        ("weights", json!({"group_size": 128, "actorder": "group"}), "`actorder`"),
        ("weights", json!({"group_size": 128, "rotation": 1}), "unknown field `rotation`"),
        ("input_activations", json!({"num_bits": 8, "type": "float"}), "`input_activations`: 8-bit `float`"),
        (
            "input_activations",
            json!({"num_bits": 8, "strategy": "tensor", "dynamic": true}),
            "dynamic true is not supported",
        ),
        (
            "input_activations",
            json!({"num_bits": 8, "strategy": "tensor", "symmetric": false}),
            "asymmetric inputs (`input_zero_point`)",
        ),
    ] {
        let error = error_of(|json| group(json, field, value.clone()));
        assert!(error.starts_with("`config_groups.group_0`") && error.contains(wanted), "{error}");
    }
}
