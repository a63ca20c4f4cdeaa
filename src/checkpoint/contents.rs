//! Which tensor of the model each stored tensor is: names matched, shapes and types checked, nothing missing, nothing
//! left over.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::foreign;
use super::{Location, Stored, TensorInfo};
use crate::container::text::some_of;
use crate::container::{InputFile, Located, Storage};
use crate::dialect::Dialect;
use crate::dialect::opened::{Encoding, Opened, Parts};
use crate::names::{Role, TensorId};
use crate::rows::Place;
use crate::scheme::Activations;

/// The tensors of a model, and where each lies.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) tensors: BTreeMap<TensorId, TensorInfo>,
    pub(super) locations: BTreeMap<TensorId, Location>,
}

/// A tensor that the configuration asks for.
struct Wanted<'a> {
    id: TensorId,
    /// Row-major, Hugging Face orientation.
    shape: &'a [usize],
    place: &'a Place,
}

/// What is known of a tensor from its stored parts.
struct Described {
    stored: Stored,
    rounding: Activations<f32>,
    /// Those that unpacking takes.
    parts: Vec<Located>,
}

/// Finds each tensor that the configuration asks for where `dialect` keeps it.
pub(super) fn of(dialect: &dyn Dialect, opened: &Opened, files: &[InputFile]) -> Result<Contents> {
    let Opened { config, tensors, encoding, .. } = opened;
    if encoding.is_none()
        && let Some(refusal) = foreign::quantized_by(tensors.iter().map(|tensor| tensor.spec.name.as_str()))
    {
        bail!(refusal);
    }
    let stored: BTreeMap<&str, &Located> = tensors.iter().map(|t| (t.spec.name.as_str(), t)).collect();
    let (mut contents, mut missing, mut used) = (Contents::default(), Vec::new(), BTreeSet::new());
    for (id, shape) in config.expected_tensors() {
        let place = dialect.place(id, shape[0], config);
        let parts = parts_at(&place, &stored);
        if parts.is_empty() {
            missing.push(id.to_string());
            continue;
        }
        used.extend(parts.values().map(|part| part.spec.name.clone()));
        // Of a stored tensor that holds several, each counts its own rows.
        let share = |bytes: u64| bytes * shape[0] as u64 / place.stored_rows().max(1) as u64;
        let bytes = parts.values().map(|part| share(part.spec.bytes())).sum();
        let wanted = Wanted { id, shape: &shape, place: &place };
        let Described { stored, rounding, parts } =
            describe(dialect, opened, &wanted, parts, files).with_context(|| format!("`{id}`"))?;
        contents.tensors.insert(id, TensorInfo { shape, stored, bytes, rounding });
        contents.locations.insert(id, Location { place, parts });
    }
    ensure!(
        missing != [TensorId::global(Role::Head).to_string()],
        "`{}` is missing; if the model's head is its embedding table, set `tie_word_embeddings` to true in `config.json`",
        missing[0]
    );
    ensure!(
        missing.is_empty(),
        "{} tensors that the configuration asks for are missing: {}; download the model again, or correct \
         `config.json` if it belongs to another model",
        missing.len(),
        some_of(&missing)
    );
    if config.tie_word_embeddings {
        // Some tools save the head although it is the embedding table.
        let head = dialect.place(TensorId::global(Role::Head), config.vocab_size, config);
        used.extend(parts_at(&head, &stored).into_values().map(|part| part.spec.name));
    }
    let surplus: Vec<_> = stored.into_keys().filter(|name| !used.contains(*name)).collect();
    if let Some(refusal) = foreign::quantized_by(surplus.iter().copied()) {
        bail!(refusal);
    }
    ensure!(
        surplus.is_empty(),
        "{} tensors have no place in the configuration: {}; is `config.json` from this model, and is it a text decoder \
         of a supported family?",
        surplus.len(),
        some_of(&surplus)
    );
    Ok(contents)
}

/// Returns what is stored at a place, by what follows the module path: the tensor itself, or the parts it became.
fn parts_at(place: &Place, stored: &BTreeMap<&str, &Located>) -> Parts {
    let prefix = place.prefix();
    let named = |(&name, &tensor): (&&str, &&Located)| {
        let suffix = match name.strip_prefix(prefix.as_str()) {
            None => (name == place.name).then_some("weight")?,
            // The biases of a linear and of a choice of experts are tensors of their own.
            Some(suffix) if suffix.ends_with("bias") || suffix.contains('.') => return None,
            Some(suffix) => suffix,
        };
        Some((suffix.to_string(), tensor.clone()))
    };
    let whole = stored.get_key_value(place.name.as_str());
    let parts = stored.range(prefix.as_str()..).take_while(|(name, _)| name.starts_with(&prefix));
    whole.into_iter().chain(parts).filter_map(named).collect()
}

