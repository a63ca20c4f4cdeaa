//! Tokenizers in older files, with tokens beside `tokenizer.json`, and hostile ones.

use std::fs;
use std::path::Path;

use quant::container::gguf::Value as Gguf;
use quant::dialect::gguf::tokenizer;
use quant::eval::tokenization::parting;
use quant::model::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder with the embedded model's tokenizer, as `change` leaves `tokenizer.json` and
/// `tokenizer_config.json`.
fn folder(change: impl Fn(&mut Value, &mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(root().join("eval/tiny-llama").join(name)).unwrap()).unwrap()
    };
    let (mut tokenizer, mut config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    change(&mut tokenizer, &mut config);
    for (name, json) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)] {
        fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    dir
}

fn files(folder: &Path) -> TokenizerFiles {
    TokenizerFiles::read(folder).unwrap().unwrap()
}

fn encode(files: &TokenizerFiles, text: &str) -> Vec<u32> {
    Tokenizer::from_files(files).unwrap().encode(text, true).unwrap()
}

/// Through GGUF keys and back.
fn through_gguf(files: &TokenizerFiles, rows: usize) -> TokenizerFiles {
    tokenizer::read(&tokenizer::write(files, rows).unwrap()).unwrap()
}

fn entry(text: &str, special: bool) -> Value {
    json!({"content": text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": special})
}

const TEXT: &str = "a<ticker>b<|cite|> c";

/// Key of `tokenizer_config.json` and its value, another file and its content, the right ids.
type Case = (&'static str, Value, Option<(&'static str, Value)>, &'static [u32]);

/// Ids of transformers 5.17 for `a<ticker>b<|cite|> c` with these files.
#[test]
fn tokens_that_only_other_files_name_are_read_and_written() {
    let decoder = json!({"4096": entry("<ticker>", false), "4097": entry("<|cite|>", true)});
    let cases: [Case; 6] = [
        ("added_tokens_decoder", decoder, None, &[67, 4096, 68, 4097, 279]),
        (
            "added_tokens_decoder",
            json!({"4100": entry("<ticker>", false), "4098": entry("<|cite|>", true)}),
            None,
            &[67, 4097, 68, 4096, 279],
        ),
        (
            "backend",
            json!("tokenizers"),
            Some(("added_tokens.json", json!({"<ticker>": 4096, "<|cite|>": 4097}))),
            &[67, 4096, 68, 4097, 279],
        ),
        ("extra_special_tokens", json!(["<|cite|>", "<ticker>"]), None, &[67, 4097, 68, 4096, 279]),
        ("additional_special_tokens", json!(["<ticker>", "<|cite|>"]), None, &[67, 4096, 68, 4097, 279]),
        (
            "backend",
            json!("tokenizers"),
            Some((
                "special_tokens_map.json",
                json!({"pad_token": "<|cite|>", "additional_special_tokens": ["<ticker>"]}),
            )),
            &[67, 4097, 68, 4096, 279],
        ),
    ];
    for (key, value, beside, wanted) in cases {
        let dir = folder(|_, config| config[key] = value.clone());
        if let Some((name, json)) = &beside {
            fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        let files = files(dir.path());
        assert_eq!(encode(&files, TEXT), wanted, "{key} {value}");
        let metadata = tokenizer::write(&files, 4104).unwrap();
        let tokens =
            metadata.get("tokenizer.ggml.tokens").and_then(Gguf::as_array).unwrap().as_strings().unwrap();
        for (text, id) in [("<ticker>", wanted[1]), ("<|cite|>", wanted[3])] {
            assert_eq!(tokens[id as usize], text);
        }
        assert_eq!(encode(&through_gguf(&files, 4104), TEXT), wanted, "through GGUF: {key}");
        let few = tokenizer::write(&files, 4096).unwrap_err().to_string();
        assert!(few.contains("has id 4096") && few.contains("4096 rows"), "{few}");
    }
}

/// Ids of transformers 5.17 for `a`: the post-processor's token goes first, whatever the configuration says.
#[test]
fn a_token_that_only_the_post_processor_names_is_the_bos() {
    let token = "<|endoftext|>";
    let (first, text) = (
        json!({"SpecialToken": {"id": token, "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
    );
    let template = |single: Vec<&Value>| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [first, text, first, {"Sequence": {"id": "B", "type_id": 0}}],
               "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}}})
    };
    let sequence = json!({"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": false, "use_regex": true}, template(vec![&first, &text])]});
    for (processor, flag, wanted) in [
        (template(vec![&first, &text]), None, vec![0, 67]),
        (template(vec![&first, &text]), Some(false), vec![0, 67]),
        (sequence, None, vec![0, 67]),
        (template(vec![&first, &text, &first]), None, vec![0, 67, 0]),
        (template(vec![&text]), Some(true), vec![67]),
    ] {
        let dir = folder(|tokenizer, config| {
            tokenizer["post_processor"] = processor.clone();
            config.as_object_mut().unwrap().retain(|key, _| !key.ends_with("os_token"));
            if let Some(flag) = flag {
                config["add_bos_token"] = flag.into();
            }
        });
        let files = files(dir.path());
        assert_eq!(encode(&files, "a"), wanted);
        assert_eq!(Tokenizer::from_files(&files).unwrap().bos(), (wanted[0] == 0).then_some(0));
        let metadata = tokenizer::write(&files, 4096).unwrap();
        assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Gguf::Bool(wanted[0] == 0)));
        if wanted[0] == 0 {
            assert_eq!(metadata.get("tokenizer.ggml.bos_token_id"), Some(&Gguf::U32(0)));
        }
        assert_eq!(encode(&through_gguf(&files, 4096), "a"), wanted);
    }
    let twice = folder(|tokenizer, _| tokenizer["post_processor"] = template(vec![&first, &first, &text]));
    let error = format!("{:#}", Tokenizer::from_files(&files(twice.path())).err().unwrap());
    assert!(error.contains("3 tokens around a text") || error.contains("2 tokens around a text"), "{error}");
}

/// Writes the older files of a golden case: the SentencePiece model, or the embedded model's vocabulary and merges.
fn older_folder(case: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("tokenizer_config.json", &case["config"].to_string());
    if case["files"] == "tokenizer.model" {
        let model = root().join("tests/golden/tokenizers/sentence_piece.model");
        fs::copy(model, dir.path().join("tokenizer.model")).unwrap();
        return dir;
    }
    let bpe: Value =
        serde_json::from_slice(&fs::read(root().join("eval/tiny-llama/tokenizer.json")).unwrap()).unwrap();
    let merges = bpe["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge.as_str() {
        Some(merge) => merge.to_string(),
        None => format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()),
    });
    write("config.json", &json!({"model_type": case["model_type"]}).to_string());
    write("vocab.json", &bpe["model"]["vocab"].to_string());
    write("merges.txt", &format!("#version: 0.2\n{}\n", merges.collect::<Vec<_>>().join("\n")));
    dir
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&fs::read(root().join("tests/golden/tokenizers").join(name)).unwrap()).unwrap()
}

