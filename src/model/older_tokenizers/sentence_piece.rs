//! `tokenizer.model` of SentencePiece (BPE) → `tokenizer.json`, as transformers' `LlamaTokenizer` has it.
//!
//! ```text
//! ModelProto      1: SentencePiece*   2: TrainerSpec   3: NormalizerSpec
//! SentencePiece   1: string piece   2: float score   3: enum type (1 normal, 2 unknown, 3 control, 4 user, 5 unused, 6 byte)
//! TrainerSpec     3: enum model_type (1 unigram, 2 BPE)   35: bool byte_fallback
//! NormalizerSpec  2: bytes precompiled_charsmap   3: bool add_dummy_prefix
//! ```
//!
//! Numbers of fields: sentencepiece_model.proto of google/sentencepiece; wire format:
//! protobuf.dev/programming-guides/encoding.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::container::text;
use crate::model::joins::Joins;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

#[derive(Clone, Debug, Default)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

#[derive(Debug, Default)]
struct Model {
    pieces: Vec<Piece>,
    model_type: u64,
    byte_fallback: bool,
    charsmap: bool,
}

/// Reads a file, with the score of every piece; `config` is `tokenizer_config.json`, which says whether a space is put before a text.
pub(super) fn read(path: &Path, config: &Value) -> Result<(Value, Vec<f32>)> {
    let shown = || format!("{}", path.display());
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    text::refuse_pointer(path, &bytes)?;
    let model = parse(&bytes).with_context(|| format!("{}: no SentencePiece model", path.display()))?;
    let scores = model.pieces.iter().map(|piece| piece.score).collect();
    Ok((tokenizer_json(&model, config).with_context(shown)?, scores))
}

fn tokenizer_json(model: &Model, config: &Value) -> Result<Value> {
    ensure!(
        model.model_type == 2 && model.byte_fallback,
        "SentencePiece of type {} (1 is unigram, 2 BPE) {} byte fallback; only BPE with byte fallback is read; save \
         `tokenizer.json` with transformers",
        model.model_type,
        if model.byte_fallback { "with" } else { "without" }
    );
    ensure!(
        !model.charsmap,
        "SentencePiece with a table of normalisation; save `tokenizer.json` with transformers"
    );
    let mut vocab = Map::new();
    for (id, piece) in model.pieces.iter().enumerate() {
        let before = vocab.insert(piece.text.clone(), id.into());
        ensure!(before.is_none(), "piece {id} has the text of an earlier one: `{}`", piece.text);
    }
    let added =
        model.pieces.iter().enumerate().filter(|(_, piece)| matches!(piece.kind, CONTROL | USER_DEFINED));
    let added: Vec<_> = added
        .map(|(id, piece)| {
            json!({"id": id, "content": piece.text, "special": piece.kind == CONTROL, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let unknown = model.pieces.iter().find(|piece| piece.kind == UNKNOWN).map(|piece| &piece.text);
    let prefix = config["add_prefix_space"].as_bool().unwrap_or(true);
    let scheme = match (prefix, config["legacy"].as_bool().unwrap_or(false)) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges(&model.pieces), "unk_token": unknown, "fuse_unk": true,
                  "byte_fallback": true, "ignore_merges": false},
    }))
}

/// Returns every way to join two pieces into a third, in the order of its id, short left parts first
/// (transformers, `generate_merges`): SentencePiece numbers pieces in the order of its merges.
fn merges(pieces: &[Piece]) -> Vec<Value> {
    let joins = Joins::of(pieces.iter().map(|piece| piece.text.as_str()));
    let halves = pieces.iter().flat_map(|piece| joins.halves(&piece.text));
    halves.map(|(left, right)| json!([left, right])).collect()
}

fn parse(bytes: &[u8]) -> Result<Model> {
    let mut model = Model { model_type: 1, ..Model::default() };
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
            (2, Wire::Bytes(trainer)) => {
                for field in Fields(trainer) {
                    match field? {
                        (3, Wire::Number(kind)) => model.model_type = kind,
                        (35, Wire::Number(flag)) => model.byte_fallback = flag != 0,
                        _ => {}
                    }
                }
            }
            (3, Wire::Bytes(normalizer)) => {
                for field in Fields(normalizer) {
                    if let (2, Wire::Bytes(charsmap)) = field? {
                        model.charsmap = !charsmap.is_empty();
                    }
                }
            }
            _ => {}
        }
    }
    ensure!(!model.pieces.is_empty(), "there are no pieces");
    Ok(model)
}

fn parse_piece(bytes: &[u8]) -> Result<Piece> {
    let mut piece = Piece { kind: 1, ..Piece::default() };
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(text)) => piece.text = std::str::from_utf8(text).context("a piece")?.to_string(),
            (2, Wire::Fixed(score)) => piece.score = f32::from_le_bytes(score.try_into().context("a score")?),
            (3, Wire::Number(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Ok(piece)
}

/// A field's content.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Four or eight bytes.
    Fixed(&'a [u8]),
}

/// The fields of a protobuf message: (number, content).
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.varint()?;
        let wire = match key & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Fixed(self.take(8)?),
            2 => {
                let len = self.varint()?;
                Wire::Bytes(self.take(len)?)
            }
            5 => Wire::Fixed(self.take(4)?),
            _ => return None,
        };
        Some((key >> 3, wire))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let left = self.0.len();
        let field =
            self.field().with_context(|| format!("damaged {left} bytes before its end; download it again"));
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}
