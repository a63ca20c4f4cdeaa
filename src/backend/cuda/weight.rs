//! Weights in GPU memory, as compact as the files: packed code planes and the stored scales, laid out as
//! `kernels/decode.cuh` says. Nothing is decoded before it is used.

use std::sync::Arc;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::compile::Kernel;
use super::device::{Arg, Buffer, Device, Geometry};
use super::tensor::Float;
use crate::num::{Codec, Element};
use crate::scheme::{Offset, QTensor, Scheme, Span};
use crate::tensor::{Dtype, Matrix};

/// A matrix `[rows, cols]` on the device. Clones share memory.
#[derive(Clone)]
pub struct Weight {
    /// Output features, or vocabulary.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How it is stored.
    pub stored: Stored,
    low: Arc<Buffer>,
    high: Option<Arc<Buffer>>,
    scales: Option<Arc<Buffer>>,
    outer: Option<Arc<Buffer>>,
    offsets: Option<Arc<Buffer>>,
    outer_offsets: Option<Arc<Buffer>>,
    /// F32 `[rows]`, for INT8 codes with one scale a row: what an INT8 product multiplies its sums with.
    row_scales: Option<Arc<Buffer>>,
}

/// How a weight's values are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stored {
    /// Plain floats.
    Dense(Dtype),
    /// Codes and scales.
    Packed(Scheme),
}

impl Weight {
    /// Copies a matrix to the device, packing codes to their bits.
    pub fn upload(device: &Device, matrix: &Matrix) -> Result<Self> {
        let [rows, cols] = matrix.dims();
        ensure!(cols % 8 == 0, "{cols} columns: the GPU wants a multiple of 8; use `--device cpu`");
        ensure!(
            rows * cols < 1 << 32,
            "{rows} x {cols} values: the GPU takes fewer than 2^32; use `--device cpu`"
        );
        match matrix {
            Matrix::Dense(dense) => Ok(Weight {
                rows,
                cols,
                stored: Stored::Dense(dense.dtype),
                low: Arc::new(device.upload(&dense.bytes)?),
                high: None,
                scales: None,
                outer: None,
                offsets: None,
                outer_offsets: None,
                row_scales: None,
            }),
            Matrix::Quantized(q) => Self::upload_packed(device, q),
        }
    }

    fn upload_packed(device: &Device, q: &QTensor) -> Result<Self> {
        let scheme = q.scheme;
        for span in [Some(scheme.group), scheme.outer.map(|(span, _)| span)].into_iter().flatten() {
            let Span::Cols(n) = span else { continue };
            ensure!(
                q.cols.is_multiple_of(n as usize) && n % 8 == 0,
                "{} columns in groups of {n}: the GPU wants whole groups of a multiple of 8; use `--device cpu`",
                q.cols
            );
        }
        let (low, high) = pack_codes(scheme.element, &q.codes);
        let stored = |codec: Option<Codec>, values: &[f32]| match codec {
            Some(codec) if !values.is_empty() => {
                Ok::<_, anyhow::Error>(Some(Arc::new(device.upload(&encode(codec, values))?)))
            }
            _ => Ok(None),
        };
        let outer_codec = scheme.outer.map(|(_, codec)| codec);
        Ok(Weight {
            rows: q.rows,
            cols: q.cols,
            stored: Stored::Packed(scheme),
            low: Arc::new(device.upload(&low)?),
            high: if high.is_empty() { None } else { Some(Arc::new(device.upload(&high)?)) },
            scales: stored(Some(scheme.scale), &q.scales)?,
            outer: stored(outer_codec, &q.outer_scales)?,
            offsets: stored(offset_codec(scheme.offset), &q.offsets)?,
            outer_offsets: stored(outer_codec, &q.outer_offsets)?,
            row_scales: if is_int8_by_row(&scheme) {
                Some(Arc::new(device.upload(&encode(Codec::F32, &q.scales))?))
            } else {
                None
            },
        })
    }

    /// Returns the bytes on the device.
    pub fn bytes(&self) -> usize {
        let rest = [&self.high, &self.scales, &self.outer, &self.offsets, &self.outer_offsets];
        self.low.bytes() + rest.into_iter().flatten().map(|buffer| buffer.bytes()).sum::<usize>()
    }

