//! How an ecosystem spells quantized tensors: names, byte order, metadata. `pack` and `unpack` are inverses and live
//! in one file per dialect; nothing else in the project knows a nibble order.

pub mod compressed_tensors;
mod dense;
pub mod gguf;
pub mod hugging_face;
pub mod opened;

use anyhow::{Result, bail};

use self::opened::{Files, Opened};

use crate::container::Storage;
use crate::container::gguf::Metadata;
use crate::loaders::Row;
use crate::model::config::Config;
use crate::model::tokenizer::TokenizerFiles;
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::{Activations, QTensor, Scheme};
use crate::tensor::Dtype;

/// One stored tensor that a quantized matrix becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredPart {
    /// What follows the module path, e.g. `weight_packed`.
    pub suffix: &'static str,
    /// Number type or ggml block type.
    pub storage: Storage,
    /// Row-major shape in elements of `storage`. Unless `fixed`, the first axis of a matrix is the rows, and a vector
    /// belongs to the tensor as a whole.
    pub shape: Vec<usize>,
    /// The bytes, where the shape alone decides them (`weight_shape`). Writers write them, readers compare them;
    /// [`Dialect::pack`] and [`Dialect::unpack`] do not see such a part.
    pub fixed: Option<Vec<u8>>,
}

impl StoredPart {
    /// Returns the shape of a part that was asked for with all rows of the stored tensor at `place`.
    pub fn shape_at(&self, place: &Place) -> Vec<usize> {
        match (self.fixed.is_none(), self.shape.as_slice()) {
            (true, &[_, width]) => place.shape(Some(width)),
            _ => self.shape.clone(),
        }
    }
}

/// A matrix, the path of its module, and what it becomes; `None` if it is kept.
pub type NamedMatrix = (TensorId, String, Option<(Scheme, Activations)>);

/// What a dialect is told of an output to surround its weights.
pub struct Description<'a> {
    /// The model.
    pub config: &'a Config,
    /// The source's own `config.json`, where it has one.
    pub config_json: Option<&'a str>,
    /// Reads the source's tokenizer.
    pub tokenizer: &'a dyn Fn() -> Result<TokenizerFiles>,
    /// Reads the files beside the source's weights, by name.
    pub side_files: &'a dyn Fn() -> Result<Vec<(String, Vec<u8>)>>,
    /// Every matrix.
    pub matrices: &'a [NamedMatrix],
    /// Number type of the embeddings, or of what they are unpacked to.
    pub dtype: Dtype,
    /// Whether the output asks for an FP8 cache of keys and values.
    pub fp8_cache: bool,
    /// The model's name.
    pub name: &'a str,
    /// The format's name; `None` if its mix is not what that name says.
    pub format: Option<&'a str>,
    /// Where the output comes from.
    pub provenance: &'a [(String, String)],
}

/// What surrounds the weights of an output.
pub enum Surroundings {
    /// A folder of safetensors files: the files beside them, by name.
    Folder(Vec<(String, Vec<u8>)>),
    /// A GGUF file.
    File(Metadata),
}

/// One ecosystem's spelling of a [`QTensor`].
pub trait Dialect: Sync {
    /// Returns the name users type after `--dialect`.
    fn name(&self) -> &'static str;

    /// Reads a model's files; `None` if they are not of this ecosystem.
    ///
    /// # Errors
    /// Name what the files say that is not read.
    fn open<'a>(&self, files: &'a Files) -> Result<Option<Opened<'a>>>;

    /// Returns the `quant_method` in `config.json` of its folders, if they have one.
    fn quant_method(&self) -> Option<&'static str> {
        None
    }

    /// Returns the tokenizer that lies in a file's metadata.
    ///
    /// # Errors
    /// If there is none, or its keys do not make one.
    fn tokenizer(&self, _metadata: &Metadata) -> Result<TokenizerFiles> {
        bail!("dialect `{}` keeps tokenizers in files of their own", self.name())
    }

    /// Returns where this ecosystem keeps a tensor of `rows` rows (elements of a vector): in which stored tensor, and in
    /// which rows of it.
    fn place(&self, id: TensorId, rows: usize, config: &Config) -> Place;

    /// Returns the number type a tensor that is kept dense is written as: the stored one unless files want another.
    fn kept_dtype(&self, _id: TensorId, _shape: &[usize], stored: Dtype) -> Dtype {
        stored
    }

    /// Returns tensors that the source does not have and this ecosystem wants (vectors, F32).
    fn computed_tensors(&self, _config: &Config) -> Vec<(TensorId, Vec<f32>)> {
        Vec::new()
    }

    /// Returns what this ecosystem's files cannot say of such a model, each with what engines do instead.
    fn losses(&self, _config: &Config) -> Vec<String> {
        Vec::new()
    }

    /// Returns what lies around the weights: configuration, tokenizer, metadata.
    ///
    /// # Errors
    /// Name what this ecosystem cannot say of the model, and what the source lacks.
    fn surround(&self, output: &Description) -> Result<Surroundings>;

    /// Returns how the names of outputs end, where they are files; `None`: they are folders.
    fn extension(&self) -> Option<&'static str> {
        None
    }

    /// Returns who loads it.
    fn loaders(&self) -> &'static [Row];

    /// Returns what follows the module path in the name of the scale of a linear's inputs (F32 `[1]`: `code = x / scale`), a
    /// number of the linear and no part of its matrix; `None` where there is no place for one.
    fn input_scale(&self) -> Option<&'static str> {
        None
    }

    /// Returns the names of the scales of a layer's keys and values in an FP8 cache; `None` where there is no place for them.
    fn kv_scales(&self, _layer: usize) -> Option<[String; 2]> {
        None
    }

    /// Returns the parts a `[rows, cols]` matrix of that scheme becomes; the error says why there is no spelling and
    /// which dialect has one. `activations` is what its linear does to its inputs: compressed-tensors spells INT8
    /// weights differently for W8A16 and W8A8.
    fn parts(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<StoredPart>>;

    /// Returns one buffer per part that is not fixed. Rows are independent: packing a slice of rows gives that slice
    /// of every matrix, and every vector whole.
    fn pack(&self, q: &QTensor, activations: Activations) -> Result<Vec<Vec<u8>>>;

    /// Inverse of [`Dialect::pack`]: `parts` are the buffers of those rows, fixed parts left out. Errors on stored
    /// values the scheme does not allow (NaN scales).
    fn unpack(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
        parts: &[&[u8]],
    ) -> Result<QTensor>;
}

/// All dialects.
pub const DIALECTS: [&dyn Dialect; 3] = [&compressed_tensors::CompressedTensors, &gguf::Gguf, &dense::Dense];

/// Returns the first dialect whose files these are, and what it reads of them.
///
/// # Errors
/// Those of [`Dialect::open`]; if they are of none.
pub fn open(files: &Files) -> Result<(&'static dyn Dialect, Opened<'_>)> {
    for dialect in DIALECTS {
        if let Some(opened) = dialect.open(files)? {
            return Ok((dialect, opened));
        }
    }
    let known: Vec<_> = DIALECTS.iter().map(|dialect| dialect.name()).collect();
    bail!("the files are of no dialect that is read ({})", known.join(", "))
}

/// Returns the dialect of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Dialect> {
    DIALECTS.into_iter().find(|dialect| dialect.name() == name)
}
