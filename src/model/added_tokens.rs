//! Tokens that stand beside `tokenizer.json`, put into it as transformers 5.17 does when it loads the
//! tokenizer (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__` and `_post_init`).
//!
//! In this order: `added_tokens_decoder` of `tokenizer_config.json`, or, without that key,
//! `added_tokens.json` and the names in `special_tokens_map.json`; the special tokens that have names;
//! `extra_special_tokens`. A token that is there keeps its id. A new one takes the next free id, whatever id
//! it is given, as in the tokenizers library.

use serde_json::{Map, Value, json};

/// Names of special tokens in transformers' order, without `_token`.
pub(super) const NAMES: [&str; 7] = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// Completes `tokenizer.json` and the names in `tokenizer_config.json`, given the older files beside them (or
/// `Null`).
pub(super) fn complete(tokenizer: &mut Value, config: &mut Value, special_map: &Value, added_json: &Value) {
    if config["added_tokens_decoder"].is_null() {
        for (key, value) in special_map.as_object().into_iter().flatten() {
            config[key.as_str()] = value.clone();
        }
    }
    let declared = declared(config, added_json);
    let named = named(config);
    let extra = extra(config);
    let mut added = tokenizer["added_tokens"].as_array().cloned().unwrap_or_default();
    let mut vocabulary = Vocabulary { model: &tokenizer["model"]["vocab"], added: &mut added };
    declared.iter().for_each(|token| vocabulary.put(token));
    named.iter().chain(&extra).for_each(|token| vocabulary.put_special(token));
    tokenizer["added_tokens"] = added.into();
}

/// A model's own tokens and those added to them.
struct Vocabulary<'a> {
    model: &'a Value,
    added: &'a mut Vec<Value>,
}

impl Vocabulary<'_> {
    /// Adds a token with its flags, or gives one that is there these flags.
    fn put(&mut self, token: &Value) {
        let Some(text) = token["content"].as_str().filter(|text| !text.is_empty()) else { return };
        let at = self.added.iter().position(|known| known["content"] == text);
        let id = at.map(|at| self.added[at]["id"].clone()).or_else(|| self.own(text));
        let id = id.unwrap_or_else(|| self.next().into());
        let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let entry = json!({
            "id": id, "content": text, "single_word": flag("single_word", false), "lstrip": flag("lstrip", false),
            "rstrip": flag("rstrip", false), "normalized": flag("normalized", !special), "special": special,
        });
        match at {
            Some(at) => self.added[at] = entry,
            None => self.added.push(entry),
        }
    }

    /// Adds a special token, given as its text or with flags; one that is there becomes special.
    fn put_special(&mut self, token: &Value) {
        let text = token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default();
        match self.added.iter_mut().find(|known| known["content"] == text) {
            Some(known) => known["special"] = true.into(),
            None => {
                let mut token = if token.is_object() { token.clone() } else { json!({ "content": text }) };
                token["special"] = true.into();
                self.put(&token);
            }
        }
    }

    /// The id of a token of the model's own.
    fn own(&self, text: &str) -> Option<Value> {
        match self.model {
            Value::Object(vocab) => vocab.get(text).cloned(),
            Value::Array(pieces) => pieces.iter().position(|piece| piece[0] == text).map(Value::from),
            _ => None,
        }
    }

    /// The next free id (tokenizers, `AddedVocabulary::add_tokens`).
    fn next(&self) -> u64 {
        let own =
            self.model.as_object().map_or_else(|| self.model.as_array().map_or(0, Vec::len), Map::len) as u64;
        let last = self.added.iter().filter_map(|token| token["id"].as_u64()).max();
        last.map_or(own, |last| own.max(last.saturating_add(1)))
    }
}

/// Returns the tokens that the files give an id, in its order.
fn declared(config: &Value, added_json: &Value) -> Vec<Value> {
    let mut tokens: Vec<(u64, Value)> = match config["added_tokens_decoder"].as_object() {
        Some(decoder) => {
            let entry = |(id, token): (&String, &Value)| Some((id.parse().ok()?, token.clone()));
            decoder.iter().filter_map(entry).collect()
        }
        None => {
            let texts =
                |token: &Value| Some(token.as_str().or_else(|| token["content"].as_str())?.to_string());
            let special: Vec<_> = named(config).iter().chain(&extra(config)).filter_map(texts).collect();
            let entry = |(text, id): (&String, &Value)| {
                let special = special.contains(text);
                Some((id.as_u64()?, json!({"content": text, "special": special, "normalized": !special})))
            };
            added_json.as_object().into_iter().flatten().filter_map(entry).collect()
        }
    };
    tokens.sort_by_key(|(id, _)| *id);
    tokens.into_iter().map(|(_, token)| token).collect()
}

