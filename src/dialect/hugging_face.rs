//! What all dialects of Hugging Face folders share: names of tensors, `config.json`, the files of the tokenizer.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::Description;
use crate::model::config::Config;
use crate::model::tokenizer::TokenizerFiles;
use crate::names::TensorId;
use crate::rows::Place;
use crate::tensor::Dtype;

/// Returns where Hugging Face checkpoints keep a tensor of `rows` rows.
pub fn place(id: TensorId, rows: usize, config: &Config) -> Place {
    match config.share(id) {
        Some(share) => share.place(id.hf_name_as(share.fused.module)),
        None => Place::whole(config.family.hf_name(id), rows),
    }
}

/// What `config.json` says otherwise than the source's.
pub struct Configuration {
    /// `quantization_config`; `None`: the weights are plain floats.
    pub quantization: Option<Value>,
    /// Number type of the weights, where it changed.
    pub dtype: Option<Dtype>,
}

/// Returns the files beside the weights: `config.json`, then those of the source, or the same made from a GGUF file's
/// metadata.
///
/// # Errors
/// Name what `config.json` cannot say of the model, or what a GGUF file's metadata lacks.
pub fn files(output: &Description, configuration: &Configuration) -> Result<Vec<(String, Vec<u8>)>> {
    let (mut config, made) = match output.config_json {
        Some(json) => (serde_json::from_str(json)?, false),
        None => match output.config.to_json()? {
            Value::Object(config) => (config, true),
            _ => (Map::new(), true),
        },
    };
    if let Some(dtype) = configuration.dtype.or(made.then_some(output.dtype)) {
        set_dtype(&mut config, dtype);
    }
    match &configuration.quantization {
        Some(quantization) => config.insert("quantization_config".into(), quantization.clone()),
        None => config.shift_remove("quantization_config"),
    };
    let config = text(&Value::Object(config));
    let mut files = vec![("config.json".to_string(), config)];
    files.extend(match made {
        false => (output.side_files)()?,
        true => made_files(output.config, (output.tokenizer)()?)?,
    });
    Ok(files)
}

fn text(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// Sets the number type under the key that is there: `dtype` since transformers 4.56, `torch_dtype` before; both are read.
fn set_dtype(config: &mut Map<String, Value>, dtype: Dtype) {
    let name = match dtype {
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        _ => "bfloat16",
    };
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.into(), name.into());
}

/// Returns the files of a tokenizer that no folder holds, and a generation configuration.
fn made_files(config: &Config, tokenizer: TokenizerFiles) -> Result<Vec<(String, Vec<u8>)>> {
    let mut settings = tokenizer.tokenizer_config.as_object().cloned().unwrap_or_default();
    settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    let template = |name: &str| tokenizer.chat_templates.iter().find(|template| template.0 == name);
    match (&tokenizer.chat_templates[..], template("default")) {
        ([_], Some((_, source))) => {
            settings.insert("chat_template".into(), source.as_str().into());
        }
        ([], _) => {}
        (all, _) => {
            let all = all.iter().map(|(name, source)| json!({"name": name, "template": source}));
            settings.insert("chat_template".into(), all.collect());
        }
    }
    let mut json = tokenizer.tokenizer.clone();
    if json["post_processor"].is_null()
        && let Some(template) = post_processor(&tokenizer)?
    {
        json["post_processor"] = template;
    }
    let mut generation = Map::new();
    for (key, ids) in [
        ("bos_token_id", config.bos_token_id.as_slice()),
        ("eos_token_id", config.eos_token_ids.as_slice()),
        ("pad_token_id", config.pad_token_id.as_slice()),
    ] {
        match ids {
            [] => {}
            [id] => drop(generation.insert(key.into(), json!(id))),
            ids => drop(generation.insert(key.into(), json!(ids))),
        }
    }
    Ok(vec![
        ("tokenizer.json".to_string(), text(&json)),
        ("tokenizer_config.json".to_string(), text(&Value::Object(settings))),
        ("generation_config.json".to_string(), text(&Value::Object(generation))),
    ])
}

/// Returns the step of `tokenizer.json` that puts BOS before and EOS after a text; `None` if neither is put.
fn post_processor(tokenizer: &TokenizerFiles) -> Result<Option<Value>> {
    let (first, last) = tokenizer.surrounding();
    if first.is_none() && last.is_none() {
        return Ok(None);
    }
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let (mut ids, mut single, mut pair) = (Map::new(), Vec::new(), Vec::new());
    let mut special = |id: Option<u32>| -> Result<Option<Value>> {
        let Some(id) = id else { return Ok(None) };
        let token = tokenizer.token_text(id).with_context(|| format!("the tokenizer has no token {id}"))?;
        ids.insert(token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
        Ok(Some(json!({"SpecialToken": {"id": token, "type_id": 0}})))
    };
    let (first, last) = (special(first)?, special(last)?);
    single.extend(first.iter().cloned().chain([sequence("A")]).chain(last.clone()));
    pair.extend(first.into_iter().chain([sequence("A"), sequence("B")]).chain(last));
    Ok(Some(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids})))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tokenizer::Tokenizer;

    fn tokenizer() -> TokenizerFiles {
        TokenizerFiles {
            tokenizer: json!({
                "version": "1.0",
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                "added_tokens": [{"id": 0, "content": "<s>", "special": true, "single_word": false,
                                  "lstrip": false, "rstrip": false, "normalized": false}],
                "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2}, "merges": []},
            }),
            tokenizer_config: json!({"bos_token": "<s>", "add_bos_token": true}),
            chat_templates: vec![("default".into(), "{{ messages }}".into())],
            ..TokenizerFiles::default()
        }
    }

    fn config() -> Config {
        Config::from_json(&json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 3, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": [1, 2],
        }))
        .unwrap()
    }

    #[test]
    fn files_made_from_metadata_tokenize_and_stop_alike() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in made_files(&config(), tokenizer()).unwrap() {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let read = TokenizerFiles::read(folder.path()).unwrap().unwrap();
        assert_eq!(read.chat_templates, tokenizer().chat_templates);
        assert_eq!(Tokenizer::from_files(&read).unwrap().encode("ab", true).unwrap(), [0, 1, 2]);
        let generation = std::fs::read_to_string(folder.path().join("generation_config.json")).unwrap();
        let generation: Value = serde_json::from_str(&generation).unwrap();
        assert_eq!(generation, json!({"bos_token_id": 0, "eos_token_id": [1, 2]}));
    }

    #[test]
    fn the_number_type_is_told_under_the_key_that_is_there() {
        for (before, after) in [
            (json!({}), json!({"torch_dtype": "float16"})),
            (json!({"dtype": "bfloat16"}), json!({"dtype": "float16"})),
            (json!({"torch_dtype": "bfloat16"}), json!({"torch_dtype": "float16"})),
        ] {
            let mut config = before.as_object().unwrap().clone();
            set_dtype(&mut config, Dtype::F16);
            assert_eq!(Value::Object(config), after);
        }
    }
}
