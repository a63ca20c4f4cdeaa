//! Weights in GPU memory, as compact as the files (but for what `widen` names): packed code planes and the
//! stored scales, laid out as `kernels/decode.cuh` says. Nothing is decoded before it is used.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::compile::Kernel;
use super::device::{Arg, Buffer, Device, Geometry};
use super::tensor::Float;
use super::widen::widened;
use crate::num::{Codec, Element};
use crate::scheme::{Offset, QTensor, Scheme, Span};
use crate::tensor::{Dtype, Matrix};

/// Columns that packed rows are padded to a multiple of.
const PIECE: usize = 128;

/// A matrix `[rows, cols]` on the device. Clones share memory.
#[derive(Clone)]
pub struct Weight {
    /// Output features, or vocabulary.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Columns as they lie, with the padding of decode.cuh.
    pitch: usize,
    /// How it is stored.
    pub stored: WeightLayout,
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
pub enum WeightLayout {
    /// Plain floats.
    Dense(Dtype),
    /// Codes and scales.
    Packed(Scheme),
}

impl Weight {
    /// Copies a matrix to the device, packing codes to their bits, where `widen` has no wider ones for it.
    pub fn upload(device: &Device, matrix: &Matrix) -> Result<Self> {
        let [rows, cols] = matrix.dims();
        ensure!(cols % 8 == 0, "{cols} columns: the GPU wants a multiple of 8; use `--device cpu`");
        ensure!(
            rows * cols < 1 << 32,
            "{rows} x {cols} values: the GPU takes fewer than 2^32; use `--device cpu`"
        );
        match matrix {
            Matrix::Dense(dense) => Ok(Self::dense(rows, cols, dense.dtype, device.upload(&dense.bytes)?)),
            Matrix::Quantized(q) => Self::upload_quantized(device, q),
        }
    }

    /// Returns a weight of values that are on the device already.
    pub fn of_floats(rows: usize, cols: usize, float: Float, values: Buffer) -> Self {
        let dtype = match float {
            Float::F32 => Dtype::F32,
            Float::F16 => Dtype::F16,
        };
        Self::dense(rows, cols, dtype, values)
    }

    fn dense(rows: usize, cols: usize, dtype: Dtype, values: Buffer) -> Self {
        Weight {
            rows,
            cols,
            pitch: cols,
            stored: WeightLayout::Dense(dtype),
            low: Arc::new(values),
            high: None,
            scales: None,
            outer: None,
            offsets: None,
            outer_offsets: None,
            row_scales: None,
        }
    }

    /// Returns the values of some rows as F32, `[rows.len(), cols]`.
    pub fn rows_as_f32(device: &Device, matrix: &Matrix, rows: Range<usize>) -> Result<Buffer> {
        let cols = matrix.dims()[1];
        match matrix {
            Matrix::Dense(dense) => {
                let width = cols * dense.dtype.bytes();
                let values = device.upload(&dense.bytes[rows.start * width..rows.end * width])?;
                match dense.dtype {
                    Dtype::F32 => Ok(values),
                    dtype => Self::dense(rows.len(), cols, dtype, values).dequantize(device, Float::F32),
                }
            }
            Matrix::Quantized(q) => {
                Self::upload_quantized(device, &q.slice_rows(rows))?.dequantize(device, Float::F32)
            }
        }
    }

    /// Returns dense values as F16, rounded once; packed ones as they are.
    pub fn rounded_if_dense(self, device: &Device) -> Result<Self> {
        match self.stored {
            WeightLayout::Packed(_) | WeightLayout::Dense(Dtype::F16) => Ok(self),
            WeightLayout::Dense(_) => {
                let values = self.dequantize(device, Float::F16)?;
                Ok(Self::dense(self.rows, self.cols, Dtype::F16, values))
            }
        }
    }

