//! Golden bytes: random ggml blocks decode to what gguf-py decodes them to, and pack to the same bytes again.
//!
//! Files: `scripts/golden_gguf.py`, gguf version recorded inside. Values are compared exactly. That holds because both
//! sides round to F32 in the same order: `d · scale`, then `· code`, then the offset (`dmin · min`, itself rounded)
//! subtracted, no fused multiply-add. Zeros may differ in sign: gguf-py decodes the MXFP4 code for -0 to +0.

#![allow(clippy::unwrap_used)]

use quant::dialect::{Dialect, gguf::Gguf};
use quant::scheme::{Activations, QTensor, Scheme, schemes};

const TYPES: [&str; 13] = [
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "mxfp4",
];

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

/// Returns (block bytes, values) of a golden file.
fn golden(name: &str) -> (Vec<u8>, Vec<f32>) {
    let path = format!("{}/tests/golden/gguf/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let field = |name: &str| from_hex(json[name].as_str().unwrap());
    let values = field("f32_values").as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    (field("bytes"), values)
}

/// Returns the golden bytes and what they become as `rows` rows, whose values are checked.
fn read(scheme: &Scheme, rows: usize) -> (Vec<u8>, QTensor) {
    let (bytes, values) = golden(scheme.name);
    let q = Gguf.unpack(scheme, Activations::Full, rows, values.len() / rows, &[&bytes]).unwrap();
    let decoded = q.decode();
    let differing = decoded.iter().zip(&values).position(|(ours, theirs)| ours != theirs);
    assert_eq!(differing.map(|i| (i, decoded[i], values[i])), None, "{}", scheme.name);
    (bytes, q)
}

#[test]
fn every_type_decodes_as_gguf_py_does_and_packs_to_the_same_bytes() {
    for scheme in TYPES.map(|name| schemes::by_name(name).unwrap()) {
        for rows in [1, 2] {
            let (bytes, q) = read(&scheme, rows);
            assert_eq!(Gguf.pack(&q, Activations::Full).unwrap(), [bytes], "{}", scheme.name);
        }
    }
}

#[test]
fn types_that_are_only_read_decode_as_gguf_py_does_and_are_refused_when_written() {
    for scheme in schemes::READ_ONLY {
        for rows in [1, 2] {
            let (_, q) = read(&scheme, rows);
            let error = Gguf.pack(&q, Activations::Full).unwrap_err().to_string();
            assert!(error.contains("is only read here; llama-quantize writes it"), "{error}");
        }
    }
}
