//! GGUF as llama.cpp reads it: block bytes, metadata, tokenizer.
//!
//! - [`Gguf`]: quantized matrices ↔ ggml blocks.
//! - [`metadata`]: configuration ↔ keys, those of `rope` apart. [`tokenizer`]: `tokenizer.json` ↔ keys.

mod blocks;
mod keys;
mod loaders;
pub mod metadata;
mod mixture;
mod open;
mod pre_tokenizer;
mod rope;
pub mod tokenizer;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;

use self::blocks::{Block, BlockMut, LAYOUTS, Layout};
use super::opened::{Files, Opened};
use super::{Description, Dialect, StoredPart, Surroundings};
use crate::backend::Pairing;
use crate::container::Storage;
use crate::container::gguf::{GgmlType, Metadata};
use crate::loaders::Row;
use crate::model::config::Config;
use crate::model::tokenizer::TokenizerFiles;
use crate::names::{Role, TensorId};
use crate::rows::{Place, RowMap};
use crate::scheme::{Activations, QTensor, Scheme};
use crate::tensor::Dtype;

/// The dialect of llama.cpp, Ollama and LM Studio.
pub struct Gguf;

/// Returns what the blocks of a quantized type mean; `None` for plain floats.
pub fn scheme_of(kind: GgmlType) -> Option<Scheme> {
    LAYOUTS.iter().find(|layout| layout.kind == kind).map(|layout| layout.scheme)
}

/// Returns the row order of one head of `len` rows, of which the first `rotary` turn: 0, half, 1, half + 1, …, then the rest
/// (`LlamaModel.permute` of convert_hf_to_gguf.py).
fn interleaved(len: usize, rotary: usize) -> Vec<usize> {
    (0..len).map(|i| if i < rotary { i / 2 + i % 2 * (rotary / 2) } else { i }).collect()
}

fn layout(scheme: &Scheme) -> Result<&'static Layout> {
    LAYOUTS.iter().find(|layout| layout.scheme == *scheme).ok_or_else(|| {
        let known: Vec<_> = LAYOUTS.iter().map(|layout| layout.scheme.name).collect();
        anyhow!(
            "dialect `gguf` has no block type for `{}` in groups of {:?}; it has {}, or try `--dialect compressed-tensors`",
            scheme.name,
            scheme.group,
            known.join(", ")
        )
    })
}

