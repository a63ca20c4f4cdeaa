//! Text → token ids, from the files of a Hugging Face folder or from the same content rebuilt out of GGUF metadata.
//!
//! [`TokenizerFiles`] is what defines a tokenizer, in the terms of `tokenizer.json` and `tokenizer_config.json`; the
//! GGUF dialect translates it to and from its own keys, so one [`Tokenizer`] serves both.

use std::iter;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;
use serde_json::Value;

use super::{added_tokens, older_tokenizers as older};
use crate::container::text::{self, read_json};
use crate::guard::guarded;

/// Says what a folder without a tokenizer lacks.
pub(crate) const NO_TOKENIZER: &str = "there is no tokenizer (`tokenizer.json`, `tokenizer.model`, or `vocab.json` with \
    `merges.txt`); copy it from the model's repository";

/// The files that define a tokenizer, parsed. Absent ones are `Value::Null`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerFiles {
    /// `tokenizer.json` of the `tokenizers` library.
    pub tokenizer: Value,
    /// `tokenizer_config.json`: names of the special tokens, `add_bos_token`, chat template.
    pub tokenizer_config: Value,
    /// `config.json`, for its `*_token_id` entries.
    pub config: Value,
    /// (name, Jinja source); the one named `default` is the chat template, others are alternatives (`tool_use`, …).
    pub chat_templates: Vec<(String, String)>,
    /// Scores of a SentencePiece model's pieces, which say in which order pieces are joined; none where merges are given.
    pub scores: Vec<f32>,
}

/// The tokens with a meaning of their own, by id. Names as in `tokenizer_config.json`, without `_token`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
    pub unk: Option<u32>,
    pub sep: Option<u32>,
    pub cls: Option<u32>,
    pub mask: Option<u32>,
}

