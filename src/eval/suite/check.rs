//! Whether an answer passes.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::json::{JsonCheck, ToolCheck};
use super::python::Sandbox;
use super::text::{Constraint, last_number, normal, same_number};

/// A check as a suite spells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum CheckSpec {
    /// The answer is one JSON value that follows the schema, and nothing else.
    Json {
        /// JSON Schema.
        schema: Value,
    },
    /// The answer calls that tool with arguments that follow the schema.
    ToolCall {
        /// Name of the tool.
        name: String,
        /// JSON Schema of the arguments.
        arguments: Value,
    },
    /// The answer's Python code passes these tests.
    Python {
        /// Statements after the code: assertions.
        tests: String,
    },
    /// The last number of the answer is this one.
    Number {
        /// Decimal, compared digit by digit.
        answer: String,
    },
    /// The answer is one of these, capitals and a last full stop aside.
    Exact {
        /// What is right.
        answers: Vec<String>,
    },
    /// The answer holds these texts, capitals aside.
    Contains {
        /// All of them,
        #[serde(default)]
        all: Vec<String>,
        /// at least one of them, if there are any,
        #[serde(default)]
        any: Vec<String>,
        /// and none of them.
        #[serde(default)]
        none: Vec<String>,
    },
    /// The answer is not empty and keeps to all constraints.
    Constraints {
        /// See `eval/suites/README.md`.
        constraints: Vec<Constraint>,
    },
}

/// A check that can be made.
#[derive(Clone, Debug)]
pub struct Check(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Json(JsonCheck),
    Tool(ToolCheck),
    Python(String),
    Number(String),
    Exact(Vec<String>),
    Contains { all: Vec<String>, any: Vec<String>, none: Vec<String> },
    Constraints(Vec<Constraint>),
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `None` where the answer was not judged: code that must not be run.
    pub passed: Option<bool>,
    /// Why it failed or was not judged; empty for what passed.
    pub reason: String,
}

impl Check {
    /// Prepares a check. Errors on schemas, numbers and patterns that are none.
    pub fn new(spec: CheckSpec) -> Result<Self> {
        Ok(Check(match spec {
            CheckSpec::Json { schema } => Kind::Json(JsonCheck::new(&schema).context("`schema`")?),
            CheckSpec::ToolCall { name, arguments } => {
                Kind::Tool(ToolCheck { name, arguments: JsonCheck::new(&arguments).context("`arguments`")? })
            }
            CheckSpec::Python { tests } => Kind::Python(tests),
            CheckSpec::Number { answer } => {
                ensure!(last_number(&answer).is_some(), "the answer `{answer}` is no number");
                Kind::Number(answer)
            }
            CheckSpec::Exact { answers } => {
                ensure!(!answers.is_empty(), "`answers` is empty");
                Kind::Exact(answers)
            }
            CheckSpec::Contains { all, any, none } => {
                ensure!(!all.is_empty() || !any.is_empty(), "`all` and `any` are both empty");
                Kind::Contains { all, any, none }
            }
            CheckSpec::Constraints { constraints } => {
                ensure!(!constraints.is_empty(), "`constraints` is empty");
                constraints.iter().try_for_each(Constraint::check)?;
                Kind::Constraints(constraints)
            }
        }))
    }

    /// Whether judging runs what the model wrote.
    pub fn runs_code(&self) -> bool {
        matches!(self.0, Kind::Python(_))
    }

    /// Judges an answer. Code runs in `sandbox` or not at all.
    pub fn judge(&self, answer: &str, sandbox: Option<&Sandbox>) -> Verdict {
        let found = match &self.0 {
            Kind::Python(tests) => match sandbox {
                Some(sandbox) => sandbox.run(&python_code(answer), tests),
                None => {
                    let reason = "not run; `--allow-exec` runs what the model wrote".to_string();
                    return Verdict { passed: None, reason };
                }
            },
            kind => kind.judge(answer),
        };
        match found {
            Ok(()) => Verdict { passed: Some(true), reason: String::new() },
            Err(reason) => Verdict { passed: Some(false), reason },
        }
    }
}

