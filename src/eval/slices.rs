//! Small texts of one kind of content each, because quantization does not cost everywhere the same: code, digits and
//! languages other than English break first. Provenance, licence and hashes: `eval/README.md`.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::container::text;
use crate::model::chat_template::{Chat, ChatTemplate};

/// The slices inside the binary.
const BUNDLED: [(&str, &str); 6] = [
    ("prose", include_str!("../../eval/slices/prose.txt")),
    ("code", include_str!("../../eval/slices/code.txt")),
    ("json", include_str!("../../eval/slices/json.txt")),
    ("digits", include_str!("../../eval/slices/digits.txt")),
    ("chat", include_str!("../../eval/slices/chat.jsonl")),
    ("german", include_str!("../../eval/slices/german.txt")),
];

/// Tokens in a window: the texts are small, and an interval needs ten windows or more.
pub const N_CTX: usize = 128;

/// One kind of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// What reports and gates call it.
    pub name: String,
    /// The file's content.
    text: String,
}

impl Slice {
    /// Returns the text as the model reads it: the bundled conversations are put into its chat template, if it has one.
    ///
    /// # Errors
    /// What the template refuses.
    pub fn text(&self, template: Option<&ChatTemplate>) -> Result<Cow<'_, str>> {
        match BUNDLED.iter().any(|row| row == &("chat", self.text.as_str())) {
            true => conversations(&self.text, template).map(Cow::Owned),
            false => Ok(Cow::Borrowed(&self.text)),
        }
    }
}

/// Returns the slices of that list: names of bundled ones, `NAME=FILE` for one's own, or `all` for all bundled ones. A name
/// that occurs twice is taken once.
///
/// # Errors
/// A name that no bundled slice has, a file that cannot be read or is empty.
pub fn by_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Slice>> {
    let mut slices: Vec<Slice> = Vec::new();
    let mut take = |slice: Slice| {
        if slices.iter().all(|other| other.name != slice.name) {
            slices.push(slice);
        }
    };
    for name in names {
        match name.split_once('=') {
            Some((name, file)) => take(own(name, Path::new(file))?),
            None if name == "all" => BUNDLED.iter().try_for_each(|row| bundled(row.0).map(&mut take))?,
            None => take(bundled(name)?),
        }
    }
    Ok(slices)
}

fn own(name: &str, file: &Path) -> Result<Slice> {
    ensure!(!name.is_empty(), "`--slices ={}`: wanted `NAME=FILE`", file.display());
    let text = text::read(file)?;
    ensure!(!text.trim().is_empty(), "{}: the slice `{name}` is empty", file.display());
    Ok(Slice { name: name.to_string(), text })
}

fn bundled(name: &str) -> Result<Slice> {
    let Some((_, text)) = BUNDLED.iter().find(|row| row.0 == name) else {
        let known: Vec<&str> = BUNDLED.iter().map(|row| row.0).collect();
        bail!(
            "there is no slice `{name}`; bundled are {} and `all`, and `NAME=FILE` names a text of your own",
            known.join(", ")
        );
    };
    Ok(Slice { name: name.to_string(), text: text.to_string() })
}

/// A line of `chat.jsonl`.
#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Value>,
}

/// Returns conversations as the model reads them: in its chat template, or as turns `role: content` where it has none.
fn conversations(lines: &str, template: Option<&ChatTemplate>) -> Result<String> {
    let mut text = String::new();
    for line in lines.lines() {
        let Conversation { messages } = serde_json::from_str(line).context("the bundled chat slice")?;
        match template {
            Some(template) => {
                let chat = Chat { messages, tools: Vec::new() };
                text +=
                    &template.render(&chat, false).context("slice `chat`, in the model's chat template")?;
            }
            None => messages.iter().for_each(|message| {
                let field = |name: &str| message[name].as_str().unwrap_or_default();
                text += &format!("{}: {}\n\n", field("role"), field("content"));
            }),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tokenizer::TokenizerFiles;

    #[test]
    fn all_slices_have_a_name_and_enough_text() {
        let slices = by_names(["all", "code"]).unwrap();
        let names: Vec<&str> = slices.iter().map(|slice| slice.name.as_str()).collect();
        assert_eq!(names, ["prose", "code", "json", "digits", "chat", "german"]);
        assert!(slices.iter().all(|slice| slice.text.len() > 5000));
    }

    #[test]
    fn conversations_are_in_the_models_template_or_plain_turns() {
        let chat = &by_names(["chat"]).unwrap()[0];
        assert!(chat.text(None).unwrap().starts_with("user: My sourdough starter"));
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/eval/tiny-llama"));
        let template = ChatTemplate::new(&TokenizerFiles::read(folder).unwrap().unwrap()).unwrap().unwrap();
        let text = chat.text(Some(&template)).unwrap();
        assert_eq!(text.matches("My sourdough starter").count(), 1);
        assert!(!text.contains("user: My"), "{}", &text[..200]);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let message = by_names(["code", "cobol"]).unwrap_err().to_string();
        assert!(message.contains("`cobol`") && message.contains("german"), "{message}");
    }

    #[test]
    fn a_file_of_ones_own_is_a_slice() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let name = format!("mine={}", file.path().display());
        assert!(by_names([name.as_str()]).unwrap_err().to_string().contains("is empty"));
        std::io::Write::write_all(&mut file, b"x y").unwrap();
        assert_eq!(by_names([name.as_str()]).unwrap(), [Slice { name: "mine".into(), text: "x y".into() }]);
        assert!(by_names(["mine=no-such-file"]).unwrap_err().to_string().contains("no-such-file"));
    }
}
