//! Checkpoints of the compressed-tensors library, read by vLLM, SGLang and transformers.

use anyhow::Result;

use super::{Dialect, Part};
use crate::model::config::Config;
use crate::names::TensorId;
use crate::scheme::{QTensor, Scheme};
use crate::tensor::Dtype;

/// The dialect of vLLM, SGLang and transformers.
pub struct CompressedTensors;

impl Dialect for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn tensor_name(&self, id: TensorId, suffix: &str) -> String {
        format!("{}.{suffix}", id.hf_module())
    }

    fn kept_dtype(&self, _id: TensorId, _shape: &[usize], stored: Dtype) -> Dtype {
        stored
    }

    fn row_order(&self, _id: TensorId, _config: &Config) -> Option<Vec<usize>> {
        None
    }

    fn computed_tensors(&self, _config: &Config) -> Vec<(TensorId, Vec<f32>)> {
        Vec::new()
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
