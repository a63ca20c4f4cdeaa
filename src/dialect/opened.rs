//! A model's files before and after a dialect has understood them.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use crate::container::gguf::Gguf;
use crate::container::{InputFile, Located};
use crate::model::config::Config;
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::{Activations, Scheme};

/// The files of a model, headers read.
pub enum Files {
    /// A Hugging Face folder.
    Folder(Box<Folder>),
    /// A GGUF file, with all its parts.
    Gguf(Gguf),
}

/// A Hugging Face folder.
pub struct Folder {
    /// The model's shape and constants.
    pub config: Config,
    /// The text of `config.json`.
    pub config_json: String,
    /// What that text says.
    pub json: Value,
    /// The weight files.
    pub files: Vec<InputFile>,
    /// Their tensors.
    pub tensors: Vec<Located>,
}

/// The stored parts of one tensor, by what follows the module path in their name.
pub type Parts = BTreeMap<String, Located>;

/// How a matrix is stored that is not plain floats.
pub struct Encoding {
    /// What its numbers mean.
    pub scheme: Scheme,
    /// What its linear does to its inputs.
    pub activations: Activations,
    /// The same, with the scale that lies beside it.
    pub rounding: Activations<f32>,
}

/// Says how a tensor of that shape is stored whose parts lie at a place; `None`: as plain floats. Takes from the parts what
/// belongs to the linear and not to its matrix.
pub type Describe<'a> = Box<dyn Fn(TensorId, &[usize], &Place, &mut Parts) -> Result<Option<Encoding>> + 'a>;

/// The files of a model as a dialect reads them.
pub struct Opened<'a> {
    /// The model's shape and constants.
    pub config: Config,
    /// Tensors of the model; those that say something else about it are read already.
    pub tensors: Vec<Located>,
    /// Scales of an FP8 cache, of every layer's keys and values; empty without one.
    pub kv_scales: Vec<[f32; 2]>,
    /// The mix that the files name.
    pub format: Option<String>,
    /// How tensors are stored; `None`: all of them as plain floats.
    pub encoding: Option<Describe<'a>>,
}

impl Files {
    /// Returns the files that hold the weights.
    pub fn files(&self) -> &[InputFile] {
        match self {
            Files::Folder(folder) => &folder.files,
            Files::Gguf(gguf) => &gguf.files,
        }
    }
}
