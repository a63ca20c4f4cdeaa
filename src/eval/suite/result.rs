//! What a suite says of each model, as data.

use serde::Serialize;

use crate::eval::answers::{Answer, SuiteScore};

/// How a suite was run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Asked {
    /// Name of the suite.
    pub suite: String,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Number of prompts.
    pub prompts: usize,
    /// Whether prompts were put into the model's chat template; else they were plain text.
    pub chat_template: bool,
    /// Limit of new tokens.
    pub max_new_tokens: usize,
    /// Why the suite ended early; finished models keep their rows.
    pub error: Option<String>,
}

/// One suite's results.
#[derive(Clone, Debug)]
pub struct SuiteResult {
    /// How they came about.
    pub about: Asked,
    /// Whether the first row is a baseline's.
    pub compared: bool,
    /// One per model, the baseline first.
    pub rows: Vec<SuiteRow>,
}

impl SuiteResult {
    /// Returns what reports and gates take of each model.
    pub fn scores(&self) -> Vec<SuiteScore> {
        let baseline = self.rows.first().filter(|_| self.compared);
        let own = |row: &SuiteRow| {
            let versus = row.versus.as_ref();
            SuiteScore {
                suite: self.about.suite.clone(),
                model: row.model.clone(),
                prompts: row.judged,
                passed: row.passed,
                baseline_passed: baseline.filter(|_| versus.is_some()).map(|baseline| baseline.passed),
                lost: versus.map_or(0, |versus| versus.lost),
                won: versus.map_or(0, |versus| versus.won),
                p_value: versus.map(|versus| versus.mcnemar_p),
                first_difference: versus.and_then(|versus| versus.first_difference),
                length_ratio: versus.map(|versus| versus.length_ratio),
                kld: versus.map(|versus| versus.kld),
                tok_per_s: Some(row.tok_per_s),
            }
        };
        // What is compared speaks for the baseline too.
        self.rows.iter().skip(usize::from(self.rows.len() > 1 && self.compared)).map(own).collect()
    }

    /// Returns every answer, beside the baseline's where there is one.
    pub fn answers(&self) -> Vec<Answer> {
        let baseline = self.rows.first().filter(|_| self.compared && self.rows.len() > 1);
        let rows = &self.rows[usize::from(baseline.is_some())..];
        let pairs = rows.iter().flat_map(|row| row.items.iter().enumerate().map(move |item| (row, item)));
        pairs
            .map(|(row, (at, item))| {
                let theirs = baseline.and_then(|baseline| baseline.items.get(at));
                Answer {
                    suite: self.about.suite.clone(),
                    id: item.id.clone(),
                    prompt: item.prompt.clone(),
                    model: row.model.clone(),
                    baseline_answer: theirs.map_or_else(String::new, |theirs| theirs.text.clone()),
                    model_answer: item.text.clone(),
                    baseline_passed: theirs.and_then(|theirs| theirs.passed),
                    model_passed: item.passed,
                    reason: item.reason.clone(),
                    first_difference: item.first_difference,
                    kld: item.kld,
                }
            })
            .collect()
    }
}

/// One model's answers.
#[derive(Clone, Debug)]
pub struct SuiteRow {
    /// Name as the user gave it.
    pub model: String,
    /// Answers that passed.
    pub passed: usize,
    /// Answers that were judged: all but code that was not run.
    pub judged: usize,
    /// Generated tokens.
    pub tokens: usize,
    /// Generated tokens per second, prompts included in the time.
    pub tok_per_s: f64,
    /// Comparison with the baseline; absent in its own row.
    pub versus: Option<Versus>,
    /// Every answer, in the suite's order.
    pub items: Vec<Item>,
}

/// How a model's answers differ from the baseline's.
#[derive(Clone, Debug, PartialEq)]
pub struct Versus {
    /// Prompts that the baseline passes and the model does not.
    pub lost: usize,
    /// Prompts that the model passes and the baseline does not.
    pub won: usize,
    /// Two-sided exact p-value of McNemar's test: how likely so uneven a split of the flips is by chance.
    pub mcnemar_p: f64,
    /// Median, over the answers that differ, of the index of the first token that does.
    pub first_difference: Option<f64>,
    /// All tokens of the model's answers over those of the baseline's.
    pub length_ratio: f64,
    /// Mean over all tokens of the baseline's answers of KL(baseline ‖ model), both reading the baseline's answer, nats.
    pub kld: f64,
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Item {
    /// The prompt's id.
    pub id: String,
    /// The last thing the user said.
    pub prompt: String,
    /// Whether it passed; `None` if it was not judged.
    pub passed: Option<bool>,
    /// Why not.
    pub reason: String,
    /// The answer.
    pub text: String,
    /// Index of the first token that differs from the baseline's answer.
    pub first_difference: Option<usize>,
    /// KL divergence over the tokens of the baseline's answer, mean.
    pub kld: Option<f64>,
    /// The answer's tokens, the stop token included.
    pub ids: Vec<u32>,
}

impl SuiteRow {
    /// Adds answers up.
    pub fn new(model: &str, items: Vec<Item>, seconds: f64) -> Self {
        let judged = items.iter().filter(|item| item.passed.is_some()).count();
        let passed = items.iter().filter(|item| item.passed == Some(true)).count();
        let tokens = items.iter().map(|item| item.ids.len()).sum();
        SuiteRow {
            model: model.to_string(),
            passed,
            judged,
            tokens,
            tok_per_s: tokens as f64 / seconds.max(1e-9),
            versus: None,
            items,
        }
    }

