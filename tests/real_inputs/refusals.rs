//! What cannot be read says what it is and what helps.

use std::fs;
use std::os::unix::fs::symlink;

use quant::checkpoint::Checkpoint;
use quant::container::gguf::Gguf;
use quant::tensor::Dtype;
use serde_json::{Value, json};

use crate::model::{Model, assert_error};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11547040\n";

#[test]
fn git_lfs_pointers_are_named_whatever_file_they_stand_for() {
    for name in
        ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    {
        let model = Model::new(true);
        let folder = model.write();
        fs::write(folder.join("tokenizer.json"), "{}").unwrap();
        fs::write(folder.join(name), POINTER).unwrap();
        let opened = Checkpoint::open(&folder).and_then(|model| model.tokenizer_files().map(|_| ()));
        assert_error(opened, &[name, "Git LFS pointer", "git lfs pull"]);
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["m.gguf", "m.safetensors", "m"] {
        fs::write(dir.path().join(name), POINTER).unwrap();
        fs::write(dir.path().join("config.json"), Model::new(true).config.to_string()).unwrap();
        assert_error(Checkpoint::open(&dir.path().join(name)), &[name, "Git LFS pointer"]);
    }
}

#[test]
fn quantized_sources_are_named_by_the_tool_that_made_them() {
    let refusal = |fields: Value, parts: &[&str]| {
        let mut model = Model::new(true);
        for (key, value) in fields.as_object().unwrap() {
            model.config[key] = value.clone();
        }
        assert_error(
            Checkpoint::open(&model.write()),
            &[&["config.json", "already quantized"], parts].concat(),
        );
    };
    for method in
        ["bitsandbytes", "gptq", "awq", "fp8", "hqq", "quanto", "torchao", "aqlm", "mxfp4", "modelopt"]
    {
        refusal(
            json!({"quantization_config": {"quant_method": method, "bits": 4}}),
            &[&format!("`{method}`")],
        );
    }
    refusal(
        json!({"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}}),
        &["MLX"],
    );
    // What is left of quantization in the tensors alone.
    for (part, word) in [
        ("mlp.up_proj.SCB", "bitsandbytes"),
        ("mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("mlp.up_proj.g_idx", "GPTQ"),
        ("mlp.up_proj.weight_scale_inv", "FP8"),
        ("mlp.up_proj.biases", "MLX"),
    ] {
        let mut model = Model::new(true);
        model.tensors.push((format!("model.layers.0.{part}"), Dtype::F32, vec![1], vec![1.0]));
        assert_error(Checkpoint::open(&model.write()), &[part, "already quantized", word]);
    }
}

#[test]
fn folders_that_are_no_model_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str, files: &[&str]| {
        let folder = dir.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        for file in files {
            fs::create_dir_all(folder.join(file).parent().unwrap()).unwrap();
            fs::write(folder.join(file), "{}").unwrap();
        }
        Checkpoint::open(&folder)
    };
    assert_error(folder("adapter", &["adapter_config.json"]), &["adapter_config.json", "merge"]);
    assert_error(folder("both", &["adapter_config.json", "config.json"]), &["adapter", "merge_and_unload"]);
    let cache = folder("models--org--name", &["refs/main", "snapshots/0123/config.json"]);
    assert_error(cache, &["hub cache", "models--org--name/snapshots/0123`"]);
    assert_error(
        folder("meta", &["params.json", "consolidated.00.pth"]),
        &["params.json", "original layout"],
    );
    assert_error(folder("gguf", &["a.GGUF.txt", "m.gguf"]), &["named by its file", "m.gguf"]);
    assert_error(folder("empty", &[]), &["no `config.json`"]);
}

#[test]
fn links_that_lead_nowhere_are_named_with_their_ends() {
    let model = Model::new(true);
    let folder = model.write();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    symlink("../blobs/gone", folder.join("model.safetensors")).unwrap();
    assert_error(Checkpoint::open(&folder), &["model.safetensors", "leads nowhere", "../blobs/gone"]);
    let model = Model::new(true);
    let folder = model.write();
    fs::remove_file(folder.join("config.json")).unwrap();
    symlink("../blobs/gone", folder.join("config.json")).unwrap();
    assert_error(Checkpoint::open(&folder), &["config.json", "leads nowhere"]);
    let model = Model::new(true);
    let folder = model.write();
    symlink("gone", folder.join("tokenizer.json")).unwrap();
    let read = Checkpoint::open(&folder).unwrap().side_files();
    assert_error(read, &["tokenizer.json", "leads nowhere"]);
}

#[test]
fn one_shard_without_the_others_is_named() {
    let model = Model::new(true);
    let folder = model.write_sharded(|_| {});
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    for path in [folder.clone(), folder.join("model-00001-of-00002.safetensors")] {
        assert_error(Checkpoint::open(&path), &["model-00002-of-00002.safetensors", "missing"]);
    }
}

/// A GGUF header of no keys and one tensor `t` of 256 columns.
fn gguf(version: u32, kind: u32) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"t");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(256u64.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + 4096, 0);
    bytes
}

#[test]
fn every_gguf_version_that_llama_cpp_reads_is_read_and_healthy_files_are_not_called_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let open = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        Gguf::open(&path)
    };
    for version in [2, 3] {
        assert_eq!(open(gguf(version, 0)).unwrap().tensors[0].spec.shape, [256]);
    }
    assert_error(open(gguf(1, 0)), &["version 1", "wanted 2 or 3"]);
    for version in [2u32, 3] {
        assert_error(open(gguf(version.swap_bytes(), 0)), &["big-endian", "gguf_convert_endian.py"]);
    }
    for magic in [b"lmgg", b"fmgg", b"tjgg"] {
        let mut old = gguf(3, 0);
        old[..4].copy_from_slice(magic);
        assert_error(open(old), &["before GGUF", "convert_llama_ggml_to_gguf.py"]);
    }
    // Q8_1, I8, F64: ggml knows them, and no model is written in them.
    for kind in [9, 24, 28] {
        let text = format!("{:#}", open(gguf(3, kind)).unwrap_err());
        assert!(text.contains("not read here") && !text.contains("damaged"), "{text}");
    }
}

#[test]
fn a_gguf_file_is_read_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["m.GGUF", "sha256-0123456789abcdef"] {
        fs::write(dir.path().join(name), gguf(3, 0)).unwrap();
        // It gets as far as the model's own keys.
        assert_error(Checkpoint::open(&dir.path().join(name)), &[name, "general.architecture"]);
    }
    fs::write(dir.path().join("notes.txt"), "hello").unwrap();
    assert_error(
        Checkpoint::open(&dir.path().join("notes.txt")),
        &["wanted a folder, a `.safetensors` or a GGUF"],
    );
}
