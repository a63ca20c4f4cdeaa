//! The output of a plan: a compressed-tensors folder or a GGUF file, with everything but the weights in place.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::container::gguf::{GgufSink, Metadata};
use crate::container::safetensors::SafetensorsSink;
use crate::container::{Opening, Sink, TensorSpec};
use crate::dialect::compressed_tensors::config::Quantization;
use crate::dialect::gguf;
use crate::names::TensorId;
use crate::plan::{Action, Plan, Step};
use crate::scheme::{Activations, Scheme};

/// A planned output, complete but for its weights.
pub struct Artifact {
    specs: Vec<TensorSpec>,
    rest: Rest,
}

/// What surrounds the weights.
enum Rest {
    /// A folder of safetensors files, split at that size, and side files by name.
    Folder { shard_bytes: u64, files: Vec<(String, Vec<u8>)> },
    /// A GGUF file.
    File(Metadata),
}

impl Artifact {
    /// Prepares the output of a plan. `name` is the model's, `provenance` goes into GGUF metadata.
    ///
    /// # Errors
    /// Name what the ecosystem cannot express of this model and what is missing from the source.
    pub fn new(
        plan: &Plan,
        source: &Checkpoint,
        name: &str,
        provenance: &[(String, String)],
        shard_bytes: u64,
    ) -> Result<Self> {
        let rest = match plan.recipe.dialect.name() {
            "gguf" => Rest::File(metadata(plan, source, name, provenance)?),
            _ => Rest::Folder { shard_bytes, files: folder_files(plan, source)? },
        };
        Ok(Artifact { specs: plan.specs(), rest })
    }

    /// Returns the exact size of everything that will be written, a folder's `quant.json` left out: that records
    /// what is measured afterwards.
    pub fn bytes(&self) -> Result<u64> {
        match &self.rest {
            Rest::File(metadata) => GgufSink::bytes(metadata, &self.specs),
            Rest::Folder { shard_bytes, files } => {
                let side: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
                Ok(SafetensorsSink::bytes(&self.specs, &[], *shard_bytes)? + side as u64)
            }
        }
    }

    /// Adds everything that is known of the output to a hash: layout, metadata, side files.
    pub fn identify(&self, hash: &mut blake3::Hasher) {
        hash.update(format!("{:?}", self.specs).as_bytes());
        match &self.rest {
            Rest::File(metadata) => {
                hash.update(format!("{metadata:?}").as_bytes());
            }
            Rest::Folder { shard_bytes, files } => {
                hash.update(&shard_bytes.to_le_bytes());
                for (name, bytes) in files {
                    hash.update(format!("{name} {}\n", bytes.len()).as_bytes()).update(bytes);
                }
            }
        }
    }

    /// Creates the output under a temporary name, ready for its weights.
    ///
    /// # Errors
    /// An output that exists and is not to be replaced, a folder that cannot be written, a full disk.
    pub fn create(&self, out: &Path, opening: Opening) -> Result<Box<dyn Sink>> {
        match &self.rest {
            Rest::File(metadata) => Ok(Box::new(GgufSink::create(out, opening, metadata, &self.specs)?)),
            Rest::Folder { shard_bytes, files } => {
                let sink = SafetensorsSink::create(out, opening, &self.specs, &[], *shard_bytes)?;
                for (name, bytes) in files {
                    sink.add_file(name, bytes)?;
                }
                Ok(Box::new(sink))
            }
        }
    }
}

/// Returns every matrix of the plan with what it becomes, `None` if it is kept.
pub fn matrices(plan: &Plan) -> Vec<(TensorId, Option<(Scheme, Activations)>)> {
    let matrices = plan.steps.iter().filter(|step| step.shape.len() == 2);
    matrices.map(|step| (step.id, stored(step))).collect()
}

fn stored(step: &Step) -> Option<(Scheme, Activations)> {
    match step.action {
        Action::Keep(_) => None,
        Action::Quantize(scheme) => Some((scheme, step.inputs)),
    }
}

/// Returns `config.json` with the quantization described, and the source's side files.
fn folder_files(plan: &Plan, source: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>> {
    let config = source.config_json().with_context(|| {
        format!(
            "{}: a GGUF file has no config.json to write beside compressed-tensors; convert the original folder, or \
             choose a GGUF format",
            source.path.display()
        )
    })?;
    let mut config: Map<String, Value> = serde_json::from_str(config)?;
    let steps = plan.steps.iter().filter(|step| step.shape.len() == 2 && step.id.role.is_linear());
    let mut linears: Vec<_> = steps.map(|step| (step.place.module().to_string(), stored(step))).collect();
    // Of a fused module, the same is said once.
    linears.dedup();
    config.insert(
        "quantization_config".into(),
        Quantization::of_plan(&linears)?.with_fp8_cache(plan.fp8_cache).to_json(),
    );
    let mut files = vec![("config.json".to_string(), format!("{:#}\n", Value::Object(config)).into_bytes())];
    for name in source.side_files()? {
        let path = source.folder().unwrap_or(&source.path).join(&name);
        let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        files.push((name, bytes));
    }
    Ok(files)
}

/// Returns a GGUF file's metadata: model, tokenizer, provenance.
fn metadata(
    plan: &Plan,
    source: &Checkpoint,
    name: &str,
    provenance: &[(String, String)],
) -> Result<Metadata> {
    let files = source.tokenizer_files()?;
    let format = if plan.recipe.pure { "mixed" } else { plan.recipe.format.name };
    let mut metadata = gguf::metadata::write(&source.config, &files, name, format)
        .with_context(|| format!("{}: cannot be written as GGUF", source.path.display()))?;
    for (key, value) in provenance {
        metadata.set(key, value.as_str());
    }
    Ok(metadata)
}

/// Returns the last component of a path as text.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
