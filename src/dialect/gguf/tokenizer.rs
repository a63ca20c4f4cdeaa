//! `tokenizer.json` ↔ the `tokenizer.*` keys of a GGUF file.
//!
//! Two models: `gpt2`, byte-level BPE (tokens, merges and a pre-tokenizer id), and `llama`, BPE over characters with
//! bytes as fallback as SentencePiece has it (tokens and scores; spaces are U+2581). Keys and token types: gguf-py's
//! constants.py and vocab.py; what the loader makes of them: llama.cpp src/llama-vocab.cpp, commit 0c1e57098.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::pre_tokenizer;
use crate::container::gguf::{Metadata, Value as Gguf};
use crate::model::joins::Joins;
use crate::model::tokenizer::TokenizerFiles;

/// Types of `tokenizer.ggml.token_type`.
mod token_type {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";
/// Bytes of the longest token of a SentencePiece model; SentencePiece's own limit is 64 characters unless it is raised.
const LONGEST: usize = 1024;
/// The space of byte-level BPE.
const BYTE_SPACE: &str = "\u{120}";

/// Returns the `tokenizer.*` keys; `rows` is the number of embedding rows, which the token list must have.
///
/// # Errors
/// Name what llama.cpp has no equivalent for: other models than BPE, unknown pre-tokenizers, tokens past the last row or
/// of the same text.
pub fn write(files: &TokenizerFiles, rows: usize) -> Result<Metadata> {
    let model = &files.tokenizer["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    ensure!(
        kind == "BPE" && model["merges"].is_array(),
        "tokenizer model `{kind}`: wanted `BPE` with `merges`; llama.cpp's other models are not written"
    );
    let mut out = Metadata::default();
    let tokens = tokens(files, rows)?;
    if model["byte_fallback"] == true {
        out.set("tokenizer.ggml.model", "llama");
        out.set("tokenizer.ggml.pre", "default");
        out.set("tokenizer.ggml.add_space_prefix", adds_space_prefix(&files.tokenizer)?);
        let scores = match files.scores.is_empty() {
            true => scores_of_merges(model, &tokens),
            false => scores_of_pieces(files, &tokens),
        };
        out.set("tokenizer.ggml.scores", scores);
    } else {
        out.set("tokenizer.ggml.model", "gpt2");
        out.set("tokenizer.ggml.pre", pre_tokenizer::recognise(&files.tokenizer)?.id);
        let merges = merges(model).map(|pair| Ok(pair?.map(|part| part.replace(' ', BYTE_SPACE)).join(" ")));
        out.set("tokenizer.ggml.merges", merges.collect::<Result<Vec<_>>>()?);
    }
    let (texts, types): (Vec<_>, Vec<_>) = tokens.into_iter().unzip();
    out.set("tokenizer.ggml.tokens", texts);
    out.set("tokenizer.ggml.token_type", types);
    set_special_ids(files, rows, &mut out)?;
    set_chat_templates(&files.chat_templates, &mut out);
    Ok(out)
}

/// Returns (text, type) of every id below `rows`; ids without a token are `[PAD{id}]`, unused.
fn tokens(files: &TokenizerFiles, rows: usize) -> Result<Vec<(String, i32)>> {
    let model = &files.tokenizer["model"];
    let byte_fallback = model["byte_fallback"] == true;
    let mut tokens = BTreeMap::new();
    for (text, id) in model["vocab"].as_object().context("tokenizer.json: `model.vocab` is missing")? {
        let id = id.as_u64().with_context(|| format!("tokenizer.json: token `{text}` has id `{id}`"))?;
        tokens.insert(id, (text.clone(), model_token_type(model, text)));
    }
    for token in files.added_tokens() {
        let text = token["content"].as_str();
        let (Some(text), Some(id)) = (text, token["id"].as_u64()) else {
            bail!("tokenizer.json: added token `{token}` lacks `content` or `id`")
        };
        let added = if token["special"] == true || looks_special(text) {
            (text.to_string(), token_type::CONTROL)
        } else {
            // llama.cpp looks for these in the text before spaces become U+2581.
            let text = if byte_fallback { text.replace(SPACE, " ") } else { text.to_string() };
            (text, token_type::USER_DEFINED)
        };
        // The unknown token and the bytes of a SentencePiece model may be listed again; they keep their type.
        let known = tokens.get(&id).map_or(token_type::NORMAL, |(_, kind)| *kind);
        if known == token_type::NORMAL {
            tokens.insert(id, added);
        }
    }
    if let Some((id, (text, _))) = tokens.range(rows as u64..).next() {
        bail!(
            "token `{text}` has id {id}, but the embedding table has only {rows} rows; add rows or drop the token"
        );
    }
    let padding = |id| (format!("[PAD{id}]"), token_type::UNUSED);
    let list: Vec<_> = (0..rows as u64).map(|id| tokens.remove(&id).unwrap_or_else(|| padding(id))).collect();
    let mut seen = HashSet::new();
    match list.iter().position(|(text, _)| !seen.insert(text)) {
        Some(id) => bail!(
            "token `{}` (id {id}) has the text of an earlier one; llama.cpp needs them unique",
            list[id].0
        ),
        None => Ok(list),
    }
}

/// Type of a token of the model's own vocabulary.
fn model_token_type(model: &Value, text: &str) -> i32 {
    if model["byte_fallback"] != true {
        token_type::NORMAL
    } else if model["unk_token"] == text {
        token_type::UNKNOWN
    } else if byte_of(text).is_some() {
        token_type::BYTE
    } else {
        token_type::NORMAL
    }
}

/// The byte that a fallback token such as `<0x0A>` stands for.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Added tokens that some files forget to mark `special` (convert_hf_to_gguf.py, `does_token_look_special`).
fn looks_special(text: &str) -> bool {
    matches!(text, "<pad>" | "<mask>")
        || (text.starts_with("<|") && text.ends_with("|>"))
        || (text.starts_with("<unused") && text.ends_with('>'))
}

/// Returns the merges as pairs, in either notation (`"a b"` or `["a", "b"]`).
fn merges(model: &Value) -> impl Iterator<Item = Result<[&str; 2]>> {
    model["merges"].as_array().into_iter().flatten().map(|merge| {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        pair.map(|(left, right)| [left, right])
            .with_context(|| format!("tokenizer.json: merge `{merge}` is no pair"))
    })
}

/// Returns the scores that make llama.cpp join what the merges join, in their order: a token's score is minus the rank
/// of the first merge that makes it, so the earliest merge scores highest. Tokens that no merge makes come last.
fn scores_of_merges(model: &Value, tokens: &[(String, i32)]) -> Vec<f32> {
    let mut ranks = HashMap::new();
    for (rank, [left, right]) in merges(model).flatten().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let last = model["merges"].as_array().map_or(0, Vec::len);
    let score = |(text, kind): &(String, i32)| match *kind {
        token_type::NORMAL => -(ranks.get(text).copied().unwrap_or(last) as f32),
        // What SentencePiece writes for control, unknown and byte tokens.
        _ => 0.0,
    };
    tokens.iter().map(score).collect()
}

/// Returns the scores of a SentencePiece model, and convert_hf_to_gguf.py's numbers for tokens that are named beside it and
/// for rows without a token.
fn scores_of_pieces(files: &TokenizerFiles, tokens: &[(String, i32)]) -> Vec<f32> {
    let beside = &files.tokenizer_config["added_tokens_decoder"];
    let score = |(id, (_, kind)): (usize, &(String, i32))| match files.scores.get(id) {
        Some(&score) if beside[id.to_string()].is_null() => score,
        None if *kind == token_type::UNUSED => -10_000.0,
        _ => -1_000.0,
    };
    tokens.iter().enumerate().map(score).collect()
}

/// Returns whether a space is put before a text. Errors unless spaces, and nothing else, become U+2581.
fn adds_space_prefix(tokenizer: &Value) -> Result<bool> {
    let steps = |entry: &Value, list: &str| match entry["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => entry[list].as_array().cloned().unwrap_or_default(),
        Some(_) => vec![entry.clone()],
    };
    let normalizers = steps(&tokenizer["normalizer"], "normalizers");
    let pre_tokenizers = steps(&tokenizer["pre_tokenizer"], "pretokenizers");
    let (mut prefix, mut replaced) = (false, false);
    for step in normalizers.iter().chain(&pre_tokenizers) {
        match step["type"].as_str().unwrap_or_default() {
            "Prepend" if step["prepend"] == SPACE => prefix = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == SPACE => replaced = true,
            "Metaspace" if step["replacement"] == SPACE && step["split"] == false => {
                (prefix, replaced) = (step["prepend_scheme"] != "never", true);
            }
            _ => bail!(
                "tokenizer step `{step}`: wanted only `Prepend`, `Replace` or an unsplit `Metaspace` of U+2581"
            ),
        }
    }
    ensure!(
        replaced,
        "the tokenizer has byte fallback but no step that turns spaces into U+2581; llama.cpp always does"
    );
    Ok(prefix)
}

fn set_special_ids(files: &TokenizerFiles, rows: usize, out: &mut Metadata) -> Result<()> {
    let special = files.special_ids();
    // What follows a text is llama.cpp's EOS; another token that ends an answer is its EOT (gguf-py, vocab.py).
    let last = files.surrounding().1.filter(|last| Some(*last) != special.eos);
    for (name, id) in [
        ("bos", special.bos),
        ("eos", last.or(special.eos)),
        ("eot", special.eos.filter(|_| last.is_some())),
        ("unknown", special.unk),
        // The format's own spelling.
        ("seperator", special.sep),
        ("padding", special.pad),
        ("cls", special.cls),
        ("mask", special.mask),
    ] {
        let Some(id) = id else { continue };
        ensure!(
            (id as usize) < rows,
            "the {name} token has id {id}, but the embedding table has only {rows} rows"
        );
        out.set(&format!("tokenizer.ggml.{name}_token_id"), id);
    }
    let (before, after) = files.surrounding();
    out.set("tokenizer.ggml.add_bos_token", before.is_some());
    out.set("tokenizer.ggml.add_eos_token", after.is_some());
    Ok(())
}

fn set_chat_templates(templates: &[(String, String)], out: &mut Metadata) {
    let mut names = Vec::new();
    for (name, source) in templates {
        if name == "default" {
            out.set("tokenizer.chat_template", source.as_str());
        } else {
            out.set(&format!("tokenizer.chat_template.{name}"), source.as_str());
            names.push(name.clone());
        }
    }
    if !names.is_empty() {
        out.set("tokenizer.chat_templates", names);
    }
}

/// Inverse of [`write()`], for files of any origin: a `tokenizer.json` and `tokenizer_config.json` that tokenize alike.
///
/// # Errors
/// Name the missing or malformed key, or the tokenizer model or pre-tokenizer that is not supported.
pub fn read(metadata: &Metadata) -> Result<TokenizerFiles> {
    let texts: Vec<&str> = strings(metadata, "tokenizer.ggml.tokens")?;
    let types = match metadata.get("tokenizer.ggml.token_type").and_then(Gguf::as_array) {
        Some(types) => types.values().map(|kind| kind.as_u64().unwrap_or_default() as i32).collect(),
        None => vec![token_type::NORMAL; texts.len()],
    };
    ensure!(
        types.len() == texts.len(),
        "{} entries in `tokenizer.ggml.token_type`, wanted {}, one per token",
        types.len(),
        texts.len()
    );
    let tokens: Vec<(&str, i32)> = texts.into_iter().zip(types).collect();
    let model = metadata.str("tokenizer.ggml.model")?;
    let (tokenizer, add_bos, scores) = match model {
        "gpt2" => {
            byte_level_bpe(metadata, &tokens).map(|(tokenizer, add_bos)| (tokenizer, add_bos, vec![]))?
        }
        "llama" => {
            let scores = scores(metadata, tokens.len())?;
            (sentence_piece(metadata, &tokens, &scores)?, true, scores)
        }
        other => bail!("`tokenizer.ggml.model` is `{other}`; known are `gpt2` and `llama`"),
    };
    let flag = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}")).and_then(Gguf::as_bool);
    let mut config = Map::new();
    config.insert("add_bos_token".into(), flag("add_bos_token").unwrap_or(add_bos).into());
    config.insert("add_eos_token".into(), flag("add_eos_token").unwrap_or(false).into());
    for (name, key) in
        [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("sep", "seperator"), ("pad", "padding")]
    {
        let id = metadata.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(Gguf::as_u64);
        let id = id.or_else(|| {
            default_id(model, name)
                .filter(|_| config.get(&format!("add_{name}_token")) == Some(&Value::Bool(true)))
        });
        if let Some((text, _)) = id.and_then(|id| tokens.get(id as usize)) {
            config.insert(format!("{name}_token"), json!(text));
        }
    }
    let mut chat_templates = Vec::new();
    for (key, value) in &metadata.0 {
        let Some(name) = key.strip_prefix("tokenizer.chat_template") else { continue };
        if let (true, Some(source)) = (name.is_empty() || name.starts_with('.'), value.as_str()) {
            let name = name.strip_prefix('.').unwrap_or("default");
            chat_templates.push((name.to_string(), source.to_string()));
        }
    }
    Ok(TokenizerFiles {
        tokenizer,
        tokenizer_config: config.into(),
        config: Value::Null,
        chat_templates,
        scores,
    })
}

