//! The table of everything that is measured on a text: one row is a column of reports and something a gate can limit.

use serde::{Deserialize, Serialize, Serializer};

/// A number about one model on one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// exp(mean negative log-likelihood).
    Ppl,
    /// PPL minus the baseline's.
    DeltaPpl,
    /// PPL divided by the baseline's, minus 1, in percent.
    DeltaPplPct,
    /// Mean over positions of KL(baseline ‖ model), nats.
    Kld,
    /// Half of the positions diverge by at most this.
    KldMedian,
    /// 90 % of the positions diverge by at most this.
    KldP90,
    /// 99 % of the positions diverge by at most this.
    KldP99,
    /// 99.9 % of the positions diverge by at most this.
    KldP999,
    /// The largest divergence of any position. It has no interval: a resample cannot exceed it.
    KldMax,
    /// Share of positions (0 to 1) where the model's most likely token is the baseline's.
    Top1,
    /// Share of positions (0 to 1) where the baseline's most likely token is among the model's five most likely.
    Top5,
    /// Root mean square of the change in the target's probability.
    RmsDp,
    /// Tokens per second of forward passes, divided by the baseline's.
    TokSRatio,
}

/// How a metric is called and shown.
pub struct Description {
    /// Which metric.
    pub metric: Metric,
    /// Name in JSON, CSV and gate files.
    pub name: &'static str,
    /// Heading for people.
    pub label: &'static str,
    /// What it says, in a sentence.
    pub meaning: &'static str,
    /// Whether it compares with a baseline.
    pub needs_baseline: bool,
    shown: Shown,
}

/// How many digits a value gets.
#[derive(Clone, Copy)]
enum Shown {
    Decimals(usize),
    Signed(usize),
    SignedPercent,
    /// A share, shown in percent.
    Share,
    Ratio,
}

const fn row(
    metric: Metric,
    name: &'static str,
    label: &'static str,
    shown: Shown,
    meaning: &'static str,
) -> Description {
    let needs_baseline = !matches!(metric, Metric::Ppl);
    Description { metric, name, label, meaning, needs_baseline, shown }
}

/// Number of metrics.
pub const COUNT: usize = 13;

/// All metrics, in the order of the enumeration.
pub const METRICS: [Description; COUNT] = [
    row(Metric::Ppl, "ppl", "PPL", Shown::Decimals(4), "perplexity"),
    row(Metric::DeltaPpl, "delta_ppl", "ΔPPL", Shown::Signed(4), "perplexity minus the baseline's"),
    row(
        Metric::DeltaPplPct,
        "delta_ppl_pct",
        "ΔPPL %",
        Shown::SignedPercent,
        "relative change of perplexity, in percent",
    ),
    row(Metric::Kld, "kld", "KLD", Shown::Decimals(5), "mean KL divergence from the baseline, nats"),
    row(Metric::KldMedian, "kld_median", "KLD median", Shown::Decimals(5), "median KL divergence"),
    row(
        Metric::KldP90,
        "kld_p90",
        "KLD p90",
        Shown::Decimals(4),
        "90 % of positions diverge by at most this",
    ),
    row(
        Metric::KldP99,
        "kld_p99",
        "KLD p99",
        Shown::Decimals(4),
        "99 % of positions diverge by at most this",
    ),
    row(
        Metric::KldP999,
        "kld_p999",
        "KLD p99.9",
        Shown::Decimals(4),
        "99.9 % of positions diverge by at most this",
    ),
    row(Metric::KldMax, "kld_max", "KLD max", Shown::Decimals(4), "the largest divergence of any position"),
    row(
        Metric::Top1,
        "top1",
        "same top-1",
        Shown::Share,
        "share of positions with the baseline's most likely token on top",
    ),
    row(
        Metric::Top5,
        "top5",
        "in top-5",
        Shown::Share,
        "share of positions with the baseline's most likely token among the first five",
    ),
    row(
        Metric::RmsDp,
        "rms_dp",
        "RMS Δp",
        Shown::Share,
        "root mean square change of the next token's probability",
    ),
    row(
        Metric::TokSRatio,
        "tok_s_ratio",
        "speed",
        Shown::Ratio,
        "tokens per second of the forward pass, divided by the baseline's",
    ),
];

impl Metric {
    /// Returns the metric's row.
    pub fn describe(self) -> &'static Description {
        &METRICS[self as usize]
    }

    /// Returns the metric of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        METRICS.iter().find(|row| row.name == name).map(|row| row.metric)
    }

    /// Returns a value as people read it.
    pub fn show(self, value: f64) -> String {
        match self.describe().shown {
            Shown::Decimals(digits) => format!("{value:.digits$}"),
            Shown::Signed(digits) => format!("{value:+.digits$}"),
            Shown::SignedPercent => format!("{value:+.2} %"),
            Shown::Share => format!("{:.2} %", 100.0 * value),
            Shown::Ratio => format!("{value:.2}×"),
        }
    }

    /// Returns a value's uncertainty with the digits of the value.
    pub fn show_error(self, error: f64) -> String {
        self.show(error).trim_start_matches('+').to_string()
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.describe().name)
    }
}

/// A measured value with its uncertainty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The measured value.
    pub value: f64,
    /// 95 % interval over windows; absent for a single window.
    pub interval: Option<[f64; 2]>,
}

/// One value per metric; those that need a baseline are absent without one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measures(pub [Option<Estimate>; COUNT]);

impl Measures {
    /// Returns what was found for a metric.
    pub fn get(&self, metric: Metric) -> Option<Estimate> {
        self.0[metric as usize]
    }

    /// Returns a metric's value without its interval.
    pub fn value(&self, metric: Metric) -> Option<f64> {
        self.get(metric).map(|estimate| estimate.value)
    }

    /// Keeps the chosen metrics only.
    pub fn retain(&mut self, keep: impl Fn(Metric) -> bool) {
        for row in METRICS.iter().filter(|row| !keep(row.metric)) {
            self.0[row.metric as usize] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enumeration_and_names_are_unique() {
        for (at, row) in METRICS.iter().enumerate() {
            assert_eq!(row.metric as usize, at);
            assert_eq!(Metric::by_name(row.name), Some(row.metric));
        }
        assert_eq!(Metric::by_name("kl"), None);
    }

    #[test]
    fn values_are_shown_with_their_unit() {
        assert_eq!(Metric::DeltaPpl.show(0.25), "+0.2500");
        assert_eq!(Metric::DeltaPplPct.show(-1.5), "-1.50 %");
        assert_eq!(Metric::Top1.show(0.9876), "98.76 %");
        assert_eq!(Metric::Kld.show(0.1), "0.10000");
    }
}
