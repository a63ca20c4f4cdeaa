use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use super::DTYPES;
use crate::container::output::{self, Draft, Payload, Slot};
use crate::container::{Opening, Sink, Storage, TensorSpec};

/// Size at which a checkpoint is split unless told otherwise: 5 GB, as transformers does.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A model folder in the making: `model.safetensors`, or shards and their index, and side files.
#[derive(Debug)]
pub struct SafetensorsSink {
    draft: Draft,
    payload: Payload,
}

impl SafetensorsSink {
    /// Creates the folder under a temporary name, with every header written.
    ///
    /// Shards are filled in the order of `specs` up to `shard_bytes` each (a larger tensor gets its own). `metadata`
    /// goes into each header beside `"format": "pt"`.
    ///
    /// # Errors
    /// The output exists and is not to be replaced, its parent cannot be written, or the disk is too small.
    pub fn create(
        folder: &Path,
        opening: Opening,
        specs: &[TensorSpec],
        metadata: &[(&str, &str)],
        shard_bytes: u64,
    ) -> Result<Self> {
        let shards = split(specs, shard_bytes);
        let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
        let draft = Draft::folder(folder, opening, total)?;
        let mut files = Vec::new();
        let mut slots = vec![Slot { file: 0, start: 0 }; specs.len()];
        for (number, members) in shards.iter().enumerate() {
            let name = shard_name(number, shards.len());
            let (header, placed) = header(specs, members, metadata)
                .with_context(|| format!("{}", folder.join(&name).display()))?;
            let mut end = header.len() as u64;
            for (tensor, offset) in placed {
                let start = header.len() as u64 + offset;
                slots[tensor] = Slot { file: number, start };
                end = end.max(start + specs[tensor].bytes());
            }
            let file = output::create_file(&draft.path().join(&name), folder, &header, end)?;
            files.push((folder.join(&name), file));
        }
        let tensors = specs.iter().cloned().zip(slots).collect();
        let sink = SafetensorsSink { draft, payload: Payload::new(files, tensors) };
        if shards.len() > 1 {
            sink.add_file("model.safetensors.index.json", index(specs, &shards, total).as_bytes())?;
        }
        Ok(sink)
    }

    /// Returns the exact size of all files that [`SafetensorsSink::create`] and complete writes make, side files left
    /// out. Errors as `create` for tensors that safetensors cannot hold.
    pub fn bytes(specs: &[TensorSpec], metadata: &[(&str, &str)], shard_bytes: u64) -> Result<u64> {
        let shards = split(specs, shard_bytes);
        let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
        let mut bytes = total;
        for members in &shards {
            bytes += header(specs, members, metadata)?.0.len() as u64;
        }
        Ok(if shards.len() > 1 { bytes + index(specs, &shards, total).len() as u64 } else { bytes })
    }

    /// Writes a side file (tokenizer, configuration) into the folder.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.draft.path().join(name);
        let write = || {
            fs::create_dir_all(output::parent_of(&path))?;
            fs::write(&path, bytes)?;
            fs::File::open(&path)?.sync_all()
        };
        write().with_context(|| format!("{}: cannot be written", self.draft.target().join(name).display()))
    }
}

impl Sink for SafetensorsSink {
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.payload.write(tensor, offset, bytes)
    }

    fn replace(&self, tensor: usize, bytes: &[u8]) -> Result<()> {
        self.payload.replace(tensor, bytes)
    }

    fn read(&self, tensor: usize) -> Result<Vec<u8>> {
        self.payload.read(tensor)
    }

    fn restate(&self, _facts: &[(String, String)]) -> Result<()> {
        Ok(())
    }

    fn path(&self) -> &Path {
        self.draft.path()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.payload.sync()?;
        output::sync_folder(self.draft.path())?;
        self.draft.publish()
    }
}

/// Returns the tensors of each shard, in order; at least one shard.
fn split(specs: &[TensorSpec], shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut used = 0;
    for (tensor, spec) in specs.iter().enumerate() {
        let last = shards.len() - 1;
        if used + spec.bytes() > shard_bytes && !shards[last].is_empty() {
            shards.push(vec![tensor]);
            used = spec.bytes();
        } else {
            shards[last].push(tensor);
            used += spec.bytes();
        }
    }
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    }
}

/// Tensors with where each starts behind the header.
type Placed = Vec<(usize, u64)>;

