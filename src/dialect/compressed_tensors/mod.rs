//! Checkpoints of the compressed-tensors library, read by vLLM, SGLang and transformers.
//!
//! | [`Format`] | parts of module `P` |
//! |---|---|
//! | `mxfp4-pack-quantized` | `P.weight_packed` U8 `[N, K/2]`, even column in the low nibble; `P.weight_scale` U8 `[N, K/32]`, E8M0 |
//! | `nvfp4-pack-quantized` | `P.weight_packed` as above; `P.weight_scale` F8_E4M3 `[N, K/16]`; `P.weight_global_scale` F32 `[1]`, a divisor |
//! | `pack-quantized` (8 bits) | `P.weight_packed` I32 `[N, ⌈K/4⌉]`, byte i = value + 128; `P.weight_scale` `[N, groups]`; `P.weight_shape` I64 `[2]` |
//! | `pack-quantized` (4 bits) | `P.weight_packed` I32 `[N, ⌈K/8⌉]`, nibble i = value + 8, even column low; the rest alike |
//! | `int-quantized` | `P.weight` I8 `[N, K]`, two's complement; `P.weight_scale` `[N, 1]`; static inputs: `P.input_scale` `[1]` |
//! | `float-quantized` | `P.weight` F8_E4M3 `[N, K]`; `P.weight_scale` `[N, 1]` |
//!
//! Layouts checked against compressed-tensors 0.17.0 (`tests/golden_compressed_tensors.rs`).

pub mod config;
mod loaders;
mod open;

use anyhow::{Context, Result, bail, ensure};
use multiversion::multiversion;
use rayon::prelude::*;

use self::config::Quantization;
use super::hugging_face::{self, Configuration};
use super::opened::{Files, Opened};
use super::{Description, Dialect, StoredPart, Surroundings};
use crate::container::Storage;
use crate::loaders::Row;
use crate::model::config::Config;
use crate::names::TensorId;
use crate::num::{Codec, Element};
use crate::rows::Place;
use crate::scheme::schemes::{MXFP4, NVFP4};
use crate::scheme::{Activations, Offset, QTensor, Scheme, Span};
use crate::tensor::{Dtype, bytes_from_floats, floats_from_bytes};

/// Names of the scales of keys and values beside a layer's attention, `[1]` each: `cached = x / scale` in E4M3.
pub const KV_SCALES: [&str; 2] = ["k_scale", "v_scale"];

/// Name of the scale of a linear's inputs beside its weight, `[1]`: `code = x / scale`. A number of the linear and no part of
/// its matrix, so neither [`Dialect::parts`] nor [`Dialect::pack`] know it.
pub const INPUT_SCALE: &str = "input_scale";

/// The dialect of vLLM, SGLang and transformers.
pub struct CompressedTensors;

/// The library's name for a way of storing a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `mxfp4-pack-quantized`
    Mxfp4PackQuantized,
    /// `nvfp4-pack-quantized`
    Nvfp4PackQuantized,
    /// `pack-quantized`: weight-only integers.
    PackQuantized,
    /// `int-quantized`: integers whose inputs are quantized too.
    IntQuantized,
    /// `float-quantized`: FP8, whatever happens to the inputs.
    FloatQuantized,
}

/// Integer codes here are offset-binary, which is what `pack-quantized` stores; this turns them to two's complement.
const SIGN: u8 = 0x80;

