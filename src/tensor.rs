//! Tensors in memory: dense ones as stored, and the [`Matrix`] that is either dense or quantized.

use std::fmt;

use bytes::Bytes;
use half::{bf16, f16};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::scheme::QTensor;

/// How the numbers of a tensor are stored. Names as in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    F8E4M3,
    I64,
    I32,
    I8,
    U8,
}

impl Dtype {
    /// Returns the size of one number.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F8E4M3 | Dtype::I8 | Dtype::U8 => 1,
        }
    }

    /// Whether a dense weight may have this type.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
        })
    }
}

/// A dense float tensor (F32, F16 or BF16), little-endian bytes as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// Number type.
    pub dtype: Dtype,
    /// Row-major shape, slowest first.
    pub shape: Vec<usize>,
    /// `shape.product() · dtype.bytes()` bytes.
    pub bytes: Bytes,
}

impl Dense {
    /// Returns an F32 tensor of those values.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Dense { dtype: Dtype::F32, shape, bytes: bytes_from_floats(Dtype::F32, values).into() }
    }

    /// Returns `[rows, cols]`: all but the last axis, and the last. A vector is one row.
    pub fn dims(&self) -> [usize; 2] {
        let cols = self.shape.last().copied().unwrap_or(1);
        [self.shape.iter().product::<usize>() / cols.max(1), cols]
    }

    /// Writes the values of rows `first_row ..` as F32, as many as fit `out`.
    pub fn decode_rows(&self, first_row: usize, out: &mut [f32]) {
        let start = first_row * self.dims()[1] * self.dtype.bytes();
        let bytes = &self.bytes[start..start + out.len() * self.dtype.bytes()];
        floats_from_bytes(self.dtype, bytes, out);
    }

    /// Returns all values as F32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len() / self.dtype.bytes()];
        floats_from_bytes(self.dtype, &self.bytes, &mut out);
        out
    }

    /// Returns the entries `order[0]`, `order[1]`, … of the first axis.
    pub fn select_rows(&self, order: &[usize]) -> Dense {
        let mut shape = self.shape.clone();
        shape.iter_mut().take(1).for_each(|n| *n = order.len());
        let width = self.shape.iter().skip(1).product::<usize>() * self.dtype.bytes();
        let mut bytes = Vec::with_capacity(order.len() * width);
        for &i in order {
            bytes.extend_from_slice(&self.bytes[i * width..(i + 1) * width]);
        }
        Dense { dtype: self.dtype, shape, bytes: bytes.into() }
    }

    /// Returns the same values as `dtype`, rounded to nearest even.
    pub fn cast(&self, dtype: Dtype) -> Dense {
        if dtype == self.dtype {
            return self.clone();
        }
        Dense { dtype, shape: self.shape.clone(), bytes: bytes_from_floats(dtype, &self.to_f32()).into() }
    }
}

/// Decodes stored floats. `bytes` holds `out.len()` numbers of type `dtype` (F32, F16 or BF16).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn floats_from_bytes(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*b).to_f32();
            }
        }
        Dtype::BF16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits((u16::from_le_bytes(*b) as u32) << 16);
            }
        }
        other => unreachable!("{other} is no float type; checkpoints refuse it when opened"),
    }
}

/// Encodes floats as `dtype` (F32, F16 or BF16), rounded to nearest even.
pub fn bytes_from_floats(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    match dtype {
        Dtype::F32 => {
            for (out, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *out = x.to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (out, &x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = f16::from_f32(x).to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (out, &x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = bf16::from_f32(x).to_le_bytes();
            }
        }
        other => unreachable!("{other} is no float type"),
    }
    bytes
}

/// Returns the index of the first NaN or infinity.
///
/// Whole chunks are tested at once: a sum of `x · 0` is zero exactly if every x is finite, and it vectorises.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    const CHUNK: usize = 1024;
    let finite = |chunk: &[f32]| {
        let mut sums = [0.0f32; 16];
        let (lanes, rest) = chunk.as_chunks::<16>();
        for lane in lanes {
            for (sum, x) in sums.iter_mut().zip(lane) {
                *sum += x * 0.0;
            }
        }
        sums.iter().sum::<f32>() == 0.0 && rest.iter().all(|x| x.is_finite())
    };
    let chunk = values.chunks(CHUNK).position(|chunk| !finite(chunk))?;
    let start = chunk * CHUNK;
    values[start..].iter().position(|x| !x.is_finite()).map(|i| start + i)
}

/// A weight as a file stores it.
#[derive(Clone, Debug, PartialEq)]
pub enum Matrix {
    /// Plain floats.
    Dense(Dense),
    /// Codes and scales.
    Quantized(QTensor),
}

impl Matrix {
    /// Returns `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Matrix::Dense(dense) => dense.dims(),
            Matrix::Quantized(q) => [q.rows, q.cols],
        }
    }

    /// Returns the rows (elements of a vector) `order[0]`, `order[1]`, …
    pub fn select_rows(&self, order: &[usize]) -> Matrix {
        match self {
            Matrix::Dense(dense) => Matrix::Dense(dense.select_rows(order)),
            Matrix::Quantized(q) => Matrix::Quantized(q.permute_rows(order)),
        }
    }

    /// Writes the values of rows `first_row ..` as F32, as many as fit `out`.
    pub fn decode_rows(&self, first_row: usize, out: &mut [f32]) {
        match self {
            Matrix::Dense(dense) => dense.decode_rows(first_row, out),
            Matrix::Quantized(q) => {
                for (i, out) in out.chunks_mut(q.cols).enumerate() {
                    q.decode_row(first_row + i, out);
                }
            }
        }
    }

    /// Returns all values as F32, decoded in parallel.
    pub fn to_f32(&self) -> Vec<f32> {
        let [rows, cols] = self.dims();
        let mut out = vec![0.0; rows * cols];
        out.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, out)| self.decode_rows(row, out));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_wherever_it_is() {
        let mut values: Vec<f32> = (0..3000).map(|i| (i as f32 - 1500.0) * 1e35).collect();
        assert_eq!(first_non_finite(&values), None);
        for at in [2999, 2047, 1024, 1023, 17, 0] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[at] = bad;
                assert_eq!(first_non_finite(&values), Some(at));
            }
        }
    }
}
