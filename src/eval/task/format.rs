//! The benchmarks' files and the prompts made of them: `doc_to_text`, `doc_to_choice` and `doc_to_target` of
//! lm-evaluation-harness 0.4.13 (`tasks/mmlu/default`, `tasks/hellaswag`, `tasks/arc`, `tasks/gsm8k`).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

/// A benchmark that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Hendrycks et al. 2021: four choices named by letters.
    Mmlu,
    /// Zellers et al. 2019: how a description goes on.
    HellaSwag,
    /// Clark et al. 2018: questions of school science.
    Arc,
    /// Cobbe et al. 2021: word problems; the answer is generated.
    Gsm8k,
}

/// Names that users type; ARC has two sets of one form.
const NAMES: [(&str, Kind); 6] = [
    ("mmlu", Kind::Mmlu),
    ("hellaswag", Kind::HellaSwag),
    ("arc", Kind::Arc),
    ("arc_easy", Kind::Arc),
    ("arc_challenge", Kind::Arc),
    ("gsm8k", Kind::Gsm8k),
];

/// What a line of a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doc {
    /// Goes before everything; MMLU names the subject.
    pub description: String,
    /// The question up to where the answer starts.
    pub text: String,
    /// The answers to choose from; empty where the answer is generated.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
    /// The right answer: that choice, or GSM8K's solution.
    pub target: String,
}

impl Doc {
    /// Returns the question with its answer: an example.
    pub fn solved(&self) -> String {
        format!("{} {}", self.text, self.target)
    }

    fn choice(description: String, text: String, choices: Vec<String>, gold: usize) -> Result<Self> {
        let target = choices
            .get(gold)
            .with_context(|| format!("the answer is number {gold} of {} choices", choices.len()))?;
        ensure!(choices.iter().all(|choice| !choice.is_empty()), "a choice is empty");
        Ok(Doc { description, text, target: target.clone(), choices, gold })
    }
}

impl Kind {
    /// Returns the benchmark of that name.
    pub fn by_name(name: &str) -> Result<Self> {
        let found = NAMES.iter().find(|row| row.0 == name);
        let known = || NAMES.map(|row| format!("`{}`", row.0)).join(", ");
        Ok(found.with_context(|| format!("`--tasks {name}=…`: tasks are {}", known()))?.1)
    }

    /// Returns the name that reports print.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|row| row.1 == self).map_or("", |row| row.0)
    }

    /// Reads a file: its documents with their lines, from 1.
    pub fn docs(self, path: &Path, text: &str) -> Result<Vec<(usize, Doc)>> {
        let csv = path.extension().is_some_and(|extension| extension == "csv");
        let records = if csv { csv_records(self, path, text)? } else { json_records(text)? };
        records
            .into_iter()
            .map(|(line, record)| Ok((line, self.doc(record).with_context(|| format!("line {line}"))?)))
            .collect()
    }

    fn doc(self, record: Value) -> Result<Doc> {
        match self {
            Kind::Mmlu => mmlu(serde_json::from_value(record)?),
            Kind::HellaSwag => hellaswag(serde_json::from_value(record)?),
            Kind::Arc => arc(serde_json::from_value(record)?),
            Kind::Gsm8k => {
                let Gsm8k { question, answer } = serde_json::from_value(record)?;
                ensure!(answer.contains("#### "), "`answer` has no line `#### NUMBER`");
                let text = format!("Question: {question}\nAnswer:");
                Ok(Doc { text, target: answer, ..Doc::default() })
            }
        }
    }
}

fn json_records(text: &str) -> Result<Vec<(usize, Value)>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            let value = serde_json::from_str(line).with_context(|| format!("line {}: no JSON", at + 1))?;
            Ok((at + 1, value))
        })
        .collect()
}

