//! What an evaluation says, as data: rows, JSON, CSV.

use anyhow::Result;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

use super::answers::{Answer, SuiteScore};
use super::metric::{METRICS, Measures, Metric};
use super::protocol::Protocol;
use super::samples::{Samples, StandardErrors};
use super::sensitivity::Sensitivity;
use super::suite::result::Asked;
use super::task::result::TaskResult;
use super::{About, Text};
use crate::model::kv_cache::KvMemory;

/// One model's results on one text. Columns that need a baseline are absent (null, empty) without one and in the
/// baseline's own row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelRow {
    /// Name as the user gave it.
    pub model: String,
    /// Format name, e.g. `bf16`, `mxfp4`, `q4_k_m`.
    pub format: String,
    /// Stored bytes of all tensors.
    pub bytes: u64,
    /// `8 · bytes / weights`.
    pub bits_per_weight: f64,
    /// What was measured, with 95 % intervals over windows.
    pub measures: Measures,
    /// Standard errors over windows.
    pub errors: StandardErrors,
    /// Scored positions.
    pub tokens: usize,
    /// Tokens of all windows per second of forward pass, the loss head left out.
    pub tok_per_s: Option<f64>,
}

/// Metrics that have a column of their own before the intervals; scripts rely on these columns and their order.
const FIRST: [Metric; 5] = [Metric::Ppl, Metric::DeltaPpl, Metric::Kld, Metric::KldP99, Metric::Top1];

impl ModelRow {
    /// Describes a model by its samples.
    pub fn new(about: &About, samples: &Samples, measures: Measures) -> Self {
        ModelRow {
            model: about.name.clone(),
            format: about.format.clone(),
            bytes: about.bytes,
            bits_per_weight: about.bits_per_weight,
            measures,
            errors: samples.standard_errors(),
            tokens: samples.tokens(),
            tok_per_s: samples.tok_per_s(),
        }
    }

    /// Returns a metric's value.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        self.measures.value(metric)
    }

    /// Keeps perplexity and what follows from it.
    fn without_divergence(&mut self) {
        let kept = [Metric::Ppl, Metric::DeltaPpl, Metric::DeltaPplPct, Metric::TokSRatio];
        self.measures.retain(|metric| kept.contains(&metric));
        self.errors.kld = None;
    }

    /// Returns all columns by name: the ones scripts rely on, then the other metrics, then every metric's interval.
    pub fn columns(&self) -> Vec<(String, Value)> {
        let column = |name: &str, value: Value| (name.to_string(), value);
        let value = |metric: Metric| column(metric.describe().name, json!(self.value(metric)));
        let mut columns = vec![
            column("model", json!(self.model)),
            column("format", json!(self.format)),
            column("bytes", json!(self.bytes)),
            column("bits_per_weight", json!(self.bits_per_weight)),
            value(Metric::Ppl),
            value(Metric::DeltaPpl),
            column("delta_ppl_se", json!(self.errors.delta_ppl)),
            value(Metric::Kld),
            column("kld_se", json!(self.errors.kld)),
            value(Metric::KldP99),
            value(Metric::Top1),
            column("tokens", json!(self.tokens)),
            column("tok_per_s", json!(self.tok_per_s)),
        ];
        columns
            .extend(METRICS.iter().filter(|row| !FIRST.contains(&row.metric)).map(|row| value(row.metric)));
        for row in METRICS.iter().filter(|row| row.metric != Metric::KldMax) {
            let interval = self.measures.get(row.metric).and_then(|estimate| estimate.interval);
            columns.push(column(&format!("{}_low", row.name), json!(interval.map(|i| i[0]))));
            columns.push(column(&format!("{}_high", row.name), json!(interval.map(|i| i[1]))));
        }
        columns
    }
}