impl TokenizerFiles {
    /// Reads the tokenizer of a model folder, with the tokens that only files beside `tokenizer.json` name; `None` if it has
    /// no tokenizer. Errors on files that are no JSON.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let json = |name: &str| Ok::<_, anyhow::Error>(read_json(&folder.join(name))?.unwrap_or_default());
        let mut tokenizer_config = json("tokenizer_config.json")?;
        let tokenizer = match read_json(&folder.join("tokenizer.json"))? {
            Some(tokenizer) => Some((tokenizer, vec![])),
            None => older::tokenizer_json(folder, &tokenizer_config)?,
        };
        let Some((mut tokenizer, scores)) = tokenizer else { return Ok(None) };
        let (special, added) = (json("special_tokens_map.json")?, json("added_tokens.json")?);
        added_tokens::complete(&mut tokenizer, &mut tokenizer_config, &special, &added);
        let chat_templates = chat_templates(folder, &tokenizer_config)?;
        let config = json("config.json")?;
        Ok(Some(TokenizerFiles { tokenizer, tokenizer_config, config, chat_templates, scores }))
    }

    /// Returns the ids of the special tokens: by the token's text in `tokenizer_config.json`, else by the id in
    /// `config.json` (gguf-py's order); a BOS that only the post-processor names is one, too.
    pub fn special_ids(&self) -> SpecialIds {
        let id = |name: &str| {
            let token = &self.tokenizer_config[format!("{name}_token")];
            let text = token.as_str().or_else(|| token["content"].as_str());
            let by_text = text.and_then(|text| self.token_id(text));
            let from_config = match &self.config[format!("{name}_token_id")] {
                // -1 is none.
                Value::Array(ids) => ids.iter().find_map(Value::as_u64),
                id => id.as_u64(),
            };
            by_text.or(from_config.and_then(|id| id.try_into().ok()))
        };
        SpecialIds {
            bos: self.template().and_then(|template| template.first).or_else(|| id("bos")),
            eos: id("eos"),
            pad: id("pad"),
            unk: id("unk"),
            sep: id("sep"),
            cls: id("cls"),
            mask: id("mask"),
        }
    }

    /// Returns the id of a token by its text, added tokens first.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        let added =
            self.added_tokens().iter().find(|token| token["content"] == text).map(|token| &token["id"]);
        added.or_else(|| self.tokenizer["model"]["vocab"].get(text))?.as_u64()?.try_into().ok()
    }

    /// Returns the text of a token by its id.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        if let Some(token) = self.added_tokens().iter().find(|token| token["id"] == id) {
            return token["content"].as_str();
        }
        match &self.tokenizer["model"]["vocab"] {
            Value::Object(vocab) => {
                vocab.iter().find(|(_, value)| **value == id).map(|(text, _)| text.as_str())
            }
            Value::Array(pieces) => pieces.get(id as usize)?[0].as_str(),
            _ => None,
        }
    }

    /// Returns the `added_tokens` entries of `tokenizer.json`.
    pub fn added_tokens(&self) -> &[Value] {
        self.tokenizer["added_tokens"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Returns the tokens that go (before, after) every text.
    ///
    /// The post-processor's template decides; without one, `add_bos_token` and `add_eos_token` of the configuration;
    /// without those, tokenizers with byte fallback (SentencePiece models) get a BOS and others nothing.
    pub fn surrounding(&self) -> (Option<u32>, Option<u32>) {
        if let Some(template) = self.template() {
            return (template.first, template.last);
        }
        let configured = |name: &str| self.tokenizer_config[name].as_bool();
        let byte_fallback = self.tokenizer["model"]["byte_fallback"] == true;
        let special = self.special_ids();
        (
            special.bos.filter(|_| configured("add_bos_token").unwrap_or(byte_fallback)),
            special.eos.filter(|_| configured("add_eos_token").unwrap_or(false)),
        )
    }

    fn template(&self) -> Option<Template> {
        let (first, last, ids) = template(&self.tokenizer["post_processor"])?;
        // The template's own ids count, not those that the vocabulary has for its tokens.
        let id = |token: &str| {
            let own = ids[token]["ids"].get(0).and_then(Value::as_u64).and_then(|id| id.try_into().ok());
            own.or_else(|| self.token_id(token))
        };
        Some(Template { first: first.and_then(id), last: last.and_then(id) })
    }

    /// Refuses post-processors that put several tokens before or after a text.
    fn check_template(&self) -> Result<()> {
        let single = single(&self.tokenizer["post_processor"]);
        let count = single.iter().filter(|item| item.get("SpecialToken").is_some()).count();
        let ends = [single.first(), single.last()].into_iter().flatten();
        let at_ends = ends.filter(|item| item.get("SpecialToken").is_some()).count();
        ensure!(
            count <= at_ends,
            "the post-processor puts {count} tokens around a text; at most one before and one after are supported"
        );
        Ok(())
    }
}

/// The tokens that a post-processor puts around a text.
struct Template {
    first: Option<u32>,
    last: Option<u32>,
}

/// Returns a post-processor's (first, last) token around one text, and what it says of their ids; `None` if it adds none.
fn template(post_processor: &Value) -> Option<(Option<&str>, Option<&str>, &Value)> {
    match post_processor["type"].as_str()? {
        "TemplateProcessing" => {
            let single = post_processor["single"].as_array()?;
            fn text(item: Option<&Value>) -> Option<&str> {
                item?["SpecialToken"]["id"].as_str()
            }
            Some((text(single.first()), text(single.last()), &post_processor["special_tokens"]))
        }
        "RobertaProcessing" | "BertProcessing" => {
            Some((post_processor["cls"][0].as_str(), post_processor["sep"][0].as_str(), &Value::Null))
        }
        "Sequence" => post_processor["processors"].as_array()?.iter().find_map(template),
        _ => None,
    }
}

/// Returns the items of the single-sequence template, if the post-processor has one.
fn single(post_processor: &Value) -> &[Value] {
    match post_processor["type"].as_str() {
        Some("TemplateProcessing") => post_processor["single"].as_array().map_or(&[], Vec::as_slice),
        Some("Sequence") => {
            let steps = post_processor["processors"].as_array().into_iter().flatten();
            steps.map(single).find(|items| !items.is_empty()).unwrap_or(&[])
        }
        _ => &[],
    }
}

/// Returns (name, source) of the chat templates. A folder may spell them in three places; transformers prefers the
/// file `chat_template.jinja` that it writes itself, and older releases knew only the entry in the configuration.
fn chat_templates(folder: &Path, tokenizer_config: &Value) -> Result<Vec<(String, String)>> {
    let named = |source: &Value| -> Option<Vec<(String, String)>> {
        match &source["chat_template"] {
            Value::String(text) => Some(vec![("default".to_string(), text.clone())]),
            Value::Array(list) => list
                .iter()
                .map(|t| Some((t["name"].as_str()?.to_string(), t["template"].as_str()?.to_string())))
                .collect(),
            _ => None,
        }
    };
    let jinja = folder.join("chat_template.jinja");
    if jinja.is_file() {
        let text = text::read(&jinja)?;
        let mut templates = vec![("default".to_string(), text)];
        templates.extend(additional_templates(&folder.join("additional_chat_templates"))?);
        return Ok(templates);
    }
    let json = read_json(&folder.join("chat_template.json"))?.unwrap_or_default();
    Ok(named(tokenizer_config).or_else(|| named(&json)).unwrap_or_default())
}

/// Returns the templates of transformers' `additional_chat_templates` folder, `NAME.jinja` each, sorted by name.
fn additional_templates(folder: &Path) -> Result<Vec<(String, String)>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut templates = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("{}: cannot be listed", folder.display()))?.path();
        if let (Some(name), true) = (path.file_stem(), path.extension().is_some_and(|e| e == "jinja")) {
            let text = text::read(&path)?;
            templates.push((name.to_string_lossy().into_owned(), text));
        }
    }
    templates.sort();
    Ok(templates)
}

