//! Checkpoints of the compressed-tensors library, read by vLLM, SGLang and transformers.

use anyhow::Result;

use super::{Dialect, Part};
use crate::scheme::{QTensor, Scheme};

/// The dialect of vLLM, SGLang and transformers.
pub struct CompressedTensors;

impl Dialect for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn parts(&self, scheme: &Scheme, _rows: usize, _cols: usize) -> Result<Vec<Part>> {
        anyhow::bail!("{} is not implemented", scheme.name)
    }

    fn pack(&self, q: &QTensor) -> Result<Vec<Vec<u8>>> {
        anyhow::bail!("{} is not implemented", q.scheme.name)
    }

    fn unpack(&self, scheme: &Scheme, _rows: usize, _cols: usize, _parts: &[&[u8]]) -> Result<QTensor> {
        anyhow::bail!("{} is not implemented", scheme.name)
    }
}
