//! Conversation → prompt text, as transformers' `apply_chat_template` renders it.
//!
//! Templates are Jinja with `trim_blocks` and `lstrip_blocks`, Python's string and dictionary methods, `break` and
//! `continue`, `raise_exception`, `strftime_now`, a `tojson` that is `json.dumps`, and `{% generation %}` blocks, which
//! render what they hold (transformers 5.17, `utils/chat_template_utils.py`). The clock stands still (`TODAY`), so that
//! an evaluation asks the same today and tomorrow.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, context};
use regex::Regex;
use serde_json::Value as Json;

use super::tokenizer::TokenizerFiles;

/// What the fields of `strftime` are at noon of Thursday, 1 January 2026, the day of every prompt.
const TODAY: [(char, &str); 14] = [
    ('d', "01"),
    ('m', "01"),
    ('Y', "2026"),
    ('y', "26"),
    ('b', "Jan"),
    ('B', "January"),
    ('a', "Thu"),
    ('A', "Thursday"),
    ('H', "12"),
    ('I', "12"),
    ('M', "00"),
    ('S', "00"),
    ('p', "PM"),
    ('%', "%"),
];

/// A conversation, in the form of the chat completions API that templates are written for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// `{"role": …, "content": …}`, first to last.
    pub messages: Vec<Json>,
    /// `{"type": "function", "function": {"name": …, "description": …, "parameters": JSON Schema}}`
    pub tools: Vec<Json>,
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, …: those that the tokenizer has.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles a tokenizer's templates; `None` if it has none.
    ///
    /// # Errors
    /// Templates that are no Jinja, with the line.
    pub fn new(files: &TokenizerFiles) -> Result<Option<Self>> {
        if !files.chat_templates.iter().any(|(name, _)| name == "default") {
            return Ok(None);
        }
        let mut environment = environment()?;
        for (name, source) in &files.chat_templates {
            let source = without_generation_tags(source)?;
            environment
                .add_template_owned(name.clone(), source)
                .map_err(|error| anyhow!("{error}"))
                .with_context(|| format!("chat template `{name}`"))?;
        }
        Ok(Some(ChatTemplate { environment, special_tokens: special_tokens(files) }))
    }

    /// Returns the text of a conversation that stands as `messages` in a line of JSON.
    pub fn render_messages(&self, messages: &Json) -> Result<String> {
        let messages = messages.as_array().cloned().context("`messages` is no list")?;
        self.render(&Chat { messages, tools: Vec::new() }, false)
    }

    /// Returns the text of a conversation; `add_generation_prompt` appends what an answer starts with.
    ///
    /// A chat with tools takes the template named `tool_use` where there is one.
    ///
    /// # Errors
    /// What the template refuses, in its own words, and what it cannot do.
    pub fn render(&self, chat: &Chat, add_generation_prompt: bool) -> Result<String> {
        let with_tools = self.environment.get_template("tool_use").ok().filter(|_| !chat.tools.is_empty());
        let template = match with_tools {
            Some(template) => template,
            None => self.environment.get_template("default")?,
        };
        let tools = (!chat.tools.is_empty()).then_some(&chat.tools);
        let variables = context! {
            messages => Value::from(Serde(&chat.messages)),
            tools => Value::from(Serde(tools)),
            documents => Value::from(()),
            add_generation_prompt,
            ..Value::from(Serde(&self.special_tokens))
        };
        template.render(variables).map_err(|error| anyhow!("the chat template says: {error}"))
    }
}

