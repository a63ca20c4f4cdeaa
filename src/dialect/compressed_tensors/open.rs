//! Folders of compressed-tensors as they lie there: what `quantization_config` says of each module, scales of inputs and of
//! the cache of keys and values.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::config::Quantization;
use super::{INPUT_SCALE, KV_SCALES};
use crate::container::text::some_of;
use crate::container::{Located, Storage};
use crate::dialect::opened::{Encoding, Folder, Opened, Parts};
use crate::names::{Role, TensorId};
use crate::num::Codec;
use crate::rows::Place;
use crate::scheme::{Activations, Scheme};
use crate::tensor::{Dtype, floats_from_bytes};

/// Reads a folder; `None` if its configuration says nothing of quantization.
///
/// # Errors
/// Name what `quantization_config` asks for that is not read, and scales that are missing, surplus or no numbers.
pub fn open(folder: &Folder) -> Result<Option<Opened<'_>>> {
    let quantization = match folder.json.get("quantization_config") {
        None | Some(Value::Null) => return Ok(None),
        Some(json) => Quantization::parse(json).context("config.json")?,
    };
    let (scales, tensors): (Vec<Located>, Vec<Located>) =
        folder.tensors.iter().cloned().partition(|tensor| is_kv_scale(&tensor.spec.name));
    let kv_scales = kv_scales(folder, &scales, quantization.has_fp8_cache())?;
    let encoding = move |id: TensorId, shape: &[usize], place: &Place, parts: &mut Parts| {
        let linear = id.role.is_linear() || id.role == Role::Head;
        let of_module = Some(&quantization).filter(|_| shape.len() == 2);
        let of_module = of_module.and_then(|quantization| quantization.of(place.module(), linear));
        let Some((scheme, activations)) = of_module else { return Ok(None) };
        let scheme = with_stored_scale(scheme, parts);
        let rounding = input_rounding(folder, activations, parts)?;
        Ok(Some(Encoding { scheme, activations, rounding }))
    };
    Ok(Some(Opened {
        config: folder.config.clone(),
        tensors,
        kv_scales,
        format: None,
        encoding: Some(Box::new(encoding)),
    }))
}

fn is_kv_scale(name: &str) -> bool {
    KV_SCALES.iter().any(|scale| name.strip_suffix(scale).is_some_and(|rest| rest.ends_with(".self_attn.")))
}

/// Reads the scales of every layer's keys and values, of one value each.
fn kv_scales(folder: &Folder, found: &[Located], fp8_cache: bool) -> Result<Vec<[f32; 2]>> {
    if !fp8_cache {
        let stray: Vec<_> = found.iter().map(|tensor| &tensor.spec.name).collect();
        ensure!(found.is_empty(), "`kv_cache_scheme` is null, but there are scales: {}", some_of(&stray));
        return Ok(Vec::new());
    }
    let read = |layer: usize, scale: &str| -> Result<f32> {
        let name = format!("model.layers.{layer}.self_attn.{scale}");
        let tensor = found.iter().find(|tensor| tensor.spec.name == name);
        let tensor = tensor.with_context(|| format!("`{name}` is missing; `kv_cache_scheme` asks for it"))?;
        read_scale(folder, tensor)
    };
    (0..folder.config.num_hidden_layers)
        .map(|layer| Ok([read(layer, KV_SCALES[0])?, read(layer, KV_SCALES[1])?]))
        .collect()
}

/// Reads a scale that stands alone: one number, finite and positive.
fn read_scale(folder: &Folder, tensor: &Located) -> Result<f32> {
    let name = &tensor.spec.name;
    let Storage::Plain(dtype) = tensor.spec.storage else { bail!("`{name}`: wanted a number") };
    ensure!(
        dtype.is_float() && tensor.spec.shape.iter().product::<usize>() == 1,
        "`{name}`: found {dtype} of shape {:?}; wanted one number",
        tensor.spec.shape
    );
    let bytes = folder.files[tensor.file].read(tensor.start, tensor.spec.bytes())?;
    let mut value = [0.0];
    floats_from_bytes(dtype, &bytes, &mut value);
    ensure!(value[0].is_finite() && value[0] > 0.0, "`{name}` is {}; wanted more than 0", value[0]);
    Ok(value[0])
}

/// Returns what a linear does to its inputs, by the scale that lies beside its weight, which is taken from `parts`.
fn input_rounding(folder: &Folder, activations: Activations, parts: &mut Parts) -> Result<Activations<f32>> {
    let scale = parts.remove(INPUT_SCALE);
    ensure!(
        activations.is_static() || scale.is_none(),
        "there is an `input_scale`, but `input_activations` do not ask for one"
    );
    activations.with_scale(|| {
        let wanted = "`input_scale` is missing; `input_activations` with `dynamic` false ask for it";
        read_scale(folder, &scale.context(wanted)?)
    })
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
