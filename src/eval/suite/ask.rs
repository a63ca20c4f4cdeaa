//! Conversation → token ids, and which tokens end an answer.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::model::chat_template::{Chat, ChatTemplate};
use crate::model::tokenizer::{Tokenizer, TokenizerFiles};

/// Tokens that end a turn in published models, whatever their configuration says (llama.cpp treats them so as well).
const ENDS_OF_TURN: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
];

/// Asks in the words of one model: its tokenizer, its chat template.
pub struct Asker {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    stop_tokens: Vec<u32>,
}

impl Asker {
    /// Opens a model's tokenizer and template.
    ///
    /// # Errors
    /// A tokenizer that is missing, a template that does not compile.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        let files = checkpoint.tokenizer_files()?;
        let context = || checkpoint.path.display().to_string();
        let template = ChatTemplate::new(&files).with_context(context)?;
        let generation = checkpoint.folder().map(|folder| folder.join("generation_config.json"));
        let generation: Value = match generation.filter(|path| path.is_file()) {
            Some(path) => std::fs::read(&path)
                .map_err(anyhow::Error::from)
                .and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
                .with_context(|| format!("{}: cannot be read as JSON", path.display()))?,
            None => Value::Null,
        };
        let stop_tokens = stop_tokens(&files, &generation);
        let tokenizer = Tokenizer::from_files(&files).with_context(context)?;
        Ok(Asker { tokenizer, template, stop_tokens })
    }

    /// Returns the tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether the model has a chat template. Without one it is asked in plain text.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Returns the tokens that end an answer.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Returns the ids of a conversation up to where the answer starts.
    ///
    /// # Errors
    /// What the template refuses.
    pub fn ids(&self, chat: &Chat) -> Result<Vec<u32>> {
        match &self.template {
            // A template writes the special tokens itself.
            Some(template) => self.tokenizer.encode(&template.render(chat, true)?, false),
            None => self.tokenizer.encode(&plain(chat), true),
        }
    }
}

/// Returns a conversation as plain text: a single question as it is, more as a dialogue.
fn plain(chat: &Chat) -> String {
    let content = |message: &Value| message["content"].as_str().unwrap_or_default().trim().to_string();
    if let ([message], []) = (&chat.messages[..], &chat.tools[..]) {
        return content(message) + "\n";
    }
    let mut text = String::new();
    if !chat.tools.is_empty() {
        text += &format!("tools: {}\n", Value::from(chat.tools.clone()));
    }
    for message in &chat.messages {
        text += &format!("{}: {}\n", message["role"].as_str().unwrap_or_default(), content(message));
    }
    text + "assistant:"
}

fn stop_tokens(files: &TokenizerFiles, generation: &Value) -> Vec<u32> {
    let ids = |value: &Value| -> Vec<u32> {
        let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        list.iter().filter_map(Value::as_u64).filter_map(|id| id.try_into().ok()).collect()
    };
    let mut stops: Vec<u32> = files.special_ids().eos.into_iter().collect();
    stops.extend(ids(&files.config["eos_token_id"]));
    stops.extend(ids(&generation["eos_token_id"]));
    stops.extend(ENDS_OF_TURN.iter().filter_map(|text| files.token_id(text)));
    stops.sort_unstable();
    stops.dedup();
    stops
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_place_that_names_an_end_is_read() {
        let files = TokenizerFiles {
            tokenizer: json!({"added_tokens": [{"id": 7, "content": "<|im_end|>"}, {"id": 3, "content": "</e>"}]}),
            tokenizer_config: json!({"eos_token": "</e>"}),
            config: json!({"eos_token_id": [3, 5]}),
            ..TokenizerFiles::default()
        };
        assert_eq!(stop_tokens(&files, &json!({"eos_token_id": 9})), [3, 5, 7, 9]);
        assert_eq!(stop_tokens(&TokenizerFiles::default(), &Value::Null), [0u32; 0]);
    }

    #[test]
    fn a_model_without_a_template_is_asked_in_plain_text() {
        let user = json!({"role": "user", "content": "Hi "});
        let one = Chat { messages: vec![user.clone()], tools: vec![] };
        assert_eq!(plain(&one), "Hi\n");
        let system = json!({"role": "system", "content": "Be kind."});
        let two = Chat { messages: vec![system, user], tools: vec![json!({"type": "function"})] };
        let expected = "tools: [{\"type\":\"function\"}]\nsystem: Be kind.\nuser: Hi\nassistant:";
        assert_eq!(plain(&two), expected);
    }
}