/// `scripts/golden_tokenizers.py`: what transformers 5.17 reads with files from before `tokenizer.json`.
#[test]
fn older_tokenizers_give_the_ids_that_transformers_gives() {
    let ids = golden("ids.json");
    for case in ids["cases"].as_array().unwrap() {
        let files = files(older_folder(case).path());
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        for (text, wanted) in ids["probes"].as_array().unwrap().iter().zip(case["ids"].as_array().unwrap()) {
            let wanted: Vec<u32> =
                wanted.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            let found = tokenizer.encode(text.as_str().unwrap(), false).unwrap();
            assert_eq!(found, wanted, "{} {} {text}", case["files"], case["config"]);
        }
    }
}

/// `scripts/golden_tokenizers.py`: the keys that llama.cpp's converter writes for such folders.
#[test]
fn older_tokenizers_become_the_gguf_keys_that_llama_cpp_writes() {
    for case in golden("gguf.json")["cases"].as_array().unwrap() {
        let files = files(older_folder(case).path());
        let metadata = tokenizer::write(&files, case["rows"].as_u64().unwrap() as usize).unwrap();
        // A piece of the model's own that nothing beside it names. The converter makes it a plain piece, which no join ever
        // makes; SentencePiece and transformers look for it in the text.
        let own = case["config"]["added_tokens_decoder"].is_null().then_some(4);
        for (key, wanted) in case["keys"].as_object().unwrap() {
            let name = format!("{key} of {} {}", case["files"], case["config"]);
            match (metadata.get(key).unwrap(), wanted) {
                (Gguf::String(found), wanted) => assert_eq!(found, wanted, "{name}"),
                (found, Value::String(hash)) => {
                    let found: Vec<Value> = found.as_array().unwrap().values().map(json_of).collect();
                    let found = Sha256::digest(Value::from(found).to_string());
                    let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
                    assert_eq!(found, *hash, "{name}");
                }
                (found, wanted) => {
                    let found: Vec<Value> = found.as_array().unwrap().values().map(json_of).collect();
                    let mut wanted = wanted.as_array().unwrap().clone();
                    if let (Some(own), true) = (own, key.ends_with("token_type")) {
                        assert_eq!(wanted[own], 1);
                        wanted[own] = 4.into();
                    }
                    let different = found.iter().zip(&wanted).position(|(found, wanted)| found != wanted);
                    assert_eq!((different, found.len()), (None, wanted.len()), "{name}");
                }
            }
        }
    }
}