impl Format {
    /// Returns the format that spells a scheme; the error names what the format cannot say.
    ///
    /// Engines demand the two integer spellings exactly so: vLLM asserts that weight-only integers are
    /// `pack-quantized`, and the library packs only weights whose inputs are not quantized.
    pub fn of(scheme: &Scheme, activations: Activations) -> Result<Self> {
        let plain = scheme.outer.is_none() && scheme.offset == Offset::None;
        let float_scale = matches!(scheme.scale, Codec::F32 | Codec::F16 | Codec::BF16);
        match (scheme.element, activations) {
            (_, Activations::Full) if *scheme == MXFP4 => Ok(Format::Mxfp4PackQuantized),
            (_, Activations::Full) if *scheme == NVFP4 => Ok(Format::Nvfp4PackQuantized),
            (Element::Int(4 | 8), Activations::Full)
                if plain && float_scale && scheme.group != Span::Tensor && is_ours(scheme) =>
            {
                Ok(Format::PackQuantized)
            }
            (Element::E4M3, Activations::Full | Activations::Fp8PerToken)
                if plain && float_scale && scheme.group == Span::Row =>
            {
                Ok(Format::FloatQuantized)
            }
            (Element::Int(8), Activations::Int8PerToken | Activations::Int8PerTensor(()))
                if plain && float_scale =>
            {
                ensure!(
                    scheme.group == Span::Row,
                    "dialect `compressed-tensors` quantizes activations only with one weight scale per row; drop \
                     --group-size, or use `--format int8`, which leaves activations alone"
                );
                Ok(Format::IntQuantized)
            }
            (_, Activations::Int8PerToken | Activations::Int8PerTensor(())) => {
                bail!("8-bit activations need 8-bit integer weights, not `{}`", scheme.name)
            }
            (_, Activations::Fp8PerToken) => bail!("FP8 activations need FP8 weights, not `{}`", scheme.name),
            _ => bail!(
                "dialect `compressed-tensors` has no encoding for `{}`; try `--dialect gguf`",
                scheme.name
            ),
        }
    }

    /// Returns the name in `quantization_config`.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Mxfp4PackQuantized => "mxfp4-pack-quantized",
            Format::Nvfp4PackQuantized => "nvfp4-pack-quantized",
            Format::PackQuantized => "pack-quantized",
            Format::IntQuantized => "int-quantized",
            Format::FloatQuantized => "float-quantized",
        }
    }
}

/// Whether an integer scheme is one of this ecosystem's own: ggml's blocks have F16 scales in groups of 32 by definition.
fn is_ours(scheme: &Scheme) -> bool {
    scheme.name == "int4" || scheme.name == "int8"
}

