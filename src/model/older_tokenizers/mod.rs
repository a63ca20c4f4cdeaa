//! Tokenizers from before `tokenizer.json`, as the `tokenizer.json` that transformers 5.17 makes of them: a
//! byte-level vocabulary with its merges (`vocab.json`, `merges.txt`), or a SentencePiece model
//! (`tokenizer.model`).

mod sentence_piece;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::container::text::{self, read_json};

/// What Qwen cuts texts by (transformers, models/qwen2/tokenization_qwen2.py).
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns the `tokenizer.json` of a folder that has none but older files, with the scores of its pieces if it is a
/// SentencePiece model; `None` if it has no tokenizer at all.
///
/// # Errors
/// Damaged files; tokenizer classes whose steps are not known; SentencePiece models other than BPE.
pub(super) fn tokenizer_json(folder: &Path, config: &Value) -> Result<Option<(Value, Vec<f32>)>> {
    let model = folder.join("tokenizer.model");
    if let Some(vocab) = read_json(&folder.join("vocab.json"))? {
        let merges = folder.join("merges.txt");
        ensure!(
            merges.is_file(),
            "{}: there is `vocab.json`, but no `merges.txt`; download it",
            folder.display()
        );
        let class = class(folder, config)?;
        let tokenizer = byte_level(vocab, &text::read(&merges)?, &class, config);
        let tokenizer = tokenizer.with_context(|| format!("{}", folder.display()))?;
        return Ok(Some((tokenizer, vec![])));
    }
    match model.is_file() {
        true => sentence_piece::read(&model, config).map(Some),
        false => Ok(None),
    }
}

/// Returns the tokenizer's class: the one that is named, else that of the model's type.
fn class(folder: &Path, config: &Value) -> Result<String> {
    let named = config["tokenizer_class"].as_str().map(|class| class.trim_end_matches("Fast").to_string());
    if let Some(class) = named {
        return Ok(class);
    }
    let model = read_json(&folder.join("config.json"))?.unwrap_or_default();
    let model_type = model["model_type"].as_str().unwrap_or_default();
    let class = [("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("qwen3", "Qwen2Tokenizer")];
    let found = class.iter().find(|(name, _)| *name == model_type).map(|(_, class)| class.to_string());
    found.with_context(|| {
        format!(
            "{}: `vocab.json` and `merges.txt` do not say how texts are cut before merging, and `tokenizer_config.json` \
             names no `tokenizer_class`; save `tokenizer.json` with transformers \
             (`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)",
            folder.display()
        )
    })
}

/// Returns a byte-level tokenizer with the steps of that class.
fn byte_level(vocab: Value, merges: &str, class: &str, config: &Value) -> Result<Value> {
    ensure!(vocab.is_object(), "vocab.json: wanted an object of tokens and ids");
    let prefix = config["add_prefix_space"] == true;
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
    let (normalizer, pre_tokenizer) = match class {
        "GPT2Tokenizer" => (Value::Null, bytes(true)),
        "Qwen2Tokenizer" => {
            let split = json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
            let steps = json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]});
            (json!({"type": "NFC"}), steps)
        }
        other => bail!(
            "tokenizer class `{other}` with `vocab.json`: known are `GPT2Tokenizer` and `Qwen2Tokenizer`; save \
             `tokenizer.json` with transformers (`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)"
        ),
    };
    let pairs = merges
        .lines()
        .enumerate()
        .filter(|(at, line)| !(line.is_empty() || *at == 0 && line.starts_with('#')));
    let pairs = pairs.map(|(at, line)| {
        let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
        let (left, right) = pair.with_context(|| format!("merges.txt: line {} is no pair", at + 1))?;
        Ok(json!([left, right]))
    });
    Ok(json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs.collect::<Result<Vec<_>>>()?, "byte_fallback": false,
                  "fuse_unk": false, "ignore_merges": false},
    }))
}