    /// Compares with the baseline's row; `kld` holds the divergences of every prompt's tokens.
    pub fn compare(&mut self, baseline: &SuiteRow, kld: &[Vec<f32>]) {
        for ((item, theirs), kld) in self.items.iter_mut().zip(&baseline.items).zip(kld) {
            item.first_difference = first_difference(&item.ids, &theirs.ids);
            item.kld = mean(kld);
        }
        let pairs = || self.items.iter().zip(&baseline.items);
        let count = |own: bool, theirs: bool| {
            pairs().filter(|(a, b)| a.passed == Some(own) && b.passed == Some(theirs)).count()
        };
        let (lost, won) = (count(false, true), count(true, false));
        let mut differences: Vec<usize> =
            self.items.iter().filter_map(|item| item.first_difference).collect();
        differences.sort_unstable();
        let all: Vec<f32> = kld.iter().flatten().copied().collect();
        self.versus = Some(Versus {
            lost,
            won,
            mcnemar_p: mcnemar(lost, won),
            first_difference: median(&differences),
            length_ratio: self.tokens as f64 / baseline.tokens.max(1) as f64,
            kld: mean(&all).unwrap_or(0.0),
        });
    }
}

fn mean(values: &[f32]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64)
}

fn median(sorted: &[usize]) -> Option<f64> {
    let (low, high) = (sorted.len().checked_sub(1)? / 2, sorted.len() / 2);
    Some((sorted[low] + sorted[high]) as f64 / 2.0)
}

/// Returns the first index at which two answers differ, one ending before the other included.
fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let differs = a.iter().zip(b).position(|(a, b)| a != b);
    differs.or((a.len() != b.len()).then_some(a.len().min(b.len())))
}

/// Returns the two-sided exact p-value of McNemar's test: twice the probability that a fair coin gives the rarer side at
/// most so often in all flips, at most 1 (McNemar, Psychometrika 12, 1947; the exact binomial form).
pub fn mcnemar(lost: usize, won: usize) -> f64 {
    let n = lost + won;
    // ln of C(n, k) / 2^n, term by term from k = 0.
    let mut term = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=lost.min(won) {
        tail += term.exp();
        term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(passed: Option<bool>, ids: &[u32]) -> Item {
        Item {
            id: "x".into(),
            passed,
            prompt: String::new(),
            reason: String::new(),
            text: format!("{ids:?}"),
            first_difference: None,
            kld: None,
            ids: ids.to_vec(),
        }
    }

    #[test]
    fn mcnemar_is_the_exact_binomial_tail() {
        for (lost, gained, p) in [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (5, 5, 1.0),
            (8, 1, 2.0 * 10.0 / 512.0),
            (1, 8, 2.0 * 10.0 / 512.0),
            (6, 0, 2.0 / 64.0),
        ] {
            assert!((mcnemar(lost, gained) - p).abs() < 1e-12, "{lost} {gained}");
        }
        assert!(mcnemar(3000, 2500) < 1e-9 && mcnemar(3000, 2500) > 0.0, "no underflow");
    }

    #[test]
    fn flips_differences_and_lengths_are_counted() {
        let (yes, no) = (Some(true), Some(false));
        let baseline = vec![item(yes, &[1, 2]), item(yes, &[1]), item(no, &[5, 6]), item(None, &[3])];
        let own = vec![item(no, &[1, 3]), item(yes, &[1]), item(yes, &[5]), item(None, &[4, 4, 4])];
        let baseline = SuiteRow::new("base", baseline, 1.0);
        let mut row = SuiteRow::new("own", own, 2.0);
        row.compare(&baseline, &[vec![0.5, 1.5], vec![0.0], vec![1.0, 0.0], vec![]]);
        assert_eq!((row.passed, row.judged, row.tok_per_s), (2, 3, 3.5));
        let versus = row.versus.unwrap();
        assert_eq!((versus.lost, versus.won, versus.mcnemar_p), (1, 1, 1.0));
        assert_eq!(versus.first_difference, Some(1.0));
        assert_eq!((versus.length_ratio, versus.kld), (7.0 / 6.0, 3.0 / 5.0));
        let firsts: Vec<_> = row.items.iter().map(|item| item.first_difference).collect();
        assert_eq!(firsts, [Some(1), None, Some(1), Some(0)]);
        assert_eq!(row.items[3].kld, None);
    }
}
