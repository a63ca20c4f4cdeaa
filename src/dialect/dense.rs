//! Ordinary checkpoints: folders of safetensors files in F32, F16 or BF16, `config.json`, tokenizer. What every trainer and
//! engine reads, and what other tools quantize.

use anyhow::{Result, bail};

use super::hugging_face::{self, Configuration};
use super::opened::{Files, Opened};
use super::{Description, Dialect, StoredPart, Surroundings};
use crate::loaders::Loads::{If, No, Unchecked, Yes};
use crate::loaders::{Row, always};
use crate::model::config::Config;
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::{Activations, QTensor, Scheme};

/// The dialect of unquantized Hugging Face folders.
pub struct Dense;

const ROWS: &[Row] = &[
    ("vLLM", always, Yes, "as it is"),
    ("SGLang", always, Yes, "as it is"),
    ("transformers", always, Yes, "as it is"),
    ("llama.cpp", always, No, "it reads GGUF; use `--dialect gguf`"),
    (
        "Ollama",
        always,
        If,
        "`FROM ./FOLDER` in a Modelfile, for classes that its converter knows: Llama, Qwen2 and Phi-3, not Mistral or \
         Qwen3; or use `--dialect gguf`",
    ),
    ("LM Studio", always, Unchecked, "its MLX engine was not tried on such folders; use `--dialect gguf`"),
    ("MLX", always, Yes, "as it is"),
];

impl Dialect for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn open<'a>(&self, files: &'a Files) -> Result<Option<Opened<'a>>> {
        let Files::Folder(folder) = files else { return Ok(None) };
        if folder.json.get("quantization_config").is_some_and(|quantization| !quantization.is_null()) {
            return Ok(None);
        }
        Ok(Some(Opened {
            config: folder.config.clone(),
            tensors: folder.tensors.clone(),
            kv_scales: Vec::new(),
            format: None,
            encoding: None,
        }))
    }

    fn place(&self, id: TensorId, rows: usize, config: &Config) -> Place {
        hugging_face::place(id, rows, config)
    }

    fn surround(&self, output: &Description) -> Result<Surroundings> {
        let configuration = Configuration { quantization: None, dtype: Some(output.dtype) };
        Ok(Surroundings::Folder(hugging_face::files(output, &configuration)?))
    }

    fn loaders(&self) -> &'static [Row] {
        ROWS
    }

    fn parts(&self, scheme: &Scheme, _: Activations, _: usize, _: usize) -> Result<Vec<StoredPart>> {
        refuse(scheme)
    }

    fn pack(&self, q: &QTensor, _: Activations) -> Result<Vec<Vec<u8>>> {
        refuse(&q.scheme)
    }

    fn unpack(&self, scheme: &Scheme, _: Activations, _: usize, _: usize, _: &[&[u8]]) -> Result<QTensor> {
        refuse(scheme)
    }
}

fn refuse<T>(scheme: &Scheme) -> Result<T> {
    bail!("dialect `dense` holds floats only, not `{}`; try `--dialect compressed-tensors`", scheme.name)
}
