//! A calibrated conversion that is killed and started again ends with the bytes of one that was not.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quant::checkpoint::Checkpoint;
use quant::container::safetensors::{SHARD_BYTES, SafetensorsSink};
use quant::container::{Opening, Sink, Storage, TensorSpec};
use quant::embedded;
use quant::names::{Role, TensorId};
use quant::tensor::Matrix;
use serde_json::Value;

/// 32 windows: enough for trials of settings.
const TEXT: &str = "--method gptq --calib-tokens 2048 --calib-ctx 64 --device cpu";

fn quant(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quant"));
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    command.args(line.split_whitespace()).env("XDG_CACHE_HOME", cache).current_dir(folder);
    command.stdout(Stdio::null());
    command
}

/// Runs a command that must work and returns its standard error.
fn ok(folder: &Path, line: &str) -> String {
    let output = quant(folder, line).stderr(Stdio::piped()).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "quant {line}\n{told}");
    told
}

/// Files in a folder that an unfinished output left there.
fn leftovers(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.to_string_lossy().contains(".partial-")).collect()
}

fn journal(folder: &Path) -> String {
    let path = leftovers(folder).into_iter().find(|path| path.extension().is_some_and(|e| e == "journal"));
    path.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default()
}

/// Writes the first three layers of the embedded model.
fn write_model(folder: &Path) {
    let source = Checkpoint::open(&embedded::model_folder().unwrap()).unwrap();
    let tensors = || source.tensors.keys().filter(|id| id.layer.is_none_or(|layer| layer < 3));
    let (mut specs, mut payload) = (Vec::new(), Vec::new());
    for &id in tensors() {
        let Matrix::Dense(dense) = source.read(id).unwrap() else { panic!("{id} is quantized") };
        specs.push(TensorSpec {
            name: id.hf_name(),
            storage: Storage::Plain(dense.dtype),
            shape: dense.shape,
        });
        payload.push(dense.bytes);
    }
    let out = folder.join("model");
    let sink = SafetensorsSink::create(&out, Opening::default(), &specs, &[], SHARD_BYTES).unwrap();
    payload.iter().enumerate().for_each(|(i, bytes)| sink.write(i, 0, bytes).unwrap());
    for file in source.side_files().unwrap() {
        sink.add_file(&file, &fs::read(source.folder().unwrap().join(&file)).unwrap()).unwrap();
    }
    let mut config: Value = serde_json::from_str(source.config_json().unwrap()).unwrap();
    config["num_hidden_layers"] = 3.into();
    sink.add_file("config.json", config.to_string().as_bytes()).unwrap();
    Box::new(sink).finish().unwrap();
}

/// A folder with that model.
fn folder_with_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path());
    folder
}