/// Returns what llama.cpp puts before and after texts where a file says that it should, but not what
/// (`llama_vocab::impl::load`).
fn default_id(model: &str, name: &str) -> Option<u64> {
    match (model, name) {
        ("llama", "bos") => Some(1),
        ("llama", "eos") => Some(2),
        ("gpt2", "bos" | "eos") => Some(11),
        _ => None,
    }
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Result<Vec<&'a str>> {
    let items =
        metadata.get(key).and_then(Gguf::as_array).with_context(|| format!("GGUF key `{key}` is missing"))?;
    let strings = items.as_strings().map(|items| items.iter().map(String::as_str).collect());
    strings.with_context(|| format!("GGUF key `{key}` holds something other than strings"))
}

/// Returns the `vocab` and `added_tokens` of a `tokenizer.json`; unused ids have no token.
fn vocabulary(tokens: &[(&str, i32)]) -> (Map<String, Value>, Vec<Value>) {
    let (mut vocab, mut added) = (Map::new(), Vec::new());
    for (id, &(text, kind)) in tokens.iter().enumerate() {
        if kind == token_type::UNUSED {
            continue;
        }
        if matches!(kind, token_type::CONTROL | token_type::USER_DEFINED) {
            added.push(json!({"id": id, "content": text, "special": kind == token_type::CONTROL, "single_word": false,
                              "lstrip": false, "rstrip": false, "normalized": false}));
        }
        vocab.insert(text.to_string(), id.into());
    }
    (vocab, added)
}