impl Kind {
    /// Returns why a text fails.
    fn judge(&self, answer: &str) -> Result<(), String> {
        let holds = |text: &String| answer.to_lowercase().contains(&text.to_lowercase());
        match self {
            Kind::Json(check) => check.judge_text(answer),
            Kind::Tool(check) => check.judge(answer),
            Kind::Number(wanted) => match last_number(answer) {
                Some(found) if same_number(&found, wanted) => Ok(()),
                Some(found) => Err(format!("the last number is {found}, not {wanted}")),
                None => Err(format!("found no number, wanted {wanted}")),
            },
            Kind::Exact(answers) => {
                let right = answers.iter().any(|wanted| normal(wanted) == normal(answer));
                if right { Ok(()) } else { Err(format!("is not `{}`", answers.join("` or `"))) }
            }
            Kind::Contains { all, any, none } => {
                if let Some(missing) = all.iter().find(|text| !holds(text)) {
                    return Err(format!("does not hold `{missing}`"));
                }
                if !any.is_empty() && !any.iter().any(holds) {
                    return Err(format!("holds none of `{}`", any.join("`, `")));
                }
                none.iter().find(|text| holds(text)).map_or(Ok(()), |found| Err(format!("holds `{found}`")))
            }
            Kind::Constraints(constraints) => {
                if answer.trim().is_empty() {
                    return Err("is empty".to_string());
                }
                constraints.iter().try_for_each(|constraint| constraint.judge(answer))
            }
            Kind::Python(_) => Err("code is judged by running it".to_string()),
        }
    }
}

/// Returns the first fenced block of an answer, or all of it.
fn python_code(answer: &str) -> String {
    let Some((_, rest)) = answer.split_once("```") else { return answer.to_string() };
    let body = rest.split_once('\n').map_or("", |(_, body)| body);
    body.split("```").next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(check: &str, answer: &str) -> Result<(), String> {
        let verdict = Check::new(serde_json::from_str(check).unwrap()).unwrap().judge(answer, None);
        if verdict.passed == Some(true) { Ok(()) } else { Err(verdict.reason) }
    }

    #[test]
    fn numbers_are_compared_digit_by_digit_and_only_the_last_counts() {
        let check = r#"{"type": "number", "answer": "98765432109876543210"}"#;
        assert_eq!(judge(check, "First 12, so the answer is 98,765,432,109,876,543,210."), Ok(()));
        assert!(judge(check, "98765432109876543211").unwrap_err().contains("98765432109876543211"));
        assert!(judge(check, "none").unwrap_err().contains("no number"));
        let check = r#"{"type": "number", "answer": "-0.5"}"#;
        assert_eq!(judge(check, "It is $-0.50$"), Ok(()));
        assert!(judge(check, "0.5").is_err());
    }

    #[test]
    fn exact_answers_forgive_capitals_and_a_full_stop_only() {
        let check = r#"{"type": "exact", "answers": ["Paris", "yes"]}"#;
        for (answer, right) in [("  paris.\n", true), ("YES", true), ("It is Paris.", false), ("", false)] {
            assert_eq!(judge(check, answer).is_ok(), right, "{answer}");
        }
    }

    #[test]
    fn contained_texts_are_wanted_or_forbidden() {
        let check = r#"{"type": "contains", "all": ["Blue"], "any": ["7", "seven"], "none": ["red"]}"#;
        assert_eq!(judge(check, "seven blue birds"), Ok(()));
        assert_eq!(judge(check, "7 birds"), Err("does not hold `Blue`".into()));
        assert_eq!(judge(check, "blue birds"), Err("holds none of `7`, `seven`".into()));
        assert_eq!(judge(check, "7 blue, one Red"), Err("holds `red`".into()));
    }

    #[test]
    fn code_is_the_first_fenced_block_and_runs_only_where_allowed() {
        assert_eq!(python_code("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```"), "x = 1\n");
        assert_eq!(python_code("x = 1"), "x = 1");
        let check = Check::new(CheckSpec::Python { tests: "assert f(2) == 4".into() }).unwrap();
        assert_eq!(check.judge("def f(x): return 2 * x", None).passed, None);
        let Ok(sandbox) = Sandbox::find() else { return };
        let judge = |code: &str| check.judge(code, Some(&sandbox));
        assert_eq!(judge("```python\ndef f(x): return 2 * x\n```").passed, Some(true));
        assert!(judge("def f(x): return x").reason.contains("AssertionError"));
        assert!(judge("def f(x: return").reason.contains("SyntaxError"));
        assert!(judge("exit(0)").reason.contains("ended before its tests"));
    }
}