/// Understands a tensor by its stored parts.
fn describe(
    dialect: &dyn Dialect,
    opened: &Opened,
    wanted: &Wanted,
    mut parts: Parts,
    files: &[InputFile],
) -> Result<Described> {
    let encoding = match &opened.encoding {
        Some(encoding) => encoding(wanted.id, wanted.shape, wanted.place, &mut parts)?,
        None => None,
    };
    match encoding {
        None => dense(wanted, parts),
        Some(encoding) => quantized(dialect, encoding, wanted, parts, files),
    }
}

/// Understands a tensor of plain floats.
fn dense(wanted: &Wanted, parts: Parts) -> Result<Described> {
    let (suffixes, mut located): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    ensure!(
        located.len() == 1 && matches!(suffixes[0].as_str(), "weight" | "bias"),
        "found the parts {}, but `config.json` does not say that this tensor is quantized",
        some_of(&suffixes)
    );
    let part = located.swap_remove(0);
    let Storage::Plain(dtype) = part.spec.storage else {
        bail!("found {:?}, wanted floats", part.spec.storage)
    };
    ensure!(
        dtype.is_float(),
        "found {dtype}, wanted F32, F16 or BF16; if the model is quantized, `config.json` must say so"
    );
    ensure_shape(&part, &wanted.place.shape(wanted.shape.get(1).copied()))?;
    Ok(Described { stored: Stored::Dense(dtype), rounding: Activations::Full, parts: vec![part] })
}

/// Understands a tensor that `dialect` spells in parts; `fixed` parts are compared here and not kept.
fn quantized(
    dialect: &dyn Dialect,
    Encoding { scheme, activations, rounding }: Encoding,
    tensor: &Wanted,
    mut parts: Parts,
    files: &[InputFile],
) -> Result<Described> {
    let &[_, cols] = tensor.shape else {
        bail!("found quantized parts, wanted a plain vector {:?}", tensor.shape)
    };
    let mut located = Vec::new();
    for wanted in dialect.parts(&scheme, activations, tensor.place.stored_rows(), cols)? {
        let suffix = wanted.suffix;
        let part = parts.remove(suffix).with_context(|| {
            let found: Vec<_> = parts.keys().collect();
            format!("`{suffix}` is missing (`{}`); found {}", scheme.name, some_of(&found))
        })?;
        ensure!(
            part.spec.storage == wanted.storage,
            "`{suffix}`: found {:?}, wanted {:?} for `{}`",
            part.spec.storage,
            wanted.storage,
            scheme.name
        );
        let shape = wanted.shape_at(tensor.place);
        ensure_shape(&part, &shape).with_context(|| format!("`{suffix}`"))?;
        match wanted.fixed {
            None => located.push(part),
            Some(bytes) => {
                let found = files[part.file].read(part.start, part.spec.bytes())?;
                ensure!(
                    found == bytes,
                    "`{suffix}` does not say {:?}; the checkpoint is damaged",
                    tensor.shape
                );
            }
        }
    }
    let surplus: Vec<_> = parts.keys().collect();
    ensure!(surplus.is_empty(), "{} is not part of `{}` and not supported", some_of(&surplus), scheme.name);
    Ok(Described { stored: Stored::Quantized(scheme, activations), rounding, parts: located })
}

fn ensure_shape(part: &Located, wanted: &[usize]) -> Result<()> {
    ensure!(
        part.spec.shape == wanted,
        "found shape {:?}, wanted {wanted:?} by the configuration; is `config.json` from this model?",
        part.spec.shape
    );
    Ok(())
}

/// Returns the format of most weights: `bf16`, `mxfp4`, `int8-w8a8`.
pub(super) fn main_format(tensors: &BTreeMap<TensorId, TensorInfo>) -> String {
    let mut weights = BTreeMap::<String, u64>::new();
    // A quantized model is named by what it is quantized to, however large its embeddings.
    let quantized = |info: &TensorInfo| matches!(info.stored, Stored::Quantized(..));
    let any_quantized = tensors.values().any(quantized);
    for info in tensors.values().filter(|info| !any_quantized || quantized(info)) {
        let name = match info.stored {
            Stored::Dense(dtype) => dtype.to_string().to_lowercase(),
            Stored::Quantized(scheme, Activations::Full) => scheme.name.to_string(),
            Stored::Quantized(scheme, Activations::Int8PerToken | Activations::Fp8PerToken) => {
                format!("{}-w8a8", scheme.name)
            }
            Stored::Quantized(scheme, Activations::Int8PerTensor(())) => {
                format!("{}-w8a8-static", scheme.name)
            }
        };
        *weights.entry(name).or_default() += info.weights();
    }
    weights.into_iter().max_by_key(|&(_, count)| count).map_or_else(String::new, |(name, _)| name)
}
