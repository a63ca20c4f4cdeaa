use std::collections::HashSet;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{ALIGNMENT, Array, GgmlType, Kind, MAGIC, MAX_DIMS, MAX_NAME, Metadata, READ_VERSIONS, Value};
use crate::container::{InputFile, Located, Storage, TensorSpec};

/// How files began before GGUF: ggml, ggmf, ggjt, as little-endian numbers.
const OLD_MAGICS: [&[u8; 4]; 3] = [b"lmgg", b"fmgg", b"tjgg"];

/// An opened GGUF model: one file, or all parts of a split one.
#[derive(Debug)]
pub struct Gguf {
    /// The file, or the parts in order.
    pub files: Vec<InputFile>,
    /// Metadata of the (first) file.
    pub metadata: Metadata,
    /// All tensors in file order. Floats are [`Storage::Plain`], everything else [`Storage::Ggml`].
    pub tensors: Vec<Located>,
}

impl Gguf {
    /// Opens a file and validates its header: every length against what is left of the file, types, unique names, and
    /// that tensors follow one another with nothing but alignment between. Any part of a split model opens all of it.
    ///
    /// # Errors
    /// Name the file, the key or tensor, what was found and wanted.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, metadata, tensors) = open_one(path)?;
        let mut gguf = Gguf { files: vec![file], metadata, tensors };
        let count = gguf.metadata.get("split.count").and_then(Value::as_u64).unwrap_or(1);
        if count > 1 {
            gguf.join(path, count).with_context(|| format!("{}", path.display()))?;
        }
        Ok(gguf)
    }

    /// Replaces the part that was opened by all parts.
    fn join(&mut self, path: &Path, count: u64) -> Result<()> {
        let wanted = self.metadata.size("split.tensors.count")?;
        ensure!(count <= 99_999, "`split.count` is {count}, wanted at most 99999");
        let (mut files, mut tensors, mut names) = (Vec::new(), Vec::new(), HashSet::new());
        for number in 0..count as usize {
            let (file, metadata, found) = open_one(&part_path(path, number, count)?)?;
            let shown = file.path.display();
            let (no, of) = (metadata.size("split.no")?, metadata.size("split.count")? as u64);
            ensure!(
                (no, of) == (number, count),
                "{shown}: found part {no} of {of}, wanted {number} of {count} (counted from 0)"
            );
            for tensor in found {
                ensure!(
                    names.insert(tensor.spec.name.clone()),
                    "{shown}: `{}` is in an earlier part already",
                    tensor.spec.name
                );
                tensors.push(Located { file: number, ..tensor });
            }
            if number == 0 {
                self.metadata = metadata;
            }
            files.push(file);
        }
        let found = tensors.len();
        ensure!(found == wanted, "the parts hold {found} tensors, but `split.tensors.count` is {wanted}");
        (self.files, self.tensors) = (files, tensors);
        Ok(())
    }
}

/// Returns the path of part `number` (from 0): `NAME-00001-of-00003.gguf` counts from 1.
fn part_path(path: &Path, number: usize, count: u64) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let end = format!("-of-{count:05}.gguf");
    let stem = name.strip_suffix(&end).and_then(|s| Some(s.rsplit_once('-')?.0)).with_context(|| {
        format!(
            "part of a model split in {count}, but its name does not end in `-0000N{end}`; rename it back"
        )
    })?;
    Ok(path.with_file_name(format!("{stem}-{:05}{end}", number + 1)))
}

fn open_one(path: &Path) -> Result<(InputFile, Metadata, Vec<Located>)> {
    let input = InputFile::open(path)?;
    let shown = path.display();
    let mut reader = Reader { input: BufReader::new(&input.file), at: 0, len: input.len };
    let magic = reader.bytes::<4>().with_context(|| format!("{shown}"))?;
    ensure!(
        !OLD_MAGICS.contains(&&magic),
        "{shown}: a ggml file from before GGUF; convert it with `convert_llama_ggml_to_gguf.py` of llama.cpp"
    );
    ensure!(&magic == MAGIC, "{shown}: no GGUF file: it starts with {magic:02x?}, wanted `GGUF`");
    let (metadata, tensors) = reader.header().with_context(|| format!("{shown}: GGUF header"))?;
    Ok((input, metadata, tensors))
}

