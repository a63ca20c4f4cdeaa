//! Quality gates: limits that stop a pipeline. One row of [`RULES`] is a command-line option, a key of `quant-gate.toml`, and
//! a line of every report.
//!
//! A gate fails when the whole 95 % interval lies beyond its limit, so noise does not fail a build; where a value has no
//! interval, the value decides.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value};

use super::answers::SuiteScore;
use super::metric::{Estimate, Metric};
use super::report::{GateVerdict, ModelRow, Report};
use crate::container::text;

/// A limit that can be set.
#[derive(Debug, PartialEq)]
pub struct Rule {
    /// Command-line option and key in a gate file.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub help: &'static str,
    limit: Limit,
    quantity: Quantity,
    /// Largest limit that makes sense.
    largest: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Max,
    Min,
}

/// What a gate looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quantity {
    /// A metric of the text or of a slice.
    Text(Metric),
    /// Answers of a suite that changed from right to wrong or back.
    Flips,
    /// Share of a suite's prompts that pass.
    Pass,
}

const fn max(name: &'static str, metric: Metric, help: &'static str) -> Rule {
    Rule { name, help, limit: Limit::Max, quantity: Quantity::Text(metric), largest: f64::INFINITY }
}

const fn min(name: &'static str, metric: Metric, largest: f64, help: &'static str) -> Rule {
    Rule { name, help, limit: Limit::Min, quantity: Quantity::Text(metric), largest }
}

/// All gates.
pub const RULES: [Rule; 10] = [
    max("max-dppl", Metric::DeltaPpl, "Fail above this ΔPPL"),
    max("max-dppl-pct", Metric::DeltaPplPct, "Fail above this ΔPPL in percent of the baseline's perplexity"),
    max("max-kld", Metric::Kld, "Fail above this mean KL divergence"),
    max("max-kld-p99", Metric::KldP99, "Fail above this 99th percentile of KL divergence"),
    max("max-kld-p999", Metric::KldP999, "Fail above this 99.9th percentile of KL divergence"),
    min("min-top1", Metric::Top1, 1.0, "Fail below this share (0 to 1) of same most likely tokens"),
    min("min-top5", Metric::Top5, 1.0, "Fail below this share (0 to 1) of favourites among the first five"),
    min(
        "min-tok-s-ratio",
        Metric::TokSRatio,
        f64::INFINITY,
        "Fail below this multiple of the baseline's speed",
    ),
    Rule {
        name: "max-flips",
        help: "Fail above this number of answers that changed between right and wrong",
        limit: Limit::Max,
        quantity: Quantity::Flips,
        largest: f64::INFINITY,
    },
    Rule {
        name: "min-pass",
        help: "Fail below this share (0 to 1) of prompts that pass",
        limit: Limit::Min,
        quantity: Quantity::Pass,
        largest: 1.0,
    },
];

impl Rule {
    /// Whether it limits answers to prompts rather than a text.
    pub fn is_about_suites(&self) -> bool {
        !matches!(self.quantity, Quantity::Text(_))
    }

    /// Returns how `--help` names the value.
    pub fn value_name(&self) -> &'static str {
        if self.is_about_suites() { "[SUITE=]LIMIT" } else { "[SLICE=]LIMIT" }
    }

    fn by_name(name: &str) -> Result<&'static Rule> {
        RULES.iter().find(|rule| rule.name == name).with_context(|| {
            let known: Vec<&str> = RULES.iter().map(|rule| rule.name).collect();
            format!("`{name}` is no gate; there are {}", known.join(", "))
        })
    }

    fn show(&self, value: f64) -> String {
        match self.quantity {
            Quantity::Text(metric) => metric.show(value),
            Quantity::Flips => format!("{value}"),
            Quantity::Pass => format!("{:.1} %", 100.0 * value),
        }
    }

    /// Whether a value is beyond doubt worse than the limit.
    fn fails(&self, found: Estimate, limit: f64) -> bool {
        let [low, high] = found.interval.unwrap_or([found.value; 2]);
        let beyond = match self.limit {
            Limit::Max => low > limit,
            Limit::Min => high < limit,
        };
        // A value that is no number is never good enough.
        beyond || found.value.is_nan()
    }
}

/// A limit that was set.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    rule: &'static Rule,
    /// Slice or suite; `None` is the whole text, or every suite.
    part: Option<String>,
    limit: f64,
}