impl Dialect for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn open<'a>(&self, files: &'a Files) -> Result<Option<Opened<'a>>> {
        match files {
            Files::Folder(_) => Ok(None),
            Files::Gguf(gguf) => open::open(gguf).map(Some),
        }
    }

    fn tokenizer(&self, metadata: &Metadata) -> Result<TokenizerFiles> {
        tokenizer::read(metadata)
    }

    fn place(&self, id: TensorId, rows: usize, config: &Config) -> Place {
        if let Some(share) = config.share(id) {
            return share.place(id.gguf_name_as(share.fused.stem));
        }
        if let Some(place) = mixture::place(id, rows, config) {
            return place;
        }
        let place = Place::whole(config.family.gguf_name(id), rows);
        let rotated = matches!(id.role, Role::Q | Role::K);
        let apart = config.rope.pairing == Pairing::Halves;
        if !(rotated && apart && config.family.gguf.neighbours) {
            return place;
        }
        let order = interleaved(config.head_dim, config.rope.rotary_dim(config.head_dim));
        Place { rows: RowMap::SAME.reordered(&order), ..place }
    }

    /// Vectors are F32 (norms, biases: ggml's element-wise kernels take nothing else), as are routers; other matrices keep
    /// their type.
    fn kept_dtype(&self, id: TensorId, shape: &[usize], stored: Dtype) -> Dtype {
        if shape.len() == 1 || mixture::chooses(id) { Dtype::F32 } else { stored }
    }

    /// llama.cpp reads no window for these architectures, or makes nothing of it (`load_arch_hparams` in src/models):
    /// attention is always full.
    fn losses(&self, config: &Config) -> Vec<String> {
        let windows = || config.layers.iter().filter_map(|layer| layer.window);
        let window = windows().min().filter(|&window| window < config.max_position_embeddings);
        let layers = match windows().count() {
            all if all == config.layers.len() => String::new(),
            some => format!(" of {some} of {} layers", config.layers.len()),
        };
        let loss = |window| {
            format!(
                "attention{layers} is limited to the last {window} positions, which llama.cpp cannot do for this \
                 architecture: it attends to all, so answers differ beyond {window} tokens"
            )
        };
        let rotary = rope::losses(&config.rope, config.max_position_embeddings);
        window.map(loss).into_iter().chain(rotary).collect()
    }

    /// Tables of RoPE divisors have no metadata.
    fn computed_tensors(&self, config: &Config) -> Vec<(TensorId, Vec<f32>)> {
        rope::tensors(&config.rope, config.head_dim)
    }

    fn surround(&self, output: &Description) -> Result<Surroundings> {
        let files = (output.tokenizer)()?;
        let format = output.format.unwrap_or("mixed");
        let mut metadata = metadata::write(output.config, &files, output.name, format)
            .context("cannot be written as GGUF")?;
        for (key, value) in output.provenance {
            metadata.set(key, value.as_str());
        }
        Ok(Surroundings::File(metadata))
    }

    fn extension(&self) -> Option<&'static str> {
        Some("gguf")
    }

    fn loaders(&self) -> &'static [Row] {
        loaders::ROWS
    }

    fn parts(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<StoredPart>> {
        let kind = layout(scheme)?.kind;
        ensure!(
            activations == Activations::Full,
            "dialect `gguf` cannot say how inputs are quantized; try `--dialect compressed-tensors`"
        );
        ensure!(
            cols.is_multiple_of(kind.block_elems()),
            "{cols} columns are not a multiple of the {} that a `{}` block holds",
            kind.block_elems(),
            scheme.name
        );
        Ok(vec![StoredPart {
            suffix: "weight",
            storage: Storage::Ggml(kind),
            shape: vec![rows, cols],
            fixed: None,
        }])
    }

    fn pack(&self, q: &QTensor, activations: Activations) -> Result<Vec<Vec<u8>>> {
        let layout = layout(&q.scheme)?;
        self.parts(&q.scheme, activations, q.rows, q.cols)?;
        let pack = layout.pack.with_context(|| {
            format!(
                "`{}` is only read here; llama-quantize writes it, or choose another format",
                q.scheme.name
            )
        })?;
        refuse_nonfinite(q)?;
        let block_bytes = layout.kind.block_bytes();
        let blocks_per_row = q.cols / layout.kind.block_elems();
        let mut bytes = vec![0; q.rows * blocks_per_row * block_bytes];
        bytes.par_chunks_mut((blocks_per_row * block_bytes).max(1)).enumerate().for_each(|(row, out)| {
            for (i, out) in out.chunks_exact_mut(block_bytes).enumerate() {
                pack(&block(q, layout, row * blocks_per_row + i), out);
            }
        });
        Ok(vec![bytes])
    }

    fn unpack(
        &self,
        scheme: &Scheme,
        activations: Activations,
        rows: usize,
        cols: usize,
        parts: &[&[u8]],
    ) -> Result<QTensor> {
        let layout = layout(scheme)?;
        self.parts(scheme, activations, rows, cols)?;
        let &[bytes] = parts else { bail!("{} parts found, wanted one (`weight`)", parts.len()) };
        let wanted = rows * cols / layout.kind.block_elems() * layout.kind.block_bytes();
        ensure!(
            bytes.len() == wanted,
            "{} bytes found, wanted {wanted} for [{rows}, {cols}] in `{}`",
            bytes.len(),
            scheme.name
        );
        let mut q = QTensor::zeroed(*scheme, rows, cols);
        unpack_blocks(layout, bytes, &mut q);
        refuse_nonfinite(&q)?;
        Ok(q)
    }
}

/// The numbers of block `i`, counted over the whole tensor: rows are whole blocks, so every field is, too.
fn block<'a>(q: &'a QTensor, layout: &Layout, i: usize) -> Block<'a> {
    let elems = layout.kind.block_elems();
    let groups = elems / q.group_cols();
    let outer = |field: &[f32]| field.get(i).copied().unwrap_or_default();
    Block {
        codes: &q.codes[i * elems..(i + 1) * elems],
        scales: &q.scales[i * groups..(i + 1) * groups],
        offsets: if q.offsets.is_empty() { &[] } else { &q.offsets[i * groups..(i + 1) * groups] },
        outer_scale: outer(&q.outer_scales),
        outer_offset: outer(&q.outer_offsets),
    }
}

