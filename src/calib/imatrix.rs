//! Importance matrices of llama.cpp: for every weight, the mean square of each column's input over a text.
//!
//! Two files hold them (tools/imatrix/imatrix.cpp, commit 0c1e57098):
//!
//! - GGUF: `general.type` = `imatrix`, `imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size`; per weight NAME the
//!   F32 tensors `NAME.in_sum2` `[matrices, cols]`, sums of squares, and `NAME.counts` `[matrices, 1]`, tokens.
//! - `.dat`: i32 count; per weight i32 length, name, i32 calls, i32 values, then F32 `mean square · calls`; then, if the
//!   file is not old, i32 chunks, i32 length, name of the text. Little-endian.
//!
//! Files with several matrices to a weight (experts) are read; each weight here has one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::container::gguf::{Array, Gguf, GgufSink, Metadata, Value};
use crate::container::{Opening, Sink, Storage, TensorSpec};
use crate::names::TensorId;
use crate::tensor::{Dtype, bytes_from_floats, floats_from_bytes};

/// The mean squared input of every column, `[cols]`, by weight.
pub type Importances = BTreeMap<TensorId, Vec<f32>>;

/// An importance matrix with its origin.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// The texts it was made from.
    pub datasets: Vec<String>,
    /// Windows of text.
    pub chunks: u32,
    /// Tokens in each.
    pub chunk_size: u32,
    /// Mean squares.
    pub importances: Importances,
}

impl Imatrix {
    /// Reads either kind of file. Entries of tensors that no model here has are left out.
    ///
    /// # Errors
    /// If the file is neither, is damaged, or holds numbers that are negative or not finite.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let bytes = fs::read(path).with_context(|| format!("{shown}: cannot read the importance matrix"))?;
        let read = if bytes.starts_with(b"GGUF") { Self::of_gguf(path) } else { Self::of_dat(&bytes) };
        let imatrix = read.with_context(|| format!("{shown}: no importance matrix that can be read"))?;
        for (id, values) in &imatrix.importances {
            ensure!(
                values.iter().all(|x| x.is_finite() && *x >= 0.0),
                "{shown}: `{id}` has importances that are negative or not finite; make the file again"
            );
        }
        ensure!(!imatrix.importances.is_empty(), "{shown}: holds no weight of a model that is known here");
        Ok(imatrix)
    }

    fn of_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let kind = gguf.metadata.get("general.type").and_then(Value::as_str);
        ensure!(kind == Some("imatrix"), "`general.type` is {kind:?}, wanted `imatrix`");
        let number = |key: &str| {
            let number = gguf.metadata.get(key).and_then(Value::as_u64).unwrap_or(0);
            u32::try_from(number).with_context(|| format!("`{key}` is {number}, wanted at most {}", u32::MAX))
        };
        let datasets = match gguf.metadata.get("imatrix.datasets") {
            Some(Value::Array(Array::String(names))) => names.clone(),
            _ => vec![],
        };
        let mut tensors: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
        for tensor in &gguf.tensors {
            let name = &tensor.spec.name;
            ensure!(tensor.spec.storage == Storage::Plain(Dtype::F32), "`{name}` is not F32");
            let bytes = gguf.files[tensor.file].read(tensor.start, tensor.spec.bytes())?;
            let mut values = vec![0.0; bytes.len() / 4];
            floats_from_bytes(Dtype::F32, &bytes, &mut values);
            tensors.insert(name, values);
        }
        let mut importances = Importances::new();
        for (name, sums) in &tensors {
            let Some(weight) = name.strip_suffix(".in_sum2") else { continue };
            let counts = tensors.get(format!("{weight}.counts").as_str());
            let counts = counts.with_context(|| format!("`{weight}.counts` is missing"))?;
            ensure!(counts.len() == 1, "`{weight}` has {} matrices, wanted one", counts.len());
            // llama.cpp takes a weight that was never used for one whose columns all count alike.
            let mean = |sum: &f32| if counts[0] > 0.0 { sum / counts[0] } else { 1.0 };
            if let Some(id) = TensorId::from_gguf(weight) {
                importances.insert(id, sums.iter().map(mean).collect());
            }
        }
        let (chunks, chunk_size) = (number("imatrix.chunk_count")?, number("imatrix.chunk_size")?);
        Ok(Imatrix { datasets, chunks, chunk_size, importances })
    }

    fn of_dat(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes;
        let entries = take_i32(&mut rest)?;
        ensure!(entries > 0, "found {entries} entries");
        let mut imatrix = Imatrix::default();
        for _ in 0..entries {
            let name = take_text(&mut rest)?;
            let calls = take_i32(&mut rest)?.max(1) as f32;
            let count = usize::try_from(take_i32(&mut rest)?).context("a negative length")?;
            let bytes = take(&mut rest, count.checked_mul(4).context("a length past the file's end")?)?;
            let mut values = vec![0.0; count];
            floats_from_bytes(Dtype::F32, bytes, &mut values);
            values.iter_mut().for_each(|x| *x /= calls);
            if let Some(id) = TensorId::from_gguf(&name) {
                imatrix.importances.insert(id, values);
            }
        }
        if !rest.is_empty() {
            imatrix.chunks = take_i32(&mut rest)?.max(0) as u32;
            imatrix.datasets.push(take_text(&mut rest)?);
        }
        Ok(imatrix)
    }

    /// Writes the GGUF file.
    ///
    /// # Errors
    /// If the file exists and `force` is not given, or cannot be written.
    pub fn write(&self, path: &Path, force: bool) -> Result<()> {
        let mut metadata = Metadata::default();
        metadata.set("general.type", "imatrix");
        metadata.set("imatrix.datasets", self.datasets.clone());
        metadata.set("imatrix.chunk_count", Value::U32(self.chunks));
        metadata.set("imatrix.chunk_size", Value::U32(self.chunk_size));
        let tokens = self.chunks as f32 * self.chunk_size as f32;
        let (mut specs, mut contents) = (Vec::new(), Vec::new());
        for (id, means) in &self.importances {
            let sums: Vec<f32> = means.iter().map(|mean| mean * tokens).collect();
            for (part, values) in [("in_sum2", sums), ("counts", vec![tokens])] {
                let name = format!("{}.{part}", id.gguf_name());
                let shape = vec![1, values.len()];
                specs.push(TensorSpec { name, storage: Storage::Plain(Dtype::F32), shape });
                contents.push(bytes_from_floats(Dtype::F32, &values));
            }
        }
        let sink = GgufSink::create(path, Opening { force, key: None }, &metadata, &specs)?;
        for (index, bytes) in contents.iter().enumerate() {
            sink.write(index, 0, bytes)?;
        }
        Box::new(sink).finish()
    }

    /// Returns the importances of a weight of `cols` columns, if the file has them.
    ///
    /// # Errors
    /// If the file has another number of columns: it is of another model.
    pub fn of(&self, id: TensorId, cols: usize) -> Result<Option<&[f32]>> {
        let Some(values) = self.importances.get(&id) else { return Ok(None) };
        ensure!(
            values.len() == cols,
            "`{id}`: the importance matrix has {} columns, the weight {cols}; it was made for another model",
            values.len()
        );
        Ok(Some(values))
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8]> {
    ensure!(count <= rest.len(), "{count} bytes wanted where {} are left", rest.len());
    let (head, tail) = rest.split_at(count);
    *rest = tail;
    Ok(head)
}