/// Starts a command and kills it as soon as its journal has `count` lines of that kind. Returns its standard error.
fn kill_at(folder: &Path, line: &str, kind: &str, count: usize) -> String {
    let mut child = quant(folder, line).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while journal(folder).matches(kind).count() < count {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        assert!(started.elapsed() < Duration::from_secs(120), "no `{kind}` in the journal");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap()
}

/// The one weight file of an output.
fn bytes(folder: &Path, out: &str) -> Vec<u8> {
    let out = folder.join(out);
    fs::read(if out.is_dir() { out.join("model.safetensors") } else { out }).unwrap()
}

#[test]
fn a_conversion_killed_three_times_goes_on_and_ends_with_the_same_bytes() {
    let (whole, killed) = (folder_with_model(), folder_with_model());
    let line = format!("convert model --format mxfp4 --effort balanced {TEXT} --windows 60 -o out");
    let untouched = ok(whole.path(), &line);
    assert!(!untouched.contains("going on"), "{untouched}");
    let manifest = |folder: &Path| fs::read_to_string(folder.join("out/quant.json")).unwrap();
    let tried = manifest(whole.path()).matches(r#""tried""#).count();
    assert!((2..=3).contains(&tried), "{tried} settings");

    kill_at(killed.path(), &line, r#"{"trial":{"#, 1);
    assert!(!killed.path().join("out").exists());
    kill_at(killed.path(), &line, r#"{"layer":{"#, 1);
    assert_eq!(
        journal(killed.path()).matches(r#"{"trial":{"#).count(),
        tried,
        "the first trial was not run again"
    );
    let told = kill_at(killed.path(), &line, r#"{"output":{"#, 1);
    let layers = |count| {
        format!("going on from an interrupted run: {count} of 3 layers are finished, {tried} settings tried")
    };
    assert!((1..3).any(|count| told.contains(&layers(count))), "{told}");
    // Killed while the output was measured: it is not made again.
    assert!(!killed.path().join("out/quant.json").exists());
    let told = ok(killed.path(), &line);
    assert!(told.contains("out is finished already") && !told.contains("calibrating"), "{told}");
    assert!(bytes(whole.path(), "out") == bytes(killed.path(), "out"));
    assert_eq!(manifest(whole.path()), manifest(killed.path()));
    assert_eq!(leftovers(killed.path()), Vec::<PathBuf>::new());
}

#[test]
fn what_an_interrupted_run_left_is_used_only_where_it_fits() {
    let (whole, killed) = (folder_with_model(), folder_with_model());
    // GGUF reorders rows, and smoothing rewrites norms.
    let line = format!("convert model --format q4_k_s --effort fast {TEXT} --no-validate -o out.gguf");
    ok(whole.path(), &line);
    kill_at(killed.path(), &line, r#"{"layer":{"#, 1);
    fs::write(killed.path().join(".out.gguf.partial-99999999"), "of a process that is gone").unwrap();

    // Other settings: another key.
    let other = folder_with_model();
    for path in leftovers(killed.path()) {
        fs::copy(&path, other.path().join(path.file_name().unwrap())).unwrap();
    }
    let told = ok(other.path(), &line.replace("2048", "1024"));
    assert!(told.contains("left by an interrupted run with other settings"), "{told}");
    assert!(told.contains("removed") && !told.contains("going on"), "{told}");
    assert_eq!(leftovers(other.path()).len(), 2);
    assert!(bytes(other.path(), "out.gguf") != bytes(whole.path(), "out.gguf"));
    let told = ok(other.path(), &format!("{line} --force --fresh"));
    assert!(!told.contains("going on") && leftovers(other.path()).is_empty(), "{told}");
    assert!(bytes(other.path(), "out.gguf") == bytes(whole.path(), "out.gguf"));

    // The same settings, but the bytes of the second layer are gone.
    let large = |path: &PathBuf| path.metadata().unwrap().len() > 1 << 20;
    let partial = leftovers(killed.path()).into_iter().find(large).unwrap();
    let mut damaged = fs::read(&partial).unwrap();
    let half = damaged.len() / 4;
    damaged[half..].fill(0);
    fs::write(&partial, damaged).unwrap();
    let told = ok(killed.path(), &line);
    assert!(told.contains("going on"), "{told}");
    assert!(bytes(killed.path(), "out.gguf") == bytes(whole.path(), "out.gguf"));
    assert_eq!(leftovers(killed.path()), Vec::<PathBuf>::new());
}

#[test]
fn scales_of_inputs_survive_an_interruption() {
    let (whole, killed) = (folder_with_model(), folder_with_model());
    let line = format!("convert model --format int8-w8a8-static --effort fast {TEXT} --no-validate -o out");
    ok(whole.path(), &line);
    kill_at(killed.path(), &line, r#"{"layer":{"#, 1);
    let told = ok(killed.path(), &line);
    assert!(told.contains("going on"), "{told}");
    assert!(bytes(whole.path(), "out") == bytes(killed.path(), "out"));

    let written = Checkpoint::open(&whole.path().join("out")).unwrap();
    let scale = |role| written.tensors[&TensorId::in_layer(1, role)].rounding.scale().unwrap();
    for (role, other) in [(Role::Q, Role::K), (Role::Q, Role::V), (Role::Gate, Role::Up)] {
        assert_eq!(scale(role), scale(other), "engines join them");
    }
    assert_ne!(scale(Role::Q), scale(Role::Down));
}
