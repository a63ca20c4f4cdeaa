//! Bad input: each fault gives one error that names the file, the tensor, what was found and wanted. Nothing panics,
//! and no output is left under its final name.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use quant::artifact::Artifact;
use quant::checkpoint::Checkpoint;
use quant::container::gguf::{Gguf, GgufSink, Metadata};
use quant::container::safetensors::{SHARD_BYTES, Safetensors, SafetensorsSink};
use quant::container::{Opening, Sink, Storage, TensorSpec};
use quant::plan::Plan;
use quant::recipe::Recipe;
use quant::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Asserts that the whole error chain holds every part.
fn assert_error<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error, wanted {parts:?}") };
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "wanted {part:?} in: {text}");
    }
}

/// A safetensors file with that header.
fn safetensors(header: &str, payload_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + payload_bytes, 0);
    bytes
}

fn open_safetensors(bytes: &[u8]) -> anyhow::Result<Safetensors> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.safetensors");
    fs::write(&path, bytes).unwrap();
    Safetensors::open(&path, |_| false)
}

const TWO: &str = r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;

#[test]
fn safetensors_faults_are_named() {
    let with = |from: &str, to: &str| safetensors(&TWO.replace(from, to), 12);
    assert!(open_safetensors(&safetensors(TWO, 12)).is_ok(), "the file is sound before it is damaged");
    let long_header = [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat();
    for (bytes, parts) in [
        (vec![], vec!["bad.safetensors", "empty"]),
        (vec![1, 2, 3], vec!["bad.safetensors", "3 bytes are no safetensors file"]),
        (long_header, vec!["18446744073709551615", "truncated"]),
        (safetensors(TWO, 12)[..40].to_vec(), vec!["header claims", "file has 40", "truncated"]),
        (
            safetensors(TWO, 11),
            vec!["`b`", "found bytes 8..12", "holds 11", "truncated", "download it again"],
        ),
        (safetensors(TWO, 13), vec!["end at byte 12", "holds 13"]),
        (safetensors("no json at all", 0), vec!["header is damaged"]),
        (safetensors("[]", 0), vec!["header is damaged", "object of tensors"]),
        (with("8,12", "4,8"), vec!["`b` overlaps `a`", "starts at 4, before 8"]),
        (with("[2,2]", "[2,1]").replace_offsets("0,8", "0,4"), vec!["`b` starts at 8, wanted 4"]),
        (with("8,12", "8,9999999"), vec!["`b`", "8..9999999"]),
        (with("8,12", "12,8"), vec!["`b`", "12..8"]),
        (with("\"b\"", "\"a\""), vec!["`a` is in the header twice"]),
        (with("F32", "F7"), vec!["`b`", "F7"]),
        (with("F32", "U32"), vec!["`b`", "`U32` is not supported", "BF16"]),
        (with("[2,2]", "[2,3]"), vec!["`a`", "found 8 bytes", "[2, 3]", "takes 12"]),
        (with("[2,2]", "[4294967296,4294967296,4]"), vec!["`a`", "more than any file"]),
        (with("[2,2]", "[-1,2]"), vec!["`a`", "header is damaged"]),
    ] {
        assert_error(open_safetensors(&bytes), &parts);
    }
}

trait ReplaceOffsets {
    fn replace_offsets(self, from: &str, to: &str) -> Self;
}

impl ReplaceOffsets for Vec<u8> {
    /// Edits the header in place; both texts have one length.
    fn replace_offsets(mut self, from: &str, to: &str) -> Self {
        assert_eq!(from.len(), to.len());
        let at = self.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        self[at..at + to.len()].copy_from_slice(to.as_bytes());
        self
    }
}

#[test]
fn no_prefix_and_no_changed_byte_of_a_safetensors_file_panics() {
    let sound = safetensors(TWO, 12);
    every_damage(&sound, |bytes| open_safetensors(bytes).is_ok());
}

/// Opens every strict prefix, none of which may pass, and every file with one byte changed in several ways.
fn every_damage(sound: &[u8], opens: impl Fn(&[u8]) -> bool) {
    assert!(opens(sound));
    for len in 0..sound.len() {
        assert!(!opens(&sound[..len]), "a file cut to {len} of {} bytes was accepted", sound.len());
    }
    for at in 0..sound.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = sound.to_vec();
            bytes[at] ^= change;
            opens(&bytes);
        }
    }
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_string(), storage: Storage::Plain(dtype), shape: shape.to_vec() }
}

