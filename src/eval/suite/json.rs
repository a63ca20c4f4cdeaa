//! Answers that are JSON: one value and nothing else, or a tool call.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use jsonschema::Validator;
use serde_json::Value;

/// A compiled JSON Schema.
#[derive(Clone, Debug)]
pub struct JsonCheck(Arc<Validator>);

impl JsonCheck {
    /// Errors on what is no JSON Schema.
    pub fn new(schema: &Value) -> Result<Self> {
        let validator =
            jsonschema::validator_for(schema).map_err(|error| anyhow!("no JSON schema: {error}"))?;
        Ok(JsonCheck(Arc::new(validator)))
    }

    /// Returns why a text fails: it must be one JSON value, white space around it aside.
    pub fn judge_text(&self, answer: &str) -> Result<(), String> {
        let value = serde_json::from_str(answer.trim()).map_err(|error| format!("is no JSON: {error}"))?;
        self.judge(&value)
    }

    fn judge(&self, value: &Value) -> Result<(), String> {
        self.0.validate(value).map_err(|error| {
            let at = error.instance_path().to_string();
            format!("at `{}`: {error}", if at.is_empty() { "/" } else { &at })
        })
    }
}

/// A call of one tool.
#[derive(Clone, Debug)]
pub struct ToolCheck {
    /// The tool's name.
    pub name: String,
    /// What its arguments must be.
    pub arguments: JsonCheck,
}

impl ToolCheck {
    /// Returns why an answer fails: its first tool call must be the right one.
    pub fn judge(&self, answer: &str) -> Result<(), String> {
        let call = tool_call(answer).ok_or("calls no tool")?;
        let name = call["name"].as_str().unwrap_or_default();
        if name != self.name {
            return Err(format!("calls `{name}`, not `{}`", self.name));
        }
        let arguments = call.get("arguments").or(call.get("parameters")).unwrap_or(&Value::Null);
        // The API's own form keeps arguments as text.
        match arguments.as_str() {
            Some(text) => self.arguments.judge_text(text),
            None => self.arguments.judge(arguments),
        }
    }
}

/// Returns the first object with a `name` in an answer: bare, in a list, in `<tool_call>` tags, or after a model's own
/// mark (`[TOOL_CALLS]`, `<|python_tag|>`).
fn tool_call(answer: &str) -> Option<Value> {
    answer.match_indices('{').find_map(|(at, _)| {
        let mut values = serde_json::Deserializer::from_str(&answer[at..]).into_iter::<Value>();
        let value = values.next()?.ok()?;
        let function = value.get("function").filter(|function| function["name"].is_string());
        let call = function.cloned().unwrap_or(value);
        call["name"].is_string().then_some(call)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_means_json_alone() {
        let schema = json!({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}});
        let check = JsonCheck::new(&schema).unwrap();
        assert_eq!(check.judge_text(" {\"a\": 1}\n"), Ok(()));
        for (answer, word) in [
            ("Here: {\"a\": 1}", "no JSON"),
            ("```json\n{\"a\": 1}\n```", "no JSON"),
            ("{\"a\": 1,}", "no JSON"),
            ("{\"a\": \"1\"}", "`/a`"),
            ("{}", "`/`"),
        ] {
            let reason = check.judge_text(answer).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }

    #[test]
    fn tool_calls_are_found_in_every_models_spelling() {
        let arguments = JsonCheck::new(&json!({"required": ["town"]})).unwrap();
        let check = ToolCheck { name: "weather".into(), arguments };
        for answer in [
            r#"{"name": "weather", "arguments": {"town": "Rome"}}"#,
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"town\": \"Rome\"}}\n</tool_call>",
            r#"[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Rome"}}]"#,
            r#"<|python_tag|>{"name": "weather", "parameters": {"town": "Rome"}}"#,
            r#"{"type": "function", "function": {"name": "weather", "arguments": "{\"town\": \"Rome\"}"}}"#,
        ] {
            assert_eq!(check.judge(answer), Ok(()), "{answer}");
        }
        assert_eq!(check.judge("It is sunny in {Rome}."), Err("calls no tool".into()));
        assert!(check.judge(r#"{"name": "time", "arguments": {}}"#).unwrap_err().contains("`time`"));
        assert!(check.judge(r#"{"name": "weather", "arguments": {}}"#).unwrap_err().contains("town"));
    }
}