impl Serialize for ModelRow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let columns = self.columns();
        let mut map = serializer.serialize_map(Some(columns.len()))?;
        for (name, value) in &columns {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// The rows of one text or of a part of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Segment {
    /// Slice name, or the positions within a window, `256-511`.
    pub name: String,
    /// How the numbers were measured.
    pub protocol: Protocol,
    /// One row per model, the baseline first.
    pub rows: Vec<ModelRow>,
}

/// What `quant bench --json` writes, as far as reports show it.
#[derive(Deserialize)]
pub struct Bench {
    model: String,
    rows: Vec<BenchRow>,
}

#[derive(Deserialize)]
struct BenchRow {
    what: String,
    value: f64,
    unit: String,
}

impl Bench {
    /// Returns what it says of the model; rates of the machine itself are left out.
    pub fn rows(self) -> impl Iterator<Item = SpeedRow> {
        let own = self.rows.into_iter().filter(|row| !["GB/s", "TFLOP/s"].contains(&row.unit.as_str()));
        own.map(move |BenchRow { what, value, unit }| SpeedRow {
            model: self.model.clone(),
            what,
            value,
            unit,
        })
    }
}

/// How fast a model is at something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedRow {
    /// The model's name.
    pub model: String,
    /// What was timed, `decode, batch 1`.
    pub what: String,
    /// The rate or time.
    pub value: f64,
    /// Its unit, `tok/s` or `ms`.
    pub unit: String,
}

/// Rows that share a protocol and so may be compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How the numbers of `rows` were measured.
    pub protocol: Protocol,
    /// One row per model, the baseline first.
    pub rows: Vec<ModelRow>,
    /// The same on other texts, one kind of content each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slices: Vec<Segment>,
    /// The same by position within the window.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub positions: Vec<Segment>,
    /// What prompt suites say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub suites: Vec<SuiteScore>,
    /// Answers to prompts, side by side.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Answer>,
    /// How suites were run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub asked: Vec<Asked>,
    /// What benchmarks say, question by question.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskResult>,
    /// Memory of the caches that were compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kv_caches: Vec<KvMemory>,
    /// Rates and latencies of generation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub speed: Vec<SpeedRow>,
    /// What each tensor costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
    /// What the gates say of each model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateVerdict>,
}

/// What a gate says of one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GateVerdict {
    /// The gate, with its slice or suite.
    pub gate: String,
    /// The model's name.
    pub model: String,
    /// What was measured.
    pub value: f64,
    /// Its 95 % interval, if it has one.
    pub interval: Option<[f64; 2]>,
    /// What was allowed.
    pub limit: f64,
    /// Whether the model may pass.
    pub passed: bool,
    /// Value and interval as people read them.
    pub shown: String,
    /// The limit as people read it.
    pub shown_limit: String,
}

impl GateVerdict {
    /// Returns one line: `q4.gguf: max-kld code: 0.31000 [0.25000, 0.40000], wanted ≤ 0.20000`.
    pub fn line(&self) -> String {
        let GateVerdict { gate, model, shown, shown_limit, .. } = self;
        format!("{model}: {gate}: {shown}, wanted {shown_limit}")
    }
}

impl Report {
    /// Starts a report with the rows of the main text.
    pub fn new(protocol: Protocol, rows: Vec<ModelRow>) -> Self {
        Report {
            protocol,
            rows,
            slices: Vec::new(),
            positions: Vec::new(),
            suites: Vec::new(),
            answers: Vec::new(),
            asked: Vec::new(),
            tasks: Vec::new(),
            kv_caches: Vec::new(),
            speed: Vec::new(),
            sensitivity: None,
            gates: Vec::new(),
        }
    }

    /// Drops everything but perplexity and what follows from it.
    pub fn without_divergence(&mut self) {
        let parts = self.slices.iter_mut().chain(&mut self.positions);
        let rows = parts.flat_map(|part| &mut part.rows);
        self.rows.iter_mut().chain(rows).for_each(ModelRow::without_divergence);
    }

