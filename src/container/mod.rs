//! Files: safetensors and GGUF headers, validated before use; payload by positioned reads; outputs under a temporary
//! name, renamed when complete.

pub mod apart;
mod flush;
pub mod gguf;
mod hash;
mod input;
pub mod leftovers;
pub(crate) mod output;
pub mod safetensors;
pub mod text;

use std::path::Path;

use anyhow::Result;

pub use hash::FileHash;
pub use input::{InputFile, Located};
pub use output::Opening;

use crate::tensor::Dtype;

/// How a stored tensor's bytes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Plain numbers.
    Plain(Dtype),
    /// ggml blocks.
    Ggml(gguf::GgmlType),
}

impl Storage {
    /// Returns how many bytes a tensor of that shape takes.
    pub fn bytes(self, shape: &[usize]) -> u64 {
        let elems: u64 = shape.iter().map(|&n| n as u64).product();
        match self {
            Storage::Plain(dtype) => elems * dtype.bytes() as u64,
            Storage::Ggml(kind) => elems / kind.block_elems() as u64 * kind.block_bytes() as u64,
        }
    }
}

/// A tensor to be written: everything but its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Number or block type.
    pub storage: Storage,
    /// Row-major shape, slowest first (GGUF's reversed order is undone inside `container/gguf.rs`).
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Returns the payload size.
    pub fn bytes(&self) -> u64 {
        self.storage.bytes(&self.shape)
    }
}

/// An output whose every tensor is known before the first byte is written. Nothing stands under the final name until
/// [`Sink::finish`]; a sink dropped before that removes what it wrote.
pub trait Sink: Sync {
    /// Writes bytes of a tensor (its index in the specs the sink was made with) from `offset` on; in any order, from
    /// any thread.
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes a tensor again, whole.
    fn replace(&self, tensor: usize, bytes: &[u8]) -> Result<()>;

    /// Returns what was written of a tensor, by this run or, with an [`Opening::key`], by one that was interrupted; zeros
    /// where nothing was.
    fn read(&self, tensor: usize) -> Result<Vec<u8>>;

    /// States what is known only once the weights were read: values of metadata keys that the sink was made with, as long
    /// as those were. A folder's sink leaves them to the manifest.
    fn restate(&self, facts: &[(String, String)]) -> Result<()>;

    /// Returns where the output lies until it is finished: the file, or the folder that holds the files.
    fn path(&self) -> &Path;

    /// Makes the output durable and gives it its final name. An error if bytes of a tensor were never written.
    fn finish(self: Box<Self>) -> Result<()>;
}
