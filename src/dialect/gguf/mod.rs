//! GGUF as llama.cpp reads it.

use anyhow::Result;

use super::{Dialect, Part};
use crate::scheme::{QTensor, Scheme};

/// The dialect of llama.cpp, Ollama and LM Studio.
pub struct Gguf;

impl Dialect for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
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
