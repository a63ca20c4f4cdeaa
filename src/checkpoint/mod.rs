//! Opens a model, whatever its container: headers only; weights by positioned reads on demand.
//!
//! - `folder`: which files a Hugging Face folder consists of.
//! - `contents`: which tensor of the model each stored tensor is, checked against the configuration.

mod contents;
pub(crate) mod folder;
mod foreign;
mod source;
mod tied;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use crate::container::gguf::{Gguf, Metadata};
use crate::container::{InputFile, Located};
use crate::dialect::opened::Files;
use crate::dialect::{self, Dialect};
use crate::model::config::Config;
use crate::model::tokenizer::{NO_TOKENIZER, Tokenizer, TokenizerFiles};
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::{Activations, Scheme};
use crate::tensor::{Dense, Dtype, Matrix};

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stored {
    /// Plain floats.
    Dense(Dtype),
    /// Codes and scales, with what its linear does to its inputs.
    Quantized(Scheme, Activations),
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Row-major logical shape, Hugging Face orientation.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub stored: Stored,
    /// Stored bytes of all its parts.
    pub bytes: u64,
    /// What its linear does to its inputs.
    pub rounding: Activations<f32>,
}

impl TensorInfo {
    /// Returns the number of weights.
    pub fn weights(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// An opened model: a Hugging Face folder (dense or compressed-tensors), a single safetensors file, or a GGUF file.
pub struct Checkpoint {
    /// Where it was opened.
    pub path: PathBuf,
    /// The model's shape and constants.
    pub config: Config,
    /// Where its files disagree with one another, and what was made of that.
    pub notes: Vec<String>,
    /// What it holds, in the order of a forward pass.
    pub tensors: BTreeMap<TensorId, TensorInfo>,
    /// Where each tensor lies.
    locations: BTreeMap<TensorId, Location>,
    /// Scales of an FP8 cache of keys and values by layer; empty without one.
    kv_scales: Vec<[f32; 2]>,
    /// The mix that its files name.
    format: Option<String>,
    files: Vec<InputFile>,
    /// Where it is a folder.
    folder: Option<Folder>,
    /// Where it is a GGUF file.
    metadata: Option<Metadata>,
    /// How quantized tensors are spelled and rows ordered.
    dialect: &'static dyn Dialect,
}

/// Where a tensor lies.
struct Location {
    place: Place,
    /// What [`Dialect::unpack`] takes, or the one dense tensor.
    parts: Vec<Located>,
}

/// A Hugging Face folder.
struct Folder {
    path: PathBuf,
    config_json: String,
}

impl Checkpoint {
    /// Opens a folder or file and validates its headers against the configuration.
    ///
    /// # Errors
    /// Everything that headers can show: damaged files, missing shards, unknown architectures, tensors that are missing,
    /// unknown or of the wrong shape. Each names the file and tensor, what was found and wanted, and the cure.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = || format!("{}", path.display());
        let (files, place, notes) = match folder::kind_of(path)? {
            folder::Kind::Gguf => (Files::Gguf(Gguf::open(path)?), None, Vec::new()),
            folder::Kind::Folder { folder, weights } => {
                let mut opened = folder::open(&folder, weights)?;
                let note = tied::settle(&mut opened).with_context(shown)?;
                (Files::Folder(Box::new(opened)), Some(folder), note.into_iter().collect())
            }
        };
        let (dialect, contents, config, kv_scales, format) = {
            let (dialect, opened) = dialect::open(&files).with_context(shown)?;
            let contents = contents::of(dialect, &opened, files.files()).with_context(shown)?;
            (dialect, contents, opened.config, opened.kv_scales, opened.format)
        };
        let (files, folder, metadata) = match files {
            Files::Gguf(gguf) => (gguf.files, None, Some(gguf.metadata)),
            Files::Folder(opened) => {
                let dialect::opened::Folder { files, config_json, .. } = *opened;
                (files, place.map(|path| Folder { path, config_json }), None)
            }
        };
        Ok(Checkpoint {
            path: path.to_path_buf(),
            config,
            notes,
            tensors: contents.tensors,
            locations: contents.locations,
            kv_scales,
            format,
            files,
            folder,
            metadata,
            dialect,
        })
    }

    /// Reads a whole tensor, in Hugging Face row order.
    pub fn read(&self, id: TensorId) -> Result<Matrix> {
        let rows = self.info(id)?.shape.first().copied().unwrap_or(1);
        self.read_rows(id, 0..rows)
    }

    /// Reads some rows of a tensor (elements of a vector), in Hugging Face row order.
    pub fn read_rows(&self, id: TensorId, rows: Range<usize>) -> Result<Matrix> {
        let count = self.info(id)?.shape.first().copied().unwrap_or(1);
        ensure!(
            rows.end <= count && rows.start <= rows.end,
            "`{id}`: rows {rows:?} wanted, but it has {count}"
        );
        let info = self.info(id)?;
        let mut buffers = self.read_parts(id, rows.clone())?;
        match info.stored {
            Stored::Dense(dtype) => {
                let mut shape = info.shape.clone();
                shape.iter_mut().take(1).for_each(|n| *n = rows.len());
                Ok(Matrix::Dense(Dense { dtype, shape, bytes: buffers.swap_remove(0) }))
            }
            Stored::Quantized(scheme, activations) => {
                let cols = info.shape.last().copied().unwrap_or(1);
                let parts: Vec<_> = buffers.iter().map(Bytes::as_ref).collect();
                let unpacked = self.dialect.unpack(&scheme, activations, rows.len(), cols, &parts);
                Ok(Matrix::Quantized(unpacked.with_context(|| format!("{}: `{id}`", self.path.display()))?))
            }
        }
    }

    /// Whether a quantized tensor is stored here as `dialect` would spell it for a linear with such inputs.
    pub fn spells(&self, id: TensorId, dialect: &dyn Dialect, inputs: Activations) -> bool {
        let stored = self.tensors.get(&id).map(|info| info.stored);
        self.dialect.name() == dialect.name()
            && matches!(stored, Some(Stored::Quantized(_, activations)) if activations == inputs)
    }

    /// Reads the stored parts of some rows of a tensor, in Hugging Face row order; what belongs to all rows comes whole.
    pub fn read_parts(&self, id: TensorId, rows: Range<usize>) -> Result<Vec<Bytes>> {
        let info = self.info(id)?;
        let count = info.shape.first().copied().unwrap_or(1);
        let Location { place, parts } = &self.locations[&id];
        let span = place.rows.span(rows.clone());
        let mut buffers = Vec::new();
        for part in parts {
            let (file, size) = (&self.files[part.file], part.spec.bytes());
            if part.spec.shape.len() < info.shape.len() {
                buffers.push(file.share(part.start, size)?);
                continue;
            }
            let row_bytes = size / place.stored_rows().max(1) as u64;
            let (start, len) = (part.start + span.start as u64 * row_bytes, span.len() as u64 * row_bytes);
            buffers.push(if !place.rows.is_contiguous() {
                place.rows.gather(rows.clone(), row_bytes as usize, &file.read(start, len)?).into()
            } else if rows.len() == count {
                file.share(start, len)?
            } else {
                file.read(start, len)?.into()
            });
        }
        Ok(buffers)
    }

    fn info(&self, id: TensorId) -> Result<&TensorInfo> {
        self.tensors.get(&id).with_context(|| format!("{}: there is no `{id}`", self.path.display()))
    }

    /// Returns the text of `config.json`; `None` for GGUF files.
    pub fn config_json(&self) -> Option<&str> {
        Some(&self.folder.as_ref()?.config_json)
    }

    /// Returns the metadata of a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&Metadata> {
        self.metadata.as_ref()
    }