/// Reads a header front to back. No length from the file is trusted before it is compared with what is left of it.
struct Reader<R> {
    input: R,
    at: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Result<(Metadata, Vec<Located>)> {
        let version = u32::from_le_bytes(self.bytes()?);
        ensure!(
            !READ_VERSIONS.contains(&version.swap_bytes()),
            "the file is big-endian; turn it round with `gguf_convert_endian.py` of llama.cpp's gguf-py"
        );
        ensure!(
            READ_VERSIONS.contains(&version),
            "found version {version}, wanted 2 or 3; convert the model with a present llama.cpp"
        );
        // A tensor takes at least 24 header bytes, a key 13.
        let tensors = self.count("tensors", 24)?;
        let keys = self.count("keys", 13)?;
        let metadata = self.metadata(keys)?;
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(&Value::U32(n)) if n.is_power_of_two() => n.into(),
            Some(other) => bail!("`general.alignment` is {other:?}, wanted a power of two as u32"),
        };
        let described = (0..tensors).map(|_| self.tensor()).collect::<Result<Vec<_>>>()?;
        let located = self.locate(described, alignment)?;
        Ok((metadata, located))
    }

    fn metadata(&mut self, keys: u64) -> Result<Metadata> {
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        for _ in 0..keys {
            let key = self.string().context("a key")?;
            ensure!(!key.is_empty(), "a key is empty");
            ensure!(seen.insert(key.clone()), "key `{key}` is there twice");
            let value =
                self.kind().and_then(|kind| self.value(kind)).with_context(|| format!("key `{key}`"))?;
            entries.push((key, value));
        }
        Ok(Metadata(entries))
    }

    fn kind(&mut self) -> Result<Kind> {
        let id = u32::from_le_bytes(self.bytes()?);
        Kind::ALL
            .get(id as usize)
            .copied()
            .with_context(|| format!("unknown value type {id}, wanted 0 to 12"))
    }

    fn value(&mut self, kind: Kind) -> Result<Value> {
        Ok(match kind {
            Kind::U8 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            Kind::I8 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            Kind::U16 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            Kind::I16 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            Kind::U32 => Value::U32(u32::from_le_bytes(self.bytes()?)),
            Kind::I32 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            Kind::F32 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            Kind::U64 => Value::U64(u64::from_le_bytes(self.bytes()?)),
            Kind::I64 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            Kind::F64 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            Kind::Bool => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => bail!("found {other} as a boolean, wanted 0 or 1"),
            },
            Kind::String => Value::String(self.string()?),
            Kind::Array => {
                let kind = self.kind()?;
                let count = u64::from_le_bytes(self.bytes()?);
                self.ensure_left(count, kind.min_bytes(), "array items")?;
                Value::Array(self.array(kind, count)?)
            }
        })
    }

    fn array(&mut self, kind: Kind, count: u64) -> Result<Array> {
        macro_rules! items {
            ($kind:ident) => {
                Array::$kind(
                    (0..count)
                        .map(|_| match self.value(Kind::$kind)? {
                            Value::$kind(item) => Ok(item),
                            other => bail!("found {other:?} in an array of another kind"),
                        })
                        .collect::<Result<_>>()?,
                )
            };
        }
        Ok(match kind {
            Kind::U8 => items!(U8),
            Kind::I8 => items!(I8),
            Kind::U16 => items!(U16),
            Kind::I16 => items!(I16),
            Kind::U32 => items!(U32),
            Kind::I32 => items!(I32),
            Kind::F32 => items!(F32),
            Kind::Bool => items!(Bool),
            Kind::String => items!(String),
            Kind::U64 => items!(U64),
            Kind::I64 => items!(I64),
            Kind::F64 => items!(F64),
            Kind::Array => bail!("arrays of arrays are not allowed"),
        })
    }

    /// Reads a tensor's description; the offset is not checked yet.
    fn tensor(&mut self) -> Result<(TensorSpec, u64)> {
        let name = self.string().context("a tensor's name")?;
        let shape = self.shape().with_context(|| format!("`{name}`"))?;
        let id = u32::from_le_bytes(self.bytes()?);
        let Some(kind) = GgmlType::from_id(id) else {
            bail!(
                "`{name}`: tensor type {} is not read here; make a file of another type from the original model",
                GgmlType::unknown_name(id)
            );
        };
        let cols = shape.last().copied().unwrap_or(1);
        ensure!(
            cols.is_multiple_of(kind.block_elems()),
            "`{name}`: {cols} columns are no multiple of {kind:?}'s block of {}",
            kind.block_elems()
        );
        ensure!(
            name.len() <= MAX_NAME,
            "`{name}`: the name has {} bytes, wanted at most {MAX_NAME}",
            name.len()
        );
        let storage = kind.dtype().map_or(Storage::Ggml(kind), Storage::Plain);
        Ok((TensorSpec { name, storage, shape }, u64::from_le_bytes(self.bytes()?)))
    }

    fn shape(&mut self) -> Result<Vec<usize>> {
        let dims = u32::from_le_bytes(self.bytes()?) as usize;
        ensure!(dims <= MAX_DIMS, "found {dims} dimensions, wanted at most {MAX_DIMS}");
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let n = i64::from_le_bytes(self.bytes()?);
            shape.push(usize::try_from(n).ok().with_context(|| format!("found a dimension of {n}"))?);
        }
        shape.reverse();
        // Twice the largest block, so that sizes in bytes stay far from overflow too.
        let elems = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        ensure!(
            elems.is_some_and(|n| n < 1 << 60),
            "shape {shape:?} is larger than any file; download it again"
        );
        Ok(shape)
    }

    /// Checks offsets: the running sum of padded sizes, the last tensor within the file.
    fn locate(&self, described: Vec<(TensorSpec, u64)>, alignment: u64) -> Result<Vec<Located>> {
        let payload = self.at.next_multiple_of(alignment);
        let (mut located, mut names, mut next) = (Vec::with_capacity(described.len()), HashSet::new(), 0u64);
        for (spec, offset) in described {
            let name = &spec.name;
            ensure!(names.insert(name.clone()), "tensor `{name}` is there twice");
            ensure!(
                offset == next,
                "`{name}`: found offset {offset}, wanted {next}, right after the tensor before it"
            );
            let start = payload.saturating_add(offset);
            let end = start.saturating_add(spec.bytes());
            ensure!(
                end <= self.len,
                "`{name}`: its {} bytes end at {end}, but the file ends at {}: it is truncated; download it again",
                spec.bytes(),
                self.len
            );
            next = offset + spec.bytes().next_multiple_of(alignment);
            located.push(Located { spec, file: 0, start });
        }
        Ok(located)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.ensure_left(N as u64, 1, "bytes")?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn string(&mut self) -> Result<String> {
        let len = u64::from_le_bytes(self.bytes()?);
        self.ensure_left(len, 1, "bytes of a string")?;
        let mut bytes = vec![0; len as usize];
        self.input.read_exact(&mut bytes)?;
        self.at += len;
        String::from_utf8(bytes)
            .ok()
            .with_context(|| format!("the string at byte {} is no UTF-8", self.at - len))
    }

    /// Reads how many entries a section has; each takes at least `min_bytes`.
    fn count(&mut self, what: &str, min_bytes: u64) -> Result<u64> {
        let count = i64::from_le_bytes(self.bytes()?);
        let count = u64::try_from(count).ok().with_context(|| format!("found {count} {what}"))?;
        self.ensure_left(count, min_bytes, what)?;
        Ok(count)
    }

    fn ensure_left(&self, count: u64, min_bytes: u64, what: &str) -> Result<()> {
        let left = self.len - self.at;
        ensure!(
            count.checked_mul(min_bytes).is_some_and(|bytes| bytes <= left),
            "wanted {count} {what} at byte {}, but the file ends at {}: it is truncated or damaged; download it again",
            self.at,
            self.len
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::GgufSink;
    use super::*;
    use crate::container::{Opening, Sink};
    use crate::tensor::Dtype;

    fn every_kind() -> Metadata {
        let mut metadata = Metadata::default();
        metadata.set("u8", 1u8);
        metadata.set("i8", -1i8);
        metadata.set("u16", 2u16);
        metadata.set("i16", -2i16);
        metadata.set("u32", 3u32);
        metadata.set("i32", -3i32);
        metadata.set("f32", 0.5f32);
        metadata.set("bool", true);
        metadata.set("string", "ü");
        metadata.set("strings", vec!["a".to_string(), String::new()]);
        metadata.set("empty", Vec::<i32>::new());
        metadata.set("u64", u64::MAX);
        metadata.set("i64", i64::MIN);
        metadata.set("f64", 1e300);
        metadata
    }

    fn specs() -> Vec<TensorSpec> {
        let spec = |name: &str, storage, shape: &[usize]| TensorSpec {
            name: name.to_string(),
            storage,
            shape: shape.to_vec(),
        };
        vec![
            spec("a.weight", Storage::Plain(Dtype::F32), &[3]),
            spec("b.weight", Storage::Ggml(GgmlType::Q4_0), &[2, 64]),
            spec("c.weight", Storage::Plain(Dtype::BF16), &[5, 3]),
        ]
    }

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let sink = GgufSink::create(&path, Opening::default(), &every_kind(), &specs()).unwrap();
        let payload: Vec<Vec<u8>> =
            specs().iter().enumerate().map(|(i, spec)| vec![i as u8 + 1; spec.bytes() as usize]).collect();
        for (i, bytes) in payload.iter().enumerate().rev() {
            sink.write(i, 4, &bytes[4..]).unwrap();
            sink.write(i, 0, &bytes[..4]).unwrap();
        }
        assert!(!path.exists(), "nothing has the final name before it is finished");
        Box::new(sink).finish().unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.metadata, every_kind());
        assert_eq!(gguf.tensors.iter().map(|t| t.spec.clone()).collect::<Vec<_>>(), specs());
        for (tensor, bytes) in gguf.tensors.iter().zip(&payload) {
            assert_eq!(&gguf.files[0].read(tensor.start, tensor.spec.bytes()).unwrap(), bytes);
            assert_eq!(tensor.start % ALIGNMENT, 0);
        }
        assert_eq!(gguf.files[0].len % ALIGNMENT, 0, "the last tensor is padded too");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn what_is_known_only_at_the_end_takes_the_place_of_a_value_as_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let sink = GgufSink::create(&path, Opening::default(), &every_kind(), &specs()).unwrap();
        let long = "y".repeat(ALIGNMENT as usize);
        let error = sink.restate(&[("string".to_string(), long)]).unwrap_err().to_string();
        assert!(error.contains("the header's length has changed"), "{error}");
        for (i, spec) in specs().iter().enumerate() {
            sink.write(i, 0, &vec![7; spec.bytes() as usize]).unwrap();
        }
        sink.restate(&[("string".to_string(), "é".to_string())]).unwrap();
        Box::new(sink).finish().unwrap();
        let mut wanted = every_kind();
        wanted.set("string", "é");
        assert_eq!(Gguf::open(&path).unwrap().metadata, wanted);
    }

    #[test]
    fn an_array_takes_no_more_memory_than_twice_its_bytes_in_the_file() {
        let count = 100_000u64;
        let header =
            |kind: Kind| [(kind as u32).to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat();
        for (kind, bytes) in [(Kind::Bool, 1), (Kind::U16, 2), (Kind::I32, 4), (Kind::F64, 8)] {
            let file = [header(kind), vec![1; bytes * count as usize]].concat();
            let mut reader = Reader { input: file.as_slice(), at: 0, len: file.len() as u64 };
            let Value::Array(array) = reader.value(Kind::Array).unwrap() else { panic!("no array") };
            let capacity = match &array {
                Array::Bool(items) => items.capacity() * size_of::<bool>(),
                Array::U16(items) => items.capacity() * size_of::<u16>(),
                Array::I32(items) => items.capacity() * size_of::<i32>(),
                Array::F64(items) => items.capacity() * size_of::<f64>(),
                other => panic!("{other:?}"),
            };
            assert_eq!((array.len() as u64, array.kind()), (count, kind));
            // Vectors double as they grow.
            assert!(capacity <= 2 * bytes * count as usize, "{kind:?}: {capacity} bytes");
        }
    }

    #[test]
    fn a_sink_with_missing_bytes_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let sink = GgufSink::create(&path, Opening::default(), &Metadata::default(), &specs()).unwrap();
        assert!(sink.write(0, 4, &[0; 12]).is_err(), "past the tensor's end");
        let error = Box::new(sink).finish().unwrap_err().to_string();
        assert!(error.contains("`a.weight`: 0 bytes were written, wanted 12"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