impl Dialect for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn open<'a>(&self, files: &'a Files) -> Result<Option<Opened<'a>>> {
        match files {
            Files::Folder(folder) => open::open(folder),
            Files::Gguf(_) => Ok(None),
        }
    }

    fn quant_method(&self) -> Option<&'static str> {
        Some(self.name())
    }

    fn place(&self, id: TensorId, rows: usize, config: &Config) -> Place {
        hugging_face::place(id, rows, config)
    }

    fn surround(&self, output: &Description) -> Result<Surroundings> {
        let mut linears: Vec<_> = (output.matrices.iter())
            .filter(|(id, ..)| id.role.is_linear())
            .map(|(_, module, stored)| (module.clone(), *stored))
            .collect();
        // Of a fused module, the same is said once.
        linears.dedup();
        let quantization = Quantization::of_plan(&linears)?.with_fp8_cache(output.fp8_cache).to_json();
        let configuration = Configuration { quantization: Some(quantization), dtype: None };
        Ok(Surroundings::Folder(hugging_face::files(output, &configuration)?))
    }

    fn loaders(&self) -> &'static [Row] {
        loaders::ROWS
    }

    fn input_scale(&self) -> Option<&'static str> {
        Some(INPUT_SCALE)
    }

    fn kv_scales(&self, layer: usize) -> Option<[String; 2]> {
        Some(KV_SCALES.map(|name| format!("model.layers.{layer}.self_attn.{name}")))
    }

    fn parts(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<StoredPart>> {
        let format = Format::of(scheme, activations)?;
        let block = scheme.block_cols();
        ensure!(
            cols.is_multiple_of(block),
            "{cols} columns are not a multiple of the {block} that share a scale"
        );
        let part = |suffix, dtype, width| StoredPart {
            suffix,
            storage: Storage::Plain(dtype),
            shape: vec![rows, width],
            fixed: None,
        };
        let scales = part("weight_scale", scale_dtype(scheme.scale), cols / scheme.group.len(cols).max(1));
        Ok(match format {
            Format::Mxfp4PackQuantized => vec![part("weight_packed", Dtype::U8, cols / 2), scales],
            Format::Nvfp4PackQuantized => {
                let global = StoredPart { shape: vec![1], ..part("weight_global_scale", Dtype::F32, 1) };
                vec![part("weight_packed", Dtype::U8, cols / 2), scales, global]
            }
            Format::IntQuantized => vec![part("weight", Dtype::I8, cols), scales],
            Format::FloatQuantized => vec![part("weight", Dtype::F8E4M3, cols), scales],
            Format::PackQuantized => {
                let shape = [rows as i64, cols as i64].map(i64::to_le_bytes).concat();
                let fixed = StoredPart {
                    suffix: "weight_shape",
                    storage: Storage::Plain(Dtype::I64),
                    shape: vec![2],
                    fixed: Some(shape),
                };
                let per_word = 32 / scheme.element.bits() as usize;
                vec![part("weight_packed", Dtype::I32, cols.div_ceil(per_word)), scales, fixed]
            }
        })
    }

    fn pack(&self, q: &QTensor, activations: Activations) -> Result<Vec<Vec<u8>>> {
        let codes = match Format::of(&q.scheme, activations)? {
            Format::Mxfp4PackQuantized | Format::Nvfp4PackQuantized => pack_nibbles(&q.codes),
            Format::PackQuantized if q.scheme.element.bits() == 4 => {
                pack_nibbles(&pad_rows(&q.codes, q.cols, q.cols.next_multiple_of(8)))
            }
            Format::PackQuantized => pad_rows(&q.codes, q.cols, q.cols.next_multiple_of(4)),
            Format::IntQuantized => q.codes.iter().map(|code| code ^ SIGN).collect(),
            Format::FloatQuantized => q.codes.clone(),
        };
        let mut parts = vec![codes, pack_scales(q.scheme.scale, &q.scales)];
        if !q.outer_scales.is_empty() {
            // Here the factor divides.
            let divisors: Vec<f32> = q.outer_scales.iter().map(|scale| 1.0 / scale).collect();
            parts.push(bytes_from_floats(Dtype::F32, &divisors));
        }
        Ok(parts)
    }

    fn unpack(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
        parts: &[&[u8]],
    ) -> Result<QTensor> {
        let wanted = self.parts(scheme, activations, rows, cols)?;
        let wanted: Vec<_> = wanted.iter().filter(|part| part.fixed.is_none()).collect();
        ensure!(parts.len() == wanted.len(), "{} parts given, {} wanted", parts.len(), wanted.len());
        for (bytes, part) in parts.iter().zip(&wanted) {
            let size = part.storage.bytes(&part.shape) as usize;
            ensure!(bytes.len() == size, "`{}` has {} bytes, wanted {size}", part.suffix, bytes.len());
        }
        let codes = match Format::of(scheme, activations)? {
            Format::Mxfp4PackQuantized | Format::Nvfp4PackQuantized => unpack_nibbles(parts[0]),
            Format::PackQuantized if scheme.element.bits() == 4 => {
                trim_rows(&unpack_nibbles(parts[0]), cols, cols.next_multiple_of(8))
            }
            Format::FloatQuantized => {
                let nan = parts[0].iter().position(|code| code & 0x7f == 0x7f);
                if let Some(at) = nan {
                    bail!("`weight`: value {at} is NaN; the file is damaged");
                }
                parts[0].to_vec()
            }
            Format::PackQuantized => trim_rows(parts[0], cols, cols.next_multiple_of(4)),
            Format::IntQuantized => parts[0].iter().map(|code| code ^ SIGN).collect(),
        };
        let scales = unpack_scales(scheme.scale, parts[1]).context("`weight_scale`")?;
        let outer_scales = match parts.get(2) {
            None => vec![],
            Some(bytes) => {
                let divisor = unpack_scales(Codec::F32, bytes).context("`weight_global_scale`")?;
                let factor = 1.0 / divisor[0];
                ensure!(
                    divisor[0] > 0.0 && factor.is_finite(),
                    "`weight_global_scale` is {}, wanted a positive number whose reciprocal is finite",
                    divisor[0]
                );
                vec![factor]
            }
        };
        let (offsets, outer_offsets) = (vec![], vec![]);
        Ok(QTensor { scheme: *scheme, rows, cols, codes, scales, outer_scales, offsets, outer_offsets })
    }
}

