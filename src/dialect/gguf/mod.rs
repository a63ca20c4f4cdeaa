//! GGUF as llama.cpp reads it.

use anyhow::Result;

use super::{Dialect, Part};
use crate::model::config::Config;
use crate::names::TensorId;
use crate::scheme::{Activations, QTensor, Scheme};
use crate::tensor::Dtype;

/// The dialect of llama.cpp, Ollama and LM Studio.
pub struct Gguf;

impl Dialect for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn tensor_name(&self, id: TensorId, _suffix: &str) -> String {
        id.gguf_name()
    }

    /// Vectors are F32 (norms, biases); matrices keep their type, so nothing is lost.
    fn kept_dtype(&self, _id: TensorId, shape: &[usize], stored: Dtype) -> Dtype {
        if shape.len() == 1 { Dtype::F32 } else { stored }
    }

    fn row_order(&self, _id: TensorId, _config: &Config) -> Option<Vec<usize>> {
        None
    }

    fn computed_tensors(&self, _config: &Config) -> Vec<(TensorId, Vec<f32>)> {
        Vec::new()
    }

    fn parts(&self, scheme: &Scheme, _: Activations, _rows: usize, _cols: usize) -> Result<Vec<Part>> {
        anyhow::bail!("{} is not implemented", scheme.name)
    }

    fn pack(&self, q: &QTensor, _: Activations) -> Result<Vec<Vec<u8>>> {
        anyhow::bail!("{} is not implemented", q.scheme.name)
    }

    fn unpack(&self, scheme: &Scheme, _: Activations, _r: usize, _c: usize, _p: &[&[u8]]) -> Result<QTensor> {
        anyhow::bail!("{} is not implemented", scheme.name)
    }
}
