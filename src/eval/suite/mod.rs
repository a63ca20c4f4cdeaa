//! Prompt suites: what a model is asked, in files anyone can write (`eval/suites/README.md`), and whether it still answers.
//!
//! | file | what |
//! |---|---|
//! | `prompt` | a line of a suite |
//! | `check` | whether an answer passes; `text`, `json` and `python` hold the kinds of checks |
//! | `ask` | prompts → token ids |
//! | `run` | answers of all models, judged and compared |
//! | `result` | what comes out |

pub mod ask;
pub mod check;
mod json;
mod prompt;
pub mod python;
pub mod result;
pub mod run;
mod text;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::container;

pub use self::prompt::Prompt;

/// The suites that come with the binary; `retrieval-long` wants a context of 32k and is run only by name.
const EMBEDDED: [(&str, &str, bool); 9] = [
    ("arithmetic", include_str!("../../../eval/suites/arithmetic.jsonl"), true),
    ("chat", include_str!("../../../eval/suites/chat.jsonl"), true),
    ("code", include_str!("../../../eval/suites/code.jsonl"), true),
    ("instructions", include_str!("../../../eval/suites/instructions.jsonl"), true),
    ("json", include_str!("../../../eval/suites/json.jsonl"), true),
    ("reasoning", include_str!("../../../eval/suites/reasoning.jsonl"), true),
    ("retrieval", include_str!("../../../eval/suites/retrieval.jsonl"), true),
    ("tools", include_str!("../../../eval/suites/tools.jsonl"), true),
    ("retrieval-long", include_str!("../../../eval/suites/retrieval-long.jsonl"), false),
];

/// Prompts with their checks.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Name as users select it, or the file's stem.
    pub name: String,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// In the file's order; at least one.
    pub prompts: Vec<Prompt>,
}

impl Suite {
    /// Returns the suites of these names and files (those that end in `.jsonl`); `all` names every embedded one that a
    /// context of 2048 tokens holds.
    ///
    /// # Errors
    /// Unknown names, and files that are no suite, with line and cause.
    pub fn select(names: &[String]) -> Result<Vec<Suite>> {
        let mut suites: Vec<Suite> = Vec::new();
        for name in names {
            match name.as_str() {
                "all" => {
                    for (name, text, _) in EMBEDDED.iter().filter(|row| row.2) {
                        suites.push(Suite::parse(name, text)?);
                    }
                }
                file if file.ends_with(".jsonl") => suites.push(Suite::read(Path::new(file))?),
                name => {
                    let Some((_, text, _)) = EMBEDDED.iter().find(|row| row.0 == name) else {
                        let known: Vec<_> = EMBEDDED.iter().map(|row| format!("`{}`", row.0)).collect();
                        bail!(
                            "`--suites {name}`: suites are {}, `all`, and files that end in `.jsonl`",
                            known.join(", ")
                        );
                    };
                    suites.push(Suite::parse(name, text)?);
                }
            }
        }
        for (at, suite) in suites.iter().enumerate() {
            let again = suites[..at].iter().any(|other| other.name == suite.name);
            ensure!(!again, "`--suites`: `{}` is named twice", suite.name);
        }
        Ok(suites)
    }

    fn read(path: &Path) -> Result<Suite> {
        let text = container::text::read(path)?;
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Suite::parse(&name, &text).with_context(|| path.display().to_string())
    }

    fn parse(name: &str, text: &str) -> Result<Suite> {
        let mut prompts: Vec<Prompt> = Vec::new();
        for (line, json) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let prompt = Prompt::parse(json).with_context(|| format!("suite `{name}`, line {}", line + 1))?;
            let twice = prompts.iter().any(|other| other.id == prompt.id);
            ensure!(!twice, "suite `{name}`, line {}: the id `{}` is taken", line + 1, prompt.id);
            prompts.push(prompt);
        }
        ensure!(!prompts.is_empty(), "suite `{name}` holds no prompt");
        let sha256 = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Suite { name: name.to_string(), sha256, prompts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_suites_hold_150_prompts_or_more() {
        let all = Suite::select(&["all".to_string()]).unwrap();
        assert!(all.iter().map(|suite| suite.prompts.len()).sum::<usize>() >= 150);
        assert!(Suite::select(&["retrieval-long".to_string()]).is_ok());
    }

    #[test]
    fn every_prompt_has_a_reference_that_passes_and_an_empty_answer_fails() {
        let sandbox = python::Sandbox::find().ok();
        for (name, text, _) in EMBEDDED {
            for prompt in Suite::parse(name, text).unwrap().prompts {
                let reference = prompt.reference.as_deref().unwrap_or_else(|| panic!("{}", prompt.id));
                let verdict = prompt.check.judge(reference, sandbox.as_ref());
                if prompt.check.runs_code() && sandbox.is_none() {
                    continue;
                }
                assert_eq!(verdict.passed, Some(true), "{name} {}: {}", prompt.id, verdict.reason);
                let empty = prompt.check.judge("", None).passed;
                assert_eq!(empty, (!prompt.check.runs_code()).then_some(false), "{}", prompt.id);
            }
        }
    }

    #[test]
    fn what_is_no_suite_is_refused_with_its_line() {
        let refusal = |text: &str| format!("{:#}", Suite::parse("mine", text).unwrap_err());
        let good = r#"{"id": "a", "prompt": "Hi", "check": {"type": "number", "answer": "1"}}"#;
        assert!(Suite::parse("mine", good).is_ok());
        assert!(refusal(&format!("{good}\nnot json")).contains("line 2: no JSON object of a prompt"));
        assert!(refusal(&format!("{good}\n{good}")).contains("line 2: the id `a` is taken"));
        assert!(refusal("\n").contains("holds no prompt"));
        for (change, word) in [
            (good.replace("\"prompt\"", "\"promt\""), "promt"),
            (good.replace("\"prompt\": \"Hi\", ", ""), "prompt"),
            (good.replace("number", "numbre"), "numbre"),
            (good.replace("\"answer\": \"1\"", "\"answer\": \"one\""), "one"),
            (good.replace("Hi", "{haystack}"), "haystack"),
            (
                r#"{"id":"a","prompt":"x","check":{"type":"json","schema":{"type":"nonsense"}}}"#.into(),
                "schema",
            ),
        ] {
            let message = refusal(&change);
            assert!(message.contains("line 1") && message.contains(word), "{message}");
        }
        let unknown = Suite::select(&["poetry".to_string()]).unwrap_err().to_string();
        assert!(unknown.contains("`arithmetic`"), "{unknown}");
        let missing = Suite::select(&["no/such.jsonl".to_string()]).unwrap_err();
        assert!(format!("{missing:#}").contains("no/such.jsonl"));
    }
}
