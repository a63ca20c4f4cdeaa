//! Claims on models that are written back: floats out of anything that is read, and codes that are copied where source and
//! output mean the same grid.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use quant::checkpoint::{Checkpoint, Stored};
use quant::cli::Cli;
use quant::container::safetensors::{SHARD_BYTES, SafetensorsSink, is_safetensors};
use quant::container::{Opening, Sink, Storage, TensorSpec};
use quant::dialect::Dialect;
use quant::dialect::compressed_tensors::CompressedTensors;
use quant::model::config::Config;
use quant::names::TensorId;
use quant::scheme::Activations;
use quant::scheme::schemes::NVFP4;
use quant::tensor::{Dtype, bytes_from_floats};
use serde_json::{Value, json};

/// Runs `quant` in this process.
fn quant(line: &str) -> Result<(), String> {
    let words = ["quant"].into_iter().chain(line.split_whitespace()).chain(["-q"]);
    quant::cmd::run(Cli::try_parse_from(words).unwrap()).map(|_| ()).map_err(|error| format!("{error:#}"))
}

/// Converts with nearest codes and returns where the result lies.
fn convert(source: &Path, options: &str, out: &Path) -> PathBuf {
    let line = format!(
        "convert {} --format {options} --method rtn --no-validate -o {}",
        source.display(),
        out.display()
    );
    quant(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
    out.to_path_buf()
}

/// A Llama of one layer whose heads GGUF keeps in another order, with the tokenizer of the embedded model. `scale` is the
/// size of its weights.
fn model(folder: &Path, scale: f32) -> PathBuf {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "bfloat16",
    });
    let tensors: Vec<_> = Config::from_json(&config).unwrap().expected_tensors().into_iter().collect();
    let spec = |(id, shape): &(TensorId, Vec<usize>)| TensorSpec {
        name: id.hf_name(),
        storage: Storage::Plain(Dtype::BF16),
        shape: shape.clone(),
    };
    let specs: Vec<_> = tensors.iter().map(spec).collect();
    let folder = folder.join("model");
    let sink = SafetensorsSink::create(&folder, Opening::default(), &specs, &[], SHARD_BYTES).unwrap();
    for (index, (_, shape)) in tensors.iter().enumerate() {
        let value = |i: usize| (((i * 37 + index * 101) * 2654435761 % 1021) as f32 / 510.0 - 1.0) * scale;
        let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        sink.write(index, 0, &bytes_from_floats(Dtype::BF16, &values)).unwrap();
    }
    sink.add_file("config.json", config.to_string().as_bytes()).unwrap();
    Box::new(sink).finish().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("eval/tiny-llama").join(name), folder.join(name))
            .unwrap();
    }
    folder
}

/// Returns the one weight file of a folder.
fn weights(folder: &Path) -> PathBuf {
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| is_safetensors(path)).unwrap()
}

fn same_values(a: &Path, b: &Path) {
    let (a, b) = (Checkpoint::open(a).unwrap(), Checkpoint::open(b).unwrap());
    assert_eq!(a.tensors.keys().collect::<Vec<_>>(), b.tensors.keys().collect::<Vec<_>>());
    for &id in a.tensors.keys() {
        assert_eq!(a.read(id).unwrap().to_f32(), b.read(id).unwrap().to_f32(), "{id}");
    }
}

#[test]
fn a_model_that_went_through_gguf_is_the_same_folder_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), 0.5);
    let direct = convert(&source, "bf16", &dir.path().join("direct"));
    let gguf = convert(&source, "f32 --dialect gguf", &dir.path().join("m.gguf"));
    let back = convert(&gguf, "bf16", &dir.path().join("back"));
    assert_eq!(fs::read(weights(&direct)).unwrap(), fs::read(weights(&back)).unwrap());
    let [was, is] = [&source, &back].map(|folder| {
        let json: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        Config::from_json(&json).unwrap()
    });
    assert_eq!(was, is);
    let ids = |path: &Path| {
        Checkpoint::open(path).unwrap().tokenizer().unwrap().encode("fn main() { 1 }", true).unwrap()
    };
    assert_eq!(ids(&source), ids(&back));
}

#[test]
fn floats_are_what_the_codes_mean() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), 0.5);
    for (format, out) in [("q8_0", "q8_0.gguf"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("int4", "int4")] {
        let options = if format == "int4" { "int4 --group-size 32" } else { format };
        let quantized = convert(&source, options, &dir.path().join(out));
        same_values(&quantized, &convert(&quantized, "f32", &dir.path().join(format!("{format}-f32"))));
    }
}

#[test]
fn values_beyond_a_number_types_range_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), 1e5);
    let line = format!(
        "convert {} --format f16 --no-validate -o {}",
        source.display(),
        dir.path().join("f16").display()
    );
    let error = quant(&line).unwrap_err();
    assert!(error.contains("beyond the range of F16") && error.contains(".weight`"), "{error}");
    assert!(!dir.path().join("f16").exists());
}

