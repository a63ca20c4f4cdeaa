//! GSM8K's answers: the filters and the comparison of lm-evaluation-harness 0.4.13 (`tasks/gsm8k/gsm8k.yaml`,
//! `filters/extraction.py`, `api/metrics.py`).

use anyhow::Result;
use regex::Regex;

/// What ends a solution, besides the end-of-sequence token.
pub const UNTIL: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// What stands for an answer that was not found.
const INVALID: &str = "[invalid]";

/// The patterns, compiled once.
pub struct Filters {
    strict: Regex,
    flexible: Regex,
    before: Regex,
}

impl Filters {
    /// Compiles the patterns.
    pub fn new() -> Result<Self> {
        Ok(Filters {
            strict: Regex::new(r"#### (-?[0-9.,]+)")?,
            flexible: Regex::new(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")?,
            before: Regex::new(r"(?s).*#### ")?,
        })
    }

    /// Returns what `strict-match` takes as the answer: the first number after `#### `.
    pub fn strict(&self, text: &str) -> String {
        self.strict.captures(text).map_or_else(|| INVALID.to_string(), |found| found[1].trim().to_string())
    }

    /// Returns what `flexible-extract` takes as the answer: the last thing that looks like a number.
    pub fn flexible(&self, text: &str) -> String {
        let last = self.flexible.find_iter(text).last();
        last.map_or_else(|| INVALID.to_string(), |found| found.as_str().trim().to_string())
    }

    /// Whether an answer is the solution's: separators, dollar signs, reasoning, a last full stop and capitals aside.
    pub fn exact_match(&self, answer: &str, solution: &str) -> bool {
        self.bare(answer) == self.bare(solution)
    }

    fn bare(&self, text: &str) -> String {
        let text = text.replace([',', '$'], "");
        let text = self.before.replace_all(&text, "");
        // Python's `$` matches before a last line break too.
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let ending = &text[line.len()..];
        let bare = line.strip_suffix('.').map_or_else(|| text.to_string(), |line| format!("{line}{ending}"));
        bare.to_lowercase()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_from_solutions_as_the_harness_does() {
        let filters = Filters::new().unwrap();
        for (text, strict, flexible) in [
            ("5 + 6 = 11\n#### 11", "11", "11"),
            ("#### 1,234.", "1,234.", "1,234."),
            ("It costs $15.", "[invalid]", "$15."),
            ("#### -3 or 4", "-3", "4"),
            ("no number", "[invalid]", "[invalid]"),
            ("He has 7", "[invalid]", "7"),
            ("7. Then", "[invalid]", "7."),
        ] {
            assert_eq!((filters.strict(text).as_str(), filters.flexible(text).as_str()), (strict, flexible));
        }
    }

    #[test]
    fn equal_answers_may_be_spelled_differently() {
        let filters = Filters::new().unwrap();
        assert!(filters.exact_match("1,234.", "Long story #### 1234"));
        assert!(filters.exact_match("$15.", "#### 15"));
        assert!(!filters.exact_match("15.0", "#### 15"));
        assert!(!filters.exact_match("[invalid]", "#### 15"));
    }
}
