//! Folders whose files disagree with each other, and which transformers reads all the same.

use std::fs;

use quant::checkpoint::Checkpoint;
use quant::names::{Role, TensorId};
use quant::tensor::Dtype;
use serde_json::{Value, json};

use crate::model::{Model, assert_error, values};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: TensorId = TensorId::global(Role::Head);

/// transformers 5.17, `PreTrainedModel.tie_weights`: both are there and differ → the head is kept and the
/// flag ignored.
#[test]
fn a_tied_model_with_a_head_of_its_own_uses_it_and_says_so() {
    for (dtype, changed) in
        [(Dtype::BF16, true), (Dtype::F32, true), (Dtype::BF16, false), (Dtype::F32, false)]
    {
        let mut model = Model::new(true);
        let (_, _, shape, mut head) = model.tensor(EMBED).clone();
        if changed {
            *head.last_mut().unwrap() += 1.0;
        }
        model.tensors.push(("lm_head.weight".to_string(), dtype, shape, head.clone()));
        let opened = Checkpoint::open(&model.write()).unwrap();
        assert_eq!(opened.config.tie_word_embeddings, !changed, "{dtype} {changed}");
        assert_eq!(opened.tensors.contains_key(&HEAD), changed);
        assert_eq!(opened.notes.len(), usize::from(changed));
        if changed {
            assert_eq!(opened.read(HEAD).unwrap().to_f32(), head);
            // What is written beside the artifact: engines trust the flag.
            let written: Value = serde_json::from_str(opened.config_json().unwrap()).unwrap();
            assert_eq!(written["tie_word_embeddings"], false);
            assert!(opened.notes[0].contains("lm_head.weight"), "{}", opened.notes[0]);
        }
    }
}

/// The same function: the table is missing and the head is there → the head serves as both.
#[test]
fn a_tied_model_with_a_head_alone_uses_it_as_its_table() {
    let mut model = Model::new(true);
    model.tensor(EMBED).0 = "lm_head.weight".to_string();
    let opened = Checkpoint::open(&model.write()).unwrap();
    assert!(opened.config.tie_word_embeddings && !opened.tensors.contains_key(&HEAD));
    assert_eq!(opened.read(TensorId::global(Role::Embed)).unwrap().to_f32(), values(0, 16 * 32));
}

/// transformers gives such a model a random head; nothing sensible can be made of it.
#[test]
fn an_untied_model_without_a_head_is_refused_with_the_flag_that_may_be_missing() {
    let mut model = Model::new(true);
    for flag in [json!(false), Value::Null] {
        model.config["tie_word_embeddings"] = flag;
        assert_error(
            Checkpoint::open(&model.write()),
            &["`lm_head.weight` is missing", "`tie_word_embeddings`"],
        );
    }
}

/// Saved from the bare decoder (`LlamaModel.save_pretrained`): transformers adds the prefix.
#[test]
fn names_without_the_decoders_prefix_are_the_same_tensors() {
    for (class, tied, bare_norm) in [
        ("LlamaForCausalLM", true, true),
        ("LlamaModel", true, true),
        ("LlamaForCausalLM", false, true),
        ("LlamaModel", true, false),
    ] {
        let mut model = Model::new(tied);
        model.config["architectures"] = json!([class]);
        let wanted = Checkpoint::open(&model.write()).unwrap();
        let wanted: Vec<_> = wanted.tensors.keys().map(|id| (*id, wanted.read(*id).unwrap())).collect();
        for tensor in &mut model.tensors {
            if bare_norm || !tensor.0.contains("norm") {
                tensor.0 = tensor.0.trim_start_matches("model.").to_string();
            }
        }
        let opened = Checkpoint::open(&model.write()).unwrap();
        assert_eq!(opened.tensors.len(), wanted.len());
        wanted.iter().for_each(|(id, matrix)| assert_eq!(opened.read(*id).unwrap(), *matrix, "{id}"));
    }
    let mut twice = Model::new(true);
    let (_, dtype, shape, values) = twice.tensor(EMBED).clone();
    twice.tensors.push((
        "embed_tokens.weight".to_string(),
        dtype,
        shape,
        values.iter().map(|x| x + 1.0).collect(),
    ));
    assert_error(Checkpoint::open(&twice.write()), &["embed_tokens.weight", "too"]);
}