/// Returns the `tokenizer.json` of a `gpt2` model and whether it puts BOS first by default.
fn byte_level_bpe(metadata: &Metadata, tokens: &[(&str, i32)]) -> Result<(Value, bool)> {
    let pre = pre_tokenizer::by_id(metadata.str("tokenizer.ggml.pre")?)?;
    let merges = strings(metadata, "tokenizer.ggml.merges")?;
    let pairs = merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ').with_context(|| format!("merge `{merge}` is no pair"))?;
        Ok(json!([left, right]))
    });
    let (vocab, added_tokens) = vocabulary(tokens);
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added_tokens,
        "pre_tokenizer": pre.to_json(),
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs.collect::<Result<Vec<_>>>()?,
                  "byte_fallback": false, "ignore_merges": pre.ignores_merges()},
    });
    Ok((tokenizer, pre.adds_bos))
}

/// Returns one score per token of a `llama` model.
fn scores(metadata: &Metadata, tokens: usize) -> Result<Vec<f32>> {
    let scores = metadata.get("tokenizer.ggml.scores").and_then(Gguf::as_array);
    let scores: Vec<f32> = scores
        .into_iter()
        .flat_map(|scores| scores.values())
        .filter_map(|score| score.as_f64().map(|score| score as f32))
        .collect();
    ensure!(
        scores.len() == tokens,
        "{} numbers in `tokenizer.ggml.scores`, wanted {tokens}, one per token",
        scores.len()
    );
    Ok(scores)
}

