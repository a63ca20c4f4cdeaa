//! What prompt suites say, as data for gates and reports. Running them is the suites' own matter.

use serde::{Deserialize, Serialize};

use super::metric::Estimate;

/// One prompt's answers, side by side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Answer {
    /// Suite of the prompt.
    pub suite: String,
    /// The prompt's id within its suite.
    pub id: String,
    /// The last thing the user said.
    pub prompt: String,
    /// Name of the compared model.
    pub model: String,
    /// What the baseline answered.
    pub baseline_answer: String,
    /// What the model answered.
    pub model_answer: String,
    /// Whether the baseline's answer passes its check; `None` if nothing checks it.
    pub baseline_passed: Option<bool>,
    /// Whether the model's answer passes its check.
    pub model_passed: Option<bool>,
    /// Why it does not pass.
    pub reason: String,
    /// Index of the first token that differs; `None` if none does.
    pub first_difference: Option<usize>,
    /// Mean KL(baseline ‖ model) over the tokens of the baseline's answer, nats.
    pub kld: Option<f64>,
}

/// One model's results in one suite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SuiteScore {
    /// Name of the suite.
    pub suite: String,
    /// Name of the model.
    pub model: String,
    /// Prompts whose answers are checked.
    pub prompts: usize,
    /// Answers of the model that pass.
    pub passed: usize,
    /// Answers of the baseline that pass; `None` without one.
    pub baseline_passed: Option<usize>,
    /// Prompts that the baseline passes and the model does not.
    pub lost: usize,
    /// Prompts that the model passes and the baseline does not.
    pub won: usize,
    /// McNemar's exact two-sided p that losses and wins are equally likely.
    pub p_value: Option<f64>,
    /// Median index of the first token that differs, over answers that differ.
    pub first_difference: Option<f64>,
    /// Tokens of the model's answers divided by those of the baseline's.
    pub length_ratio: Option<f64>,
    /// Mean KL(baseline ‖ model) over the tokens of the baseline's answers, nats.
    pub kld: Option<f64>,
    /// Generated tokens per second, prompts included in the time.
    pub tok_per_s: Option<f64>,
}

impl SuiteScore {
    /// Returns how many answers changed between right and wrong.
    pub fn flips(&self) -> usize {
        self.lost + self.won
    }

    /// Returns the share of prompts that pass, with Wilson's 95 % interval (JASA 1927).
    pub fn pass_rate(&self) -> Estimate {
        const Z: f64 = 1.959_964;
        let n = self.prompts as f64;
        let value = self.passed as f64 / n;
        let middle = (value + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt();
        let interval = [(middle - half).max(0.0), (middle + half).min(1.0)];
        Estimate { value, interval: (self.prompts > 0).then_some(interval) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_is_that_of_the_textbook() {
        // 81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 1998, table I).
        let score = SuiteScore { prompts: 263, passed: 81, ..SuiteScore::default() };
        let Estimate { value, interval: Some([low, high]) } = score.pass_rate() else { panic!() };
        assert!((value - 0.3080).abs() < 1e-4 && (low - 0.2553).abs() < 1e-4 && (high - 0.3662).abs() < 1e-4);
    }

    #[test]
    fn a_perfect_suite_still_leaves_doubt() {
        let score = SuiteScore { prompts: 20, passed: 20, ..SuiteScore::default() };
        assert!(score.pass_rate().interval.unwrap()[0] < 0.9);
        assert_eq!(SuiteScore::default().pass_rate().interval, None);
    }
}