/// transformers reads every tensor of every shard that an index names, wherever it is.
#[test]
fn an_index_that_is_wrong_where_it_does_no_harm_is_read() {
    let model = Model::new(true);
    let [first, second] = [1, 2].map(|n| format!("model-0000{n}-of-00002.safetensors"));
    let changes: [&dyn Fn(&mut Value); 4] = [
        &|map| map["lm_head.weight"] = second.clone().into(),
        &|map| map[EMBED] = second.clone().into(),
        &|map| map["model.layers.0.self_attn.rotary_emb.inv_freq"] = first.clone().into(),
        &|map| _ = map.as_object_mut().unwrap().shift_remove("model.norm.weight"),
    ];
    for change in changes {
        let opened = Checkpoint::open(&model.write_sharded(change)).unwrap();
        assert_eq!(opened.tensors.len(), model.tensors.len());
    }
    // A tensor that the model needs is missed, index or not.
    let mut lacking = Model::new(true);
    lacking.tensors.retain(|tensor| tensor.0 != "model.norm.weight");
    let folder = lacking.write_sharded(|map| map["model.norm.weight"] = second.clone().into());
    assert_error(Checkpoint::open(&folder), &["missing", "`model.norm.weight`"]);
}

/// Mistral's repositories hold the model twice; without an index the numbering decides.
#[test]
fn a_numbering_leaves_other_weight_files_alone_and_any_shard_names_all() {
    let model = Model::new(true);
    let folder = model.write_sharded(|_| {});
    fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    fs::write(folder.join("consolidated.safetensors"), "not even one").unwrap();
    for path in [folder.clone(), folder.join("model-00002-of-00002.safetensors")] {
        assert_eq!(Checkpoint::open(&path).unwrap().tensors.len(), model.tensors.len(), "{}", path.display());
    }
}

/// `pad_token_id: -1` of the original LLaMA conversions, with which transformers 5.17 loads a model.
#[test]
fn an_id_of_minus_one_is_none() {
    let mut model = Model::new(true);
    for (name, value) in [
        ("pad_token_id", json!(-1)),
        ("bos_token_id", json!(-1)),
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!([-1, 2])),
        ("pad_token_id", json!([-1])),
    ] {
        let before = model.config.clone();
        model.config[name] = value.clone();
        let config = Checkpoint::open(&model.write()).unwrap().config;
        let eos = if value.as_array().is_some_and(|list| list.len() == 2) { vec![2] } else { vec![] };
        assert_eq!(
            (config.bos_token_id, config.eos_token_ids, config.pad_token_id),
            (None, eos, None),
            "{name}"
        );
        model.config = before;
    }
    model.config["eos_token_id"] = json!(-2);
    assert_error(Checkpoint::open(&model.write()), &["`eos_token_id` is `-2`"]);
}

/// Files that define tokenizers, processors and templates go along; weights of other kinds and caches do not.
#[test]
fn side_files_are_those_that_other_programs_read() {
    let model = Model::new(true);
    let folder = model.write();
    let templates = folder.join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    for file in ["tool_use.jinja", "rag.jinja", "notes.txt"] {
        fs::write(templates.join(file), "{{ tools }}").unwrap();
    }
    let taken = [
        "LICENSE",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "qwen.tiktoken",
        "tekken.json",
        "tokenizer.model",
        "video_preprocessor_config.json",
        "vocab.json",
    ];
    for file in taken.iter().chain(&["README.md", "training_args.bin", "trainer_state.json"]) {
        fs::write(folder.join(file), "x").unwrap();
    }
    let found = Checkpoint::open(&folder).unwrap().side_files().unwrap();
    let mut wanted: Vec<String> = taken.iter().map(|name| name.to_string()).collect();
    wanted.extend(["rag", "tool_use"].map(|name| format!("additional_chat_templates/{name}.jinja")));
    wanted.sort();
    assert_eq!(found, wanted);
}
