use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{ALIGNMENT, GgmlType, MAGIC, MAX_DIMS, MAX_NAME, Metadata, VERSION, Value};
use crate::container::output::{Draft, Payload, Slot};
use crate::container::{Opening, Sink, Storage, TensorSpec};

/// A GGUF file in the making.
#[derive(Debug)]
pub struct GgufSink {
    draft: Draft,
    metadata: Metadata,
    payload: Payload,
}

impl GgufSink {
    /// Creates the file under a temporary name, header written. Tensors follow one another in the order of `specs`,
    /// each padded to 32 bytes, the last one too.
    ///
    /// # Errors
    /// A tensor that GGUF cannot hold, an existing output that is not to be replaced, a parent that cannot be written,
    /// a disk too small.
    pub fn create(path: &Path, opening: Opening, metadata: &Metadata, specs: &[TensorSpec]) -> Result<Self> {
        let (header, offsets, payload_bytes) =
            header(metadata, specs).with_context(|| format!("{}", path.display()))?;
        let start = header.len() as u64;
        let len = start + payload_bytes;
        let (draft, file) = Draft::file(path, opening, &header, len)?;
        let slots = offsets.into_iter().map(|offset| Slot { file: 0, start: start + offset });
        let tensors = specs.iter().cloned().zip(slots).collect();
        let payload = Payload::new(vec![(path.to_path_buf(), file)], tensors);
        Ok(GgufSink { draft, metadata: metadata.clone(), payload })
    }

    /// Returns the exact size of the file. Errors as [`GgufSink::create`] for tensors that GGUF cannot hold.
    pub fn bytes(metadata: &Metadata, specs: &[TensorSpec]) -> Result<u64> {
        let (header, _, payload_bytes) = header(metadata, specs)?;
        Ok(header.len() as u64 + payload_bytes)
    }
}

impl Sink for GgufSink {
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.payload.write(tensor, offset, bytes)
    }

    fn replace(&self, tensor: usize, bytes: &[u8]) -> Result<()> {
        self.payload.replace(tensor, bytes)
    }

    fn read(&self, tensor: usize) -> Result<Vec<u8>> {
        self.payload.read(tensor)
    }

    fn restate(&self, facts: &[(String, String)]) -> Result<()> {
        let mut metadata = self.metadata.clone();
        facts.iter().for_each(|(key, value)| metadata.set(key, value.as_str()));
        let specs: Vec<TensorSpec> = self.payload.specs().cloned().collect();
        let [before, after] = [&self.metadata, &metadata].map(|metadata| header(metadata, &specs));
        let after = after?.0;
        ensure!(
            after.len() == before?.0.len(),
            "{}: the header's length has changed since the file was created",
            self.draft.target().display()
        );
        self.payload.restate(0, &after)
    }

    fn path(&self) -> &Path {
        self.draft.path()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.payload.sync()?;
        self.draft.publish()
    }
}

/// Returns the padded header, the offset of each tensor behind it, and the padded payload's length.
fn header(metadata: &Metadata, specs: &[TensorSpec]) -> Result<(Vec<u8>, Vec<u64>, u64)> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((specs.len() as i64).to_le_bytes());
    out.extend((metadata.0.len() as i64).to_le_bytes());
    let mut keys = HashSet::new();
    for (key, value) in &metadata.0 {
        ensure!(!key.is_empty() && keys.insert(key), "GGUF key `{key}` is empty or given twice");
        push_string(&mut out, key);
        out.extend((value.kind() as u32).to_le_bytes());
        push_value(&mut out, value);
    }
    let (mut offsets, mut next, mut names) = (Vec::with_capacity(specs.len()), 0, HashSet::new());
    for spec in specs {
        ensure!(names.insert(&spec.name), "`{}`: two tensors of the output have this name", spec.name);
        push_tensor(&mut out, spec, next).with_context(|| format!("`{}`", spec.name))?;
        offsets.push(next);
        next += spec.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    Ok((out, offsets, next))
}

fn push_tensor(out: &mut Vec<u8>, spec: &TensorSpec, offset: u64) -> Result<()> {
    let kind = match spec.storage {
        Storage::Ggml(kind) => kind,
        Storage::Plain(dtype) => {
            GgmlType::from_dtype(dtype).with_context(|| format!("GGUF has no weight type for {dtype}"))?
        }
    };
    let (dims, cols) = (spec.shape.len(), spec.shape.last().copied().unwrap_or(1));
    ensure!(spec.name.len() <= MAX_NAME, "the name has {} bytes, wanted at most {MAX_NAME}", spec.name.len());
    ensure!(dims <= MAX_DIMS, "found {dims} dimensions, wanted at most {MAX_DIMS}");
    ensure!(
        cols.is_multiple_of(kind.block_elems()),
        "{cols} columns are no multiple of {kind:?}'s block of {}",
        kind.block_elems()
    );
    push_string(out, &spec.name);
    out.extend((dims as u32).to_le_bytes());
    for &n in spec.shape.iter().rev() {
        out.extend((n as i64).to_le_bytes());
    }
    out.extend(kind.id().to_le_bytes());
    out.extend(offset.to_le_bytes());
    Ok(())
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => push_string(out, v),
        Value::Array(array) => {
            out.extend((array.kind() as u32).to_le_bytes());
            out.extend((array.len() as u64).to_le_bytes());
            array.values().for_each(|item| push_value(out, &item));
        }
    }
}
