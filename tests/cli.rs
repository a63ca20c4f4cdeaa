//! The binary, end to end, as a user or a script meets it.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use quant::container::gguf::Gguf;
use serde_json::Value;
use tempfile::TempDir;

/// A folder of its own for each test; the embedded model is unpacked once for all of them.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Bench { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a command line. Conversions round to nearest unless the line names a method: calibration takes a minute.
    fn quant(&self, line: &str) -> Output {
        let nearest = line.starts_with("convert ") && !line.contains("--method");
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        Command::cargo_bin("quant")
            .unwrap()
            .args(line.split_whitespace())
            .args(nearest.then_some("--method=rtn"))
            .env("XDG_CACHE_HOME", cache)
            .current_dir(&self.folder)
            .output()
            .unwrap()
    }

    /// Runs a command that must work and returns its standard output.
    fn ok(&self, line: &str) -> String {
        let output = self.quant(line);
        assert_eq!(output.status.code(), Some(0), "quant {line}\n{}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a command that must be refused and returns what it says.
    fn refused(&self, line: &str) -> String {
        let output = self.quant(line);
        assert_eq!(output.status.code(), Some(2), "quant {line}\n{}", text(&output.stdout));
        assert!(output.stdout.is_empty(), "a refusal prints no results: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// A copy of the embedded model that a test may damage.
    fn model(&self) -> PathBuf {
        let copy = self.path("model");
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/eval/tiny-llama")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        copy
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes of all files of a folder, or of one file; `quant.json` left out.
fn bytes_of(path: &Path) -> u64 {
    if path.is_file() {
        return path.metadata().unwrap().len();
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.filter(|e| e.file_name() != "quant.json").map(|e| e.metadata().unwrap().len()).sum()
}

#[test]
fn the_first_command_converts_loads_back_and_measures_the_embedded_model() {
    let bench = Bench::new();
    let out = bench.ok("convert --format mxfp4 --windows 2");
    assert!(out.contains("wrote tiny-llama-mxfp4"), "{out}");
    for word in ["KLD", "same top-1", "2 windows of 512 tokens"] {
        assert!(out.contains(word), "{word} in {out}");
    }
    let manifest = fs::read_to_string(bench.path("tiny-llama-mxfp4/quant.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["recipe"]["format"], "mxfp4");
    assert_eq!(manifest["tensors"]["model.layers.3.mlp.up_proj.weight"]["scheme"], "mxfp4");
    assert!(manifest["evaluation"]["metrics"]["kld"].as_f64().unwrap() < 0.3);
    // b3sum eval/tiny-llama/model.safetensors
    let hash = manifest["source"]["files"]["model.safetensors"].as_str().unwrap();
    assert!(hash.starts_with("blake3:dff8395c97a10756"), "{hash}");
    let config = fs::read_to_string(bench.path("tiny-llama-mxfp4/config.json")).unwrap();
    assert!(config.contains("mxfp4-pack-quantized"));
}

#[test]
fn every_format_loads_back_and_stays_close_to_the_source() {
    let bench = Bench::new();
    // Upper ends a little above what these formats measure on the embedded model with 2 windows.
    let formats = [
        ("mxfp4", 0.25),
        ("int8", 0.002),
        ("int8-w8a8", 0.02),
        ("q4_k_m", 0.11),
        ("q4_k_s", 0.13),
        ("q5_k_m", 0.04),
        ("q5_k_s", 0.05),
        ("q6_k", 0.016),
        ("q8_0", 0.003),
        ("q4_0", 0.2),
    ];
    let names: Vec<_> = formats.iter().map(|f| f.0).collect();
    let report = bench.ok(&format!("convert --format {} --windows 2 --out made --json -", names.join(",")));
    let report: Value = serde_json::from_str(&report).unwrap();
    let rows = report["evaluation"]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), formats.len() + 1);
    for ((format, limit), row) in formats.iter().zip(&rows[1..]) {
        let kld = row["kld"].as_f64().unwrap();
        assert!(kld > 0.0 && kld < *limit, "{format}: {kld}");
        assert_eq!(row["format"], *format);
    }
}

#[test]
fn calibrated_codes_diverge_less_than_nearest_ones_at_the_same_bytes() {
    let bench = Bench::new();
    let kld = |method: &str, format: &str| {
        let line = format!(
            "convert --format {format} --method {method} --calib-tokens 4096 --windows 4 --json - -o {method}"
        );
        let report: Value = serde_json::from_str(&bench.ok(&line)).unwrap();
        let row = &report["evaluation"]["rows"][1];
        (row["kld"].as_f64().unwrap(), row["bytes"].as_u64().unwrap())
    };
    let ((nearest, bytes), (calibrated, same_bytes)) = (kld("rtn", "mxfp4"), kld("gptq", "mxfp4"));
    assert_eq!(bytes, same_bytes);
    assert!(calibrated < 0.9 * nearest, "{calibrated} against {nearest}");
    let manifest = fs::read_to_string(bench.path("gptq/quant.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["calibration"]["windows"], 8);
    let tensor = &manifest["tensors"]["model.layers.0.mlp.up_proj.weight"];
    assert!(tensor["error"].as_f64() < tensor["error_nearest"].as_f64());
}

#[test]
fn the_dry_run_writes_nothing_and_its_size_is_exact() {
    let bench = Bench::new();
    for (format, out) in [("mxfp4", "a"), ("int8-w8a8", "b"), ("q4_k_m", "c.gguf")] {
        let plan = bench.ok(&format!("convert --format {format} --out {out} --dry-run --json -"));
        assert!(!bench.path(out).exists());
        let plan: Value = serde_json::from_str(&plan).unwrap();
        bench.ok(&format!("convert --format {format} --out {out} --no-validate"));
        assert_eq!(plan["plans"][0]["bytes"], bytes_of(&bench.path(out)), "{format}");
    }
    let text = bench.ok("convert --format mxfp4 --dry-run");
    for word in ["vLLM", "llama.cpp", "fallbacks:", "memory: about", "bits per weight"] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let bench = Bench::new();
    for out in ["a", "b"] {
        bench.ok(&format!("convert --format mxfp4 --out {out} --windows 1"));
    }
    for (format, threads) in [("q4_k_m", 1), ("q4_k_m", 2)] {
        bench
            .ok(&format!("convert --format {format} --out {threads}.gguf --no-validate --threads {threads}"));
    }
    for file in ["model.safetensors", "config.json", "quant.json"] {
        let [a, b] = ["a", "b"].map(|out| fs::read(bench.path(out).join(file)).unwrap());
        assert!(a == b, "{file}");
    }
    assert!(fs::read(bench.path("1.gguf")).unwrap() == fs::read(bench.path("2.gguf")).unwrap());
}

#[test]
fn an_existing_output_is_replaced_only_by_force() {
    let bench = Bench::new();
    bench.ok("convert --format q8_0 --out m.gguf --no-validate");
    // `b3sum config.json model.safetensors | b3sum` in eval/tiny-llama; found while the source was converted.
    let source = Gguf::open(&bench.path("m.gguf")).unwrap();
    let hash = source.metadata.str("quant.source.blake3").unwrap();
    assert!(hash.starts_with("5007e412df4f00c0"), "{hash}");
    let before = fs::read(bench.path("m.gguf")).unwrap();
    let message = bench.refused("convert --format q4_0 --out m.gguf --no-validate");
    assert!(message.contains("m.gguf: exists already") && message.contains("--force"), "{message}");
    assert!(fs::read(bench.path("m.gguf")).unwrap() == before);
    bench.ok("convert --format q4_0 --out m.gguf --no-validate --force");
    assert!(fs::read(bench.path("m.gguf")).unwrap().len() < before.len());
    assert_eq!(bench.names(), ["m.gguf"], "nothing temporary is left");
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name_and_leave_nothing_behind() {
    let bench = Bench::new();
    let file = bench.model().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let index: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    for tensor in ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"] {
        let start = 8 + header + index[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 6;
        let old = bytes[start..start + 2].to_vec();
        // The BF16 pattern of an infinity.
        bytes[start..start + 2].copy_from_slice(&0x7f80u16.to_le_bytes());
        fs::write(&file, &bytes).unwrap();
        let message = bench.refused("convert model --format mxfp4 --out out");
        assert!(message.contains(tensor) && message.contains("inf"), "{message}");
        assert_eq!(bench.names(), ["model"], "nothing temporary is left");
        bytes[start..start + 2].copy_from_slice(&old);
    }
}

#[test]
fn a_quantized_source_is_refused_unless_allowed() {
    let bench = Bench::new();
    bench.ok("convert --format q8_0 --out m.gguf --no-validate");
    let message = bench.refused("convert m.gguf --format q4_0 --out n.gguf");
    assert!(
        message.contains("already quantized (q8_0)") && message.contains("--allow-requantize"),
        "{message}"
    );
    bench.ok("convert m.gguf --format q4_0 --out n.gguf --allow-requantize --windows 1");
}

#[test]
fn contradictions_are_bad_usage() {
    let bench = Bench::new();
    for (line, words) in [
        ("convert", "--format"),
        ("convert --format q9", "`--format q9` is not known"),
        ("convert --format int8 --dialect gguf", "no spelling for `int8`"),
        ("convert --format int8 --out m.gguf", "name a folder"),
        ("convert --format q4_0,q8_0 --out m.gguf", "name a folder"),
        ("convert no-such-folder/x/y --format q4_0", "no-such-folder/x/y"),
        ("eval --text no-such-text --ppl", "no-such-text"),
        ("eval --kld", "--baseline"),
        ("eval --device tpu", "`--device tpu`"),
        ("eval --csv - --json -", "two reports want this file"),
        ("eval --ctx 4096 --ppl", "exceed its context of 2048"),
        ("frobnicate", "frobnicate"),
    ] {
        let message = bench.refused(line);
        assert!(message.contains(words), "quant {line}: {message}");
    }
}

#[test]
fn results_are_on_standard_output_and_nothing_else_is() {
    let bench = Bench::new();
    let csv = bench.ok("eval --ppl --windows 1 --csv -");
    assert_eq!(csv.lines().count(), 2, "{csv}");
    assert!(csv.starts_with("model,format,bytes,bits_per_weight,ppl,delta_ppl"), "{csv}");
    let json: Value = serde_json::from_str(&bench.ok("eval --ppl --windows 1 --json -")).unwrap();
    assert_eq!(json["protocol"]["windows"], 1);
    assert_eq!(json["rows"][0]["tokens"], 255);
    let inspected: Value = serde_json::from_str(&bench.ok("inspect --json -")).unwrap();
    assert_eq!(inspected["tensors"].as_array().unwrap().len(), 56);
    let output = bench.quant("eval --ppl --windows 1 --quiet");
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn a_model_against_itself_diverges_by_exactly_nothing() {
    let bench = Bench::new();
    let model = bench.model();
    let line = format!("eval {0} --baseline {0} --ppl --kld --windows 2 --json -", model.display());
    let json: Value = serde_json::from_str(&bench.ok(&line)).unwrap();
    let row = &json["rows"][1];
    assert_eq!((row["kld"].as_f64(), row["delta_ppl"].as_f64()), (Some(0.0), Some(0.0)));
    assert_eq!(row["top1"].as_f64(), Some(1.0));
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let bench = Bench::new();
    let binary = assert_cmd::cargo::cargo_bin("quant");
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let script = format!("set -o pipefail; '{}' inspect | head -1", binary.display());
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .env("XDG_CACHE_HOME", cache)
        .current_dir(&bench.folder)
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn completions_know_the_subcommands() {
    let script = Bench::new().ok("completions bash");
    assert!(script.contains("convert") && script.contains("--no-fallback"));
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let bench = Bench::new();
    // A limit on file sizes makes the same calls fail as a full disk does, without needing one: 1,000 blocks are less
    // than the 6 MB of the artifact.
    let line = format!(
        "trap '' XFSZ; ulimit -f 1000; exec {} convert --format mxfp4 --method rtn --no-validate --out small",
        env!("CARGO_BIN_EXE_quant")
    );
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    // Unpacks the embedded model, which the limit would stop too.
    bench.ok("inspect");
    let output = std::process::Command::new("sh")
        .args(["-c", &line])
        .env("XDG_CACHE_HOME", cache)
        .current_dir(&bench.folder)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    let message = text(&output.stderr);
    assert!(message.contains("small") && message.contains("File too large"), "{message}");
    assert_eq!(bench.names(), Vec::<String>::new());
}

#[test]
fn what_gguf_cannot_say_of_a_model_is_told() {
    let bench = Bench::new();
    let config = bench.model().join("config.json");
    let llama = fs::read_to_string(&config).unwrap();
    let mut mistral: Value = serde_json::from_str(&llama).unwrap();
    mistral["architectures"][0] = "MistralForCausalLM".into();
    mistral["sliding_window"] = 100.into();
    fs::write(&config, mistral.to_string()).unwrap();
    let told = "attention is limited to the last 100 positions";
    let output = bench.quant("convert model --format q8_0,mxfp4 --dry-run --json plan.json");
    assert_eq!(text(&output.stderr).matches(told).count(), 1, "{}", text(&output.stderr));
    let plans: Value = serde_json::from_str(&fs::read_to_string(bench.path("plan.json")).unwrap()).unwrap();
    assert!(plans["plans"][0]["losses"][0].as_str().unwrap().contains(told));
    assert_eq!(plans["plans"][1]["losses"], serde_json::json!([]));
}

#[test]
fn bench_measures_the_cpu_where_there_is_no_gpu() {
    let bench = Bench::new();
    let out = bench.quant("bench --device cpu --batch 1,2 --prompt 8 --tokens 4 --json -");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["device"].as_str().unwrap().starts_with("CPU"));
    let rows = report["rows"].as_array().unwrap();
    for what in ["prompts, ", "first token after 8 tokens", "generation, 2 at once"] {
        let row = rows.iter().find(|row| row["what"].as_str().unwrap().starts_with(what)).unwrap();
        assert!(row["value"].as_f64().unwrap() > 0.0, "{row}");
    }
}