    /// Returns the values as they lie, when a product can read them so: floats, or INT8 codes.
    pub fn codes(&self) -> &Buffer {
        &self.low
    }

    /// Returns the scales of INT8 codes with one scale a row, F32 `[rows]`; `None` for every other scheme.
    pub fn row_scales(&self) -> Option<&Buffer> {
        self.row_scales.as_deref()
    }

    /// Queues y = all values as `float`, `[rows, cols]`. F32 is exact; others are rounded once.
    pub fn dequantize(&self, device: &Device, float: Float) -> Result<Buffer> {
        let y = device.allocate(self.rows * self.cols * float.bytes())?;
        let mut defines = self.defines();
        defines.push(format!("Y={}", float.c_name()));
        let units = self.rows * self.cols / 8;
        device.launch(
            Kernel { name: "dequantize", defines },
            Geometry::flat(units.div_ceil(1024), 256),
            &[Arg::Struct(&self.argument()), Arg::Pointer(y.at()), Arg::U32(units as u32)],
        )?;
        Ok(y)
    }

    /// Queues y\[i, :\] = row `ids[i]` as F32, `[n, cols]`; `ids` holds `n` u32 below `rows`.
    pub fn embed(&self, device: &Device, ids: &Buffer, n: usize) -> Result<Buffer> {
        let y = device.allocate(n * self.cols * 4)?;
        self.embed_into(device, ids, n, &y)?;
        Ok(y)
    }

    /// The same, into memory that is there.
    pub fn embed_into(&self, device: &Device, ids: &Buffer, n: usize, y: &Buffer) -> Result<()> {
        device.launch_overlapping(
            Kernel { name: "embed", defines: self.defines() },
            Geometry::flat(n, 128),
            &[Arg::Struct(&self.argument()), Arg::Pointer(ids.at()), Arg::Pointer(y.at())],
        )
    }

    /// Returns `struct Weight` of decode.cuh.
    pub(super) fn argument(&self) -> [u64; 7] {
        let at = |buffer: &Option<Arc<Buffer>>| buffer.as_ref().map_or(0, |buffer| buffer.at());
        let rest = [&self.high, &self.scales, &self.outer, &self.offsets, &self.outer_offsets].map(at);
        [self.low.at(), rest[0], rest[1], rest[2], rest[3], rest[4], self.cols as u64]
    }

    /// Returns the macros that specialise decode.cuh for this weight.
    pub(super) fn defines(&self) -> Vec<String> {
        match self.stored {
            Stored::Dense(dtype) => vec![format!("ELEMENT=DENSE_{dtype}")],
            Stored::Packed(scheme) => scheme_defines(&scheme),
        }
    }
}

fn is_int8_by_row(scheme: &Scheme) -> bool {
    let plain = scheme.outer.is_none() && scheme.offset == Offset::None;
    plain && scheme.element == Element::Int(8) && scheme.group == Span::Row
}

/// Returns the macros that specialise decode.cuh for a scheme.
pub fn scheme_defines(scheme: &Scheme) -> Vec<String> {
    let element = match scheme.element {
        Element::E2M1 => "E2M1",
        Element::E4M3 => "E4M3",
        Element::Int(_) => "INT",
        Element::Uint(_) => "UINT",
    };
    let (outer_group, outer) = match scheme.outer {
        None => ("ROW".to_string(), "NONE".to_string()),
        Some((span, codec)) => (span_name(span), codec_name(codec)),
    };
    let offset = match scheme.offset {
        Offset::None => "NONE",
        Offset::Added(_) => "ADDED",
        Offset::Subtracted(_) => "SUBTRACTED",
    };
    vec![
        format!("ELEMENT={element}"),
        format!("BITS={}", scheme.element.bits()),
        format!("GROUP={}", span_name(scheme.group)),
        format!("SCALE={}", codec_name(scheme.scale)),
        format!("OUTER={outer}"),
        format!("OUTER_GROUP={outer_group}"),
        format!("OFFSET={offset}"),
        format!("OFFSET_CODEC={}", offset_codec(scheme.offset).map_or("NONE".to_string(), codec_name)),
    ]
}

