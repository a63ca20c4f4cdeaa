//! Which tensor of the model each stored tensor is: names matched, shapes and types checked, nothing missing, nothing
//! left over.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::folder::{OpenedFolder, some_of};
use super::foreign;
use super::{Location, Stored, TensorInfo};
use crate::container::gguf::Gguf;
use crate::container::{InputFile, Located, Storage};
use crate::dialect::compressed_tensors::{CompressedTensors, INPUT_SCALE, KV_SCALES};
use crate::dialect::{self, Dialect};
use crate::model::config::Config;
use crate::names::{Role, TensorId};
use crate::num::Codec;
use crate::rows::Place;
use crate::scheme::{Activations, Scheme};
use crate::tensor::{Dtype, floats_from_bytes};

/// The tensors of a model, and where each lies.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) tensors: BTreeMap<TensorId, TensorInfo>,
    pub(super) locations: BTreeMap<TensorId, Location>,
    /// Scales of an FP8 cache, of every layer's keys and values; empty without one.
    pub(super) kv_scales: Vec<[f32; 2]>,
}

/// The stored parts of one tensor, by what follows the module path in their name.
type Parts = BTreeMap<String, Located>;

/// Understands a Hugging Face folder.
pub(super) fn of_folder(opened: &OpenedFolder) -> Result<Contents> {
    let quantization = opened.quantization.as_ref();
    let (scales, tensors): (Vec<Located>, Vec<Located>) =
        opened.tensors.iter().cloned().partition(|tensor| is_kv_scale(&tensor.spec.name));
    let fp8_cache = quantization.is_some_and(|quantization| quantization.has_fp8_cache());
    let kv_scales = kv_scales(opened, &scales, fp8_cache)?;
    if quantization.is_none()
        && let Some(refusal) = foreign::quantized_by(tensors.iter().map(|tensor| tensor.spec.name.as_str()))
    {
        bail!(refusal);
    }
    let contents = assign(&opened.config, &CompressedTensors, &tensors, |wanted, mut parts| {
        let linear = wanted.id.role.is_linear() || wanted.id.role == Role::Head;
        let of_module = (quantization.filter(|_| wanted.shape.len() == 2))
            .and_then(|quantization| quantization.of(wanted.place.module(), linear));
        match of_module {
            None => dense(wanted, parts),
            Some((scheme, activations)) => {
                let scheme = with_stored_scale(scheme, &parts);
                let rounding = input_rounding(opened, activations, &mut parts)?;
                let (stored, parts) =
                    quantized(&CompressedTensors, scheme, activations, wanted, parts, &opened.files)?;
                Ok(Described { stored, rounding, parts })
            }
        }
    });
    Ok(Contents { kv_scales, ..contents? })
}

fn is_kv_scale(name: &str) -> bool {
    KV_SCALES.iter().any(|scale| name.strip_suffix(scale).is_some_and(|rest| rest.ends_with(".self_attn.")))
}

/// Reads the scales of every layer's keys and values, of one value each.
fn kv_scales(opened: &OpenedFolder, found: &[Located], fp8_cache: bool) -> Result<Vec<[f32; 2]>> {
    if !fp8_cache {
        let stray: Vec<_> = found.iter().map(|tensor| &tensor.spec.name).collect();
        ensure!(found.is_empty(), "`kv_cache_scheme` is null, but there are scales: {}", some_of(&stray));
        return Ok(Vec::new());
    }
    let read = |layer: usize, scale: &str| -> Result<f32> {
        let name = format!("model.layers.{layer}.self_attn.{scale}");
        let tensor = found.iter().find(|tensor| tensor.spec.name == name);
        let tensor = tensor.with_context(|| format!("`{name}` is missing; `kv_cache_scheme` asks for it"))?;
        read_scale(opened, tensor)
    };
    (0..opened.config.num_hidden_layers)
        .map(|layer| Ok([read(layer, KV_SCALES[0])?, read(layer, KV_SCALES[1])?]))
        .collect()
}

