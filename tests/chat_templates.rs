//! Chat templates render as transformers renders them: references made by `scripts/golden_chat_templates.py`.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use quant::model::chat_template::{Chat, ChatTemplate};
use quant::model::tokenizer::TokenizerFiles;
use serde_json::Value;

#[test]
fn every_conversation_reads_as_transformers_writes_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat_templates.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let source = golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let files = TokenizerFiles {
            tokenizer_config: golden["tokens"].clone(),
            chat_templates: vec![("default".into(), source.into())],
            ..TokenizerFiles::default()
        };
        let chat = Chat {
            messages: case["messages"].as_array().unwrap().clone(),
            tools: case["tools"].as_array().unwrap().clone(),
        };
        let template = ChatTemplate::new(&files).unwrap().unwrap();
        let found = template.render(&chat, case["add_generation_prompt"] == true);
        match case["text"].as_str() {
            Some(text) => assert_eq!(found.unwrap(), text, "{}", case["name"]),
            None => assert!(found.is_err(), "{}: transformers refuses: {}", case["name"], case["refused"]),
        }
    }
}