fn span_name(span: Span) -> String {
    match span {
        Span::Tensor => "TENSOR".to_string(),
        Span::Row => "ROW".to_string(),
        Span::Cols(n) => n.to_string(),
    }
}

fn codec_name(codec: Codec) -> String {
    format!("CODEC_{codec:?}")
}

fn offset_codec(offset: Offset) -> Option<Codec> {
    match offset {
        Offset::None => None,
        Offset::Added(codec) | Offset::Subtracted(codec) => Some(codec),
    }
}

/// Returns the planes (low, high) of decode.cuh; `codes.len()` is a multiple of 8.
fn pack_codes(element: Element, codes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let bits = element.bits();
    if bits > 6 {
        let flip = if element == Element::Int(8) { 0x80 } else { 0 };
        return (codes.par_iter().map(|code| code ^ flip).collect(), Vec::new());
    }
    let mut low = vec![0u8; codes.len() / 2];
    low.par_chunks_mut(4).zip(codes.par_chunks(8)).for_each(|(word, unit)| {
        let packed =
            (0..8).fold(0u32, |word, j| word | u32::from(unit[j] & 15) << (4 * (j / 2) + 16 * (j % 2)));
        word.copy_from_slice(&packed.to_le_bytes());
    });
    let above = bits.saturating_sub(4) as usize;
    let mut high = vec![0u8; codes.len() / 8 * above];
    if above > 0 {
        high.par_chunks_mut(above).zip(codes.par_chunks(8)).for_each(|(bytes, unit)| {
            let packed = (0..8).fold(0u16, |word, j| word | u16::from(unit[j] >> 4) << (above * j));
            bytes.copy_from_slice(&packed.to_le_bytes()[..above]);
        });
    }
    (low, high)
}

/// Returns the stored bits, 1, 2 or 4 bytes each. The codec represents every value exactly: see [`QTensor`].
fn encode(codec: Codec, values: &[f32]) -> Vec<u8> {
    let bytes = codec.bits().div_ceil(8) as usize;
    let mut out = vec![0u8; values.len() * bytes];
    out.par_chunks_mut(bytes)
        .zip(values)
        .for_each(|(out, &value)| out.copy_from_slice(&codec.encode(value).to_le_bytes()[..bytes]));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(element: Element, low: &[u8], high: &[u8], i: usize) -> u8 {
        let (unit, j) = (i / 8, i % 8);
        if element.bits() > 6 {
            return low[i] ^ if element == Element::Int(8) { 0x80 } else { 0 };
        }
        let word =
            u32::from_le_bytes([low[4 * unit], low[4 * unit + 1], low[4 * unit + 2], low[4 * unit + 3]]);
        let code = (word >> (4 * (j / 2) + 16 * (j % 2)) & 15) as u8;
        match element.bits() {
            5 => code | ((high[unit] >> j & 1) << 4),
            6 => code | ((high[2 * unit + j / 4] >> (2 * (j % 4)) & 3) << 4),
            _ => code,
        }
    }

    #[test]
    fn every_code_survives_packing() {
        for element in [
            Element::E2M1,
            Element::E4M3,
            Element::Int(4),
            Element::Int(5),
            Element::Int(6),
            Element::Int(8),
            Element::Uint(5),
        ] {
            // Strides coprime to the number of codes put every code at every place of a unit.
            let count = 1usize << element.bits();
            let codes: Vec<u8> = (0..8 * count).map(|i| ((i * 3 + i / 8 * 5) % count) as u8).collect();
            let (low, high) = pack_codes(element, &codes);
            let stored_bits = if element.bits() > 6 { 8 } else { element.bits() as usize };
            assert_eq!(8 * (low.len() + high.len()), stored_bits * codes.len(), "{element:?}");
            for (i, &code) in codes.iter().enumerate() {
                assert_eq!(unpacked(element, &low, &high, i), code, "{element:?} at {i}");
            }
        }
    }
}
