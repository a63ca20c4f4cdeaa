//! Benchmarks from local files, scored as lm-evaluation-harness 0.4.13 does.
//!
//! | file | what |
//! |---|---|
//! | `format` | MMLU, HellaSwag, ARC and GSM8K, from JSONL or CSV |
//! | `answer` | what counts as GSM8K's answer |
//! | `run` | log-likelihoods and generated answers of all models |
//! | `result` | what comes out |

mod answer;
mod format;
pub mod result;
pub mod run;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::container::text;

pub use self::format::{Doc, Kind};

/// A benchmark's questions, examples before each included.
#[derive(Clone, Debug)]
pub struct Task {
    /// What it is.
    pub kind: Kind,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Solved examples before each question.
    pub shots: usize,
    /// Questions in the file's order, without those that serve as examples.
    pub questions: Vec<Question>,
}

/// A question as a model reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Line of the file, from 1.
    pub line: usize,
    /// Description, examples and question.
    pub prompt: String,
    /// What is right, and what may be chosen.
    pub doc: Doc,
}

impl Task {
    /// Returns the task of an option's value `NAME=FILE`.
    ///
    /// # Errors
    /// Unknown names, files that hold something else, fewer questions than examples.
    pub fn open(spec: &str, shots: usize) -> Result<Self> {
        let (name, file) = spec
            .split_once('=')
            .with_context(|| format!("`--tasks {spec}`: wanted NAME=FILE, such as `gsm8k=test.jsonl`"))?;
        let kind = Kind::by_name(name)?;
        let path = Path::new(file);
        let text = text::read(path)?;
        Task::parse(kind, path, &text, shots).with_context(|| path.display().to_string())
    }

    /// The first `shots` questions of each subject are the examples of its others.
    fn parse(kind: Kind, path: &Path, text: &str, shots: usize) -> Result<Self> {
        let docs = kind.docs(path, text)?;
        ensure!(!docs.is_empty(), "holds no question");
        let mut questions = Vec::new();
        for (line, doc) in &docs {
            let mut same = docs.iter().filter(|(_, other)| other.description == doc.description);
            let examples: Vec<_> = same.by_ref().take(shots).collect();
            if examples.iter().any(|(example, _)| example == line) {
                continue;
            }
            let solved: String = examples.iter().map(|(_, doc)| doc.solved() + "\n\n").collect();
            let prompt = format!("{}{solved}{}", doc.description, doc.text);
            questions.push(Question { line: *line, prompt, doc: doc.clone() });
        }
        ensure!(
            !questions.is_empty(),
            "its {} questions are all taken as examples by `--shots {shots}`",
            docs.len()
        );
        let sha256 = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Task { kind, sha256, shots, questions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GSM8K: &str = r#"{"question": "1+1?", "answer": "Easy. #### 2"}
{"question": "2+2?", "answer": "Sum. #### 4"}
{"question": "3+3?", "answer": "More. #### 6"}
"#;

    #[test]
    fn the_first_questions_are_the_examples_of_the_others() {
        let task = |shots| Task::parse(Kind::Gsm8k, Path::new("x.jsonl"), GSM8K, shots);
        let prompts: Vec<_> = task(0).unwrap().questions.into_iter().map(|q| q.prompt).collect();
        assert_eq!(prompts[0], "Question: 1+1?\nAnswer:");
        assert_eq!(prompts.len(), 3);
        let two = task(2).unwrap().questions;
        let expected = "Question: 1+1?\nAnswer: Easy. #### 2\n\nQuestion: 2+2?\nAnswer: Sum. #### 4\n\nQuestion: 3+3?\n\
                        Answer:";
        assert_eq!((two.len(), two[0].line, two[0].prompt.as_str()), (1, 3, expected));
        assert!(task(3).unwrap_err().to_string().contains("--shots 3"));
    }

    #[test]
    fn examples_are_of_the_same_subject() {
        let line = |subject: &str, question: &str| {
            format!(
                r#"{{"question":"{question}","subject":"{subject}","choices":["a","b","c","d"],"answer":1}}"#
            )
        };
        let text =
            [line("law", "L1"), line("art_history", "A1"), line("law", "L2"), line("art_history", "A2")];
        let task = Task::parse(Kind::Mmlu, Path::new("x.jsonl"), &text.join("\n"), 1).unwrap();
        assert_eq!(task.questions.len(), 2);
        let expected = "The following are multiple choice questions (with answers) about art history.\n\nA1\nA. a\nB. b\n\
                        C. c\nD. d\nAnswer: B\n\nA2\nA. a\nB. b\nC. c\nD. d\nAnswer:";
        assert_eq!(task.questions[1].prompt, expected);
    }
}