    /// Returns the folder with tokenizer and configuration; `None` for GGUF files, which hold their own.
    pub fn folder(&self) -> Option<&Path> {
        Some(&self.folder.as_ref()?.path)
    }

    /// Returns the tokenizer's files, whatever the container.
    ///
    /// # Errors
    /// If there is none, or a GGUF file's keys do not make one.
    pub fn tokenizer_files(&self) -> Result<TokenizerFiles> {
        if let Some(metadata) = &self.metadata {
            return self.dialect.tokenizer(metadata).with_context(|| format!("{}", self.path.display()));
        }
        let folder = self.folder().unwrap_or(&self.path);
        TokenizerFiles::read(folder)?.with_context(|| format!("{}: {}", folder.display(), NO_TOKENIZER))
    }

    /// Returns the tokenizer. Errors as [`Checkpoint::tokenizer_files`], and if the files are not valid.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_files(&self.tokenizer_files()?).with_context(|| format!("{}", self.path.display()))
    }

    /// Returns every file that conversion reads.
    pub fn read_files(&self) -> Result<Vec<PathBuf>> {
        let mut files: Vec<_> = self.weight_files().map(Path::to_path_buf).collect();
        files.push(self.path.clone());
        files.extend(self.folder().map(|folder| folder.join("config.json")));
        if let Some(folder) = self.folder() {
            files.extend(self.side_files()?.iter().map(|name| folder.join(name)));
        }
        Ok(files)
    }

    /// Returns the files a converted model takes along: tokenizer, chat template, generation configuration, licence.
    /// Names within [`Checkpoint::folder`], sorted; empty for GGUF files.
    pub fn side_files(&self) -> Result<Vec<String>> {
        self.folder().map_or(Ok(Vec::new()), folder::side_files)
    }

    /// Returns the file, as an index into [`Checkpoint::weight_files`], and the byte in it where a row of a tensor starts;
    /// that of its first part, if it has several.
    pub fn position(&self, id: TensorId, row: usize) -> Result<(usize, u64)> {
        self.info(id)?;
        let Location { place, parts } = &self.locations[&id];
        let part = &parts[0];
        let row_bytes = part.spec.bytes() / place.stored_rows().max(1) as u64;
        Ok((part.file, part.start + row_bytes * place.rows.stored(row) as u64))
    }

    /// Returns the files that hold the weights.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Returns the stored bytes of all tensors, without headers and padding.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.bytes).sum()
    }

    /// Returns the number of weights.
    pub fn total_weights(&self) -> u64 {
        self.tensors.values().map(TensorInfo::weights).sum()
    }

    /// Returns stored bits per weight over all tensors.
    pub fn bits_per_weight(&self) -> f64 {
        self.total_bytes() as f64 * 8.0 / self.total_weights().max(1) as f64
    }

    /// Returns the scales of every layer's keys and values, if engines keep them in FP8; empty otherwise.
    pub fn kv_scales(&self) -> &[[f32; 2]] {
        &self.kv_scales
    }

    /// Whether any tensor is quantized.
    pub fn is_quantized(&self) -> bool {
        self.tensors.values().any(|info| matches!(info.stored, Stored::Quantized(..)))
    }

    /// Returns what reports call the model's format: the mix a GGUF file names (`q4_k_m`), else that of most
    /// weights (`bf16`, `mxfp4`, `int8-w8a8`).
    pub fn format_name(&self) -> String {
        self.format.clone().unwrap_or_else(|| contents::main_format(&self.tensors))
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::container::safetensors::{SHARD_BYTES, SafetensorsSink};
    use crate::container::{Opening, Sink, Storage, TensorSpec};
    use crate::dialect::compressed_tensors::{CompressedTensors, config::Quantization};
    use crate::names::Role;
    use crate::scheme::schemes::{INT8, MXFP4, Q4_0};
    use crate::tensor::bytes_from_floats;

    fn config_json() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        })
    }

    /// Values that every float type holds exactly and that differ between tensors and positions.
    fn values(seed: usize, count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 101) % 255) as f32 / 64.0 - 2.0).collect()
    }

    /// A tensor of a file: name, type, shape, bytes.
    type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

    /// Writes a folder as converters do.
    fn write(folder: &Path, config: &Value, tensors: &[Stored], shard_bytes: u64) {
        let specs: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, _)| TensorSpec {
                name: name.clone(),
                storage: Storage::Plain(*dtype),
                shape: shape.clone(),
            })
            .collect();
        let sink = SafetensorsSink::create(folder, Opening::default(), &specs, &[], shard_bytes).unwrap();
        tensors.iter().enumerate().for_each(|(i, t)| sink.write(i, 0, &t.3).unwrap());
        sink.add_file("config.json", config.to_string().as_bytes()).unwrap();
        Box::new(sink).finish().unwrap();
    }

    /// The tensors that the configuration asks for, number types taking turns.
    fn dense_tensors(config: &Value) -> Vec<Stored> {
        let expected = Config::from_json(config).unwrap().expected_tensors();
        let types = [Dtype::BF16, Dtype::F32, Dtype::F16].into_iter().cycle();
        (expected.into_iter().zip(types).enumerate())
            .map(|(i, ((id, shape), dtype))| {
                let bytes = bytes_from_floats(dtype, &values(i, shape.iter().product()));
                (id.hf_name(), dtype, shape, bytes)
            })
            .collect()
    }

    #[test]
    fn one_file_shards_and_a_named_file_hold_the_same_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = dense_tensors(&config_json());
        let [whole, sharded] = ["whole", "sharded"].map(|name| dir.path().join(name));
        write(&whole, &config_json(), &tensors, SHARD_BYTES);
        write(&sharded, &config_json(), &tensors, 4000);
        for path in [&whole, &sharded, &whole.join("model.safetensors")] {
            let checkpoint = Checkpoint::open(path).unwrap();
            assert_eq!(checkpoint.tensors.len(), tensors.len());
            assert!(!checkpoint.is_quantized());
            for (i, (name, dtype, shape, _)) in tensors.iter().enumerate() {
                let id = TensorId::from_hf(name).unwrap();
                assert_eq!(checkpoint.tensors[&id].stored, super::Stored::Dense(*dtype));
                let wanted = values(i, shape.iter().product());
                assert_eq!(checkpoint.read(id).unwrap().to_f32(), wanted, "{name}");
                let width: usize = shape[1..].iter().product();
                let rows = checkpoint.read_rows(id, 3..7).unwrap();
                assert_eq!(rows.to_f32(), wanted[3 * width..7 * width], "{name}");
            }
        }
        // Without its index, the numbering alone finds all shards.
        fs::remove_file(sharded.join("model.safetensors.index.json")).unwrap();
        assert!(Checkpoint::open(&sharded).unwrap().weight_files().count() > 2);
    }

    #[test]
    fn old_tables_and_a_redundant_head_are_tolerated_in_a_tied_model() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        let mut tensors = dense_tensors(&config_json());
        let table = "model.layers.0.self_attn.rotary_emb.inv_freq".to_string();
        tensors.push((table, Dtype::F32, vec![4], vec![0; 16]));
        let (_, dtype, shape, bytes) = tensors[0].clone();
        tensors.push(("lm_head.weight".to_string(), dtype, shape, bytes));
        write(&folder, &config_json(), &tensors, SHARD_BYTES);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert!(!checkpoint.tensors.contains_key(&TensorId::global(Role::Head)));
    }

    #[test]
    fn gguf_rows_come_in_hugging_face_order_whatever_range_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let config = Config::from_json(&config_json()).unwrap();
        let gguf = dialect::gguf::Gguf;
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", "llama");
        metadata.set("general.file_type", 2u32);
        for (key, value) in [
            ("context_length", 64u32),
            ("embedding_length", 32),
            ("block_count", 1),
            ("feed_forward_length", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            metadata.set(&format!("llama.{key}"), value);
        }
        metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
        // As a writer: rows reordered, matrices of linears quantized, vectors F32.
        let (mut specs, mut payload, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (id, shape)) in config.expected_tensors().into_iter().enumerate() {
            let dense = Dense::from_f32(shape.clone(), &values(i, shape.iter().product()));
            let quantized = id.role.is_linear();
            let matrix = if quantized {
                let mut q = crate::scheme::QTensor::zeroed(Q4_0, shape[0], shape[1]);
                q.codes.iter_mut().enumerate().for_each(|(at, code)| *code = ((at / 3 + i) % 16) as u8);
                q.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = at as f32 + 0.5);
                Matrix::Quantized(q)
            } else {
                Matrix::Dense(dense)
            };
            let (storage, packed) = match &matrix {
                Matrix::Dense(dense) => (Storage::Plain(dense.dtype), dense.bytes.to_vec()),
                Matrix::Quantized(q) => {
                    let part = &gguf.parts(&q.scheme, Activations::Full, q.rows, q.cols).unwrap()[0];
                    (part.storage, gguf.pack(q, Activations::Full).unwrap().swap_remove(0))
                }
            };
            let map = gguf.place(id, shape[0], &config).rows;
            let row_bytes = packed.len() / shape[0];
            let mut bytes = vec![0; packed.len()];
            map.scatter(0..shape[0], row_bytes, &packed, |row, piece| {
                bytes[row * row_bytes..row * row_bytes + piece.len()].copy_from_slice(piece);
                Ok::<_, ()>(())
            })
            .unwrap();
            let rotated = matches!(id.role, Role::Q | Role::K);
            assert_eq!(rotated, bytes != packed, "the order does something");
            specs.push(TensorSpec { name: id.gguf_name(), storage, shape });
            payload.push(bytes);
            wanted.push((id, matrix));
        }
        let sink =
            crate::container::gguf::GgufSink::create(&path, Opening::default(), &metadata, &specs).unwrap();
        payload.iter().enumerate().for_each(|(i, bytes)| sink.write(i, 0, bytes).unwrap());
        Box::new(sink).finish().unwrap();

        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.format_name(), "q4_0");
        assert!(checkpoint.config.tie_word_embeddings && checkpoint.is_quantized());
        for (id, matrix) in wanted {
            assert_eq!(checkpoint.read(id).unwrap(), matrix, "{id}");
            let count = checkpoint.tensors[&id].shape[0];
            for rows in [0..1, 3..7, 5..count, 0..count] {
                let picked: Vec<_> = rows.clone().collect();
                assert_eq!(checkpoint.read_rows(id, rows).unwrap(), matrix.select_rows(&picked), "{id}");
            }
        }
    }

    #[test]
    fn quantized_parts_are_one_tensor_whatever_type_their_scales_have() {
        for (scheme, scales) in [(MXFP4, Dtype::U8), (INT8, Dtype::BF16), (INT8, Dtype::F32)] {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("m");
            let mut tensors = dense_tensors(&config_json());
            let id = TensorId::in_layer(0, Role::Down);
            let scheme = if scales == Dtype::F32 {
                Scheme { scale: crate::num::Codec::F32, ..scheme }
            } else {
                scheme
            };
            let mut q = crate::scheme::QTensor::zeroed(scheme, 32, 64);
            q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 7 % 16) as u8);
            q.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = 2f32.powi(i as i32 % 5 - 2));
            tensors.retain(|tensor| tensor.0 != id.hf_name());
            let parts = CompressedTensors.parts(&scheme, Activations::Full, 32, 64).unwrap();
            let mut packed = CompressedTensors.pack(&q, Activations::Full).unwrap().into_iter();
            for part in parts {
                let Storage::Plain(dtype) = part.storage else { unreachable!() };
                let bytes = part.fixed.unwrap_or_else(|| packed.next().unwrap());
                tensors.push((format!("{}.{}", id.hf_module(), part.suffix), dtype, part.shape, bytes));
            }
            let mut config = config_json();
            let linears = [(id.hf_module(), Some((scheme, Activations::Full)))];
            let quantization = Quantization::of_plan(&linears).unwrap();
            config["quantization_config"] = quantization.to_json();
            config["quantization_config"]["config_groups"]["group_0"]["targets"] = json!([id.hf_module()]);
            write(&folder, &config, &tensors, SHARD_BYTES);

            let checkpoint = Checkpoint::open(&folder).unwrap();
            assert_eq!(checkpoint.tensors[&id].stored, super::Stored::Quantized(scheme, Activations::Full));
            assert_eq!(checkpoint.read(id).unwrap(), Matrix::Quantized(q.clone()));
            assert_eq!(checkpoint.read_rows(id, 5..9).unwrap(), Matrix::Quantized(q.slice_rows(5..9)));
            assert_eq!(checkpoint.format_name(), scheme.name);
        }
    }
}