/// A small sound GGUF file: two keys, two tensors.
fn gguf() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    metadata.set("list", vec![7u32, 8]);
    let specs = [spec("a.weight", Dtype::F32, &[2, 4]), spec("b.weight", Dtype::F16, &[16])];
    let sink = GgufSink::create(&path, Opening::default(), &metadata, &specs).unwrap();
    specs.iter().enumerate().for_each(|(i, s)| sink.write(i, 0, &vec![0; s.bytes() as usize]).unwrap());
    Box::new(sink).finish().unwrap();
    fs::read(path).unwrap()
}

fn open_gguf(bytes: &[u8]) -> anyhow::Result<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

#[test]
fn no_prefix_and_no_changed_byte_of_a_gguf_file_panics() {
    every_damage(&gguf(), |bytes| open_gguf(bytes).is_ok());
}

/// Replaces the bytes right behind the first occurrence of `after`.
fn patched(after: &[u8], skip: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = gguf();
    let at = bytes.windows(after.len()).position(|window| window == after).unwrap() + after.len() + skip;
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

#[test]
fn gguf_faults_are_named() {
    let huge = u64::MAX.to_le_bytes();
    // Behind a tensor's name: u32 dimensions, i64 each, u32 type, u64 offset.
    for (bytes, parts) in [
        (b"GGML....".to_vec(), vec!["bad.gguf", "wanted `GGUF`"]),
        (patched(b"GGUF", 0, &[1, 0, 0, 0]), vec!["bad.gguf", "found version 1, wanted 2 or 3"]),
        (patched(b"GGUF", 0, &[0, 0, 0, 3]), vec!["big-endian"]),
        (patched(b"GGUF", 4, &huge), vec!["found -1 tensors"]),
        (patched(b"GGUF", 4, &(1u64 << 40).to_le_bytes()), vec!["wanted 1099511627776 tensors", "truncated"]),
        (patched(b"GGUF", 12, &(1u64 << 40).to_le_bytes()), vec!["1099511627776 keys"]),
        (
            patched(b"general.architecture", 0, &[99, 0, 0, 0]),
            vec!["`general.architecture`", "value type 99"],
        ),
        (patched(b"general.architecture", 4, &huge), vec!["`general.architecture`", "bytes of a string"]),
        (patched(b"list", 4, &[9, 0, 0, 0]), vec!["`list`", "arrays of arrays"]),
        (patched(b"list", 8, &huge), vec!["`list`", "array items", "truncated"]),
        (patched(b"a.weight", 0, &[5, 0, 0, 0]), vec!["`a.weight`", "5 dimensions, wanted at most 4"]),
        (patched(b"a.weight", 4, &huge), vec!["`a.weight`", "dimension of -1"]),
        (patched(b"a.weight", 4, &(1u64 << 62).to_le_bytes()), vec!["`a.weight`", "larger than any file"]),
        (patched(b"a.weight", 20, &[40, 0, 0, 0]), vec!["`a.weight`", "NVFP4", "is not read here"]),
        (patched(b"a.weight", 20, &[77, 0, 0, 0]), vec!["`a.weight`", "number 77"]),
        (patched(b"a.weight", 20, &[12, 0, 0, 0]), vec!["`a.weight`", "4 columns", "block of 256"]),
        (patched(b"b.weight", 16, &[64, 0]), vec!["`b.weight`", "offset 64, wanted 32"]),
        (patched(b"b.weight", 4, &[0, 4, 0]), vec!["`b.weight`", "the file ends at", "truncated"]),
        (patched(b"b.weight", 0, &[9]), vec!["`b.weight`", "9 dimensions"]),
        (
            {
                let mut bytes = gguf();
                let at = bytes.windows(8).position(|window| window == b"b.weight").unwrap();
                bytes[at] = b'a';
                bytes
            },
            vec!["`a.weight` is there twice"],
        ),
    ] {
        assert_error(open_gguf(&bytes), &parts);
    }
}

#[test]
fn parts_of_a_split_gguf_are_all_needed_and_numbered() {
    let dir = tempfile::tempdir().unwrap();
    let part = |number: u16, claimed: u16, name: &str| {
        let mut metadata = Metadata::default();
        metadata.set("split.no", claimed);
        metadata.set("split.count", 2u16);
        metadata.set("split.tensors.count", 2i32);
        let path = dir.path().join(format!("m-0000{}-of-00002.gguf", number + 1));
        let sink = GgufSink::create(&path, REPLACING, &metadata, &[spec(name, Dtype::F32, &[1])]).unwrap();
        sink.write(0, 0, &[number as u8; 4]).unwrap();
        Box::new(sink).finish().unwrap();
        path
    };
    let first = part(0, 0, "a.weight");
    assert_error(Gguf::open(&first), &["m-00002-of-00002.gguf", "cannot be opened"]);
    let second = part(1, 1, "b.weight");
    for path in [&first, &second] {
        let gguf = Gguf::open(path).unwrap();
        let files: Vec<_> =
            gguf.tensors.iter().map(|tensor| (tensor.spec.name.as_str(), tensor.file)).collect();
        assert_eq!(files, [("a.weight", 0), ("b.weight", 1)]);
    }
    part(1, 0, "b.weight");
    assert_error(Gguf::open(&first), &["m-00002", "found part 0 of 2, wanted 1 of 2"]);
    part(1, 1, "a.weight");
    assert_error(Gguf::open(&first), &["m-00002", "`a.weight` is in an earlier part"]);
    let alone = dir.path().join("renamed.gguf");
    fs::copy(&first, &alone).unwrap();
    assert_error(Gguf::open(&alone), &["renamed.gguf", "-of-00002.gguf"]);
}

/// A model folder of one layer that can be damaged before it is opened.
struct Model {
    dir: TempDir,
    config: Value,
    tensors: Vec<(String, Dtype, Vec<usize>)>,
    shard_bytes: u64,
}

impl Model {
    fn new() -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        });
        let parsed = quant::model::config::Config::from_json(&config).unwrap();
        let tensors = parsed
            .expected_tensors()
            .into_iter()
            .map(|(id, shape)| (id.hf_name(), Dtype::BF16, shape))
            .collect();
        Model { dir: tempfile::tempdir().unwrap(), config, tensors, shard_bytes: SHARD_BYTES }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    /// Writes the folder; weights are zero.
    fn write(&self) -> PathBuf {
        let folder = self.folder();
        let specs: Vec<_> =
            self.tensors.iter().map(|(name, dtype, shape)| spec(name, *dtype, shape)).collect();
        let sink = SafetensorsSink::create(&folder, REPLACING, &specs, &[], self.shard_bytes).unwrap();
        specs.iter().enumerate().for_each(|(i, s)| sink.write(i, 0, &vec![0; s.bytes() as usize]).unwrap());
        sink.add_file("config.json", self.config.to_string().as_bytes()).unwrap();
        Box::new(sink).finish().unwrap();
        folder
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
}

