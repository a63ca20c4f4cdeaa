//! `quant eval` end to end: gates, slices, positions.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::LazyLock;

use assert_cmd::Command;
use serde_json::Value;

/// A Q4_0 artifact of the embedded model, and the model: made once, read by all tests.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("evaluation");
    fs::create_dir_all(&folder).unwrap();
    let output = run(&folder, "convert --format q4_0 --method rtn --no-validate --force -o q4_0.gguf");
    assert!(output.status.success(), "{}", text(&output.stderr));
    folder
});

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/eval/tiny-llama");

fn run(folder: &Path, line: &str) -> Output {
    Command::cargo_bin("quant")
        .unwrap()
        .args(line.split_whitespace())
        .env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Evaluates the artifact against the embedded model, four windows.
fn eval(options: &str) -> Output {
    run(&FOLDER, &format!("eval q4_0.gguf --baseline {MODEL} --device cpu --windows 4 {options}"))
}

fn json(options: &str) -> Value {
    let output = eval(&format!("{options} --json -"));
    assert!(output.status.code() < Some(2), "{options}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_gate_that_fails_ends_with_status_1_and_says_value_interval_and_limit() {
    // Q4_0 measures about .09 and 88 % on the whole text.
    let output = eval("--max-kld 0.5 --min-top1 0.7 --max-dppl 2");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).matches(" passed").count(), 3, "{}", text(&output.stdout));
    let output = eval("--max-kld 0.01 --min-top1 0.7 --max-kld code=0.001 --quiet");
    assert_eq!(output.status.code(), Some(1));
    let failures = text(&output.stderr);
    assert_eq!(failures.lines().count(), 2, "{failures}");
    let line = failures.lines().next().unwrap();
    assert!(line.starts_with("gate failed: q4_0.gguf: max-kld: 0.") && line.contains(" [0."), "{line}");
    assert!(line.ends_with("], wanted ≤ 0.01000"), "{line}");
    assert!(failures.contains("max-kld code: 0."), "{failures}");
}

#[test]
fn a_gate_file_says_the_same_and_the_report_keeps_the_verdicts() {
    fs::write(
        FOLDER.join("quant-gate.toml"),
        "max-kld = 0.01\nmax-dppl-pct = 50\n[slices.digits]\nmin-top1 = 0.2\n",
    )
    .unwrap();
    let report = json("--gates quant-gate.toml");
    let gates = report["gates"].as_array().unwrap();
    let verdicts: Vec<_> =
        gates.iter().map(|v| (v["gate"].as_str().unwrap(), v["passed"].as_bool().unwrap())).collect();
    assert_eq!(verdicts, [("max-dppl-pct", true), ("max-kld", false), ("min-top1 digits", true)]);
    assert_eq!(report["slices"][0]["name"], "digits");
}

#[test]
fn slices_and_positions_have_rows_of_their_own() {
    let report = json("--kld --slices code,german --ctx 1024 --protocol full");
    let names = |key: &str| -> Vec<String> {
        report[key].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(names("slices"), ["code", "german"]);
    assert_eq!(names("positions"), ["0-255", "256-511", "512-1022"]);
    let (mut kld, mut tokens) = (0.0, 0.0);
    for part in report["positions"].as_array().unwrap() {
        let row = &part["rows"][1];
        kld += row["kld"].as_f64().unwrap() * row["tokens"].as_f64().unwrap();
        tokens += row["tokens"].as_f64().unwrap();
    }
    let whole = &report["rows"][1];
    assert_eq!(whole["tokens"], tokens);
    assert!((whole["kld"].as_f64().unwrap() - kld / tokens).abs() < 1e-9, "buckets add up to the whole");
    assert!(whole["kld_low"].as_f64() < whole["kld"].as_f64());
    assert!(report["slices"][1]["rows"][1]["kld"].as_f64().unwrap() > 0.01);
}

#[test]
fn a_model_against_itself_diverges_by_exactly_nothing_in_every_slice_and_bucket() {
    let line = format!(
        "eval {MODEL} --baseline {MODEL} --device cpu --windows 2 --kld --slices chat,json --ctx 600 --json -"
    );
    let report: Value = serde_json::from_slice(&run(&FOLDER, &line).stdout).unwrap();
    let parts = ["slices", "positions"].map(|key| report[key].as_array().unwrap().iter());
    let rows = parts.into_iter().flatten().map(|part| &part["rows"][1]).chain([&report["rows"][1]]);
    let mut count = 0;
    for row in rows {
        for name in ["kld", "kld_max", "kld_high", "delta_ppl", "delta_ppl_low", "rms_dp"] {
            assert_eq!(row[name], 0.0, "{name}");
        }
        assert_eq!((&row["top1"], &row["top5"]), (&1.0.into(), &1.0.into()));
        count += 1;
    }
    assert_eq!(count, 5);
}

#[test]
fn what_cannot_be_judged_is_bad_usage() {
    fs::write(FOLDER.join("bad-gate.toml"), "max-kl = 1\n").unwrap();
    fs::write(FOLDER.join("short.txt"), "too short\n").unwrap();
    let other = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/logits/llama2");
    fs::write(FOLDER.join("other.json"), "{}").unwrap();
    for (line, words) in [
        ("eval --bench other.json".to_string(), "is no JSON of `quant bench --json`"),
        ("eval --sensitivity other.json".to_string(), "is no JSON of `quant sensitivity --json`"),
        ("eval --max-kld 1".to_string(), "--baseline"),
        (format!("eval --baseline {MODEL} --max-kld klein"), "`klein` is no number"),
        (format!("eval --baseline {MODEL} --min-top1 95"), "share from 0 to 1"),
        (format!("eval --baseline {MODEL} --gates bad-gate.toml"), "`max-kl` is no gate"),
        (format!("eval --baseline {MODEL} --gates no-file.toml"), "no-file.toml"),
        (format!("eval --baseline {MODEL} --max-kld cobol=1"), "no slice `cobol`"),
        (format!("eval --baseline {MODEL} --slices mine=short.txt"), "slice `mine`: the evaluation text has"),
        (format!("eval --baseline {MODEL} --min-pass json=0.5 --windows 1"), "no such suite was run"),
        (format!("eval {other} --baseline {MODEL} --kld --windows 1 --ctx 64"), "vocabulary has 64 tokens"),
    ] {
        let output = run(&FOLDER, &line);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "quant {line}\n{message}");
        assert!(message.contains(words), "quant {line}: {message}");
    }
}