    /// Returns what could not be finished: suites and benchmarks that ended early.
    pub fn errors(&self) -> Vec<String> {
        let suites = self.asked.iter().map(|asked| ("suite", &asked.suite, &asked.error));
        let tasks = self.tasks.iter().map(|task| ("task", &task.task, &task.error));
        let all = suites.chain(tasks);
        all.filter_map(|(kind, name, error)| Some(format!("{kind} `{name}`: {}", error.as_ref()?))).collect()
    }

    /// Whether every gate lets every model pass.
    pub fn passed(&self) -> bool {
        self.gates.iter().all(|verdict| verdict.passed)
    }

    /// Returns one JSON object: `{"protocol": …, "rows": […], …}`; `eval/report.schema.json` describes it.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Returns a header line and one line per row, with the columns of [`ModelRow`] and `slice`: empty for the whole text, else
    /// the name of the slice or the positions.
    pub fn csv(&self) -> Result<String> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let names = ModelRow::default().columns().into_iter().map(|(name, _)| name);
        writer.write_record(names.chain(["slice".to_string()]))?;
        let parts = self.slices.iter().chain(&self.positions);
        let parts = parts.flat_map(|part| part.rows.iter().map(|row| (row, part.name.as_str())));
        for (row, slice) in self.rows.iter().map(|row| (row, "")).chain(parts) {
            let fields = row.columns().into_iter().map(|(_, value)| match value {
                Value::Null => String::new(),
                Value::String(text) => text,
                value => value.to_string(),
            });
            writer.write_record(fields.chain([slice.to_string()]))?;
        }
        Ok(String::from_utf8(writer.into_inner()?)?)
    }
}

/// First positions of the buckets that windows are cut into, so that drift in long contexts shows.
const BUCKETS: [usize; 9] = [0, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768];

/// Whether a text is long enough for its passes to say something about speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Timed {
    Yes,
    No,
}

/// Returns the rows of a text: one per model, the baseline first.
pub fn rows(models: &[About], samples: &[Samples], timed: Timed) -> Vec<ModelRow> {
    let rows = models.iter().zip(samples).enumerate();
    rows.map(|(at, (about, own))| {
        let mut measures = own.measures();
        if timed == Timed::Yes && at > 0 && measures.get(Metric::Kld).is_some() {
            measures.0[Metric::TokSRatio as usize] = own.speed_ratio(&samples[0]);
        }
        ModelRow::new(about, own, measures)
    })
    .collect()
}

