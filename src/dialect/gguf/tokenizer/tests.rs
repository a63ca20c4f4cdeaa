use super::*;
use crate::model::tokenizer::Tokenizer;

fn added(id: u32, text: &str, special: bool) -> Value {
    json!({"id": id, "content": text, "special": special, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false})
}

/// Byte-level BPE over a few letters, ids 7 and up to be padded.
fn byte_level_files() -> TokenizerFiles {
    TokenizerFiles {
        tokenizer: json!({
            "version": "1.0",
            "added_tokens": [added(0, "<|end|>", false), added(6, "aa", false)],
            "pre_tokenizer": pre_tokenizer::by_id("qwen2").unwrap().to_json(),
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "merges": [["a", "b"], ["Ġ", "ab"]], "ignore_merges": false,
                      "vocab": {"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġab": 5}},
        }),
        tokenizer_config: json!({"eos_token": "<|end|>", "bos_token": "<|end|>", "add_bos_token": true}),
        config: json!({"pad_token_id": 2}),
        chat_templates: vec![("default".into(), "{{ x }}".into()), ("rag".into(), "{{ y }}".into())],
        ..TokenizerFiles::default()
    }
}

/// SentencePiece-like BPE; merges in the two notations that files use.
fn sentence_piece_files(merges: Value) -> TokenizerFiles {
    TokenizerFiles {
        tokenizer: json!({
            "version": "1.0",
            "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(12, "b\u{2581}b", false)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
            "model": {"type": "BPE", "merges": merges, "byte_fallback": true, "fuse_unk": true,
                      "unk_token": "<unk>", "ignore_merges": false,
                      "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "<0xC3>": 3, "<0xBC>": 4, SPACE: 5, "a": 6,
                                "b": 7, "ab": 8, "\u{2581}a": 9, "ba": 10, "\u{2581}ab": 11}},
        }),
        tokenizer_config: json!({"bos_token": "<s>"}),
        ..TokenizerFiles::default()
    }
}

fn spaced_merges() -> Value {
    json!(["a b", "b a", "\u{2581} a", "\u{2581} ab", "\u{2581}a b"])
}

fn encode(files: &TokenizerFiles, text: &str) -> Vec<u32> {
    Tokenizer::from_files(files).unwrap().encode(text, true).unwrap()
}

#[test]
fn byte_level_tokens_types_and_ids_are_those_of_the_file() {
    let metadata = write(&byte_level_files(), 9).unwrap();
    let texts = ["<|end|>", "a", "b", "ab", "Ġ", "Ġab", "aa", "[PAD7]", "[PAD8]"];
    assert_eq!(strings(&metadata, "tokenizer.ggml.tokens").unwrap(), texts);
    let types = vec![3, 1, 1, 1, 1, 1, 4, 5, 5];
    assert_eq!(metadata.get("tokenizer.ggml.token_type"), Some(&Gguf::from(types)));
    assert_eq!(strings(&metadata, "tokenizer.ggml.merges").unwrap(), ["a b", "Ġ ab"]);
    for (key, value) in [("bos", 0), ("eos", 0), ("padding", 2)] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}_token_id")), Some(&Gguf::U32(value)), "{key}");
    }
    assert_eq!(metadata.get("tokenizer.ggml.unknown_token_id"), None);
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Gguf::Bool(true)));
    assert_eq!(metadata.str("tokenizer.ggml.model").unwrap(), "gpt2");
    assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), "qwen2");
    assert_eq!(metadata.str("tokenizer.chat_template").unwrap(), "{{ x }}");
    assert_eq!(metadata.str("tokenizer.chat_template.rag").unwrap(), "{{ y }}");
    assert_eq!(strings(&metadata, "tokenizer.chat_templates").unwrap(), ["rag"]);
}

#[test]
fn a_byte_level_tokenizer_read_back_gives_the_same_ids() {
    let files = byte_level_files();
    let back = read(&write(&files, 9).unwrap()).unwrap();
    for text in ["ab", "abab ab", " ab<|end|>ba", "baaab"] {
        assert_eq!(encode(&back, text), encode(&files, text), "{text}");
    }
    assert_eq!(encode(&back, "ab ab"), [0, 3, 5]);
    assert_eq!(back.chat_templates, files.chat_templates);
    assert_eq!(Tokenizer::from_files(&back).unwrap().vocab_size(), 7, "padding is no token");
}