#[test]
fn every_kind_of_report_is_written_in_one_run() {
    let ranking =
        run(&FOLDER, "sensitivity --format q4_0 --device cpu --windows 1 --by layer --json ranking.json");
    assert!(ranking.status.success(), "{}", text(&ranking.stderr));
    assert_eq!(text(&ranking.stdout).lines().count(), 1 + 7 + 2, "six layers, embeddings, protocol");
    let bench = r#"{"model": "q4_0.gguf", "format": "q4_0", "rows": [
        {"what": "generation, 1 at once", "value": 123.0, "unit": "tok/s", "share": 0.5},
        {"what": "copy, read + write", "value": 3000.0, "unit": "GB/s", "share": null}]}"#;
    fs::write(FOLDER.join("bench.json"), bench).unwrap();
    let output = eval(
        "--slices prose,code --max-kld 1 --sensitivity ranking.json --bench bench.json --html r.html --markdown r.md --junit r.xml \
         --json r.json --csv r.csv",
    );
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let read = |name: &str| fs::read_to_string(FOLDER.join(name)).unwrap();
    let page = read("r.html");
    assert!(page.contains("The gate is passed") && page.contains("Which tensors cost most"));
    assert!(page.contains("123 tok/s") && !page.contains("copy, read"));
    assert!(read("r.md").contains("| max-kld | q4_0.gguf | 0."));
    assert!(read("r.xml").contains(r#"tests="2" skipped="0" failures="0""#));
    assert_eq!(read("r.csv").lines().count(), 1 + 2 + 2 * 2);
    let schema = serde_json::from_str(include_str!("../eval/report.schema.json")).unwrap();
    let report: Value = serde_json::from_str(&read("r.json")).unwrap();
    let errors: Vec<String> =
        jsonschema::validator_for(&schema).unwrap().iter_errors(&report).map(|e| e.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn sensitivity_ranks_by_divergence_per_byte_and_its_groups_add_up() {
    let ranking = |by: &str| -> Value {
        let line = format!("sensitivity --format q4_0 --device cpu --windows 1 --by {by} --json -");
        serde_json::from_slice(&run(&FOLDER, &line).stdout).unwrap()
    };
    let (tensors, roles) = (ranking("tensor"), ranking("role"));
    let groups = tensors["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 6 * 7 + 1);
    let cost = |group: &Value| group["kld_per_megabyte"].as_f64().unwrap();
    assert!(groups.windows(2).all(|pair| cost(&pair[0]) >= cost(&pair[1])));
    assert!(groups.iter().all(|group| group["kld"]["value"].as_f64().unwrap() > 0.0));
    let saved = |groups: &Value| -> u64 {
        groups["groups"].as_array().unwrap().iter().map(|group| group["bytes_saved"].as_u64().unwrap()).sum()
    };
    assert_eq!(saved(&tensors), saved(&roles));
    assert_eq!(roles["groups"].as_array().unwrap().len(), 8);
    let refused = run(&FOLDER, "sensitivity --format q9");
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn a_cached_baseline_gives_the_same_numbers_and_is_not_run_again() {
    let _ = fs::remove_dir_all(FOLDER.join("states"));
    let live = json("--kld --slices json");
    for _ in 0..2 {
        let cached = json("--kld --slices json --chunks-cache states");
        for (live, cached) in
            [(&live["rows"], &cached["rows"]), (&live["slices"][0]["rows"], &cached["slices"][0]["rows"])]
        {
            for name in ["ppl", "delta_ppl", "kld", "kld_low", "kld_p99", "top1", "rms_dp"] {
                assert_eq!((&live[0][name], &live[1][name]), (&cached[0][name], &cached[1][name]), "{name}");
            }
        }
    }
    let files: Vec<_> = fs::read_dir(FOLDER.join("states")).unwrap().map(|entry| entry.unwrap()).collect();
    assert_eq!(files.len(), 2, "one for the text, one for the slice");
    assert!(files.iter().any(|file| file.metadata().unwrap().len() == 4 * 255 * 256 * 4));
    let refused = eval("--chunks-cache states --min-tok-s-ratio 1");
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn the_ci_templates_use_options_that_exist() {
    for (name, template) in [
        ("GitHub", include_str!("../scripts/ci/github-actions.yml")),
        ("GitLab", include_str!("../scripts/ci/gitlab-ci.yml")),
    ] {
        for command in ["convert", "eval"] {
            let help = text(&run(&FOLDER, &format!("{command} --help")).stdout);
            let start = template.find(&format!("quant {command} ")).unwrap();
            let line = template[start..].split("\n\n").next().unwrap();
            let line = line.split("after_script").next().unwrap().split("- >-").next().unwrap();
            let options: Vec<&str> = line.split_whitespace().filter(|word| word.starts_with("--")).collect();
            assert!(options.len() > 2, "{name}: {options:?}");
            for option in options {
                assert!(help.contains(option), "{name}: `quant {command}` has no {option}");
            }
        }
    }
}
