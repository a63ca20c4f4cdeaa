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
mod tests;