#[test]
fn sentence_piece_scores_order_tokens_as_the_merges_do() {
    let metadata = write(&sentence_piece_files(spaced_merges()), 13).unwrap();
    assert_eq!(metadata.str("tokenizer.ggml.model").unwrap(), "llama");
    let scores = vec![0.0f32, 0.0, 0.0, 0.0, 0.0, -5.0, -5.0, -5.0, 0.0, -2.0, -1.0, -3.0, 0.0];
    assert_eq!(metadata.get("tokenizer.ggml.scores"), Some(&Gguf::from(scores)));
    let types = vec![2, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 4];
    assert_eq!(metadata.get("tokenizer.ggml.token_type"), Some(&Gguf::from(types)));
    assert_eq!(metadata.get("tokenizer.ggml.add_space_prefix"), Some(&Gguf::Bool(true)));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Gguf::Bool(true)));
    assert_eq!(metadata.get("tokenizer.ggml.merges"), None);
    assert_eq!(strings(&metadata, "tokenizer.ggml.tokens").unwrap()[12], "b b", "as the text has it");
}

#[test]
fn a_sentence_piece_tokenizer_read_back_gives_the_same_ids() {
    let spaced = spaced_merges();
    let pairs = spaced.as_array().unwrap().iter().map(|merge| json!(merge.as_str().unwrap().split_once(' ')));
    let files = sentence_piece_files(pairs.collect());
    let back = read(&write(&files, 13).unwrap()).unwrap();
    for text in ["ab", "ba ab", "a\nb", "aüb", "bab  aab"] {
        assert_eq!(encode(&back, text), encode(&files, text), "{text}");
    }
    assert_eq!(encode(&back, "ab ü\n"), [1, 11, 5, 3, 4, 2]);
    let mut metaspace = files.clone();
    metaspace.tokenizer["normalizer"] = Value::Null;
    metaspace.tokenizer["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false});
    assert_eq!(write(&metaspace, 13).unwrap(), write(&files, 13).unwrap());
}

#[test]
fn what_llama_cpp_cannot_load_is_refused() {
    let error = |files: &TokenizerFiles, rows| format!("{:#}", write(files, rows).unwrap_err());
    let files = byte_level_files();
    assert!(error(&files, 5).contains("token `Ġab` has id 5, but the embedding table has only 5 rows"));
    let mut twice = files.clone();
    twice.tokenizer["added_tokens"][1]["content"] = json!("ab");
    assert!(error(&twice, 9).contains("token `ab` (id 6) has the text of an earlier one"));
    let mut unigram = files.clone();
    unigram.tokenizer["model"]["type"] = json!("Unigram");
    assert!(error(&unigram, 9).contains("`Unigram`: wanted `BPE`"));
    let mut spaces = sentence_piece_files(spaced_merges());
    spaces.tokenizer["normalizer"] = Value::Null;
    assert!(error(&spaces, 13).contains("turns spaces into U+2581"));
    spaces.tokenizer["normalizer"] = json!({"type": "Lowercase"});
    assert!(error(&spaces, 13).contains("Lowercase"));
}

#[test]
fn damaged_keys_are_refused_by_name() {
    let with = |key: &str, value: Gguf| {
        let mut metadata = write(&byte_level_files(), 9).unwrap();
        metadata.set(key, value);
        format!("{:#}", read(&metadata).unwrap_err())
    };
    assert!(with("tokenizer.ggml.model", "bert".into()).contains("`bert`; known are `gpt2` and `llama`"));
    assert!(with("tokenizer.ggml.pre", "gpt-5".into()).contains("`gpt-5`"));
    assert!(with("tokenizer.ggml.tokens", vec![1u32].into()).contains("other than strings"));
    assert!(with("tokenizer.ggml.token_type", vec![1i32].into()).contains("1 entries"));
    assert!(with("tokenizer.ggml.merges", vec!["ab"].into()).contains("`ab` is no pair"));
    assert!(with("tokenizer.ggml.model", "llama".into()).contains("0 numbers in `tokenizer.ggml.scores`"));
    let missing = read(&Metadata::default()).unwrap_err().to_string();
    assert!(missing.contains("`tokenizer.ggml.tokens` is missing"), "{missing}");
}

#[test]
fn a_file_that_adds_a_token_without_naming_it_gets_llama_cpps_own() {
    let mut metadata = write(&byte_level_files(), 16).unwrap();
    metadata.0.retain(|(key, _)| key != "tokenizer.ggml.bos_token_id");
    assert_eq!(encode(&read(&metadata).unwrap(), "ab"), [3], "token 11, which is padding here, is none");
    let mut spaced = write(&sentence_piece_files(spaced_merges()), 13).unwrap();
    spaced.0.retain(|(key, _)| key != "tokenizer.ggml.bos_token_id");
    assert_eq!(encode(&read(&spaced).unwrap(), "ab"), [1, 11]);
}