/// Fills `q` from `bytes`, whose length is right.
fn unpack_blocks(layout: &Layout, bytes: &[u8], q: &mut QTensor) {
    let elems = layout.kind.block_elems();
    let groups = elems / q.group_cols();
    // Fields that a scheme lacks are empty; a chunk of them is an empty slice.
    let mut offsets = q.offsets.chunks_exact_mut(groups);
    let mut outer = (q.outer_scales.iter_mut(), q.outer_offsets.iter_mut());
    let codes = q.codes.chunks_exact_mut(elems).zip(q.scales.chunks_exact_mut(groups));
    for (bytes, (codes, scales)) in bytes.chunks_exact(layout.kind.block_bytes()).zip(codes) {
        let offsets = offsets.next().unwrap_or_default();
        let mut block = BlockMut { codes, scales, offsets, outer_scale: 0.0, outer_offset: 0.0 };
        (layout.unpack)(bytes, &mut block);
        let decoded = (block.outer_scale, block.outer_offset);
        if let Some(outer_scale) = outer.0.next() {
            *outer_scale = decoded.0;
        }
        if let Some(outer_offset) = outer.1.next() {
            *outer_offset = decoded.1;
        }
    }
}

/// Errors on scales and offsets that are NaN or infinite: llama.cpp's row validation refuses them, too.
fn refuse_nonfinite(q: &QTensor) -> Result<()> {
    for (name, field) in [
        ("scale", &q.scales),
        ("offset", &q.offsets),
        ("super-block scale", &q.outer_scales),
        ("super-block offset", &q.outer_offsets),
    ] {
        if let Some(i) = field.iter().position(|x| !x.is_finite()) {
            let per_row = field.len() / q.rows;
            let (row, span) = (i / per_row, q.cols / per_row);
            let first = i % per_row * span;
            let last = first + span - 1;
            bail!(
                "row {row}, columns {first} to {last}: the `{}` {name} is {}, wanted a number",
                q.scheme.name,
                field[i]
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::family::Family;
    use crate::num::Codec;
    use crate::scheme::schemes::*;

    fn round_trip(q: &QTensor) {
        let parts = Gguf.pack(q, Activations::Full).unwrap();
        assert_eq!(parts[0].len() as u64 * 8, q.scheme.stored_bits(q.rows, q.cols), "{}", q.scheme.name);
        let back = Gguf.unpack(&q.scheme, Activations::Full, q.rows, q.cols, &[&parts[0]]).unwrap();
        assert_eq!(&back, q, "{}", q.scheme.name);
    }

    /// One block per value of `values` (and one row), every code at every position among them.
    fn with_scales(scheme: Scheme, values: &[f32]) -> QTensor {
        let elems = scheme.block_cols();
        let mut q = QTensor::zeroed(scheme, 1, values.len() * elems);
        let mask = ((1u32 << scheme.element.bits()) - 1) as usize;
        for (i, code) in q.codes.iter_mut().enumerate() {
            *code = ((i + i / elems) & mask) as u8;
        }
        match scheme.outer {
            None => q.scales.copy_from_slice(values),
            Some(_) => q.outer_scales.copy_from_slice(values),
        }
        q
    }

    fn all_finite_f16() -> Vec<f32> {
        (0..1u32 << 16).map(|bits| Codec::F16.decode(bits)).filter(|x| x.is_finite()).collect()
    }

    #[test]
    fn every_f16_scale_and_every_code_at_every_position_survive() {
        for scheme in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0] {
            let mut q = with_scales(scheme, &all_finite_f16());
            if !q.offsets.is_empty() {
                q.offsets = q.scales.iter().rev().copied().collect();
            }
            round_trip(&q);
        }
    }

    #[test]
    fn every_e8m0_byte_but_nan_survives() {
        let scales: Vec<f32> = (0..255).map(|byte| Codec::E8M0.decode(byte)).collect();
        let q = with_scales(MXFP4, &scales);
        round_trip(&q);
        let bytes = &Gguf.pack(&q, Activations::Full).unwrap()[0];
        let stored: Vec<u8> = bytes.chunks(17).map(|block| block[0]).collect();
        assert_eq!(stored, (0..255).collect::<Vec<u8>>());
    }

    #[test]
    fn every_6_bit_scale_and_minimum_survives_in_each_of_the_8_slots() {
        for scheme in [Q4_K, Q5_K] {
            for slot in 0..8 {
                let mut q = with_scales(scheme, &[1.0; 64 * 64]);
                for (i, value) in (0..64 * 64).map(|i| (i, [i / 64, i % 64])) {
                    q.scales[8 * i + slot] = value[0] as f32;
                    q.offsets[8 * i + slot] = value[1] as f32;
                    q.scales[8 * i + (slot + 1) % 8] = (63 - value[0]) as f32;
                }
                round_trip(&q);
            }
        }
    }

    #[test]
    fn every_super_block_factor_survives() {
        let d = all_finite_f16();
        for scheme in [Q4_K, Q5_K, Q6_K] {
            let mut q = with_scales(scheme, &d);
            if !q.outer_offsets.is_empty() {
                q.outer_offsets = d.iter().rev().copied().collect();
            }
            round_trip(&q);
        }
    }

    #[test]
    fn every_int8_scale_survives_in_each_of_the_16_slots_of_q6_k() {
        let mut q = with_scales(Q6_K, &[1.0; 256]);
        for (i, scale) in q.scales.iter_mut().enumerate() {
            *scale = ((i / 16 + 17 * (i % 16)) % 256) as f32 - 128.0;
        }
        round_trip(&q);
    }

    #[test]
    fn rows_are_independent() {
        for layout in LAYOUTS.iter().filter(|layout| layout.pack.is_some()) {
            let mut q = with_scales(layout.scheme, &[1.0, 2.0, 4.0]);
            (q.rows, q.cols) = (3, q.cols / 3);
            let whole = &Gguf.pack(&q, Activations::Full).unwrap()[0];
            for i in 0..3 {
                let order = [i, (i + 1) % 3, (i + 2) % 3];
                let first = q.permute_rows(&order);
                let part = &Gguf.pack(&first, Activations::Full).unwrap()[0];
                let size = whole.len() / 3;
                assert_eq!(part[..size], whole[i * size..(i + 1) * size], "{}", q.scheme.name);
            }
        }
    }

    #[test]
    fn a_scale_that_is_no_number_is_refused_when_read_and_when_written() {
        let unpack = |scheme: &Scheme, bytes: &[u8]| {
            Gguf.unpack(scheme, Activations::Full, 1, scheme.block_cols(), &[bytes])
        };
        let mut mxfp4 = [0u8; 17];
        mxfp4[0] = 255;
        let error = unpack(&MXFP4, &mxfp4).unwrap_err().to_string();
        assert!(error.contains("row 0, columns 0 to 31: the `mxfp4` scale is NaN"), "{error}");
        let mut q4_k = [0u8; 144];
        q4_k[2..4].copy_from_slice(&0x7c00u16.to_le_bytes());
        let error = unpack(&Q4_K, &q4_k).unwrap_err().to_string();
        assert!(error.contains("super-block offset is inf"), "{error}");
        let mut q = QTensor::zeroed(Q8_0, 2, 64);
        q.scales[3] = f32::NAN;
        let error = Gguf.pack(&q, Activations::Full).unwrap_err().to_string();
        assert!(error.contains("row 1, columns 32 to 63"), "{error}");
    }

    #[test]
    fn wrong_sizes_and_foreign_schemes_are_refused_with_the_cure() {
        let error = Gguf.unpack(&Q8_0, Activations::Full, 1, 32, &[&[0; 33]]).unwrap_err().to_string();
        assert!(error.contains("33 bytes found, wanted 34"), "{error}");
        assert!(
            Gguf.parts(&Q4_K, Activations::Full, 1, 576)
                .unwrap_err()
                .to_string()
                .contains("multiple of the 256")
        );
        assert!(
            Gguf.parts(&INT8, Activations::Full, 1, 64)
                .unwrap_err()
                .to_string()
                .contains("--dialect compressed-tensors")
        );
    }

    #[test]
    fn every_type_is_either_a_scheme_or_a_float() {
        use GgmlType::*;
        for kind in (0..64).filter_map(GgmlType::from_id) {
            assert_ne!(scheme_of(kind).is_some(), matches!(kind, F32 | F16 | BF16), "{kind:?}");
        }
    }

    #[test]
    fn heads_of_q_and_k_are_interleaved_for_llama_only() {
        assert_eq!(interleaved(8, 8), [0, 4, 1, 5, 2, 6, 3, 7]);
        assert_eq!(interleaved(6, 4), [0, 2, 1, 3, 4, 5]);
        let json = serde_json::json!({"architectures": ["MistralForCausalLM"], "hidden_size": 32, "vocab_size": 8,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4});
        let mut config = Config::from_json(&json).unwrap();
        for (role, wanted) in [(Role::Q, true), (Role::K, true), (Role::V, false), (Role::O, false)] {
            let id = TensorId::in_layer(0, role);
            let order = if wanted { RowMap::SAME.reordered(&interleaved(8, 8)) } else { RowMap::SAME };
            for id in [id, id.bias()] {
                assert_eq!(Gguf.place(id, 32, &config).rows, order, "{id}");
            }
        }
        config.family = Family::of_gguf("qwen3", false).unwrap();
        assert_eq!(Gguf.place(TensorId::in_layer(0, Role::Q), 32, &config).rows, RowMap::SAME);
    }
}