const REPLACING: Opening = Opening { force: true, key: None };
const UP: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    let fault = |damage: &dyn Fn(&mut Model), parts: &[&str]| {
        let mut model = Model::new();
        assert!(Checkpoint::open(&model.write()).is_ok());
        damage(&mut model);
        let folder = model.write();
        assert_error(Checkpoint::open(&folder), &[&[folder.to_str().unwrap()], parts].concat());
    };
    fault(
        &|m| m.tensor(UP).2 = vec![63, 32],
        &["`model.layers.0.mlp.up_proj.weight`", "[63, 32]", "[64, 32]"],
    );
    fault(&|m| m.tensor(UP).2 = vec![2048], &["up_proj", "[2048]", "[64, 32]"]);
    fault(&|m| m.tensors.retain(|t| t.0 != UP), &["1 tensors", "missing", UP]);
    fault(&|m| m.tensors.retain(|t| !t.0.starts_with("lm_head")), &["missing", "`lm_head.weight`"]);
    fault(&|m| m.config["num_hidden_layers"] = json!(2), &["missing", "model.layers.1.", "and 3 more"]);
    fault(
        &|m| m.tensors.push(("model.mystery.weight".into(), Dtype::F32, vec![1])),
        &["`model.mystery.weight`"],
    );
    fault(
        &|m| m.tensors.push(("model.layers.0.mlp.up_proj.bias".into(), Dtype::F32, vec![64])),
        &["no place in the configuration", "up_proj.bias"],
    );
    fault(&|m| m.tensor(UP).1 = Dtype::I8, &["up_proj", "found I8, wanted F32, F16 or BF16"]);
    fault(
        &|m| m.tensor(UP).0 = "model.layers.0.mlp.up_proj.weight_packed".into(),
        &["`model.layers.0.mlp.up_proj.weight_packed`"],
    );
    fault(
        &|m| m.config["architectures"] = json!(["MysteryForCausalLM"]),
        &["config.json", "MysteryForCausalLM"],
    );
    fault(&|m| m.config["hidden_act"] = json!("gelu"), &["config.json", "gelu"]);
    fault(&|m| m.config["hidden_size"] = json!("wide"), &["config.json", "`hidden_size`"]);
    fault(
        &|m| m.config["quantization_config"] = json!({"quant_method": "gptq"}),
        &["config.json", "quantization_config"],
    );
}

