//! How an ecosystem spells quantized tensors: names, byte order, metadata. `pack` and `unpack` are inverses and live
//! in one file per dialect; nothing else in the project knows a nibble order.

pub mod compressed_tensors;
pub mod gguf;

use anyhow::Result;

use crate::container::Storage;
use crate::scheme::{QTensor, Scheme};

/// One stored tensor that a quantized matrix becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// What follows the module path, e.g. `weight_packed`.
    pub suffix: &'static str,
    /// Number type or ggml block type.
    pub storage: Storage,
    /// Row-major shape in elements of `storage`.
    pub shape: Vec<usize>,
}

/// One ecosystem's spelling of a [`QTensor`].
pub trait Dialect: Sync {
    /// Returns the name users type after `--dialect`.
    fn name(&self) -> &'static str;

    /// Returns the parts a `[rows, cols]` matrix of that scheme becomes; the error says why there is no spelling and
    /// which dialect has one.
    fn parts(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>>;

    /// Returns one buffer per part. Rows are independent: packing a slice of rows gives that slice of every part whose
    /// first axis is the rows.
    fn pack(&self, q: &QTensor) -> Result<Vec<Vec<u8>>>;

    /// Inverse of [`Dialect::pack`]. Errors on stored values the scheme does not allow (NaN scales).
    fn unpack(&self, scheme: &Scheme, rows: usize, cols: usize, parts: &[&[u8]]) -> Result<QTensor>;
}

/// Returns the dialect of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Dialect> {
    match name {
        "compressed-tensors" => Some(&compressed_tensors::CompressedTensors),
        "gguf" => Some(&gguf::Gguf),
        _ => None,
    }
}
