//! What a benchmark says of each model, as data.

use serde::Serialize;

use crate::eval::answers::SuiteScore;
use crate::eval::suite::result::mcnemar;

/// One benchmark's results: the baseline first, if there is one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskResult {
    /// Name of the benchmark.
    pub task: String,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Solved examples before each question.
    pub shots: usize,
    /// Number of questions.
    pub questions: usize,
    /// One per model.
    pub rows: Vec<TaskRow>,
    /// Why the benchmark ended early; finished models keep their rows.
    pub error: Option<String>,
}

/// One model's scores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskRow {
    /// Name as the user gave it.
    pub model: String,
    /// `acc` and `acc_norm`, or `exact_match` by filter, the benchmark's usual one first.
    pub scores: Vec<TaskScore>,
    /// Comparison with the baseline by the first score; absent in its own row.
    pub versus: Option<TaskVersus>,
    /// Every question, in the file's order.
    pub items: Vec<TaskItem>,
}

/// A share of right answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskScore {
    /// Name as lm-evaluation-harness prints it.
    pub metric: String,
    /// 0 to 1.
    pub value: f64,
    /// Standard error over questions; needs two.
    pub standard_error: Option<f64>,
}

/// How a model's answers differ from the baseline's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskVersus {
    /// Questions that the baseline gets right and the model does not.
    pub lost: usize,
    /// Questions that the model gets right and the baseline does not.
    pub won: usize,
    /// Two-sided exact p-value of McNemar's test.
    pub mcnemar_p: f64,
    /// Questions with the same answer, right or wrong.
    pub same: usize,
}

/// One question's answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskItem {
    /// Line of the file, from 1.
    pub line: usize,
    /// The right answer.
    pub target: String,
    /// Log-likelihood of every choice, nats; empty where the answer is generated.
    pub log_likelihoods: Vec<f64>,
    /// What the model wrote; empty where it chooses.
    pub text: String,
    /// Its answer by each score.
    pub answers: Vec<String>,
    /// Whether each is right.
    pub right: Vec<bool>,
}

impl TaskResult {
    /// Returns what reports and gates take of each model, by the first score.
    pub fn scores(&self) -> Vec<SuiteScore> {
        let compared = self.rows.get(1).is_some_and(|row| row.versus.is_some());
        let baseline = self.rows.first().filter(|_| compared);
        let own = |row: &TaskRow| SuiteScore {
            suite: self.task.clone(),
            model: row.model.clone(),
            prompts: row.items.len(),
            passed: row.passed(),
            baseline_passed: baseline.map(TaskRow::passed),
            lost: row.versus.as_ref().map_or(0, |versus| versus.lost),
            won: row.versus.as_ref().map_or(0, |versus| versus.won),
            p_value: row.versus.as_ref().map(|versus| versus.mcnemar_p),
            ..SuiteScore::default()
        };
        self.rows.iter().skip(usize::from(compared)).map(own).collect()
    }
}

impl TaskRow {
    /// Adds answers up; `metrics` names the scores of each item.
    pub fn new(model: &str, metrics: &[&str], items: Vec<TaskItem>) -> Self {
        let n = items.len() as f64;
        let score = |(at, metric): (usize, &&str)| {
            let value = items.iter().filter(|item| item.right[at]).count() as f64 / n;
            // The sample deviation of zeros and ones.
            let standard_error = (items.len() > 1).then(|| (value * (1.0 - value) / (n - 1.0)).sqrt());
            TaskScore { metric: metric.to_string(), value, standard_error }
        };
        let scores = metrics.iter().enumerate().map(score).collect();
        TaskRow { model: model.to_string(), scores, versus: None, items }
    }

    /// Returns the number of right answers by the first score.
    pub fn passed(&self) -> usize {
        self.items.iter().filter(|item| item.right[0]).count()
    }

    /// Compares with the baseline's row.
    pub fn compare(&mut self, baseline: &TaskRow) {
        let pairs = || self.items.iter().zip(&baseline.items);
        let lost = pairs().filter(|(own, theirs)| !own.right[0] && theirs.right[0]).count();
        let won = pairs().filter(|(own, theirs)| own.right[0] && !theirs.right[0]).count();
        let same = pairs().filter(|(own, theirs)| own.answers[0] == theirs.answers[0]).count();
        self.versus = Some(TaskVersus { lost, won, mcnemar_p: mcnemar(lost, won), same });
    }
}