/// CSV with a header names its columns; MMLU's own files have none: question, four choices, letter.
fn csv_records(kind: Kind, path: &Path, text: &str) -> Result<Vec<(usize, Value)>> {
    let headed = text.lines().next().is_some_and(|line| line.split(',').any(|field| field == "question"));
    if kind != Kind::Mmlu && !(kind == Kind::Gsm8k && headed) {
        bail!("`{}` is read from JSONL; CSV holds MMLU, or GSM8K with a header", kind.name());
    }
    let mut reader = csv::ReaderBuilder::new().has_headers(headed).from_reader(text.as_bytes());
    let header = if headed { Some(reader.headers()?.clone()) } else { None };
    let stem = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let subject = ["_test", "_dev", "_val"].iter().find_map(|end| stem.strip_suffix(end));
    let mut records = Vec::new();
    for record in reader.records() {
        let record = record?;
        let line = record.position().map_or(0, |position| position.line() as usize);
        let value = match (&header, record.len()) {
            (Some(header), _) => {
                header.iter().zip(&record).map(|(k, v)| (k.to_string(), Value::from(v))).collect()
            }
            (None, 6) => serde_json::json!({
                "question": record[0],
                "choices": [record[1], record[2], record[3], record[4]],
                "answer": record[5],
                "subject": subject,
            }),
            (None, found) => {
                bail!("line {line}: {found} columns; wanted question, four choices and a letter")
            }
        };
        records.push((line, value));
    }
    Ok(records)
}

#[derive(Deserialize)]
struct Mmlu {
    question: String,
    choices: Vec<String>,
    answer: Answer,
    subject: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Index(usize),
    Text(String),
}

impl Answer {
    /// Returns the index: a number, a number as text, or a letter from A.
    fn index(&self) -> Result<usize> {
        match self {
            Answer::Index(index) => Ok(*index),
            Answer::Text(text) => match text.trim().as_bytes() {
                [letter @ b'A'..=b'Z'] => Ok((letter - b'A') as usize),
                _ => {
                    text.trim().parse().with_context(|| format!("the answer `{text}` is no index or letter"))
                }
            },
        }
    }
}

fn mmlu(line: Mmlu) -> Result<Doc> {
    ensure!(line.choices.len() == 4, "{} choices; wanted 4", line.choices.len());
    let description = line.subject.map_or_else(String::new, |subject| {
        let subject = subject.replace('_', " ");
        format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
    });
    let letters = ["A", "B", "C", "D"];
    let listed: String = letters.iter().zip(&line.choices).map(|(l, c)| format!("{l}. {c}\n")).collect();
    let text = format!("{}\n{listed}Answer:", line.question.trim());
    Doc::choice(description, text, letters.map(str::to_string).to_vec(), line.answer.index()?)
}

#[derive(Deserialize)]
struct HellaSwag {
    ctx_a: String,
    ctx_b: String,
    activity_label: String,
    endings: Vec<String>,
    label: Answer,
}

fn hellaswag(line: HellaSwag) -> Result<Doc> {
    let brackets = Regex::new(r"\[.*?\]")?;
    let clean = |text: &str| {
        let text = text.trim().replace(" [title]", ". ");
        brackets.replace_all(&text, "").replace("  ", " ")
    };
    let text = clean(&format!("{}: {} {}", line.activity_label, line.ctx_a, capitalized(&line.ctx_b)));
    let choices = line.endings.iter().map(|ending| clean(ending)).collect();
    Doc::choice(String::new(), text, choices, line.label.index()?)
}

/// Python's `str.capitalize`: the first letter large, all others small.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map_or_else(String::new, |c| c.to_uppercase().collect());
    first + &letters.as_str().to_lowercase()
}

#[derive(Deserialize)]
struct Arc {
    question: String,
    choices: ArcChoices,
    #[serde(rename = "answerKey")]
    answer_key: String,
}

#[derive(Deserialize)]
struct ArcChoices {
    text: Vec<String>,
    label: Vec<String>,
}

