//! What the command line does with such inputs: nothing is destroyed, nothing is refused late, nothing is
//! left behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::json;

use crate::model::Model;

/// A model of 16 tokens with a tokenizer, in a folder of its own.
fn model() -> (Model, PathBuf) {
    let model = Model::new(true);
    let folder = model.write();
    let vocab: serde_json::Map<_, _> =
        "abcdefghijklmnop".chars().zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": false, "ignore_merges": false},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    (model, folder)
}

/// Runs a command line in `folder`.
fn quant(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quant"));
    let convert = line.starts_with("convert").then_some(["--method=rtn", "--no-validate"]);
    command.args(line.split_whitespace()).args(convert.into_iter().flatten()).current_dir(folder);
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_output_that_would_destroy_what_is_read_is_refused_whatever_it_is_called() {
    let (model, folder) = model();
    let place = model.dir.path();
    symlink(&folder, place.join("link")).unwrap();
    let made = quant(place, "convert model -f q8_0 -o m.gguf");
    assert!(made.status.success(), "{}", said(&made));
    fs::hard_link(place.join("m.gguf"), place.join("hard.gguf")).unwrap();
    fs::write(place.join("config.json"), "{}").unwrap();
    let before = fs::read(folder.join("model.safetensors")).unwrap();
    let file = fs::read(place.join("m.gguf")).unwrap();
    for line in [
        "convert model -f int8 -o model",
        "convert model -f int8 -o model/",
        "convert model -f int8 -o ./model/../model",
        "convert link -f int8 -o model",
        "convert model -f int8 -o link",
        "convert model/model.safetensors -f int8 -o model",
        "convert model -f int8 -o ../model",
        "convert model -f q8_0 --imatrix m.gguf -o m.gguf",
        "convert m.gguf -f q4_0 --allow-requantize -o m.gguf",
        "convert m.gguf -f q4_0 --allow-requantize -o hard.gguf",
        "convert hard.gguf -f q4_0 --allow-requantize -o ./m.gguf",
    ] {
        let at = if line.contains("../model") && !line.contains("./model/..") { &folder } else { place };
        let line = if at == folder { line.replace("convert model", "convert .") } else { line.to_string() };
        let output = quant(at, &format!("{line} --force"));
        assert_eq!(output.status.code(), Some(2), "{line}: {}", said(&output));
        let text = said(&output);
        assert!(text.contains("would destroy") || text.contains("imatrix"), "{line}: {text}");
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), before, "{line}");
        assert_eq!(fs::read(place.join("m.gguf")).unwrap(), file, "{line}");
    }
    // Beside and below the source there is room, and an output that is another model is replaced.
    for line in ["convert model -f int8 -o model/int8", "convert model -f int8 -o model/int8 --force"] {
        let output = quant(place, line);
        assert!(output.status.success(), "{line}: {}", said(&output));
    }
}

#[test]
fn force_replaces_models_and_no_other_folder() {
    let (model, _) = model();
    let place = model.dir.path();
    for (name, files, replaced) in [
        ("settings", &["config.json", "main.js"][..], false),
        ("notes", &["a.txt"], false),
        ("old", &["config.json", "model.safetensors"], true),
        ("ours", &["quant.json"], true),
        ("empty", &[], true),
    ] {
        fs::create_dir(place.join(name)).unwrap();
        files.iter().for_each(|file| fs::write(place.join(name).join(file), "{}").unwrap());
        let output = quant(place, &format!("convert model -f int8 --force -o {name}"));
        assert_eq!(output.status.success(), replaced, "{name}: {}", said(&output));
        let kept =
            files.iter().all(|file| fs::read(place.join(name).join(file)).is_ok_and(|text| text == b"{}"));
        assert!(kept != replaced || files.is_empty(), "{name}");
    }
}

#[test]
fn every_file_has_the_rights_that_the_umask_gives() {
    let (model, _) = model();
    let place = model.dir.path();
    for (umask, mode) in [("022", 0o644), ("002", 0o664), ("077", 0o600)] {
        let line = format!(
            "umask {umask}; {} convert model -f int8,q8_0 --method rtn --no-validate -o out-{umask}",
            env!("CARGO_BIN_EXE_quant")
        );
        let output = Command::new("sh").args(["-c", &line]).current_dir(place).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let out = place.join(format!("out-{umask}"));
        for folder in [out.join("model-int8"), out] {
            for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
                let metadata = entry.metadata().unwrap();
                let found = metadata.permissions().mode() & 0o777;
                assert!(metadata.is_dir() || found == mode, "{:?} {found:o}", entry.path());
            }
        }
    }
}