/// Two codes a byte, the even column in the low nibble.
fn pack_nibbles(codes: &[u8]) -> Vec<u8> {
    const PIECE: usize = 1 << 20;
    let mut bytes = vec![0; codes.len() / 2];
    let pieces = bytes.par_chunks_mut(PIECE).zip(codes.par_chunks(2 * PIECE));
    pieces.for_each(|(bytes, codes)| pack_nibbles_into(bytes, codes));
    bytes
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn pack_nibbles_into(bytes: &mut [u8], codes: &[u8]) {
    for (byte, &pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
        // As one 16-bit number, so that this becomes a shift, an or and a narrowing of whole vectors.
        let pair = u16::from_le_bytes(pair);
        *byte = (pair | pair >> 4) as u8;
    }
}

fn unpack_nibbles(bytes: &[u8]) -> Vec<u8> {
    let mut codes = vec![0; bytes.len() * 2];
    for (codes, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *codes = [byte & 15, byte >> 4];
    }
    codes
}

/// Rows of I32 words: the library fills the last word of a row with zero bytes.
fn pad_rows(codes: &[u8], cols: usize, width: usize) -> Vec<u8> {
    if width == cols {
        return codes.to_vec();
    }
    let mut bytes = Vec::with_capacity(codes.len() / cols * width);
    for row in codes.chunks_exact(cols) {
        bytes.extend_from_slice(row);
        bytes.resize(bytes.len() + width - cols, 0);
    }
    bytes
}

fn trim_rows(bytes: &[u8], cols: usize, width: usize) -> Vec<u8> {
    bytes.chunks_exact(width.max(1)).flat_map(|row| &row[..cols]).copied().collect()
}

fn scale_dtype(codec: Codec) -> Dtype {
    match codec {
        Codec::F32 => Dtype::F32,
        Codec::F16 => Dtype::F16,
        Codec::BF16 => Dtype::BF16,
        Codec::E8M0 => Dtype::U8,
        Codec::E4M3 => Dtype::F8E4M3,
        other => unreachable!("`Format::of` refuses {other:?} scales"),
    }
}

fn pack_scales(codec: Codec, scales: &[f32]) -> Vec<u8> {
    match codec {
        Codec::E8M0 | Codec::E4M3 => scales.iter().map(|&scale| codec.encode(scale) as u8).collect(),
        _ => bytes_from_floats(scale_dtype(codec), scales),
    }
}

fn unpack_scales(codec: Codec, bytes: &[u8]) -> Result<Vec<f32>> {
    let scales = match codec {
        Codec::E8M0 | Codec::E4M3 => bytes.iter().map(|&byte| codec.decode(byte as u32)).collect(),
        _ => {
            let dtype = scale_dtype(codec);
            let mut scales = vec![0.0; bytes.len() / dtype.bytes()];
            floats_from_bytes(dtype, bytes, &mut scales);
            scales
        }
    };
    // Of E4M3, engines read the magnitude, or clamp at 0: a negative scale has no one meaning.
    let damaged = |scale: &f32| !scale.is_finite() || (codec == Codec::E4M3 && *scale < 0.0);
    match scales.iter().position(damaged) {
        Some(at) => {
            bail!("scale {at} is {}; the file is damaged, or no scale was computed for it", scales[at])
        }
        None => Ok(scales),
    }
}

#[cfg(test)]
mod tests;