#[test]
fn files_that_are_missing_or_contradict_each_other_are_named() {
    let mut model = Model::new();
    model.shard_bytes = 9000;
    let folder = model.write();
    let sound = Checkpoint::open(&folder).unwrap();
    let shards: Vec<_> = sound.weight_files().map(Path::to_path_buf).collect();
    assert!(shards.len() >= 3);
    let index = folder.join("model.safetensors.index.json");
    let index_text = fs::read_to_string(&index).unwrap();

    // An index that names a file outside the folder, or is none.
    let first = shards[0].file_name().unwrap().to_str().unwrap();
    fs::write(&index, index_text.replace(first, &format!("../{first}"))).unwrap();
    assert_error(Checkpoint::open(&folder), &["index.json", "is no file name"]);
    fs::write(&index, "{").unwrap();
    assert_error(Checkpoint::open(&folder), &["index.json", "no valid index"]);
    fs::write(&index, &index_text).unwrap();

    // A shard cut short, a shard gone: with the index and by numbering alone.
    let shard = fs::read(&shards[1]).unwrap();
    fs::write(&shards[1], &shard[..shard.len() - 1]).unwrap();
    assert_error(Checkpoint::open(&folder), &[shards[1].to_str().unwrap(), "truncated", "download it again"]);
    fs::remove_file(&shards[1]).unwrap();
    let missing = shards[1].file_name().unwrap().to_str().unwrap();
    assert_error(Checkpoint::open(&folder), &["1 of the model's files missing", missing]);
    fs::remove_file(&index).unwrap();
    assert_error(Checkpoint::open(&folder), &["1 of the model's files missing", missing]);

    // Two files with one tensor.
    fs::write(&shards[1], &shard).unwrap();
    for (at, shard) in shards.iter().enumerate() {
        fs::rename(shard, folder.join(format!("part{at}.safetensors"))).unwrap();
    }
    fs::copy(folder.join("part1.safetensors"), folder.join("part2-copy.safetensors")).unwrap();
    assert!(Checkpoint::open(&folder).is_ok(), "the same values twice do no harm");
    let mut other = shard.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(folder.join("part2-copy.safetensors"), other).unwrap();
    assert_error(Checkpoint::open(&folder), &["part2-copy.safetensors", "with other values", "remove one"]);
}