/// Returns the rows of every position bucket; none if all scored positions lie in one.
pub fn positions(models: &[About], samples: &[Samples], text: &Text) -> Vec<Segment> {
    let scored = text.protocol.scored();
    let ends = BUCKETS[1..].iter().copied().chain([usize::MAX]);
    let buckets: Vec<_> = BUCKETS
        .into_iter()
        .zip(ends)
        .map(|(first, end)| first.max(scored.start)..end.min(scored.end))
        .filter(|bucket| !bucket.is_empty())
        .collect();
    if buckets.len() < 2 {
        return Vec::new();
    }
    let part = |bucket: &std::ops::Range<usize>| {
        let within = bucket.start - scored.start..bucket.end - scored.start;
        let rows = models.iter().zip(samples).map(|(about, samples)| ModelRow {
            tokens: within.len() * text.protocol.windows,
            errors: StandardErrors::default(),
            tok_per_s: None,
            ..ModelRow::new(about, samples, samples.measures_of(within.clone()))
        });
        Segment {
            name: format!("{}-{}", bucket.start, bucket.end - 1),
            protocol: text.protocol.clone(),
            rows: rows.collect(),
        }
    };
    buckets.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metric::Estimate;
    use crate::eval::protocol::Scored;

    fn report() -> Report {
        let mut row = ModelRow {
            model: "a,b".into(),
            format: "bf16".into(),
            bytes: 10,
            bits_per_weight: 16.0,
            tokens: 255,
            tok_per_s: Some(1000.0),
            ..ModelRow::default()
        };
        row.measures.0[Metric::Ppl as usize] = Some(Estimate { value: 6.5, interval: None });
        let mut compared = ModelRow { format: "mxfp4".into(), ..row.clone() };
        compared.measures.0[Metric::Kld as usize] =
            Some(Estimate { value: 0.25, interval: Some([0.1, 0.5]) });
        compared.measures.0[Metric::Top1 as usize] = Some(Estimate { value: 0.5, interval: None });
        let protocol = Protocol::new(Scored::default(), 512, None, "text", &[1; 600], None).unwrap();
        let slice = Segment { name: "code".into(), protocol: protocol.clone(), rows: vec![compared.clone()] };
        Report { slices: vec![slice], ..Report::new(protocol, vec![row, compared]) }
    }

    const CONTRACT: &str = "model,format,bytes,bits_per_weight,ppl,delta_ppl,delta_ppl_se,kld,kld_se,kld_p99,top1,tokens,tok_per_s";

    #[test]
    fn csv_starts_with_the_contract_columns_and_quotes_names() {
        let out = report().csv().unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with(&format!("{CONTRACT},delta_ppl_pct,kld_median,")), "{}", lines[0]);
        assert!(lines[0].ends_with(",tok_s_ratio_low,tok_s_ratio_high,slice"), "{}", lines[0]);
        assert!(lines[1].starts_with("\"a,b\",bf16,10,16.0,6.5,,,,,,,255,1000.0,"), "{}", lines[1]);
        assert!(lines[2].starts_with("\"a,b\",mxfp4,10,16.0,6.5,,,0.25,,,0.5,255,1000.0,"), "{}", lines[2]);
        assert!(lines[1].ends_with(',') && lines[3].ends_with(",code"), "{out}");
    }

    #[test]
    fn json_has_the_protocol_and_the_same_columns() {
        let json: Value = serde_json::from_str(&report().json().unwrap()).unwrap();
        assert_eq!(json["protocol"]["name"], "llama.cpp");
        assert_eq!(json["protocol"]["windows"], 1);
        let columns: Vec<&str> = json["rows"][0].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(columns[..13].join(","), CONTRACT);
        assert_eq!(json["rows"][0]["kld"], Value::Null);
        let compared = &json["slices"][0]["rows"][0];
        assert_eq!((&compared["kld"], &compared["kld_high"]), (&json!(0.25), &json!(0.5)));
        assert!(json.get("positions").is_none());
    }

    #[test]
    fn long_windows_are_cut_into_buckets_up_to_their_end() {
        let protocol = Protocol::new(Scored::All, 40_000, None, "text", &[1; 40_000], None).unwrap();
        let mut samples = Samples::new(39_999, false);
        let nll = |at: usize| if at < 32_768 { 1.0 } else { 2.0 };
        let scores: Vec<_> = (0..39_999).map(|at| crate::backend::Score { nll: nll(at), top: 0 }).collect();
        samples.add_scores(&scores).unwrap();
        let model = About { name: "m".into(), format: "f".into(), bytes: 1, bits_per_weight: 1.0 };
        let text = Text { name: "text".into(), tokens: vec![1; 40_000], protocol };
        let parts = positions(&[model], &[samples], &text);
        let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!((names[0], names[7], names[8]), ("0-255", "16384-32767", "32768-39998"));
        let ppl = |at: usize| parts[at].rows[0].value(Metric::Ppl).unwrap();
        assert!((ppl(7) - 1f64.exp()).abs() < 1e-9 && (ppl(8) - 2f64.exp()).abs() < 1e-9);
        assert_eq!(parts[8].rows[0].tokens, 39_999 - 32_768);
    }

    #[test]
    fn columns_are_unique() {
        let mut names: Vec<String> =
            ModelRow::default().columns().into_iter().map(|(name, _)| name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
