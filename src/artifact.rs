//! The output of a plan: a folder or a file of its dialect, with everything but the weights in place.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::checkpoint::Checkpoint;
use crate::container::gguf::{GgufSink, Metadata};
use crate::container::safetensors::SafetensorsSink;
use crate::container::{Opening, Sink, TensorSpec};
use crate::dialect::{Description, Surroundings};
use crate::names::{Role, TensorId};
use crate::plan::{Action, Plan, Step};
use crate::scheme::{Activations, Scheme};
use crate::tensor::Dtype;

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
        let matrices: Vec<_> = (plan.steps.iter())
            .filter(|step| step.shape.len() == 2)
            .map(|step| (step.id, step.place.module().to_string(), stored(step)))
            .collect();
        let embeddings = plan.steps.iter().find(|step| step.id == TensorId::global(Role::Embed));
        let output = Description {
            config: &source.config,
            config_json: source.config_json(),
            tokenizer: &|| source.tokenizer_files(),
            side_files: &|| side_files(source),
            matrices: &matrices,
            dtype: match embeddings.map(|step| step.action) {
                Some(Action::Keep(dtype)) => dtype,
                _ => Dtype::BF16,
            },
            fp8_cache: plan.fp8_cache,
            name,
            format: (!plan.recipe.pure).then_some(plan.recipe.format.name),
            provenance,
        };
        let rest = plan.recipe.dialect.surround(&output);
        let rest = match rest.with_context(|| format!("{}", source.path.display()))? {
            Surroundings::File(metadata) => Rest::File(metadata),
            Surroundings::Folder(files) => Rest::Folder { shard_bytes, files },
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
    Some((step.action.scheme()?, step.inputs))
}

/// Reads the files beside the source's weights that an output takes along.
fn side_files(source: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: String| {
        let path = source.folder().unwrap_or(&source.path).join(&name);
        let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        Ok((name, bytes))
    };
    source.side_files()?.into_iter().map(read).collect()
}

/// Returns the last component of a path as text.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