#[test]
fn paths_that_hold_no_model_say_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert_error(Checkpoint::open(&at("nowhere")), &["nowhere", "not found", "hub id"]);
    assert_error(Checkpoint::open(dir.path()), &["no `config.json`"]);
    fs::write(at("m.gguf"), gguf()).unwrap();
    assert_error(Checkpoint::open(dir.path()), &["m.gguf", "named by its file"]);
    fs::write(at("config.json"), "{ not json").unwrap();
    assert_error(Checkpoint::open(dir.path()), &["config.json", "not valid JSON"]);
    fs::write(at("config.json"), Model::new().config.to_string()).unwrap();
    assert_error(Checkpoint::open(dir.path()), &["no `.safetensors` file"]);
    fs::write(at("pytorch_model.bin"), "pickle").unwrap();
    assert_error(Checkpoint::open(dir.path()), &["`pytorch_model.bin` is a pickle", "safetensors"]);
    fs::write(at("notes.txt"), "x").unwrap();
    assert_error(Checkpoint::open(&at("notes.txt")), &["notes.txt", "a GGUF file"]);
}

#[test]
fn a_gguf_file_needs_the_tokenizer_that_the_folder_lacks() {
    let model = Model::new();
    let source = Checkpoint::open(&model.write()).unwrap();
    let plan = Plan::new(&source, &Recipe::new("q8_0", None, None).unwrap()).unwrap();
    let artifact = Artifact::new(&plan, &source, "model", &[], SHARD_BYTES).map(|_| ());
    assert_error(artifact, &["model", "tokenizer.json"]);
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn outputs_that_cannot_be_made_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let specs = [spec("a.weight", Dtype::F32, &[4])];
    let create = |path: &Path, force| {
        GgufSink::create(path, Opening { force, key: None }, &Metadata::default(), &specs)
    };

    fs::write(&path, "precious").unwrap();
    assert_error(create(&path, false), &["out.gguf", "exists already", "--force"]);
    drop(create(&path, true).unwrap());
    assert_eq!(
        fs::read(&path).unwrap(),
        b"precious",
        "what stood there stays until the new output is complete"
    );
    assert_error(create(&path.join("x.gguf"), false), &["out.gguf"]);
    assert_error(create(dir.path(), true), &["found a folder, wanted to write a file"]);
    let folder_sink = |path: &Path| SafetensorsSink::create(path, REPLACING, &specs, &[], SHARD_BYTES);
    assert_error(folder_sink(&path), &["out.gguf", "found a file, wanted to write a folder"]);

    // No process, root included, may create files here.
    assert_error(create(Path::new("/proc/quant-out/m.gguf"), false), &["/proc/quant-out"]);
    let vast = [spec("a.weight", Dtype::F32, &[1 << 50])];
    let too_large =
        GgufSink::create(&dir.path().join("vast.gguf"), Opening::default(), &Metadata::default(), &vast);
    assert_error(too_large, &["the output takes 45035996273", "free"]);

    let unfinished = folder_sink(&dir.path().join("model")).unwrap();
    unfinished.write(0, 0, &[0; 16]).unwrap();
    drop(unfinished);
    let cut_short = folder_sink(&dir.path().join("model")).unwrap();
    assert_error(Box::new(cut_short).finish(), &["`a.weight`: 0 bytes were written, wanted 16"]);
    assert_eq!(entries(dir.path()), 1, "only the file that was there before");
}

#[cfg(unix)]
#[test]
fn a_folder_without_write_permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(closed.join("probe"), "").is_ok() {
        return; // Root may write anywhere; the test above covers it.
    }
    let created = GgufSink::create(&closed.join("m.gguf"), Opening::default(), &Metadata::default(), &[]);
    assert_error(created, &["m.gguf", "cannot be created", "may write to"]);
}