fn json_of(value: Gguf) -> Value {
    match value {
        Gguf::String(text) => text.into(),
        Gguf::I32(number) => number.into(),
        Gguf::F32(number) => number.into(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn older_tokenizers_that_cannot_be_read_say_why() {
    let refusal = |files: &[(&str, &[u8])]| {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
        format!("{:#}", TokenizerFiles::read(dir.path()).unwrap_err())
    };
    let model = fs::read(root().join("tests/golden/tokenizers/sentence_piece.model")).unwrap();
    assert!(refusal(&[("vocab.json", b"{}")]).contains("no `merges.txt`"));
    let unnamed = refusal(&[("vocab.json", b"{}"), ("merges.txt", b"a b\n")]);
    assert!(unnamed.contains("`tokenizer_class`") && unnamed.contains("save_pretrained"), "{unnamed}");
    let class = br#"{"tokenizer_class": "RobertaTokenizer"}"#;
    let other = [("vocab.json", &b"{}"[..]), ("merges.txt", b"a b\n"), ("tokenizer_config.json", class)];
    assert!(refusal(&other).contains("`RobertaTokenizer`"));
    assert!(refusal(&[("tokenizer.model", b"hello")]).contains("no SentencePiece model"));
    assert!(refusal(&[("tokenizer.model", &model[..model.len() - 7])]).contains("no SentencePiece model"));
    for len in 0..200 {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.model"), &model[..len]).unwrap();
        let _ = TokenizerFiles::read(dir.path());
    }
    assert!(TokenizerFiles::read(tempfile::tempdir().unwrap().path()).unwrap().is_none());
}

/// The tokenizers library slices a merge's right half by the length of the prefix, and panics where it is
/// shorter.
#[test]
fn a_panic_in_the_library_is_an_error() {
    for prefix in ["######", "\u{2581}\u{2581}"] {
        let dir = folder(|tokenizer, _| tokenizer["model"]["continuing_subword_prefix"] = prefix.into());
        let built = Tokenizer::from_files(&files(dir.path()));
        let error = format!("{:#}", built.err().expect("such a file does not load"));
        assert!(error.contains("tokenizers library") || error.contains("not a tokenizer"), "{error}");
    }
}

#[test]
fn tokenizers_that_cut_otherwise_are_told_apart_and_others_are_not() {
    let text = fs::read_to_string(root().join("eval/eval.txt")).unwrap();
    let original = files(&root().join("eval/tiny-llama"));
    let own = Tokenizer::from_files(&original).unwrap();
    let through = Tokenizer::from_files(&through_gguf(&original, 4096)).unwrap();
    assert_eq!(parting(&own, &through, &text, 2000).unwrap(), None);
    let changed = |change: &dyn Fn(&mut quant::container::gguf::Metadata)| {
        let mut metadata = tokenizer::write(&original, 4096).unwrap();
        change(&mut metadata);
        let other = Tokenizer::from_files(&tokenizer::read(&metadata).unwrap()).unwrap();
        parting(&own, &other, &text, 2000).unwrap().expect("they differ")
    };
    let pre = changed(&|metadata| metadata.set("tokenizer.ggml.pre", "gpt-2"));
    assert!(pre.wanted.contains("{Ċ") && pre.sentence().contains("cuts text otherwise"), "{pre:?}");
    let bos = changed(&|metadata| metadata.set("tokenizer.ggml.add_bos_token", true));
    assert_eq!(bos.equal, 0);
    // A special token that has become a plain one shows in no ordinary text.
    let plain = changed(&|metadata| {
        metadata.set("tokenizer.ggml.token_type", vec![1i32; 4096]);
    });
    assert!(plain.wanted.contains("<|"), "{plain:?}");
    assert!(!plain.verdict("m").passed);
}