fn take_i32(rest: &mut &[u8]) -> Result<i32> {
    let bytes = take(rest, 4)?;
    Ok(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn take_text(rest: &mut &[u8]) -> Result<String> {
    let length = take_i32(rest)?;
    let Ok(length) = usize::try_from(length) else { bail!("a text of {length} bytes") };
    Ok(String::from_utf8_lossy(take(rest, length)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Role;

    fn example() -> Imatrix {
        let id = |role| TensorId::in_layer(0, role);
        Imatrix {
            datasets: vec!["text".into()],
            chunks: 2,
            chunk_size: 8,
            importances: [(id(Role::Q), vec![0.5, 2.0, 0.0]), (id(Role::Down), vec![1.0; 5])].into(),
        }
    }

    fn opened(bytes: &[u8]) -> Result<Imatrix> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.dat");
        fs::write(&path, bytes).unwrap();
        Imatrix::open(&path)
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.gguf");
        example().write(&path, false).unwrap();
        assert_eq!(Imatrix::open(&path).unwrap(), example());
        assert!(example().write(&path, false).is_err(), "an existing file is kept");
    }

    /// One entry as the old format stores it.
    fn dat(values: &[f32], calls: i32) -> Vec<u8> {
        let name = b"blk.0.attn_q.weight";
        let mut bytes = 1i32.to_le_bytes().to_vec();
        bytes.extend((name.len() as i32).to_le_bytes());
        bytes.extend(name);
        bytes.extend(calls.to_le_bytes());
        bytes.extend((values.len() as i32).to_le_bytes());
        values.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        bytes
    }

    #[test]
    fn the_old_format_is_divided_by_its_calls() {
        let mut bytes = dat(&[2.0, 8.0], 4);
        let q = TensorId::in_layer(0, Role::Q);
        assert_eq!(opened(&bytes).unwrap().of(q, 2).unwrap(), Some(&[0.5, 2.0][..]));
        bytes.extend(7i32.to_le_bytes());
        bytes.extend(4i32.to_le_bytes());
        bytes.extend(b"wiki");
        let read = opened(&bytes).unwrap();
        assert_eq!((read.chunks, &read.datasets[..]), (7, &["wiki".to_string()][..]));
        let error = read.of(q, 3).unwrap_err().to_string();
        assert!(error.contains("another model"), "{error}");
    }

    #[test]
    fn damaged_files_are_refused() {
        let whole = dat(&[1.0, 2.0], 1);
        for end in 1..whole.len() {
            assert!(opened(&whole[..end]).is_err(), "cut at {end}");
        }
        let mut negative = whole.clone();
        let calls = 4 + 4 + 19;
        negative[calls + 4..calls + 8].copy_from_slice(&(-2i32).to_le_bytes());
        assert!(opened(&negative).is_err());
        assert!(opened(&dat(&[f32::NAN, 1.0], 1)).is_err());
    }
}
