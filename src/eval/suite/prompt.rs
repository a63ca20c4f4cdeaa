//! A line of a suite.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::check::{Check, CheckSpec};
use crate::model::chat_template::Chat;

/// What stands for the haystack in a message.
const HAYSTACK: &str = "{haystack}";

/// One question and how its answer is judged.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Unique in the suite.
    pub id: String,
    /// The conversation so far; the model answers its last message.
    pub chat: Chat,
    /// How the answer is judged.
    pub check: Check,
    /// An answer that passes.
    pub reference: Option<String>,
    /// Overrides the run's limit of new tokens downwards.
    pub max_new_tokens: Option<usize>,
}

/// The fields of a line, as documented in `eval/suites/README.md`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: String,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    #[serde(default)]
    tools: Vec<Value>,
    haystack: Option<Haystack>,
    check: CheckSpec,
    reference: Option<String>,
    max_new_tokens: Option<usize>,
}

/// A long text of little meaning with one sentence that matters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Haystack {
    /// Sentences besides the needle.
    sentences: usize,
    /// Where the needle lies: 0 first, 1 last.
    depth: f64,
    needle: String,
}

impl Prompt {
    /// Returns the last thing the user said.
    pub fn question(&self) -> String {
        let last = self.chat.messages.iter().rfind(|message| message["role"] == "user");
        last.and_then(|message| message["content"].as_str()).unwrap_or_default().to_string()
    }

    /// Parses a line.
    ///
    /// # Errors
    /// Lines that are no JSON, fields that are missing, unknown or contradictory, checks that cannot be made.
    pub fn parse(line: &str) -> Result<Self> {
        let line: Line = serde_json::from_str(line).context("no JSON object of a prompt")?;
        let mut messages = match (line.prompt, line.messages) {
            (Some(prompt), None) => vec![json!({"role": "user", "content": prompt})],
            (None, Some(messages)) => messages,
            _ => anyhow::bail!("wanted either `prompt` or `messages`"),
        };
        for message in &messages {
            let role = message["role"].as_str().unwrap_or_default();
            ensure!(
                ["system", "user", "assistant", "tool"].contains(&role),
                "a message has the role `{role}`; roles are `system`, `user`, `assistant` and `tool`"
            );
        }
        let last = messages.last().map_or(&Value::Null, |message| &message["role"]);
        ensure!(last == "user" || last == "tool", "the last message must be the user's or a tool's");
        fill_haystack(&mut messages, line.haystack)?;
        Ok(Prompt {
            id: line.id,
            chat: Chat { messages, tools: line.tools },
            check: Check::new(line.check)?,
            reference: line.reference,
            max_new_tokens: line.max_new_tokens,
        })
    }
}

fn fill_haystack(messages: &mut [Value], haystack: Option<Haystack>) -> Result<()> {
    let holes = messages
        .iter()
        .filter(|message| message["content"].as_str().is_some_and(|content| content.contains(HAYSTACK)));
    let holes = holes.count();
    let Some(haystack) = haystack else {
        ensure!(holes == 0, "a message holds `{HAYSTACK}` but the line has no `haystack`");
        return Ok(());
    };
    ensure!(holes == 1, "one message must hold `{HAYSTACK}`, and {holes} do");
    ensure!((0.0..=1.0).contains(&haystack.depth), "a depth of {}; wanted 0 to 1", haystack.depth);
    let text = haystack.text();
    for message in messages {
        if let Some(content) = message["content"].as_str() {
            message["content"] = content.replace(HAYSTACK, &text).into();
        }
    }
    Ok(())
}

impl Haystack {
    fn text(&self) -> String {
        let at = (self.depth * self.sentences as f64).round() as usize;
        let mut sentences: Vec<String> = (0..self.sentences).map(filler).collect();
        sentences.insert(at, self.needle.clone());
        sentences.join(" ")
    }
}

/// Parts of the sentences of a dull diary. The lists' lengths share no factor, so that sentences repeat late.
const WHO: [&str; 11] = [
    "the gardener",
    "a neighbour",
    "the baker",
    "my aunt",
    "the postman",
    "a student",
    "the carpenter",
    "our teacher",
    "the ferryman",
    "a violinist",
    "the librarian",
];
const DID: [&str; 13] = [
    "walked past",
    "painted",
    "spoke about",
    "repaired",
    "drew a picture of",
    "forgot",
    "asked about",
    "cleaned",
    "admired",
    "took a photograph of",
    "measured",
    "sat beside",
    "described",
];
const WHAT: [&str; 17] = [
    "the old bridge",
    "a wooden boat",
    "the green door",
    "the market square",
    "a stone wall",
    "the bell tower",
    "an apple tree",
    "the long table",
    "a broken clock",
    "the harbour",
    "the narrow stairs",
    "a tin roof",
    "the village well",
    "a blue bicycle",
    "the school fence",
    "the mill",
    "an iron gate",
];
const WHEN: [&str; 7] = [
    "in the morning",
    "before lunch",
    "in the rain",
    "at noon",
    "after the concert",
    "in the evening",
    "on the way home",
];

/// Returns sentence `i` of a dull diary.
fn filler(i: usize) -> String {
    let (who, did, what, when) = (WHO[i % 11], DID[i % 13], WHAT[i % 17], WHEN[i % 7]);
    let sentence = format!("{who} {did} {what} {when}.");
    sentence[..1].to_uppercase() + &sentence[1..]
}