impl Gate {
    fn new(rule: &'static Rule, part: Option<&str>, limit: f64) -> Result<Self> {
        ensure!(
            limit <= rule.largest && !limit.is_nan(),
            "`{}`: the limit is {limit}; wanted a share from 0 to {}, such as 0.95",
            rule.name,
            rule.largest
        );
        Ok(Gate { rule, part: part.map(str::to_string), limit })
    }

    /// Returns the gate of an option's value, `LIMIT` or `PART=LIMIT`.
    pub fn parse(rule: &'static Rule, value: &str) -> Result<Self> {
        let (part, limit) = match value.split_once('=') {
            Some((part, limit)) => (Some(part), limit),
            None => (None, value),
        };
        let limit = limit.parse().with_context(|| {
            format!("`--{} {value}`: `{limit}` is no number; wanted {}", rule.name, rule.value_name())
        })?;
        Gate::new(rule, part, limit)
    }

    /// Returns the gates of a TOML file: limits of the whole text at the top, of slices in `[slices.NAME]`, of suites in
    /// `[suites.NAME]`.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML, unknown keys, limits that are no numbers; each names file and key.
    pub fn read(file: &Path) -> Result<Vec<Self>> {
        let name = file.display();
        let text = text::read(file)?;
        let table: Table = text.parse().with_context(|| format!("{name}: is no TOML"))?;
        Gate::from_table(&table).with_context(|| format!("{name}"))
    }

    fn from_table(table: &Table) -> Result<Vec<Self>> {
        let mut gates = Vec::new();
        for (key, value) in table {
            match (key.as_str(), value) {
                ("slices" | "suites", Value::Table(parts)) => {
                    for (part, limits) in parts {
                        let limits =
                            limits.as_table().with_context(|| format!("`{key}.{part}` is no table"))?;
                        for (name, value) in limits {
                            let gate = Gate::from_entry(name, Some(part), value)?;
                            ensure!(
                                gate.rule.is_about_suites() == (key == "suites"),
                                "`{name}` does not belong into `[{key}.{part}]`"
                            );
                            gates.push(gate);
                        }
                    }
                }
                _ => gates.push(Gate::from_entry(key, None, value)?),
            }
        }
        Ok(gates)
    }

    fn from_entry(name: &str, part: Option<&str>, value: &Value) -> Result<Self> {
        let rule = Rule::by_name(name)?;
        let limit = match value {
            Value::Integer(limit) => *limit as f64,
            Value::Float(limit) => *limit,
            other => bail!("`{name}` is {other}; wanted a number"),
        };
        Gate::new(rule, part, limit)
    }

    /// Returns the slice that has to be measured for it.
    pub fn slice(&self) -> Option<&str> {
        self.part.as_deref().filter(|_| !self.rule.is_about_suites())
    }

    /// Whether it needs answers to prompts.
    pub fn is_about_suites(&self) -> bool {
        self.rule.is_about_suites()
    }

    /// Whether it needs more than perplexities.
    pub fn needs_divergence(&self) -> bool {
        use Metric::*;
        matches!(self.rule.quantity, Quantity::Text(metric) if !matches!(metric, DeltaPpl | DeltaPplPct | TokSRatio))
    }

    /// Whether it needs the baseline's speed.
    pub fn needs_speed(&self) -> bool {
        self.rule.quantity == Quantity::Text(Metric::TokSRatio)
    }

    /// Returns what reports call it: `max-kld code`.
    pub fn name(&self) -> String {
        match &self.part {
            Some(part) => format!("{} {part}", self.rule.name),
            None => self.rule.name.to_string(),
        }
    }

    fn verdict(&self, model: &str, part: Option<&str>, found: Estimate) -> GateVerdict {
        let name = part.map_or(self.rule.name.to_string(), |part| format!("{} {part}", self.rule.name));
        let interval = found.interval.map_or(String::new(), |[low, high]| {
            format!(" [{}, {}]", self.rule.show(low), self.rule.show(high))
        });
        GateVerdict {
            gate: name,
            model: model.to_string(),
            value: found.value,
            interval: found.interval,
            limit: self.limit,
            passed: !self.rule.fails(found, self.limit),
            shown: format!("{}{interval}", self.rule.show(found.value)),
            shown_limit: format!(
                "{} {}",
                if self.rule.limit == Limit::Max { "≤" } else { "≥" },
                self.rule.show(self.limit)
            ),
        }
    }
}