/// Returns the special tokens that have names: the usual ones, then a model's own (`image_token`).
fn named(config: &Value) -> Vec<Value> {
    let is_usual = |key: &str| NAMES.iter().any(|name| key.strip_suffix("_token") == Some(name));
    let usual = NAMES.iter().map(|name| &config[format!("{name}_token")]);
    let own = config.as_object().into_iter().flatten();
    let own = own.filter(|(key, _)| key.ends_with("_token") && !is_usual(key)).map(|(_, token)| token);
    let more = config["extra_special_tokens"].as_object().into_iter().flat_map(Map::values);
    usual
        .chain(own)
        .chain(more)
        .filter(|token| token.is_string() || token["content"].is_string())
        .cloned()
        .collect()
}

/// Returns the special tokens without names.
fn extra(config: &Value) -> Vec<Value> {
    let list = |key: &str| config[key].as_array().cloned();
    list("extra_special_tokens").or_else(|| list("additional_special_tokens")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str, special: bool) -> Value {
        json!({"content": text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
               "special": special})
    }

    /// The ids of `<ticker>` and `<|cite|>` that transformers 5.17 gives with these files beside a
    /// `tokenizer.json` of two tokens of its own (there 4096, of which `<|end|>` is listed as added), less
    /// 4094.
    fn ids(config: Value, special_map: Value, added_json: Value) -> [Option<u64>; 2] {
        let mut tokenizer = json!({"added_tokens": [{"id": 0, "content": "<|end|>", "special": true}],
                                   "model": {"vocab": {"<|end|>": 0, "a": 1}}});
        let mut config = config;
        complete(&mut tokenizer, &mut config, &special_map, &added_json);
        let added = tokenizer["added_tokens"].as_array().unwrap();
        ["<ticker>", "<|cite|>"]
            .map(|text| added.iter().find(|token| token["content"] == text)?["id"].as_u64())
    }

    #[test]
    fn tokens_beside_the_tokenizer_get_the_ids_that_transformers_gives_them() {
        let ticker = entry("<ticker>", false);
        let cite = entry("<|cite|>", true);
        let legacy = json!({"<ticker>": 2, "<|cite|>": 3});
        let none = Value::Null;
        for (config, map, added, wanted) in [
            (json!({"added_tokens_decoder": {"2": ticker, "3": cite}}), &none, &none, [Some(2), Some(3)]),
            (json!({"added_tokens_decoder": {"6": ticker, "4": cite}}), &none, &none, [Some(3), Some(2)]),
            (json!({}), &none, &legacy, [Some(2), Some(3)]),
            // The newer key hides the older file.
            (json!({"added_tokens_decoder": {"2": ticker}}), &none, &json!({"<|cite|>": 3}), [Some(2), None]),
            (json!({"extra_special_tokens": ["<|cite|>", "<ticker>"]}), &none, &none, [Some(3), Some(2)]),
            (
                json!({"additional_special_tokens": ["<ticker>", "<|cite|>"]}),
                &none,
                &none,
                [Some(2), Some(3)],
            ),
            (json!({"pad_token": "<ticker>"}), &none, &none, [Some(2), None]),
            (json!({"image_token": "<ticker>"}), &none, &none, [Some(2), None]),
            (
                json!({}),
                &json!({"pad_token": "<|cite|>", "additional_special_tokens": ["<ticker>"]}),
                &none,
                [Some(3), Some(2)],
            ),
        ] {
            assert_eq!(ids(config.clone(), map.clone(), added.clone()), wanted, "{config}");
        }
    }

    #[test]
    fn flags_come_from_the_newer_file_and_names_make_tokens_special() {
        let mut tokenizer =
            json!({"added_tokens": [entry("<s>", false)], "model": {"vocab": {"<s>": 0, "</s>": 1}}});
        tokenizer["added_tokens"][0]["id"] = 0.into();
        let mut config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "rstrip": true}});
        complete(&mut tokenizer, &mut config, &Value::Null, &Value::Null);
        let added = &tokenizer["added_tokens"];
        assert_eq!((&added[0]["special"], &added[1]["special"]), (&true.into(), &true.into()));
        assert_eq!((&added[1]["id"], &added[1]["rstrip"]), (&1.into(), &true.into()), "{added}");
        config["added_tokens_decoder"] = json!({"0": {"content": "<s>", "lstrip": true, "special": true}});
        complete(&mut tokenizer, &mut config, &Value::Null, &Value::Null);
        assert_eq!(tokenizer["added_tokens"][0]["lstrip"], true);
    }
}