/// Returns an environment with what transformers defines.
fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| anyhow!("{error}"))?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_filter("tojson", to_json);
    // Python can walk a string, a dictionary and an undefined value, but not None.
    environment.add_test("iterable", |value: &Value| {
        value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

/// Replaces `{% generation %}` blocks, which mark what training counts, with blocks that do nothing.
fn without_generation_tags(source: &str) -> Result<String> {
    let open = Regex::new(r"(\{%-?\s*)generation(\s*-?%\})")?.replace_all(source, "${1}if true${2}");
    let close = Regex::new(r"(\{%-?\s*)endgeneration(\s*-?%\})")?;
    Ok(close.replace_all(&open, "${1}endif${2}").into_owned())
}

/// Returns the special tokens' texts by the names that templates know: of the configuration, else by id.
fn special_tokens(files: &TokenizerFiles) -> BTreeMap<String, String> {
    let ids = files.special_ids();
    let named = [
        ("bos_token", ids.bos),
        ("eos_token", ids.eos),
        ("pad_token", ids.pad),
        ("unk_token", ids.unk),
        ("sep_token", ids.sep),
        ("cls_token", ids.cls),
        ("mask_token", ids.mask),
    ];
    let text = |name: &str, id: Option<u32>| {
        let token = &files.tokenizer_config[name];
        let configured = token.as_str().or_else(|| token["content"].as_str()).map(str::to_string);
        configured.or_else(|| files.token_text(id?).map(str::to_string))
    };
    named.into_iter().filter_map(|(name, id)| Some((name.to_string(), text(name, id)?))).collect()
}

/// `datetime.now().strftime(format)` on `TODAY`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let field = rest.next().filter(|&field| field != '-').or_else(|| rest.next());
        let value = TODAY.iter().find(|(name, _)| Some(*name) == field).map(|row| row.1);
        let unknown = || {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `{format}` has an unknown field"))
        };
        out.push_str(value.ok_or_else(unknown)?);
    }
    Ok(out)
}

/// `json.dumps` with the arguments that transformers passes on.
fn to_json(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let separators: Option<(String, String)> =
        arguments.get::<Option<Vec<String>>>("separators")?.and_then(|pair| match &pair[..] {
            [items, keys] => Some((items.clone(), keys.clone())),
            _ => None,
        });
    let indent: Option<usize> = arguments.get("indent")?;
    let items = if indent.is_some() { "," } else { ", " };
    let (items, keys) = separators.unwrap_or((items.to_string(), ": ".to_string()));
    let style = JsonStyle {
        items,
        keys,
        indent,
        ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    let mut out = String::new();
    style.dump(value, 0, &mut out)?;
    Ok(Value::from(out))
}

/// Python's ways to write JSON.
struct JsonStyle {
    items: String,
    keys: String,
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
}

impl JsonStyle {
    fn dump(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.enclosed('[', ']', &items, depth, out, |item, out| self.dump(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.enclosed('{', '}', &keys, depth, out, |key, out| {
                    self.string(&key.to_string(), out);
                    out.push_str(&self.keys);
                    self.dump(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("tojson: a value that is {kind} has no JSON form");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn enclosed(
        &self,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        out: &mut String,
        mut each: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize, out: &mut String| {
            if let Some(width) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', width * depth));
            }
        };
        out.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                out.push_str(&self.items);
            }
            line(depth + 1, out);
            each(item, out)?;
        }
        line(depth, out);
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        let json = Json::from(text).to_string();
        for c in json.chars() {
            if self.ascii && !c.is_ascii() {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            } else {
                out.push(c);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, chat: &Chat) -> Result<String> {
        let files = TokenizerFiles {
            tokenizer_config: json!({"eos_token": {"content": "</s>"}}),
            chat_templates: vec![("default".into(), source.into())],
            ..TokenizerFiles::default()
        };
        ChatTemplate::new(&files)?.unwrap().render(chat, true)
    }

    #[test]
    fn a_model_without_a_template_has_none() {
        assert!(ChatTemplate::new(&TokenizerFiles::default()).unwrap().is_none());
    }

    #[test]
    fn templates_that_refuse_or_are_broken_say_so() {
        let chat = Chat::default();
        let refusal = render("{{ raise_exception('roles must alternate') }}", &chat).unwrap_err().to_string();
        assert!(refusal.contains("roles must alternate"), "{refusal}");
        let broken = format!("{:#}", render("{% if %}", &chat).unwrap_err());
        assert!(broken.starts_with("chat template `default`:"), "{broken}");
        let unknown = render("{{ strftime_now('%Q') }}", &chat).unwrap_err().to_string();
        assert!(unknown.contains("unknown field"), "{unknown}");
    }

    #[test]
    fn chats_with_tools_take_the_template_for_tools() {
        let template = |name: &str| (name.to_string(), format!("{name}{{{{ tools is none }}}}"));
        let files = TokenizerFiles {
            chat_templates: vec![template("default"), template("tool_use")],
            ..TokenizerFiles::default()
        };
        let compiled = ChatTemplate::new(&files).unwrap().unwrap();
        let with_tools = Chat { tools: vec![json!({})], ..Chat::default() };
        assert_eq!(compiled.render(&Chat::default(), false).unwrap(), "defaultTrue");
        assert_eq!(compiled.render(&with_tools, false).unwrap(), "tool_useFalse");
    }
}