/// Bytes of text that one thread encodes at a time.
const PIECE: usize = 32 << 10;
/// Bytes on each side of a cut that say whether it is one.
const AROUND: usize = 1 << 10;

/// Returns where the first line past byte `from` starts that does not start with white space.
fn line_start(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let starts = |at: usize| bytes[at - 1] == b'\n' && !bytes[at].is_ascii_whitespace();
    (from.max(1)..bytes.len()).find(|&at| starts(at))
}

/// Text ↔ token ids.
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    special: SpecialIds,
    /// What goes before and after every text.
    surrounding: (Option<u32>, Option<u32>),
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder. Errors if there is none, or it is not one `tokenizers` can load.
    pub fn open(folder: &Path) -> Result<Self> {
        let Some(files) = TokenizerFiles::read(folder)? else {
            bail!("{}: {}", folder.display(), NO_TOKENIZER);
        };
        Self::from_files(&files).with_context(|| folder.join("tokenizer.json").display().to_string())
    }

    /// Builds a tokenizer from parsed files. Errors on what the `tokenizers` library cannot load.
    pub fn from_files(files: &TokenizerFiles) -> Result<Self> {
        let json = serde_json::to_vec(&files.tokenizer)?;
        let built = guarded("the tokenizers library", || tokenizers::Tokenizer::from_bytes(json))?;
        let mut tokenizer = built.map_err(|e| anyhow!("not a tokenizer: {e}"))?;
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        tokenizer.with_padding(None);
        files.check_template()?;
        Ok(Tokenizer { tokenizer, special: files.special_ids(), surrounding: files.surrounding() })
    }

    /// Returns the ids of `text`. `add_special` puts BOS before and EOS after it where the model's convention does.
    /// Special tokens spelled out in the text become their ids, as in transformers. Long texts are encoded in parallel.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let ids: Vec<Vec<u32>> =
            self.pieces(text).into_par_iter().map(|piece| self.ids(piece)).collect::<Result<_>>()?;
        let (bos, eos) = if add_special { self.surrounding } else { (None, None) };
        Ok(bos.into_iter().chain(ids.into_iter().flatten()).chain(eos).collect())
    }

    /// Returns what [`Tokenizer::encode`] does, or of a long text the beginning of it with more than `count` ids.
    pub fn encode_start(&self, text: &str, add_special: bool, count: usize) -> Result<Vec<u32>> {
        // Where tokens are shorter than this, more of the text is read.
        let mut bytes = count.saturating_mul(4).max(PIECE);
        while let Some(cut) = line_start(text, bytes).filter(|&cut| self.may_cut(text, 0, cut)) {
            let ids = self.encode(&text[..cut], add_special)?;
            // The last one may be the end of a sequence.
            if ids.len() > count {
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(2);
        }
        self.encode(text, add_special)
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = guarded("the tokenizers library", || self.tokenizer.encode_fast(text, false))?;
        let encoding = encoded.map_err(|e| anyhow!("cannot tokenize: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Cuts a long text before lines where the tokens of what stands around the cut are those of both sides. A tokenizer
    /// that splits text by a pattern, from left to right, is then where it would be in the whole text. For others (models
    /// of SentencePiece, which mark the start of a text) no cut passes, and the text stays whole.
    fn pieces<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let next = |&start: &usize| line_start(text, start + PIECE);
        let mut bounds: Vec<usize> = iter::successors(Some(0), next).collect();
        let pairs = bounds.par_windows(2);
        let passed = pairs.position_first(|pair| !self.may_cut(text, pair[0], pair[1]));
        bounds.truncate(passed.map_or(bounds.len(), |pair| pair + 1));
        bounds.push(text.len());
        bounds.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
    }

    /// Whether the tokens around a cut are those of both sides; `last` is the cut before.
    fn may_cut(&self, text: &str, last: usize, cut: usize) -> bool {
        let before = line_start(text, cut - AROUND).filter(|&start| start < cut).unwrap_or(last);
        let after = line_start(text, cut + AROUND).unwrap_or(text.len());
        let ids = |range: Range<usize>| self.ids(&text[range]).ok();
        match (ids(before..cut), ids(cut..after), ids(before..after)) {
            (Some(left), Some(right), Some(whole)) => [left, right].concat() == whole,
            _ => false,
        }
    }

    /// Returns the text of `ids`, special tokens left out. A character cut in half decodes to U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let decoded = guarded("the tokenizers library", || self.tokenizer.decode(ids, true))?;
        decoded.map_err(|e| anyhow!("cannot decode tokens: {e}"))
    }

    /// Returns a token's text as it stands in the vocabulary; empty where the id has none.
    pub fn piece(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// Returns the texts of the added tokens, by id.
    pub fn added_tokens(&self) -> Vec<String> {
        let mut added: Vec<_> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        added.into_iter().map(|(_, token)| token.content).collect()
    }

    /// Returns the number of tokens, added ones included. Embedding tables may have more rows (padding).
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Returns the BOS id if the model's convention puts one before every text, which is when evaluation starts each
    /// window with it (as llama-perplexity does).
    pub fn bos(&self) -> Option<u32> {
        self.surrounding.0
    }

    /// Returns the special tokens.
    pub fn special_ids(&self) -> SpecialIds {
        self.special
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A byte-level tokenizer of five tokens, in the shape of a Hugging Face folder.
    fn files() -> TokenizerFiles {
        TokenizerFiles {
            tokenizer: json!({
                "version": "1.0",
                "added_tokens": [{"id": 0, "content": "<s>", "special": true, "single_word": false,
                                  "lstrip": false, "rstrip": false, "normalized": false}],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                                  "use_regex": true},
                "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                "truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
                "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4},
                          "merges": [["a", "b"]], "byte_fallback": false, "ignore_merges": false},
            }),
            tokenizer_config: json!({"bos_token": "<s>", "eos_token": {"content": "b"}}),
            config: json!({"bos_token_id": 4, "pad_token_id": 1, "eos_token_id": [3, 2]}),
            ..TokenizerFiles::default()
        }
    }

    #[test]
    fn bos_is_added_only_where_the_template_starts_with_a_special_token() {
        let mut files = files();
        let encode =
            |files: &TokenizerFiles| Tokenizer::from_files(files).unwrap().encode("ab b", true).unwrap();
        assert_eq!(encode(&files), [3, 4, 2], "no post-processor, no configuration, no byte fallback");
        files.tokenizer_config["add_bos_token"] = json!(true);
        assert_eq!(encode(&files), [0, 3, 4, 2]);
        let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
        files.tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": [sequence],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {}});
        assert_eq!(encode(&files), [3, 4, 2], "the template wins over the configuration");
        let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        files.tokenizer["post_processor"]["single"].as_array_mut().unwrap().insert(0, bos);
        files.tokenizer["post_processor"]["special_tokens"] =
            json!({"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}});
        assert_eq!(encode(&files), [0, 3, 4, 2]);
        assert_eq!(Tokenizer::from_files(&files).unwrap().encode("ab", false).unwrap(), [3]);
    }

    #[test]
    fn a_text_in_pieces_has_the_tokens_of_the_whole() {
        let text = crate::embedded::EVAL_TEXT;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("eval/tiny-llama");
        let tokenizer = Tokenizer::open(&folder).unwrap();
        assert!(tokenizer.pieces(text).len() > 5);
        assert!(tokenizer.encode(text, false).unwrap() == tokenizer.ids(text).unwrap());
    }

    #[test]
    fn the_start_of_a_text_has_the_ids_that_the_whole_has_there() {
        let text = crate::embedded::EVAL_TEXT;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("eval/tiny-llama");
        let tokenizer = Tokenizer::open(&folder).unwrap();
        let whole = tokenizer.encode(text, true).unwrap();
        for count in [1, 5_000, 20_000, whole.len(), usize::MAX] {
            let start = tokenizer.encode_start(text, true, count).unwrap();
            assert!(start.len() >= count.min(whole.len()) && whole.starts_with(&start), "{count}");
            assert_eq!(start.len() < whole.len(), count <= 20_000, "{count}");
        }
    }

    #[test]
    fn a_tokenizer_that_marks_the_start_of_a_text_gets_it_whole() {
        let mut files = files();
        files.tokenizer["normalizer"] = json!({"type": "Prepend", "prepend": "a"});
        let text = "b ab\n".repeat(30_000);
        let whole = Tokenizer::from_files(&files).unwrap();
        assert_eq!(whole.pieces(&text), [text.as_str()]);
    }

    #[test]
    fn truncation_in_the_file_is_not_applied() {
        assert_eq!(Tokenizer::from_files(&files()).unwrap().encode("abababab", false).unwrap(), [3, 3, 3, 3]);
    }

    #[test]
    fn special_ids_come_from_the_token_text_then_from_config() {
        let special = files().special_ids();
        assert_eq!((special.bos, special.eos, special.pad, special.unk), (Some(0), Some(2), Some(1), None));
    }

    #[test]
    fn a_folder_without_a_tokenizer_is_an_error_that_names_the_cure() {
        let folder = tempfile::tempdir().unwrap();
        let error = |folder: &Path| format!("{:#}", Tokenizer::open(folder).err().unwrap());
        assert!(error(folder.path()).contains("copy it from the model's repository"));
        std::fs::write(folder.path().join("tokenizer.model"), b"").unwrap();
        assert!(error(folder.path()).contains("no SentencePiece model"));
        std::fs::write(folder.path().join("tokenizer.json"), b"{").unwrap();
        assert!(error(folder.path()).contains("not valid JSON"));
    }

    #[test]
    fn chat_templates_are_found_wherever_a_folder_keeps_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer.json", "{}");
        let templates = || TokenizerFiles::read(folder.path()).unwrap().unwrap().chat_templates;
        let pair = |name: &str, text: &str| (name.to_string(), text.to_string());
        assert_eq!(templates(), []);
        write("chat_template.json", r#"{"chat_template": "from json"}"#);
        assert_eq!(templates(), [pair("default", "from json")]);
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}"#,
        );
        assert_eq!(templates(), [pair("default", "a"), pair("rag", "b")]);
        write("chat_template.jinja", "from jinja");
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        write("additional_chat_templates/tool_use.jinja", "tools");
        assert_eq!(templates(), [pair("default", "from jinja"), pair("tool_use", "tools")]);
    }
}
