//! Evaluation in less memory than the model takes: the same numbers, and the bound holds.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use quant::checkpoint::Checkpoint;
use quant::container::safetensors::{SHARD_BYTES, SafetensorsSink};
use quant::container::{Opening, Sink, Storage, TensorSpec};
use quant::embedded;
use quant::model::config::Config;
use quant::tensor::{Dtype, bytes_from_floats};
use serde_json::{Value, json};

/// Writes a model of 106 MB in F32 with the tokenizer of the embedded one.
fn write_model(folder: &Path) {
    let source = Checkpoint::open(&embedded::model_folder().unwrap()).unwrap();
    let mut config: Value = serde_json::from_str(source.config_json().unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", 256),
        ("intermediate_size", 1024),
        ("num_hidden_layers", 24),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 4),
        ("head_dim", 64),
    ] {
        config[key] = json!(value);
    }
    let tensors = Config::from_json(&config).unwrap().expected_tensors();
    let specs = tensors.iter().map(|(id, shape)| TensorSpec {
        name: id.hf_name(),
        storage: Storage::Plain(Dtype::F32),
        shape: shape.clone(),
    });
    let specs: Vec<TensorSpec> = specs.collect();
    let sink = SafetensorsSink::create(folder, Opening::default(), &specs, &[], SHARD_BYTES).unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    for (at, (_, shape)) in tensors.iter().enumerate() {
        let gain = shape.len() == 1;
        let mut number = || if gain { 1.0 } else { (random.f32() - 0.5) * 0.2 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| number()).collect();
        sink.write(at, 0, &bytes_from_floats(Dtype::F32, &values)).unwrap();
    }
    for file in source.side_files().unwrap() {
        sink.add_file(&file, &fs::read(source.folder().unwrap().join(&file)).unwrap()).unwrap();
    }
    sink.add_file("config.json", config.to_string().as_bytes()).unwrap();
    Box::new(sink).finish().unwrap();
}

/// Returns exit status, standard output and standard error.
fn quant(folder: &Path, line: &str) -> (Option<i32>, String, String) {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quant"));
    command.args(line.split_whitespace()).env("XDG_CACHE_HOME", cache).current_dir(folder);
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Returns what `--verbose` says of the peak, in MB.
fn peak(told: &str) -> f64 {
    let line = told.lines().find_map(|line| line.strip_prefix("peak memory ")).unwrap();
    line.strip_suffix(" MB").unwrap().parse().unwrap()
}

/// Rows of a report without their speeds.
fn rows(report: &str) -> Vec<Value> {
    let report: Value = serde_json::from_str(report).unwrap();
    let mut rows = report["rows"].as_array().unwrap().clone();
    for row in &mut rows {
        row.as_object_mut().unwrap().retain(|key, _| !key.contains("tok_"));
    }
    rows
}

#[test]
fn two_models_that_do_not_fit_are_streamed_with_the_same_numbers_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"));
    let (status, _, told) =
        quant(folder.path(), "convert model --format int8 --method rtn --no-validate -o int8");
    assert_eq!(status, Some(0), "{told}");
    let line =
        "eval int8 --baseline model --kld --ctx 128 --windows 4 --device cpu --threads 2 --verbose --json -";
    let (status, resident, told) = quant(folder.path(), &format!("{line} --ram 8G"));
    assert_eq!(status, Some(0), "{told}");
    // More than is allowed below.
    assert!(told.contains("models in memory") && peak(&told) > 150.0, "{told}");
    // Program, tokenizer, texts and what the allocator keeps included.
    let (status, streamed, told) = quant(folder.path(), &format!("{line} --ram 150M"));
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("streaming layers") && peak(&told) < 150.0, "{told}");
    assert_eq!(rows(&resident), rows(&streamed));
    // Stored states of the baseline, streamed.
    let (status, stored, told) = quant(folder.path(), &format!("{line} --ram 150M --chunks-cache states"));
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("streaming layers"), "{told}");
    assert_eq!(rows(&resident)[1], rows(&stored)[1]);

    let (status, _, told) = quant(folder.path(), &format!("{line} --ram 150M --suites json"));
    assert_eq!(status, Some(2));
    assert!(told.contains("generate, which needs them in memory"), "{told}");
    let (status, _, told) = quant(folder.path(), &format!("{line} --ram 30M"));
    assert_eq!(status, Some(2));
    assert!(told.contains("may be used; raise `--ram`"), "{told}");
    let (status, _, told) = quant(folder.path(), &format!("{line} --vram 1G"));
    assert_eq!(status, Some(2));
    assert!(told.contains("`--vram` limits a GPU's memory"), "{told}");
}