fn arc(line: Arc) -> Result<Doc> {
    let ArcChoices { text, label } = line.choices;
    let gold = label.iter().position(|label| *label == line.answer_key);
    let gold = gold.with_context(|| format!("`answerKey` is `{}`; labels are {label:?}", line.answer_key))?;
    Doc::choice(String::new(), format!("Question: {}\nAnswer:", line.question), text, gold)
}

#[derive(Deserialize)]
struct Gsm8k {
    question: String,
    answer: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(kind: Kind, file: &str, text: &str) -> Result<Doc> {
        Ok(kind.docs(Path::new(file), text)?.remove(0).1)
    }

    #[test]
    fn mmlu_reads_jsonl_and_its_own_csv_alike() {
        let json =
            r#"{"question":" Why? ","subject":"high_school_law","choices":["a","b","c","d"],"answer":2}"#;
        let from_json = one(Kind::Mmlu, "x.jsonl", json).unwrap();
        let from_csv = one(Kind::Mmlu, "high_school_law_test.csv", " Why? ,a,b,c,d,C\n").unwrap();
        assert_eq!(from_json, from_csv);
        assert_eq!(from_json.text, "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:");
        assert_eq!((from_json.target.as_str(), from_json.gold), ("C", 2));
        assert!(from_json.description.ends_with("about high school law.\n\n"));
    }

    #[test]
    fn hellaswag_is_cleaned_as_the_harness_does() {
        let json = r#"{"ctx_a":"A man [header] sits.","ctx_b":"he Then","activity_label":"Rest","label":"1",
            "endings":["walks.","  sleeps [title] soundly  now"]}"#;
        let doc = one(Kind::HellaSwag, "x.jsonl", &json.replace('\n', "")).unwrap();
        assert_eq!(doc.text, "Rest: A man sits. He then");
        assert_eq!(doc.choices, ["walks.", "sleeps.  soundly now".replace("  ", " ").as_str()]);
        assert_eq!(doc.solved(), "Rest: A man sits. He then sleeps. soundly now");
    }

    #[test]
    fn arc_finds_the_answer_by_its_label() {
        let json =
            r#"{"question":"Ice?","choices":{"text":["hot","cold"],"label":["1","2"]},"answerKey":"2"}"#;
        let doc = one(Kind::Arc, "x.jsonl", json).unwrap();
        assert_eq!(doc.solved(), "Question: Ice?\nAnswer: cold");
        let refusal = one(Kind::Arc, "x.jsonl", &json.replace("\"2\"}", "\"E\"}")).unwrap_err();
        assert!(format!("{refusal:#}").contains("line 1: `answerKey` is `E`"));
    }

    #[test]
    fn gsm8k_comes_from_jsonl_or_csv() {
        let json = one(Kind::Gsm8k, "x.jsonl", r##"{"question":"1+1?","answer":"So #### 2"}"##).unwrap();
        assert_eq!(json, one(Kind::Gsm8k, "x.csv", "question,answer\n1+1?,So #### 2\n").unwrap());
        assert_eq!(json.solved(), "Question: 1+1?\nAnswer: So #### 2");
    }

    #[test]
    fn files_of_another_form_are_refused() {
        let refusal = |kind, file, text| format!("{:#}", one(kind, file, text).unwrap_err());
        assert!(refusal(Kind::Gsm8k, "x.jsonl", r#"{"question":"?","answer":"2"}"#).contains("####"));
        assert!(refusal(Kind::Arc, "x.csv", "a,b\n").contains("JSONL"));
        assert!(refusal(Kind::Mmlu, "x.csv", "a,b,c\n").contains("3 columns"));
        assert!(refusal(Kind::Mmlu, "x.jsonl", "{").contains("line 1: no JSON"));
        let five = r#"{"question":"?","choices":["a","b","c","d"],"answer":4}"#;
        assert!(refusal(Kind::Mmlu, "x.jsonl", five).contains("number 4 of 4"));
        assert!(Kind::by_name("trivia").unwrap_err().to_string().contains("`hellaswag`"));
    }
}