/// Reads a scale that stands alone: one number, finite and positive.
fn read_scale(opened: &OpenedFolder, tensor: &Located) -> Result<f32> {
    let name = &tensor.spec.name;
    let Storage::Plain(dtype) = tensor.spec.storage else { bail!("`{name}`: wanted a number") };
    ensure!(
        dtype.is_float() && tensor.spec.shape.iter().product::<usize>() == 1,
        "`{name}`: found {dtype} of shape {:?}; wanted one number",
        tensor.spec.shape
    );
    let bytes = opened.files[tensor.file].read(tensor.start, tensor.spec.bytes())?;
    let mut value = [0.0];
    floats_from_bytes(dtype, &bytes, &mut value);
    ensure!(value[0].is_finite() && value[0] > 0.0, "`{name}` is {}; wanted more than 0", value[0]);
    Ok(value[0])
}

/// Returns what a linear does to its inputs, by the scale that lies beside its weight, which is taken from `parts`.
fn input_rounding(
    opened: &OpenedFolder,
    activations: Activations,
    parts: &mut Parts,
) -> Result<Activations<f32>> {
    let scale = parts.remove(INPUT_SCALE);
    ensure!(
        activations.is_static() || scale.is_none(),
        "there is an `input_scale`, but `input_activations` do not ask for one"
    );
    activations.with_scale(|| {
        let wanted = "`input_scale` is missing; `input_activations` with `dynamic` false ask for it";
        read_scale(opened, &scale.context(wanted)?)
    })
}

/// Understands a GGUF file.
pub(super) fn of_gguf(config: &Config, gguf: &Gguf) -> Result<Contents> {
    // These are part of the configuration already.
    let divisors = |name: &str| TensorId::from_gguf(name).is_some_and(|id| id.role.is_rope_divisors());
    let tensors: Vec<_> =
        gguf.tensors.iter().filter(|tensor| !divisors(&tensor.spec.name)).cloned().collect();
    assign(config, &dialect::gguf::Gguf, &tensors, |wanted, parts| {
        let kind = parts.values().find_map(|part| match part.spec.storage {
            Storage::Ggml(kind) => Some(kind),
            Storage::Plain(_) => None,
        });
        let Some(kind) = kind else { return dense(wanted, parts) };
        let scheme = dialect::gguf::scheme_of(kind)
            .with_context(|| format!("no scheme is known for {kind:?} of `{}`", wanted.place.name))?;
        let (stored, parts) =
            quantized(&dialect::gguf::Gguf, scheme, Activations::Full, wanted, parts, &gguf.files)?;
        Ok(Described { stored, rounding: Activations::Full, parts })
    })
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

/// Finds each tensor that the configuration asks for where `dialect` keeps it, as `describe` understands its parts.
fn assign(
    config: &Config,
    dialect: &dyn Dialect,
    tensors: &[Located],
    describe: impl Fn(&Wanted, Parts) -> Result<Described>,
) -> Result<Contents> {
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
            describe(&wanted, parts).with_context(|| format!("`{id}`"))?;
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
            Some(suffix) if suffix == "bias" || suffix.contains('.') => return None,
            Some(suffix) => suffix,
        };
        Some((suffix.to_string(), tensor.clone()))
    };
    let whole = stored.get_key_value(place.name.as_str());
    let parts = stored.range(prefix.as_str()..).take_while(|(name, _)| name.starts_with(&prefix));
    whole.into_iter().chain(parts).filter_map(named).collect()
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
    scheme: Scheme,
    activations: Activations,
    tensor: &Wanted,
    mut parts: Parts,
    files: &[InputFile],
) -> Result<(Stored, Vec<Located>)> {
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
    Ok((Stored::Quantized(scheme, activations), located))
}

/// Returns the scheme with the scale type that is stored: the configuration leaves it to the model's number type.
fn with_stored_scale(scheme: Scheme, parts: &Parts) -> Scheme {
    let stored = parts.get("weight_scale").map(|part| part.spec.storage);
    let scale = match (scheme.scale, stored) {
        (Codec::F32 | Codec::F16 | Codec::BF16, Some(Storage::Plain(Dtype::F32))) => Codec::F32,
        (Codec::F32 | Codec::F16 | Codec::BF16, Some(Storage::Plain(Dtype::F16))) => Codec::F16,
        (Codec::F32 | Codec::F16 | Codec::BF16, Some(Storage::Plain(Dtype::BF16))) => Codec::BF16,
        (codec, _) => codec,
    };
    Scheme { scale, ..scheme }
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
