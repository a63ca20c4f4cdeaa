//! Answers that are text: numbers, and constraints on form.

use anyhow::{Result, ensure};
use regex::Regex;
use serde::Deserialize;

/// A demand on an answer's form.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// At least and at most this many words.
    Words(usize, usize),
    /// Exactly this many sentences: runs of text that end in `.`, `!` or `?`.
    Sentences(usize),
    /// Exactly this many lines that are not blank.
    Lines(usize),
    /// Exactly this many lines that start with `- `, `* ` or `• `.
    Bullets(usize),
    /// Exactly this many paragraphs, which blank lines separate.
    Paragraphs(usize),
    /// No capital letter (`true`).
    Lowercase(bool),
    /// No small letter (`true`).
    Uppercase(bool),
    /// The trimmed answer starts with this.
    StartsWith(String),
    /// The trimmed answer ends with this.
    EndsWith(String),
    /// It holds this text, capitals aside.
    Contains(String),
    /// It does not hold this text, capitals aside.
    Excludes(String),
    /// It holds this text exactly so many times, capitals aside.
    Count(String, usize),
    /// The trimmed answer matches the pattern as a whole.
    Matches(String),
}

impl Constraint {
    /// Errors on patterns that are none.
    pub fn check(&self) -> Result<()> {
        match self {
            Constraint::Matches(pattern) => _ = whole(pattern)?,
            Constraint::Words(least, most) => ensure!(least <= most, "words from {least} to {most}"),
            _ => {}
        }
        Ok(())
    }

    /// Returns why an answer breaks the constraint.
    pub fn judge(&self, answer: &str) -> Result<(), String> {
        let answer = answer.trim();
        let lower = answer.to_lowercase();
        let filled = || answer.lines().map(str::trim).filter(|line| !line.is_empty());
        let exactly = |found: usize, wanted: usize, what: &str| match found == wanted {
            true => Ok(()),
            false => Err(format!("has {found} {what}, not {wanted}")),
        };
        let must = |right: bool, reason: String| if right { Ok(()) } else { Err(reason) };
        match self {
            Constraint::Words(least, most) => {
                let found = answer.split_whitespace().count();
                let right = (*least..=*most).contains(&found);
                must(right, format!("has {found} words, not {least} to {most}"))
            }
            Constraint::Sentences(wanted) => exactly(sentences(answer), *wanted, "sentences"),
            Constraint::Lines(wanted) => exactly(filled().count(), *wanted, "lines"),
            Constraint::Bullets(wanted) => {
                let bullet = |line: &&str| ["- ", "* ", "• "].iter().any(|mark| line.starts_with(mark));
                exactly(filled().filter(bullet).count(), *wanted, "bullets")
            }
            Constraint::Paragraphs(wanted) => exactly(paragraphs(answer), *wanted, "paragraphs"),
            Constraint::Lowercase(wanted) => {
                must(!wanted || !answer.contains(char::is_uppercase), "has capital letters".into())
            }
            Constraint::Uppercase(wanted) => {
                must(!wanted || !answer.contains(char::is_lowercase), "has small letters".into())
            }
            Constraint::StartsWith(text) => {
                must(answer.starts_with(text), format!("does not start with `{text}`"))
            }
            Constraint::EndsWith(text) => must(answer.ends_with(text), format!("does not end with `{text}`")),
            Constraint::Contains(text) => {
                must(lower.contains(&text.to_lowercase()), format!("does not hold `{text}`"))
            }
            Constraint::Excludes(text) => {
                must(!lower.contains(&text.to_lowercase()), format!("holds `{text}`"))
            }
            Constraint::Count(text, wanted) => {
                exactly(lower.matches(&text.to_lowercase()).count(), *wanted, &format!("times `{text}`"))
            }
            Constraint::Matches(pattern) => {
                let right = whole(pattern).is_ok_and(|regex| regex.is_match(answer));
                must(right, format!("does not match `{pattern}`"))
            }
        }
    }
}

fn whole(pattern: &str) -> Result<Regex> {
    Ok(Regex::new(&format!("^(?:{pattern})$"))?)
}

