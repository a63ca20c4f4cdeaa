//! Activations in GPU memory.

use std::sync::Arc;

use anyhow::Result;

use super::device::{Buffer, Device};

/// Number type of activations on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// What is uploaded (gains, biases), the residual stream, logits; everything under `--precise`.
    F32,
    /// What products read and write.
    F16,
}

impl Float {
    /// Returns the size of one number.
    pub const fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 => 2,
        }
    }

    /// Returns its name in the kernels.
    pub const fn c_name(self) -> &'static str {
        match self {
            Float::F32 => "float",
            Float::F16 => "f16",
        }
    }
}

/// Activations `[rows, cols]`. Clones share memory; writing in place copies first when shared.
#[derive(Clone)]
pub struct Tensor {
    /// Tokens, or 1 for a vector.
    pub rows: usize,
    /// Width.
    pub cols: usize,
    /// Number type.
    pub float: Float,
    values: Arc<Buffer>,
}

impl Tensor {
    /// Returns a tensor of the values in `values`.
    pub fn new(rows: usize, cols: usize, float: Float, values: Buffer) -> Self {
        Tensor { rows, cols, float, values: Arc::new(values) }
    }

    /// Returns a tensor with unknown contents.
    pub fn empty(device: &Device, rows: usize, cols: usize, float: Float) -> Result<Self> {
        Ok(Self::new(rows, cols, float, device.allocate(rows * cols * float.bytes())?))
    }

    /// Returns the number of values.
    pub fn count(&self) -> usize {
        self.rows * self.cols
    }

    /// Returns the address on the device.
    pub fn at(&self) -> u64 {
        self.values.at()
    }

    /// Returns the memory.
    pub fn buffer(&self) -> &Buffer {
        &self.values
    }

    /// Makes the memory this tensor's own, so that it may be written.
    pub fn make_unique(&mut self, device: &Device) -> Result<()> {
        if Arc::get_mut(&mut self.values).is_none() {
            self.values = Arc::new(device.duplicate(&self.values)?);
        }
        Ok(())
    }
}