/// Checks that every linear of `copy` has the codes and scales of `original`, and returns how many were compared.
fn same_codes(original: &Path, copy: &Path) -> usize {
    let (original, copy) = (Checkpoint::open(original).unwrap(), Checkpoint::open(copy).unwrap());
    let linears = original
        .tensors
        .iter()
        .filter(|(id, info)| id.role.is_linear() && matches!(info.stored, Stored::Quantized(..)));
    linears
        .map(|(&id, info)| {
            let parts = |checkpoint: &Checkpoint| checkpoint.read_parts(id, 0..info.shape[0]).unwrap();
            assert_eq!(original.read(id).unwrap().to_f32(), copy.read(id).unwrap().to_f32(), "{id}");
            assert!(parts(&original) == parts(&copy), "{id}");
        })
        .count()
}

#[test]
fn codes_go_from_dialect_to_dialect_and_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(dir.path(), 0.5);
    for (first, second) in [
        ("q8_0", "int8 --group-size 32"),
        ("q4_0", "int4 --group-size 32"),
        ("mxfp4 --dialect gguf", "mxfp4"),
    ] {
        let at = |name: &str| dir.path().join(format!("{}-{name}", first.split(' ').next().unwrap()));
        let file = convert(&source, first, &at("first.gguf"));
        let folder = convert(&file, second, &at("second"));
        let back = convert(&folder, &format!("{first} --allow-requantize"), &at("third.gguf"));
        assert_eq!(same_codes(&file, &back), 7, "{first}");
    }
    for format in ["mxfp4", "fp8", "fp8-w8a8", "int8-w8a8", "int8", "int4 --group-size 64"] {
        let at = |name: &str| dir.path().join(format!("{}-{name}", format.split(' ').next().unwrap()));
        let first = convert(&source, format, &at("a"));
        let second = convert(&first, format, &at("b"));
        assert_eq!(fs::read(weights(&first)).unwrap(), fs::read(weights(&second)).unwrap(), "{format}");
    }
}

#[test]
fn codes_of_another_grid_are_not_chosen_anew_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let file = convert(&model(dir.path(), 0.5), "q8_0", &dir.path().join("q8_0.gguf"));
    let out = dir.path().join("out").display().to_string();
    let error =
        quant(&format!("convert {} --format int8 --method rtn -o {out}", file.display())).unwrap_err();
    assert!(error.contains("already quantized (q8_0)") && error.contains("--allow-requantize"), "{error}");
}

#[test]
fn a_stored_divisor_survives_whatever_its_reciprocal_rounds_to() {
    let dir = tempfile::tempdir().unwrap();
    let folder = convert(&model(dir.path(), 0.5), "nvfp4", &dir.path().join("nvfp4"));
    let mut bytes = fs::read(weights(&folder)).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
    // Divisors that 1/(1/x) does not return: about every sixth mantissa.
    let lossy = (0x42c8_0000u32..).step_by(7919).map(f32::from_bits).filter(|x| 1.0 / (1.0 / x) != *x);
    let places = header.as_object().unwrap().iter().filter(|(name, _)| name.ends_with("weight_global_scale"));
    for ((_, place), divisor) in places.clone().zip(lossy) {
        let at = header_end + place["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[at..at + 4].copy_from_slice(&divisor.to_le_bytes());
    }
    assert_eq!(places.count(), 7);
    fs::write(weights(&folder), &bytes).unwrap();
    let copy = convert(&folder, "nvfp4", &dir.path().join("copy"));
    assert!(fs::read(weights(&copy)).unwrap() == bytes);
}

#[test]
fn scales_that_engines_read_in_two_ways_are_refused() {
    let unpack = |scale: u8, divisor: f32| {
        let parts: [&[u8]; 3] = [&[0x12; 8], &[scale], &divisor.to_le_bytes()];
        CompressedTensors
            .unpack(&NVFP4, Activations::Full, 1, 16, &parts)
            .map_err(|error| format!("{error:#}"))
    };
    assert!(unpack(0x38, 100.0).is_ok());
    let error = unpack(0xb8, 100.0).unwrap_err();
    assert!(error.contains("`weight_scale`") && error.contains("-1"), "{error}");
    for divisor in [0.0, -0.0, -2.0, f32::NAN, f32::INFINITY, 1e-45, f32::MIN_POSITIVE / 5.0] {
        let error = unpack(0x38, divisor).unwrap_err();
        assert!(error.contains("`weight_global_scale`"), "{divisor}: {error}");
    }
    assert!(unpack(0x38, f32::MIN_POSITIVE).is_ok());
}
