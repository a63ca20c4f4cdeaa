//! Prompt suites, benchmarks and caches of keys and values, through the binary and the library.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use quant::backend::cpu::Cpu;
use quant::backend::kv_cache::KvCache;
use quant::checkpoint::Checkpoint;
use quant::eval::Subject;
use quant::eval::suite::Suite;
use quant::eval::suite::ask::Asker;
use quant::eval::suite::run::{Prepared, Settings};
use quant::model::Model;
use serde_json::{Value, json};
use tempfile::TempDir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/eval/tiny-llama");

const SUITE: &str = r#"{"id": "sum", "prompt": "What is 2 + 2?", "check": {"type": "number", "answer": "4"}, "max_new_tokens": 6}
{"id": "words", "prompt": "Tell a story.", "check": {"type": "constraints", "constraints": [{"words": [1, 99]}]}}
{"id": "code", "prompt": "Write f.", "check": {"type": "python", "tests": "assert f() == 1"}}
"#;

const GSM8K: &str = r##"{"question": "1 + 1?", "answer": "Two. #### 2"}
{"question": "2 + 2?", "answer": "Four. #### 4"}
"##;

/// A folder with a suite, a benchmark and a quantized model.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Bench(tempfile::tempdir().unwrap());
        for (name, text) in
            [("mine.jsonl", SUITE), ("gsm.jsonl", GSM8K), ("law_test.csv", "Who?,a,b,c,d,B\n")]
        {
            fs::write(bench.path(name), text).unwrap();
        }
        bench.ok(&format!("convert {MODEL} --format q4_0 --method rtn --no-validate -o q4.gguf"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn quant(&self, line: &str) -> Output {
        let mut quant = Command::cargo_bin("quant").unwrap();
        quant.args(line.split_whitespace()).current_dir(&self.0).output().unwrap()
    }

    fn ok(&self, line: &str) -> String {
        let output = self.quant(line);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Evaluates one window and the questions of `line`.
    fn eval(&self, line: &str) -> Value {
        let line = format!("eval {line} --windows 1 --device cpu --json -");
        serde_json::from_str(&self.ok(&line)).unwrap()
    }
}

#[test]
fn a_quantized_model_is_asked_and_compared_with_its_baseline() {
    let bench = Bench::new();
    let line = format!("q4.gguf --baseline {MODEL} --suites mine.jsonl --max-new-tokens 12");
    let report = bench.eval(&format!("{line} --tasks gsm8k=gsm.jsonl,mmlu=law_test.csv --shots 0"));
    let asked = &report["asked"][0];
    assert_eq!(
        (&asked["suite"], &asked["prompts"], &asked["error"]),
        (&json!("mine"), &json!(3), &Value::Null)
    );
    assert_eq!(asked["chat_template"], true);
    let score = &report["suites"][0];
    // Code is not judged without `--allow-exec`.
    assert_eq!((&score["model"], &score["prompts"]), (&json!("q4.gguf"), &json!(2)));
    assert!(score["kld"].as_f64().unwrap() > 1e-4 && score["baseline_passed"].is_u64());
    let answers = report["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 3);
    assert!(answers.iter().all(|answer| answer["kld"].is_f64() && answer["model_answer"].is_string()));
    assert!(answers[2]["reason"].as_str().unwrap().contains("--allow-exec"));
    let tasks = report["tasks"].as_array().unwrap();
    assert_eq!(tasks[0]["rows"][1]["scores"][0]["metric"], "exact_match,flexible-extract");
    let chosen = &tasks[1]["rows"][1]["items"][0];
    assert_eq!(chosen["log_likelihoods"].as_array().unwrap().len(), 4);
    assert_eq!(report["suites"].as_array().unwrap().len(), 3, "benchmarks have scores for gates too");
}

#[test]
fn a_model_answers_as_itself_and_gates_judge_its_answers() {
    let bench = Bench::new();
    let line = format!(
        "eval {MODEL} --baseline {MODEL} --suites mine.jsonl --max-new-tokens 8 --windows 1 --device cpu"
    );
    let report: Value = serde_json::from_str(&bench.ok(&format!("{line} --max-flips 0 --json -"))).unwrap();
    let score = &report["suites"][0];
    assert_eq!((score["kld"].as_f64(), score["length_ratio"].as_f64()), (Some(0.0), Some(1.0)));
    assert_eq!(
        (&score["lost"], &score["won"], &score["first_difference"]),
        (&json!(0), &json!(0), &Value::Null)
    );
    let failed = bench.quant(&format!("{line} --min-pass mine=1 --markdown page.md"));
    let words = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{words}");
    assert!(words.contains("min-pass mine"), "{words}");
    assert!(fs::read_to_string(bench.path("page.md")).unwrap().contains("mine"));
}

#[test]
fn a_cache_of_fewer_bits_diverges_more() {
    let bench = Bench::new();
    let caches = "--kv-cache bf16 --kv-cache int8,group=32 --kv-cache fp8";
    let report = bench.eval(&format!("q4.gguf --baseline {MODEL} --kld {caches}"));
    let rows = report["rows"].as_array().unwrap();
    let kld: Vec<f64> = rows[1..].iter().map(|row| row["kld"].as_f64().unwrap()).collect();
    assert_eq!(rows[3]["model"], "tiny-llama, kv fp8");
    assert_eq!(rows[5]["model"], "q4.gguf, kv bf16");
    assert!(0.0 < kld[0] && kld[0] < kld[1] && kld[1] < kld[2] && kld[2] < kld[3], "{kld:?}");
    assert_eq!(report["kv_caches"][2], json!({"kv_cache": "fp8", "bytes_per_token": 1536, "saved": 0.5}));
}

#[test]
fn calibrated_scales_of_an_fp8_cache_are_written_and_read_back() {
    let bench = Bench::new();
    let convert = format!("convert {MODEL} --format int8 --method rtn --calib-tokens 1024");
    bench.ok(&format!("{convert} --no-validate -o plain"));
    let plan = bench.ok(&format!("{convert} --kv-cache fp8 --dry-run --json - -o cached"));
    bench.ok(&format!("{convert} --kv-cache fp8 --no-validate -o cached"));
    let size = |folder: &str| -> u64 {
        let files = fs::read_dir(bench.path(folder)).unwrap().map(|file| file.unwrap());
        let weights = files.filter(|file| file.file_name() != "quant.json");
        weights.map(|file| file.metadata().unwrap().len()).sum()
    };
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["plans"][0]["bytes"], size("cached"), "the dry run's size is exact");
    let config = fs::read_to_string(bench.path("cached/config.json")).unwrap();
    let json: Value = serde_json::from_str(&config).unwrap();
    let scheme = &json["quantization_config"]["kv_cache_scheme"];
    assert_eq!((&scheme["num_bits"], &scheme["type"]), (&json!(8), &json!("float")));
    let scales = Checkpoint::open(&bench.path("cached")).unwrap().kv_scales().to_vec();
    assert_eq!(scales.len(), 6);
    // Keys and values of a trained model are of the order of 1: amax / 448.
    assert!(scales.iter().flatten().all(|scale| (1e-4..1.0).contains(scale)), "{scales:?}");
    // An evaluation reads the cache as the artifact keeps it.
    let report = bench.eval(&format!("plain cached --baseline {MODEL} --kld --kv-cache fp8"));
    let kld = |model: &str| {
        let row = report["rows"].as_array().unwrap().iter().find(|row| row["model"] == model).unwrap();
        row["kld"].as_f64().unwrap()
    };
    assert_eq!(kld("cached"), kld("cached, kv fp8"));
    assert!(kld("plain") < 0.5 * kld("cached"), "{} {}", kld("plain"), kld("cached"));
    assert!(kld("cached") < 1.5 * kld("plain, kv fp8"), "{} {}", kld("cached"), kld("plain, kv fp8"));
    let refused = |line: &str, words: &str| {
        let output = bench.quant(line);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains(words), "{line}: {message}");
    };
    refused(&format!("convert {MODEL} --format q4_0 --kv-cache fp8 -o x.gguf"), "no place for scales");
    refused(&format!("{convert} --kv-cache int8 -o x"), "fp8 only");
    let mut other = json.clone();
    other["quantization_config"]["kv_cache_scheme"]["type"] = json!("int");
    let mut none = json.clone();
    none["quantization_config"]["kv_cache_scheme"] = Value::Null;
    for (config, words) in [(other, "with type"), (none, "but there are scales")] {
        fs::write(bench.path("cached/config.json"), config.to_string()).unwrap();
        refused("inspect cached", words);
    }
}

#[test]
fn questions_that_cannot_be_asked_are_refused() {
    let bench = Bench::new();
    fs::write(bench.path("bad.jsonl"), "{\"id\": 1}\n").unwrap();
    let haystack = json!({"id": "deep", "prompt": "{haystack}", "check": {"type": "number", "answer": "1"},
        "haystack": {"sentences": 900, "depth": 0.5, "needle": "1"}});
    fs::write(bench.path("long.jsonl"), haystack.to_string()).unwrap();
    for (line, words) in [
        ("--suites bad.jsonl", "line 1"),
        ("--suites poetry", "`--suites poetry`"),
        ("--suites long.jsonl", "prompt `deep`: its "),
        ("--suites mine.jsonl,mine.jsonl", "twice"),
        ("--tasks gsm8k=none.jsonl", "none.jsonl"),
        ("--tasks gsm8k", "NAME=FILE"),
        ("--tasks gsm8k=gsm.jsonl --shots 2", "--shots 2"),
        ("--kv-cache int4", "int4"),
        ("--kv-cache int8,group=48", "do not divide heads of 64"),
    ] {
        let output = bench.quant(&format!("eval {MODEL} --device cpu --windows 1 {line}"));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {message}");
        assert!(message.contains(words) && output.stdout.is_empty(), "{line}: {message}");
    }
}

#[test]
fn a_suite_that_fails_keeps_what_was_finished_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine.jsonl"), SUITE).unwrap();
    let path = folder.path().join("mine.jsonl").display().to_string();
    let checkpoint = Checkpoint::open(Path::new(MODEL)).unwrap();
    let asker = Asker::new(&checkpoint).unwrap();
    let models = [(); 2].map(|()| Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap());
    let settings = Settings { max_new_tokens: 8, sandbox: None };
    let prepared = Prepared::new(Suite::select(&[path]).unwrap().remove(0), &asker, 2048, &settings).unwrap();
    let mut models = models.into_iter();
    let (good, mut bad) = (models.next().unwrap(), models.next().unwrap());
    bad.config.max_position_embeddings = 16;
    let subject = |name: &str, model| Subject {
        name: name.into(),
        format: "bf16".into(),
        bytes: 1,
        bits_per_weight: 16.0,
        model,
        kv_cache: KvCache::Exact,
    };
    let (good, bad) = (subject("good", &good), subject("bad", &bad));
    let result = prepared.run(&Cpu, Some(&good), &[bad], &asker, &settings, &|| ());
    assert!(result.about.error.as_ref().unwrap().starts_with("bad: "), "{:?}", result.about.error);
    assert_eq!((result.rows.len(), result.scores().len(), result.answers().len()), (1, 1, 3));
}
