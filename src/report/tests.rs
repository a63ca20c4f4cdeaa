//! Every report of one evaluation that has everything.

use super::*;
use crate::eval::answers::{Answer, SuiteScore};
use crate::eval::gate::{self, Gate, RULES};
use crate::eval::metric::{METRICS, Measures};
use crate::eval::report::{ModelRow, Segment, SpeedRow};
use crate::eval::sensitivity::{Sensitivity, TensorGroup};
use crate::eval::{Estimate, Metric, Protocol, Scored};
use crate::model::kv_cache::KvMemory;

fn row(model: &str, bytes: u64, kld: Option<f64>) -> ModelRow {
    let mut measures = Measures::default();
    for metric in METRICS.iter().map(|row| row.metric) {
        let value = if metric == Metric::Ppl { Some(6.5) } else { kld };
        let estimate = |value: f64| Estimate { value, interval: Some([0.9 * value, 1.1 * value]) };
        measures.0[metric as usize] = value.map(estimate);
    }
    ModelRow { model: model.into(), format: "q".into(), bytes, measures, tokens: 10, ..ModelRow::default() }
}

fn answer() -> Answer {
    Answer {
        suite: "json".into(),
        id: "a1".into(),
        prompt: "<script>alert(1)</script>".into(),
        model: "q8".into(),
        baseline_answer: "größer als 3".into(),
        model_answer: "größe 4".into(),
        baseline_passed: Some(true),
        model_passed: Some(false),
        reason: "no JSON".into(),
        first_difference: Some(2),
        kld: None,
    }
}

fn score() -> SuiteScore {
    SuiteScore {
        suite: "json".into(),
        model: "q8".into(),
        prompts: 20,
        passed: 15,
        baseline_passed: Some(16),
        lost: 2,
        won: 1,
        p_value: Some(1.0),
        ..SuiteScore::default()
    }
}

/// A report with every section filled; names try to break out.
pub fn full() -> Report {
    let rows = || {
        vec![
            row("base", 11_000_000, None),
            row("<q4>|&", 3_000_000, Some(0.1)),
            row("q8", 6_000_000, Some(0.004)),
        ]
    };
    let protocol = Protocol::new(Scored::default(), 512, None, "text", &[1; 600], None).unwrap();
    let part = |name: &str| Segment { name: name.into(), protocol: protocol.clone(), rows: rows() };
    let group = |layer, role: &str, kld| TensorGroup {
        name: format!("layer {layer} {role}"),
        role: role.into(),
        layer: Some(layer),
        scheme: "q4_0".into(),
        weights: 100,
        bytes_saved: 1_000_000,
        kld: Estimate { value: kld, interval: None },
        kld_per_megabyte: kld,
    };
    let speed = |model: &str, value| SpeedRow {
        model: model.into(),
        what: "decode, batch 1".into(),
        value,
        unit: "tok/s".into(),
    };
    let sensitivity = Sensitivity {
        model: "base".into(),
        format: "q4_0".into(),
        protocol: protocol.clone(),
        groups: vec![group(1, "down", 0.2), group(0, "q", 0.01)],
    };
    let mut report = Report {
        slices: vec![part("code"), part("prose")],
        positions: vec![part("0-255"), part("256-511")],
        suites: vec![score()],
        answers: vec![answer()],
        kv_caches: vec![KvMemory { kv_cache: "int8".into(), bytes_per_token: 544, saved: 0.47 }],
        speed: vec![speed("base", 40.0), speed("q8", 80.0)],
        sensitivity: Some(sensitivity),
        ..Report::new(protocol.clone(), rows())
    };
    let limits =
        [("max-kld", "0.05"), ("min-top1", "code=0.001"), ("max-flips", "json=2"), ("min-pass", "0.5")];
    let gates = limits.map(|(name, value)| {
        Gate::parse(RULES.iter().find(|rule| rule.name == name).unwrap(), value).unwrap()
    });
    report.gates = gate::judge(&gates, &report).unwrap();
    report
}

#[test]
fn the_page_has_every_section_and_needs_no_network() {
    let page = html(&full()).unwrap();
    for words in [
        "2 of 6 gates failed",
        "Size against KL divergence",
        "By content",
        "By position",
        "Speed",
        "Which tensors cost most",
        "Prompts and benchmarks",
        "Caches of keys and values",
        "Not passed: no JSON",
        "Answers side by side",
        "größe<mark>r als 3</mark>",
        "größe<mark> 4</mark>",
        "Every metric",
    ] {
        assert!(page.contains(words), "{words}");
    }
    for word in ["http:", "https:", "src=", "@import", "url(", "<script", "NaN", "undefined"] {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("&lt;q4&gt;|&amp;"));
    assert_eq!(page.matches("<svg").count(), 5);
}

#[test]
fn a_page_of_little_has_no_empty_sections() {
    let protocol = full().protocol;
    let page = html(&Report::new(protocol, vec![row("alone", 1, None)])).unwrap();
    assert!(page.contains("No gates were set") && !page.contains("<svg"));
    for words in ["<h2>Gates", "By content", "Speed", "Answers"] {
        assert!(!page.contains(words), "{words}");
    }
    let found = full();
    let page = html(&Report { sensitivity: found.sensitivity, ..Report::new(found.protocol, Vec::new()) });
    let page = page.unwrap();
    assert!(page.contains("<h1>quant sensitivity") && page.contains("layer 1 down"));
    assert!(!page.contains("gates") && !page.contains("Summary"));
}

#[test]
fn markdown_tables_have_as_many_cells_as_headings() {
    let markdown = markdown(&full()).unwrap();
    assert!(markdown.starts_with("### quant eval: 2 of 6 gates failed"), "{markdown}");
    let mut cells = None;
    for line in markdown.lines() {
        if !line.starts_with('|') {
            cells = None;
            continue;
        }
        let found = line.replace("\\|", "").matches('|').count();
        assert_eq!(*cells.get_or_insert(found), found, "{line}");
    }
    assert!(markdown.contains("- **failed** &lt;q4&gt;\\|&amp;: max-kld: 0.10000"), "{markdown}");
}

#[test]
fn junit_counts_a_failure_for_each_gate_that_failed() {
    let xml = junit::xml(&full()).unwrap();
    assert!(
        xml.contains(r#"<testsuites name="quant eval" tests="7" skipped="0" failures="2" errors="0">"#),
        "{xml}"
    );
    assert!(xml.contains("wanted ≤ 0.05000"), "{xml}");
}

#[test]
fn json_reports_follow_the_documented_schema() {
    let schema = include_str!("../../eval/report.schema.json");
    let validator = jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&full().json().unwrap()).unwrap();
    let errors: Vec<String> = validator.iter_errors(&json).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?}");
    json["rows"][0]["klds"] = 3.into();
    assert!(!validator.is_valid(&json), "unknown columns are not documented");
}