/// Judges every model of a report but the baseline.
///
/// # Errors
/// A gate whose slice or suite was not measured.
pub fn judge(gates: &[Gate], report: &Report) -> Result<Vec<GateVerdict>> {
    let mut verdicts = Vec::new();
    for gate in gates {
        match gate.rule.quantity {
            Quantity::Text(metric) => {
                for row in compared(rows(gate, report)?) {
                    let found = row.measures.get(metric);
                    let found = found.with_context(|| format!("`{}` was not measured", gate.name()))?;
                    verdicts.push(gate.verdict(&row.model, gate.part.as_deref(), found));
                }
            }
            Quantity::Flips => {
                for score in suites(gate, report)? {
                    let flips = Estimate { value: score.flips() as f64, interval: None };
                    verdicts.push(gate.verdict(&score.model, Some(&score.suite), flips));
                }
            }
            Quantity::Pass => {
                for score in suites(gate, report)? {
                    verdicts.push(gate.verdict(&score.model, Some(&score.suite), score.pass_rate()));
                }
            }
        }
    }
    Ok(verdicts)
}

fn rows<'a>(gate: &Gate, report: &'a Report) -> Result<&'a [ModelRow]> {
    let Some(name) = &gate.part else { return Ok(&report.rows) };
    let part = report.slices.iter().find(|part| part.name == *name);
    Ok(&part.with_context(|| format!("`{}`: the slice `{name}` was not measured", gate.name()))?.rows)
}

/// The baseline's row comes first.
fn compared(rows: &[ModelRow]) -> &[ModelRow] {
    rows.get(1..).unwrap_or(&[])
}

fn suites<'a>(gate: &Gate, report: &'a Report) -> Result<Vec<&'a SuiteScore>> {
    let chosen = |score: &&SuiteScore| gate.part.as_ref().is_none_or(|name| score.suite == *name);
    let found: Vec<&SuiteScore> = report.suites.iter().filter(chosen).collect();
    ensure!(!found.is_empty(), "`{}`: no such suite was run", gate.name());
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str) -> &'static Rule {
        Rule::by_name(name).unwrap()
    }

    #[test]
    fn only_an_interval_wholly_beyond_the_limit_fails() {
        let found = |interval| Estimate { value: 0.2, interval };
        for (name, interval, limit, fails) in [
            ("max-kld", Some([0.1, 0.3]), 0.15, false),
            ("max-kld", Some([0.1, 0.3]), 0.05, true),
            ("max-kld", None, 0.15, true),
            ("max-kld", None, 0.2, false),
            ("min-top1", Some([0.1, 0.3]), 0.25, false),
            ("min-top1", Some([0.1, 0.3]), 0.35, true),
        ] {
            assert_eq!(rule(name).fails(found(interval), limit), fails, "{name} {interval:?} {limit}");
        }
        assert!(rule("max-kld").fails(Estimate { value: f64::NAN, interval: None }, 1.0));
    }

    #[test]
    fn options_and_files_set_the_same_gates() {
        let table = "max-kld = 0.05\n[slices.code]\nmax-kld = 1\n[suites.json]\nmin-pass = 0.9";
        let from_file = Gate::from_table(&table.parse().unwrap()).unwrap();
        let from_options = [("max-kld", "0.05"), ("max-kld", "code=1"), ("min-pass", "json=0.9")]
            .map(|(name, value)| Gate::parse(rule(name), value).unwrap());
        assert_eq!(from_file, from_options);
        assert_eq!(from_file[1].slice(), Some("code"));
        assert_eq!(from_file[2].slice(), None);
    }

    #[test]
    fn the_example_file_is_valid() {
        let text = include_str!("../../scripts/ci/quant-gate.toml");
        assert_eq!(Gate::from_table(&text.parse().unwrap()).unwrap().len(), 5);
    }

    #[test]
    fn what_is_no_gate_is_refused_by_name() {
        let refusal = |text: &str| Gate::from_table(&text.parse().unwrap()).unwrap_err().to_string();
        for (text, words) in [
            ("max-kl = 1", "`max-kl` is no gate"),
            ("max-kld = true", "`max-kld` is true"),
            ("min-top1 = 95", "share from 0 to 1"),
            ("max-kld = nan", "NaN"),
            ("slices = 3", "`slices` is no gate"),
            ("[slices]\ncode = 3", "`slices.code` is no table"),
            ("[suites.json]\nmax-kld = 3", "`max-kld` does not belong"),
            ("[slices.code]\nmin-pass = 0.3", "`min-pass` does not belong"),
        ] {
            assert!(refusal(text).contains(words), "{text}: {}", refusal(text));
        }
        assert!(Gate::parse(rule("max-kld"), "code=x").unwrap_err().to_string().contains("`x` is no number"));
    }
}
