//! Inputs of one scale per linear, fixed by calibration: written, measured, read back, refused where they cannot be.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use quant::checkpoint::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::{Value, json};

fn quant(folder: &Path, line: &str) -> Output {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quant"));
    command.args(line.split_whitespace()).env("XDG_CACHE_HOME", cache).current_dir(folder).output().unwrap()
}

fn refused(folder: &Path, line: &str) -> String {
    let output = quant(folder, line);
    assert_eq!(output.status.code(), Some(2), "quant {line}");
    String::from_utf8(output.stderr).unwrap()
}

const CONVERT: &str =
    "convert --format int8-w8a8-static --effort fast --calib-tokens 4096 --device cpu --windows 4";

#[test]
fn the_artifact_has_its_planned_size_diverges_little_and_loads_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let plan = quant(folder, &format!("{CONVERT} --dry-run --json - -o out"));
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    let report = quant(folder, &format!("{CONVERT} --json - -o out"));
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let size: u64 = fs::read_dir(folder.join("out"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != "quant.json")
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    assert_eq!(plan["plans"][0]["bytes"], size);
    let row = &report["evaluation"]["rows"][1];
    assert_eq!(row["format"], "int8-w8a8-static");
    // Inputs rounded token by token cost .004, in one step for all tokens three times that.
    assert!((0.004..0.03).contains(&row["kld"].as_f64().unwrap()), "{}", row["kld"]);
    let config: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("out/config.json")).unwrap()).unwrap();
    let inputs = &config["quantization_config"]["config_groups"]["group_0"]["input_activations"];
    let wanted =
        json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "tensor", "dynamic": false});
    assert_eq!(*inputs, wanted);
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("out/quant.json")).unwrap()).unwrap();
    let inspected = quant(folder, "inspect out --json -");
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let tensors = inspected["tensors"].as_array().unwrap();
    let scaled: Vec<_> = tensors.iter().filter(|tensor| tensor.get("input_scale").is_some()).collect();
    assert_eq!(scaled.len(), 7 * inspected["layers"].as_u64().unwrap() as usize);
    for tensor in scaled {
        let recorded = &manifest["tensors"][tensor["name"].as_str().unwrap()]["input_scale"];
        let number = |json: &Value| json.as_f64().unwrap() as f32;
        assert_eq!(number(recorded), number(&tensor["input_scale"]));
    }
    damaged_scales_are_refused(&folder.join("out"));
}

/// Rewrites one input scale of an artifact, and its configuration.
fn damaged_scales_are_refused(folder: &Path) {
    const NAME: &str = "model.layers.2.mlp.down_proj.input_scale";
    let file = folder.join("model.safetensors");
    let sound = fs::read(&file).unwrap();
    let with_scale = |dtype: Dtype, shape: Vec<usize>, bytes: &[u8]| {
        let tensors = SafeTensors::deserialize(&sound).unwrap();
        let mut tensors: Vec<(String, TensorView)> = tensors.tensors();
        tensors.retain(|(name, _)| name != NAME);
        if !bytes.is_empty() {
            tensors.push((NAME.into(), TensorView::new(dtype, shape, bytes).unwrap()));
        }
        serialize_to_file(tensors, None, &file).unwrap();
        Checkpoint::open(folder).map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    let float = |x: f32| x.to_le_bytes();
    assert_eq!(with_scale(Dtype::F32, vec![1], &float(0.5)), Ok(()));
    // As llm-compressor stores it.
    assert_eq!(with_scale(Dtype::BF16, vec![1], &[0, 0x3f]), Ok(()));
    for (dtype, shape, bytes, wanted) in [
        (Dtype::F32, vec![1], &float(-0.5)[..], "is -0.5; wanted more than 0"),
        (Dtype::F32, vec![1], &float(0.0)[..], "is 0; wanted more than 0"),
        (Dtype::F32, vec![1], &float(f32::NAN)[..], "is NaN"),
        (Dtype::F32, vec![2], &[float(1.0), float(1.0)].concat()[..], "of shape [2]; wanted one number"),
        (Dtype::I32, vec![1], &float(1.0)[..], "wanted one number"),
        (Dtype::F32, vec![1], &[][..], "`input_scale` is missing"),
    ] {
        let error = with_scale(dtype, shape, bytes).unwrap_err();
        assert!(error.contains("down_proj") && error.contains(wanted), "{error}");
    }
    fs::write(&file, &sound).unwrap();
    let path = folder.join("config.json");
    let config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (inputs, wanted) in [
        (Value::Null, "stored as `pack-quantized`"),
        (json!({"num_bits": 8, "strategy": "token", "dynamic": true}), "there is an `input_scale`"),
        (json!({"num_bits": 8, "strategy": "tensor", "symmetric": false}), "asymmetric inputs"),
    ] {
        let mut changed = config.clone();
        changed["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs;
        fs::write(&path, changed.to_string()).unwrap();
        let error = Checkpoint::open(folder).map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains(wanted), "{error:#}");
    }
}

#[test]
fn what_works_without_calibration_is_refused_with_the_cure() {
    let folder = tempfile::tempdir().unwrap();
    for line in [
        "convert --format int8-w8a8-static --method rtn",
        "convert --format mxfp4,w8a8-static --imatrix matrix.gguf",
        "sensitivity --format int8-w8a8-static --windows 1",
    ] {
        let told = refused(folder.path(), line);
        assert!(told.contains("calibration") && told.contains("`--format int8-w8a8`"), "{told}");
    }
}