#[test]
fn what_can_be_known_before_the_work_is_refused_before_it() {
    let (model, _) = model();
    let place = model.dir.path();
    fs::create_dir(place.join("taken")).unwrap();
    fs::create_dir_all(place.join("there/model-int8")).unwrap();
    fs::write(place.join("there/model-int8/quant.json"), "{}").unwrap();
    for (line, part) in [
        ("convert model -f int8 -o a --json no/such/report.json", "there is no folder `no/such`"),
        ("convert model -f int8 -o a --json taken", "found a folder"),
        ("convert model -f int8,int8 -o a", "name it once"),
        ("convert model -f q4_k,q4_k_m -o a", "name it once"),
        // The second of two outputs stands there already.
        ("convert model -f q8_0,int8 -o there", "exists already"),
        ("convert model -f int8 -o a.safetensors", "a folder is written"),
        ("eval model --windows 1 --json no/such/report.json", "there is no folder `no/such`"),
        ("eval model --windows 1 --csv r --html r", "two reports"),
        ("sensitivity model -f int8 --csv no/such/r.csv", "there is no folder"),
        ("calibrate model -o taken", "found a folder"),
    ] {
        let output = quant(place, line);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{line}: {text}");
        assert!(text.contains(part) && !text.contains("measuring"), "{line}: {text}");
        assert!(!place.join("a").exists(), "{line}");
        assert_eq!(fs::read_dir(place.join("there")).unwrap().count(), 1, "{line}");
    }
}

#[test]
fn a_converted_folder_has_the_further_chat_templates() {
    let (model, folder) = model();
    let place = model.dir.path();
    let templates = folder.join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ messages }}").unwrap();
    fs::write(templates.join("tool_use.jinja"), "{{ tools | tojson }}").unwrap();
    let output = quant(place, "convert model -f int8 -o out");
    assert!(output.status.success(), "{}", said(&output));
    let copied = fs::read_to_string(place.join("out/additional_chat_templates/tool_use.jinja")).unwrap();
    assert_eq!(copied, "{{ tools | tojson }}");
    let manifest = fs::read_to_string(place.join("out/quant.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert!(manifest["side_files"]["additional_chat_templates/tool_use.jinja"].is_string(), "{manifest:#}");
    let gguf = quant(place, "convert model -f q8_0 -o out.GGUF");
    assert!(gguf.status.success(), "{}", said(&gguf));
    let inspected = quant(place, "inspect out.GGUF");
    assert!(
        inspected.status.success(),
        "what is written under a name is read under it: {}",
        said(&inspected)
    );
    let bytes = fs::read(place.join("out.GGUF")).unwrap();
    assert!(bytes.windows(32).any(|window| window == b"tokenizer.chat_template.tool_use"));
}

#[test]
fn an_artifact_whose_tokenizer_cuts_otherwise_fails_a_gate() {
    let dir = tempfile::tempdir().unwrap();
    let made = quant(dir.path(), "convert -f q8_0 -o good.gguf");
    assert!(made.status.success(), "{}", said(&made));
    let key = [&b"tokenizer.ggml.pre"[..], &8u32.to_le_bytes(), &5u64.to_le_bytes()].concat();
    let mut bytes = fs::read(dir.path().join("good.gguf")).unwrap();
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    assert_eq!(&bytes[at..at + 5], b"qwen2");
    bytes[at..at + 5].copy_from_slice(b"gpt-2");
    fs::write(dir.path().join("other.gguf"), bytes).unwrap();
    for (name, code) in [("good.gguf", 0), ("other.gguf", 1)] {
        let line = format!("eval {name} --baseline good.gguf --windows 1 --device cpu --kld --max-kld 0.01");
        let output = quant(dir.path(), &line);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(
            said(&output).contains("gate failed: other.gguf: same-tokens"),
            code == 1,
            "{}",
            said(&output)
        );
    }
}