/// Returns a shard's header with its length, padded with spaces to a multiple of 8, and where each member's payload
/// starts behind it. Members are placed by falling number size, so that every tensor is aligned to its numbers:
/// readers that map the file need that.
fn header(specs: &[TensorSpec], members: &[usize], metadata: &[(&str, &str)]) -> Result<(Vec<u8>, Placed)> {
    let mut entries = Vec::new();
    for &tensor in members {
        let spec = &specs[tensor];
        let row = match spec.storage {
            Storage::Plain(dtype) => DTYPES.iter().find(|row| row.0 == dtype),
            Storage::Ggml(_) => None,
        };
        let (_, dtype) = row.with_context(|| {
            format!("`{}`: safetensors has no type for {:?}; write a `.gguf` file", spec.name, spec.storage)
        })?;
        entries.push((tensor, *dtype));
    }
    entries.sort_by_key(|&(_, dtype)| Reverse(dtype.bitsize()));
    let (mut infos, mut placed, mut offset) = (Vec::new(), Vec::new(), 0);
    for (tensor, dtype) in entries {
        let spec = &specs[tensor];
        let end = offset + spec.bytes();
        let data_offsets = (offset as usize, end as usize);
        infos.push((spec.name.clone(), TensorInfo { dtype, shape: spec.shape.clone(), data_offsets }));
        placed.push((tensor, offset));
        offset = end;
    }
    let names = infos.iter().map(|(name, _)| name).collect::<HashSet<_>>().len();
    ensure!(names == infos.len(), "two tensors of the output have one name");
    let described: HashMap<String, String> = std::iter::once(&("format", "pt"))
        .chain(metadata)
        .map(|&(key, value)| (key.to_string(), value.to_string()))
        .collect();
    let metadata = Metadata::new(Some(described), infos).map_err(|error| anyhow!("{error}"))?;
    let mut json = serde_json::to_vec(&sorted(&metadata)?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok((header, placed))
}

/// Returns the header with `__metadata__` in a fixed order, so that equal inputs give equal bytes.
fn sorted(metadata: &Metadata) -> Result<Value> {
    let mut header = serde_json::to_value(metadata)?;
    if let Some(Value::Object(entries)) = header.get_mut("__metadata__") {
        entries.sort_keys();
    }
    Ok(header)
}

fn index(specs: &[TensorSpec], shards: &[Vec<usize>], total: u64) -> String {
    let mut weight_map = Map::new();
    for (number, members) in shards.iter().enumerate() {
        for &tensor in members {
            weight_map.insert(specs[tensor].name.clone(), json!(shard_name(number, shards.len())));
        }
    }
    weight_map.sort_keys();
    format!("{:#}\n", json!({ "metadata": { "total_size": total }, "weight_map": weight_map }))
}

#[cfg(test)]
mod tests {
    use super::super::Safetensors;
    use super::*;
    use crate::tensor::Dtype;

    fn specs() -> Vec<TensorSpec> {
        [
            ("a", Dtype::U8, vec![3]),
            ("b", Dtype::BF16, vec![2, 5]),
            ("c", Dtype::I64, vec![2]),
            ("d", Dtype::F32, vec![]),
        ]
        .into_iter()
        .map(|(name, dtype, shape)| TensorSpec { name: name.into(), storage: Storage::Plain(dtype), shape })
        .collect()
    }

    fn write(folder: &Path, shard_bytes: u64) {
        let sink = SafetensorsSink::create(folder, Opening::default(), &specs(), &[("k", "v")], shard_bytes)
            .unwrap();
        for (i, spec) in specs().iter().enumerate() {
            sink.write(i, 0, &vec![i as u8; spec.bytes() as usize]).unwrap();
        }
        sink.add_file("config.json", b"{}").unwrap();
        assert!(!folder.exists(), "nothing has the final name before it is finished");
        Box::new(sink).finish().unwrap();
    }

    #[test]
    fn the_safetensors_crate_reads_one_file_with_every_tensor_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("out");
        write(&folder, SHARD_BYTES);
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (i, spec) in specs().iter().enumerate() {
            let view = file.tensor(&spec.name).unwrap();
            assert_eq!(
                (view.shape(), view.data()),
                (&spec.shape[..], &vec![i as u8; spec.bytes() as usize][..])
            );
            let start = 8 + header + metadata.info(&spec.name).unwrap().data_offsets.0;
            assert_eq!(start * 8 % view.dtype().bitsize(), 0, "{}", spec.name);
        }
        assert!(!folder.join("model.safetensors.index.json").exists());
        assert!(folder.join("config.json").exists());
    }

    #[test]
    fn shards_are_split_at_the_limit_and_indexed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("out");
        write(&folder, 24);
        let index: Value =
            serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 43);
        assert_eq!(index["weight_map"]["b"], "model-00001-of-00002.safetensors");
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00002.safetensors");
        let shard =
            Safetensors::open(&folder.join("model-00002-of-00002.safetensors"), |name| name == "d").unwrap();
        assert_eq!(shard.metadata["k"], "v");
        let [c] = &shard.tensors[..] else { panic!("one tensor left after skipping `d`") };
        assert_eq!(shard.file.read(c.start, 16).unwrap(), vec![2; 16]);
    }

    #[test]
    fn equal_inputs_give_equal_files() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["1", "2"].map(|name| dir.path().join(name));
        write(&first, SHARD_BYTES);
        write(&second, SHARD_BYTES);
        let read = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert_eq!(read(&first), read(&second));
    }

    #[test]
    fn only_folders_that_hold_a_model_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("out");
        let create =
            |force| SafetensorsSink::create(&folder, Opening { force, key: None }, &[], &[], SHARD_BYTES);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("letters.txt"), "dear").unwrap();
        assert!(create(false).unwrap_err().to_string().contains("holds no model"));
        assert!(create(true).unwrap_err().to_string().contains("holds no model"));
        fs::write(folder.join("config.json"), "{}").unwrap();
        assert!(create(true).unwrap_err().to_string().contains("holds no model"), "a configuration alone");
        fs::write(folder.join("model.safetensors"), "").unwrap();
        assert!(create(false).unwrap_err().to_string().contains("--force"));
        Box::new(create(true).unwrap()).finish().unwrap();
        assert!(folder.join("model.safetensors").exists() && !folder.join("letters.txt").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