/// Returns the `tokenizer.json` of a `llama` model: its scores become merges.
fn sentence_piece(metadata: &Metadata, tokens: &[(&str, i32)], scores: &[f32]) -> Result<Value> {
    let prefix = metadata.get("tokenizer.ggml.add_space_prefix").and_then(Gguf::as_bool).unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = tokens.iter().find(|(_, kind)| *kind == token_type::UNKNOWN).map(|(text, _)| *text);
    // The merges of a token can take memory in the square of its length.
    let long = tokens.iter().map(|(text, _)| text.len()).find(|&len| len > LONGEST);
    ensure!(long.is_none(), "a token has {} bytes; wanted at most {LONGEST}", long.unwrap_or_default());
    let merges = merges_by_score(tokens, scores);
    let (vocab, added_tokens) = vocabulary(tokens);
    Ok(json!({
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown, "fuse_unk": true,
                  "byte_fallback": true, "ignore_merges": false},
    }))
}

/// Returns every way to join two tokens into a third, best score first: what llama.cpp looks for pair by pair.
fn merges_by_score(tokens: &[(&str, i32)], scores: &[f32]) -> Vec<Value> {
    let joinable = |kind| matches!(kind, token_type::NORMAL | token_type::USER_DEFINED);
    let joins = Joins::of(tokens.iter().filter(|(_, kind)| joinable(*kind)).map(|(text, _)| *text));
    let mut order: Vec<usize> = (0..tokens.len()).filter(|&id| tokens[id].1 == token_type::NORMAL).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    // Longer left parts first, as transformers orders the merges of one token.
    let halves = order.into_iter().flat_map(|id| joins.halves(tokens[id].0).rev());
    halves.map(|(left, right)| json!([left, right])).collect()
}

#[cfg(test)]
mod tests;