/// Returns the number of texts that end in a mark followed by white space or the end.
fn sentences(answer: &str) -> usize {
    let ends = |word: &&str| word.trim_end_matches(['"', ')', '\'', '”']).ends_with(['.', '!', '?']);
    answer.split_whitespace().filter(ends).count()
}

fn paragraphs(answer: &str) -> usize {
    let blank = |line: &str| line.trim().is_empty();
    let lines: Vec<&str> = answer.lines().collect();
    lines.split(|line| blank(line)).filter(|run| !run.is_empty()).count()
}

/// Returns the last number of a text, separators of thousands left out.
pub fn last_number(text: &str) -> Option<String> {
    let number = Regex::new(r"[-−]?\d[\d,_ ]*\d(?:\.\d+)?|[-−]?\d(?:\.\d+)?").ok()?;
    let found = number.find_iter(text).last()?;
    // A hyphen after a letter or digit joins words; it is no sign.
    let joined = text[..found.start()].chars().next_back().is_some_and(char::is_alphanumeric);
    let plain: String = found.as_str().replace('−', "-").replace([',', '_', ' '], "");
    Some(if joined { plain.trim_start_matches('-').to_string() } else { plain })
}

/// Whether two decimal numbers are equal, trailing zeros aside.
pub fn same_number(a: &str, b: &str) -> bool {
    let parts = |text: &str| {
        let negative = text.starts_with('-');
        let (whole, fraction) = text.trim_start_matches('-').split_once('.').unwrap_or((text, ""));
        let whole = whole.trim_start_matches(['-', '0']).to_string();
        (negative, whole, fraction.trim_end_matches('0').to_string())
    };
    parts(a) == parts(b)
}

/// Returns a text for comparison: trimmed, lower case, without quotes and a last full stop.
pub fn normal(text: &str) -> String {
    text.trim().trim_matches(['"', '\'', '*', '`']).trim_end_matches('.').trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_is_found_in_running_text() {
        for (text, number) in [
            ("12 and 3.50.", "3.50"),
            ("about 1,234,567 people", "1234567"),
            ("x = -7", "-7"),
            ("minus −7", "-7"),
            ("a range of 3-9", "9"),
            ("**42**", "42"),
            ("12 345 678", "12345678"),
        ] {
            assert_eq!(last_number(text).as_deref(), Some(number), "{text}");
        }
        assert_eq!(last_number("no digits"), None);
    }

    #[test]
    fn equal_numbers_may_be_spelled_differently() {
        assert!(same_number("0.50", ".5") && same_number("007", "7") && same_number("3.0", "3"));
        assert!(!same_number("-3", "3") && !same_number("12345678901234567890", "12345678901234567891"));
    }

    #[test]
    fn every_constraint_accepts_what_it_asks_for_and_nothing_else() {
        for (constraint, right, wrong) in [
            (r#"{"words": [2, 3]}"#, "one two three", "one"),
            (r#"{"sentences": 2}"#, "It is 3.5 m. \"Really?\"", "One. Two. Three."),
            (r#"{"lines": 2}"#, "a\n\nb", "a"),
            (r#"{"bullets": 2}"#, "Here:\n- a\n* b", "- a\nb"),
            (r#"{"paragraphs": 2}"#, "a\nb\n\nc", "a\nb"),
            (r#"{"lowercase": true}"#, "abc 1", "Abc"),
            (r#"{"uppercase": true}"#, "ABC 1", "ABc"),
            (r#"{"starts_with": "So"}"#, " So it is", "Is it so"),
            (r#"{"ends_with": "?"}"#, "Is it?\n", "It is."),
            (r#"{"contains": "CAT"}"#, "a cat", "a dog"),
            (r#"{"excludes": "E"}"#, "a cat", "a hen"),
            (r#"{"count": ["ha", 2]}"#, "Ha ha", "ha"),
            (r#"{"matches": "\\d{4}-\\d{2}"}"#, "2026-01", "in 2026-01"),
        ] {
            let constraint: Constraint = serde_json::from_str(constraint).unwrap();
            assert_eq!(constraint.judge(right), Ok(()));
            assert!(constraint.judge(wrong).is_err(), "{constraint:?}");
        }
        let broken: Constraint = serde_json::from_str(r#"{"matches": "("}"#).unwrap();
        assert!(broken.check().is_err());
    }
}
