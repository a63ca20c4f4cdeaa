//! A checkpoint as where a model's tensors come from, and what they take where they go.

use anyhow::Result;

use super::{Checkpoint, Stored, TensorInfo};
use crate::backend::footprint::Footprint;
use crate::model::TensorSource;
use crate::names::TensorId;
use crate::scheme::Activations;
use crate::tensor::Matrix;

impl TensorSource for Checkpoint {
    fn read(&self, id: TensorId) -> Result<Matrix> {
        Checkpoint::read(self, id)
    }

    fn rounding(&self, id: TensorId) -> Activations<f32> {
        self.tensors.get(&id).map_or(Activations::Full, |info| info.rounding)
    }

    fn kv_scales(&self, layer: usize) -> Result<Option<[f32; 2]>> {
        Ok(Checkpoint::kv_scales(self).get(layer).copied())
    }
}

impl TensorInfo {
    /// Returns the bytes that the tensor takes in a device's memory.
    pub fn bytes_on(&self, device: &impl Footprint) -> u64 {
        let scheme = match self.stored {
            Stored::Quantized(scheme, _) => Some(scheme),
            Stored::Dense(_) => None,
        };
        device.weight_bytes(scheme, &self.shape, self.bytes)
    }
}
