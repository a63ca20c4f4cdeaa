use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::DTYPES;
use crate::container::{InputFile, Located, Storage, TensorSpec};

/// Same limit as the safetensors crate: a header is read whole before anything in it is trusted.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An opened safetensors file.
#[derive(Debug)]
pub struct Safetensors {
    /// The file.
    pub file: InputFile,
    /// Its tensors in payload order; `file` of each is 0.
    pub tensors: Vec<Located>,
    /// The entries of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Safetensors {
    /// Opens a file and validates its header: tensors cover the payload exactly, without overlap, each with the size
    /// its type and shape ask for. Tensors for which `skip` holds may be of any type and are left out.
    ///
    /// # Errors
    /// Name the file, the tensor, what was found and wanted.
    pub fn open(path: &Path, skip: impl Fn(&str) -> bool) -> Result<Self> {
        let file = InputFile::open(path)?;
        let shown = path.display();
        ensure!(file.len >= 8, "{shown}: {} bytes are no safetensors file; download it again", file.len);
        let bytes = file.read(0, 8)?;
        let header_bytes = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        ensure!(
            header_bytes <= MAX_HEADER_BYTES && header_bytes <= file.len - 8,
            "{shown}: the header claims {header_bytes} bytes, but the file has {}; it is truncated or no safetensors \
             file; download it again",
            file.len
        );
        let json = file.read(8, header_bytes)?;
        let header: Header = serde_json::from_slice(&json).map_err(|error| {
            anyhow!("{shown}: the safetensors header is damaged: {error}; download it again")
        })?;
        let payload = 8 + header_bytes;
        let entries = validate(header.tensors, file.len - payload).with_context(|| format!("{shown}"))?;
        let mut tensors = Vec::with_capacity(entries.len());
        for (name, info) in entries.into_iter().filter(|(name, _)| !skip(name)) {
            let Some(&(dtype, _)) = DTYPES.iter().find(|row| row.1 == info.dtype) else {
                bail!(
                    "{shown}: `{name}`: number type `{}` is not supported; save the model as F32, F16 or BF16",
                    info.dtype
                );
            };
            let start = payload + info.data_offsets.0 as u64;
            let spec = TensorSpec { name, storage: Storage::Plain(dtype), shape: info.shape };
            tensors.push(Located { spec, file: 0, start });
        }
        Ok(Safetensors { file, tensors, metadata: header.metadata })
    }
}

/// Returns the tensors in payload order if they tile `payload` bytes. Every fault is named before the safetensors
/// crate, which knows only the kind of fault, confirms that there is none.
fn validate(mut tensors: Vec<(String, TensorInfo)>, payload: u64) -> Result<Vec<(String, TensorInfo)>> {
    let mut seen = HashSet::new();
    for (name, info) in &tensors {
        ensure!(seen.insert(name), "`{name}` is in the header twice; download the file again");
        let (begin, end) = info.data_offsets;
        ensure!(
            begin <= end && end as u64 <= payload,
            "`{name}`: found bytes {begin}..{end}, but the file holds {payload} bytes of tensors; it is truncated: \
             download it again"
        );
        let elems = info.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let wanted = elems.and_then(|elems| elems.checked_mul(info.dtype.bitsize())).map(|bits| bits / 8);
        ensure!(
            wanted == Some(end - begin),
            "`{name}`: found {} bytes, but shape {:?} of {} takes {}; download the file again",
            end - begin,
            info.shape,
            info.dtype,
            wanted.map_or("more than any file".to_string(), |bytes| bytes.to_string())
        );
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (i, (name, info)) in tensors.iter().enumerate() {
        let (begin, end) = info.data_offsets;
        if begin < covered {
            let other = &tensors[i - 1].0;
            bail!(
                "`{name}` overlaps `{other}`: it starts at {begin}, before {covered}; download the file again"
            );
        }
        ensure!(
            begin == covered,
            "`{name}` starts at {begin}, wanted {covered}: bytes between belong to no tensor"
        );
        covered = end;
    }
    ensure!(
        covered as u64 == payload,
        "tensors end at byte {covered}, but the file holds {payload}; download it again"
    );
    Metadata::new(None, tensors.clone()).map_err(|error| anyhow!("the header is damaged: {error}"))?;
    Ok(tensors)
}

/// The header's entries in file order, duplicates kept: a map would silently drop them.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                header.metadata = map.next_value::<HashMap<_, _>>()?.into_iter().collect();
            } else {
                let info =
                    map.next_value().map_err(|error| A::Error::custom(format!("`{name}`: {error}")))?;
                header.tensors.push((name, info));
            }
        }
        Ok(header)
    }
}
