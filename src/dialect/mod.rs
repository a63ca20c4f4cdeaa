//! How an ecosystem spells quantized tensors: names, byte order, metadata. `pack` and `unpack` are inverses and live
//! in one file per dialect; nothing else in the project knows a nibble order.

pub mod compressed_tensors;
pub mod gguf;

use anyhow::Result;

use crate::container::Storage;
use crate::model::config::Config;
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::{Activations, QTensor, Scheme};
use crate::tensor::Dtype;

/// One stored tensor that a quantized matrix becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
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

impl Part {
    /// Returns the shape of a part that was asked for with all rows of the stored tensor at `place`.
    pub fn shape_at(&self, place: &Place) -> Vec<usize> {
        match (self.fixed.is_none(), self.shape.as_slice()) {
            (true, &[_, width]) => place.shape(Some(width)),
            _ => self.shape.clone(),
        }
    }
}

/// One ecosystem's spelling of a [`QTensor`].
pub trait Dialect: Sync {
    /// Returns the name users type after `--dialect`.
    fn name(&self) -> &'static str;

    /// Returns where this ecosystem keeps a tensor of `rows` rows (elements of a vector): in which stored tensor, and in
    /// which rows of it.
    fn place(&self, id: TensorId, rows: usize, config: &Config) -> Place;

    /// Returns the number type a tensor that is kept dense is written as.
    fn kept_dtype(&self, id: TensorId, shape: &[usize], stored: Dtype) -> Dtype;

    /// Returns tensors that the source does not have and this ecosystem wants (vectors, F32).
    fn computed_tensors(&self, config: &Config) -> Vec<(TensorId, Vec<f32>)>;

    /// Returns what this ecosystem's files cannot say of such a model, each with what engines do instead.
    fn losses(&self, _config: &Config) -> Vec<String> {
        Vec::new()
    }

    /// Returns the parts a `[rows, cols]` matrix of that scheme becomes; the error says why there is no spelling and
    /// which dialect has one. `activations` is what its linear does to its inputs: compressed-tensors spells INT8
    /// weights differently for W8A16 and W8A8.
    fn parts(&self, scheme: &Scheme, activations: Activations, rows: usize, cols: usize)
    -> Result<Vec<Part>>;

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

/// Returns where Hugging Face checkpoints keep a tensor of `rows` rows.
pub fn hugging_face_place(id: TensorId, rows: usize, config: &Config) -> Place {
    match config.share(id) {
        Some(share) => share.place(id.hf_name_as(share.fused.module)),
        None => Place::whole(config.family.hf_name(id), rows),
    }
}

/// Returns the dialect of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Dialect> {
    match name {
        "compressed-tensors" => Some(&compressed_tensors::CompressedTensors),
        "gguf" => Some(&gguf::Gguf),
        _ => None,
    }
}
