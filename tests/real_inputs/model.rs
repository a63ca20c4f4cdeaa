//! A small model folder that tests make strange before it is opened.

use std::fs;
use std::path::{Path, PathBuf};

use quant::container::safetensors::SafetensorsSink;
use quant::container::{Opening, Sink, Storage, TensorSpec};
use quant::model::config::Config;
use quant::tensor::{Dtype, bytes_from_floats};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tensor: name, type, shape, values.
pub type Tensor = (String, Dtype, Vec<usize>, Vec<f32>);

pub struct Model {
    pub dir: TempDir,
    pub config: Value,
    pub tensors: Vec<Tensor>,
}

impl Model {
    /// One layer, 16 tokens; every value differs from its neighbours. The head is stored when `tied` is
    /// false.
    pub fn new(tied: bool) -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        });
        let expected = Config::from_json(&config).unwrap().expected_tensors();
        let tensor = |(seed, (id, shape)): (usize, (quant::names::TensorId, Vec<usize>))| {
            (id.hf_name(), Dtype::BF16, shape.clone(), values(seed, shape.iter().product()))
        };
        let tensors = expected.into_iter().enumerate().map(tensor).collect();
        Model { dir: tempfile::tempdir().unwrap(), config, tensors }
    }

    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    /// Writes the folder with one weight file.
    pub fn write(&self) -> PathBuf {
        let folder = self.folder();
        save(&folder, &self.tensors);
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        folder
    }

    /// Writes the folder with two shards, and an index that `change` makes wrong.
    pub fn write_sharded(&self, change: impl Fn(&mut Value)) -> PathBuf {
        let folder = self.folder();
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let half = self.tensors.len() / 2;
        let mut map = json!({});
        for (number, tensors) in [(1, &self.tensors[..half]), (2, &self.tensors[half..])] {
            let name = format!("model-0000{number}-of-00002.safetensors");
            let part = self.dir.path().join("part");
            save(&part, tensors);
            fs::rename(part.join("model.safetensors"), folder.join(&name)).unwrap();
            tensors.iter().for_each(|tensor| map[&tensor.0] = name.clone().into());
        }
        change(&mut map);
        let index = json!({ "metadata": {}, "weight_map": map });
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        folder
    }
}

pub fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 101) % 255) as f32 / 64.0 - 2.0).collect()
}

fn save(folder: &Path, tensors: &[Tensor]) {
    let spec = |(name, dtype, shape, _): &Tensor| TensorSpec {
        name: name.clone(),
        storage: Storage::Plain(*dtype),
        shape: shape.clone(),
    };
    let specs: Vec<_> = tensors.iter().map(spec).collect();
    let _ = fs::remove_dir_all(folder);
    let sink =
        SafetensorsSink::create(folder, Opening { force: true, key: None }, &specs, &[], u64::MAX).unwrap();
    for (at, (_, dtype, _, values)) in tensors.iter().enumerate() {
        sink.write(at, 0, &bytes_from_floats(*dtype, values)).unwrap();
    }
    Box::new(sink).finish().unwrap();
}

/// Asserts that an error's chain holds every part.
pub fn assert_error<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error, wanted {parts:?}") };
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "wanted {part:?} in: {text}");
    }
}