    /// The same for codes and scales that stay with the caller.
    pub fn upload_quantized(device: &Device, q: &QTensor) -> Result<Self> {
        let widened = widened(q);
        let q = widened.as_ref().unwrap_or(q);
        let scheme = q.scheme;
        for span in [Some(scheme.group), scheme.outer.map(|(span, _)| span)].into_iter().flatten() {
            let Span::Cols(n) = span else { continue };
            ensure!(
                q.cols.is_multiple_of(n as usize) && n % 8 == 0,
                "{} columns in groups of {n}: the GPU wants whole groups of a multiple of 8; use `--device cpu`",
                q.cols
            );
        }
        let pitch = if is_int8_by_row(&scheme) { q.cols } else { q.cols.next_multiple_of(PIECE) };
        ensure!(
            q.rows * pitch < 1 << 32,
            "{} x {pitch} codes: the GPU takes fewer than 2^32; use `--device cpu`",
            q.rows
        );
        let (low, high) = match is_int8_by_row(&scheme) {
            true => (q.codes.par_iter().map(|code| code ^ 0x80).collect(), Vec::new()),
            false => pack_codes(&scheme, q.cols, &q.codes),
        };
        let stored = |codec: Option<Codec>, values: &[f32], span: Option<Span>| match (codec, span) {
            (Some(codec), Some(span)) if !values.is_empty() => {
                let bytes = tile_groups(&encode(codec, values), codec, span, q.cols, pitch);
                Ok::<_, anyhow::Error>(Some(Arc::new(device.upload(&bytes)?)))
            }
            _ => Ok(None),
        };
        let (group, outer_group) = (Some(scheme.group), scheme.outer.map(|(span, _)| span));
        let outer_codec = scheme.outer.map(|(_, codec)| codec);
        Ok(Weight {
            rows: q.rows,
            cols: q.cols,
            pitch,
            stored: WeightLayout::Packed(scheme),
            low: Arc::new(device.upload(&low)?),
            high: if high.is_empty() { None } else { Some(Arc::new(device.upload(&high)?)) },
            scales: stored(Some(scheme.scale), &q.scales, group)?,
            outer: stored(outer_codec, &q.outer_scales, outer_group)?,
            offsets: stored(offset_codec(scheme.offset), &q.offsets, group)?,
            outer_offsets: stored(outer_codec, &q.outer_offsets, outer_group)?,
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
        let units = self.rows * self.pitch / 8;
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
            Geometry::flat(n, 256),
            &[Arg::Struct(&self.argument()), Arg::Pointer(ids.at()), Arg::Pointer(y.at())],
        )
    }

    /// Returns `struct Weight` of decode.cuh.
    pub(super) fn argument(&self) -> [u64; 7] {
        let at = |buffer: &Option<Arc<Buffer>>| buffer.as_ref().map_or(0, |buffer| buffer.at());
        let rest = [&self.high, &self.scales, &self.outer, &self.offsets, &self.outer_offsets].map(at);
        let widths = self.cols as u64 | (self.pitch as u64) << 32;
        [self.low.at(), rest[0], rest[1], rest[2], rest[3], rest[4], widths]
    }

    /// Returns how many bytes of codes a lane of matvec.cu reads of a row and piece: 32 columns.
    pub(super) fn lane_bytes(&self) -> usize {
        match self.stored {
            WeightLayout::Dense(dtype) => 32 * dtype.bytes(),
            WeightLayout::Packed(scheme) => match scheme.element.bits() {
                ..=4 => 16,
                5 => 20,
                6 => 24,
                _ => 32,
            },
        }
    }

    /// Returns the bytes of scales that matvec.cu stages for a row and piece, a word at least from each plane.
    pub(super) fn staged_grid_bytes(&self) -> usize {
        let WeightLayout::Packed(scheme) = self.stored else { return 0 };
        let plane = |span: Span, codec: Codec| match span {
            Span::Cols(n) => ((PIECE / n as usize).max(1) * codec.bits().div_ceil(8) as usize).max(4),
            Span::Row | Span::Tensor => 0,
        };
        let subtracted = matches!(scheme.offset, Offset::Subtracted(_));
        let outer = scheme.outer.map_or(0, |(span, codec)| plane(span, codec));
        plane(scheme.group, scheme.scale)
            + offset_codec(scheme.offset).map_or(0, |codec| plane(scheme.group, codec))
            + if subtracted { 2 * outer } else { outer }
    }

    /// Returns the macros that specialise decode.cuh for this weight.
    pub(super) fn defines(&self) -> Vec<String> {
        match self.stored {
            WeightLayout::Dense(dtype) => vec![format!("ELEMENT=DENSE_{dtype}")],
            WeightLayout::Packed(scheme) => scheme_defines(&scheme),
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
        Element::Table(_) => "TABLE",
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
    let table = match scheme.element {
        Element::Table(table) => {
            let values: Vec<_> = table.values().iter().map(|value| value.to_string()).collect();
            Some(format!("TABLE_VALUES={}", values.join(",")))
        }
        _ => None,
    };
    let mut defines = vec![
        format!("ELEMENT={element}"),
        format!("BITS={}", scheme.element.bits()),
        format!("GROUP={}", span_name(scheme.group)),
        format!("SCALE={}", codec_name(scheme.scale)),
        format!("OUTER={outer}"),
        format!("OUTER_GROUP={outer_group}"),
        format!("OFFSET={offset}"),
        format!("OFFSET_CODEC={}", offset_codec(scheme.offset).map_or("NONE".to_string(), codec_name)),
    ];
    defines.extend(table);
    defines
}

fn span_name(span: Span) -> String {
    match span {
        Span::Tensor => "TENSOR".to_string(),
        Span::Row => "ROW".to_string(),
        Span::Cols(n) => n.to_string(),
    }
}

fn codec_name(codec: Codec) -> String {
    match codec {
        Codec::OddEighths(_) => "CODEC_ODD_EIGHTHS".to_string(),
        _ => format!("CODEC_{codec:?}"),
    }
}

fn offset_codec(offset: Offset) -> Option<Codec> {
    match offset {
        Offset::None => None,
        Offset::Added(codec) | Offset::Subtracted(codec) => Some(codec),
    }
}

/// Returns where the columns of stored unit `unit` of a piece come from, in the piece: decode.cuh.
fn unit_columns(scheme: &Scheme, unit: usize) -> [usize; 8] {
    let (t, b) = match scheme.element.bits() {
        ..=6 => (unit / 4, unit % 4),
        _ => (unit / 2 % 4, unit / 8 * 2 + unit % 2),
    };
    std::array::from_fn(|i| match scheme.group {
        Span::Cols(16) => 32 * b + 16 * (i / 4) + 4 * t + i % 4,
        _ => 32 * b + 8 * t + i,
    })
}

/// Returns the planes (low, high) of decode.cuh for rows of `cols` codes, padded to whole pieces.
fn pack_codes(scheme: &Scheme, cols: usize, codes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let bits = scheme.element.bits();
    let (pieces, rows) = (cols.div_ceil(PIECE), codes.len() / cols.max(1));
    let unit_bytes = if bits > 6 { 8 } else { 4 };
    let high_bytes = 4 * bits.saturating_sub(4) as usize * usize::from(bits <= 6);
    let mut low = vec![0u8; rows * pieces * 16 * unit_bytes];
    let mut high = vec![0u8; rows * pieces * 4 * high_bytes];
    let columns: [[usize; 8]; 16] = std::array::from_fn(|unit| unit_columns(scheme, unit));
    let pack_row = |row: &[u8], low: &mut [u8], high: &mut [u8]| {
        let mut padded = [0u8; PIECE];
        for (piece, codes) in row.chunks(PIECE).enumerate() {
            padded.fill(0);
            padded[..codes.len()].copy_from_slice(codes);
            for (unit, columns) in columns.iter().enumerate() {
                let codes = columns.map(|column| padded[column]);
                let at = (16 * piece + unit) * unit_bytes;
                if bits > 6 {
                    let flip = if scheme.element == Element::Int(8) { 0x80 } else { 0 };
                    low[at..at + 8].copy_from_slice(&codes.map(|code| code ^ flip));
                } else {
                    low[at..at + 4].copy_from_slice(&pack_unit(scheme.element, codes).to_le_bytes());
                }
                if high_bytes > 0 {
                    put_high(&mut high[(4 * piece + unit / 4) * high_bytes..][..high_bytes], unit % 4, codes);
                }
            }
        }
    };
    let row_high = pieces * 4 * high_bytes;
    if row_high == 0 {
        let rows = low.par_chunks_mut(pieces * 16 * unit_bytes).zip(codes.par_chunks(cols));
        rows.for_each(|(low, row)| pack_row(row, low, &mut []));
    } else {
        let rows = low.par_chunks_mut(pieces * 16 * unit_bytes).zip(high.par_chunks_mut(row_high));
        rows.zip(codes.par_chunks(cols)).for_each(|((low, high), row)| pack_row(row, low, high));
    }
    (low, high)
}

/// Returns the low word of eight codes of up to six bits.
fn pack_unit(element: Element, codes: [u8; 8]) -> u32 {
    codes.iter().enumerate().fold(0, |word, (i, &code)| {
        let (j, code) = (i / 2, u32::from(code));
        let half = if element == Element::E2M1 {
            let (sign, magnitude) = (code >> 3 & 1, code & 7);
            sign << [15, 12, 14, 13][j] | magnitude << [9, 6, 3, 0][j]
        } else {
            (code & 15) << (4 * j)
        };
        word | half << (16 * (i % 2))
    })
}

/// Puts the bits above the fourth of unit `b`'s codes into the high words of its four units: one word for five bits, two
/// for six.
fn put_high(words: &mut [u8], b: usize, codes: [u8; 8]) {
    let above = words.len() / 4;
    for (i, code) in codes.iter().enumerate() {
        let bit = above * (4 * b + i / 2);
        let (word, bit) = (bit / 16, bit % 16 + 16 * (i % 2));
        words[4 * word + bit / 8] |= (code >> 4) << (bit % 8);
    }
}

/// Arranges the entries of a plane, row by row, as decode.cuh wants them: eight rows together, zeros where rows are padded,
/// and a word behind all, since matvec.cu reads whole words.
fn tile_groups(entries: &[u8], codec: Codec, span: Span, cols: usize, pitch: usize) -> Vec<u8> {
    let Span::Cols(group) = span else { return entries.to_vec() };
    let bytes = codec.bits().div_ceil(8) as usize;
    let covered = PIECE.max(group as usize);
    let (row_bytes, run) = (cols / group as usize * bytes, covered / group as usize * bytes);
    let runs = pitch / covered;
    let rows = entries.len() / row_bytes;
    let mut out = vec![0; rows.next_multiple_of(8) * runs * run + 4];
    for (row, entries) in entries.chunks(row_bytes).enumerate() {
        for (at, entries) in entries.chunks(run).enumerate() {
            let to = ((row / 8 * runs + at) * 8 + row % 8) * run;
            out[to..to + entries.len()].copy_from_slice(entries);
        }
    }
    out
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
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::backend::cuda::scheme_on_device;
    use crate::scheme::schemes;

    /// Reads a code back by the words of decode.cuh.
    fn unpacked(scheme: &Scheme, cols: usize, planes: &(Vec<u8>, Vec<u8>), row: usize, column: usize) -> u8 {
        let (low, high) = planes;
        let columns = |unit| unit_columns(scheme, unit);
        let unit = (0..16).find(|&unit| columns(unit).contains(&(column % PIECE))).unwrap();
        let i = columns(unit).iter().position(|&at| at == column % PIECE).unwrap();
        let stored = row * cols.div_ceil(PIECE) * 16 + column / PIECE * 16 + unit;
        let (j, half, b) = (i / 2, 16 * (i % 2), unit % 4);
        let word =
            |plane: &[u8], at: usize| u32::from_le_bytes(plane[4 * at..4 * at + 4].try_into().unwrap());
        if scheme.element.bits() > 6 {
            return low[8 * stored + i] ^ if scheme.element == Element::Int(8) { 0x80 } else { 0 };
        }
        let bits = word(low, stored) >> half & 0xffff;
        let code = match scheme.element {
            Element::E2M1 => (bits >> [15, 12, 14, 13][j] & 1) << 3 | bits >> [9, 6, 3, 0][j] & 7,
            _ => bits >> (4 * j) & 15,
        };
        let above = match scheme.element.bits() {
            5 => word(high, stored / 4) >> (half + 4 * b + j) & 1,
            6 => word(high, stored / 2) >> (half + 8 * (b % 2) + 2 * j) & 3,
            _ => 0,
        };
        (code | above << 4) as u8
    }

    #[test]
    fn every_code_survives_packing() {
        let read_only = schemes::READ_ONLY.map(|scheme| scheme_on_device(scheme, 1 << 12, 1 << 12));
        for scheme in schemes::ALL.into_iter().chain(read_only) {
            // Strides coprime to the number of codes put every code at every place of a unit; 416 columns end in a
            // part of a piece.
            let (rows, cols) = (5, if scheme.block_cols() == 256 { 512 } else { 416 });
            let count = 1usize << scheme.element.bits();
            let codes: Vec<u8> = (0..rows * cols).map(|i| ((i * 3 + i / 8 * 5) % count) as u8).collect();
            let planes = pack_codes(&scheme, cols, &codes);
            for (i, &code) in codes.iter().enumerate() {
                assert_eq!(
                    unpacked(&scheme, cols, &planes, i / cols, i % cols),
                    code,
                    "{} at {i}",
                    scheme.name
                );
            }
        }
    }
}
