//! GGUF files as they lie there.

use anyhow::{Context, Result};

use super::{metadata, scheme_of};
use crate::container::Storage;
use crate::container::gguf::Gguf;
use crate::dialect::opened::{Encoding, Opened, Parts};
use crate::names::TensorId;
use crate::rows::Place;
use crate::scheme::Activations;

/// Reads a file.
///
/// # Errors
/// Name the key that is missing, malformed or not supported.
pub fn open(gguf: &Gguf) -> Result<Opened<'_>> {
    // These are part of the configuration already.
    let divisors = |name: &str| TensorId::from_gguf(name).is_some_and(|id| id.role.is_rope_divisors());
    let tensors = gguf.tensors.iter().filter(|tensor| !divisors(&tensor.spec.name)).cloned().collect();
    Ok(Opened {
        config: metadata::read(gguf)?,
        tensors,
        kv_scales: Vec::new(),
        format: metadata::format(&gguf.metadata).map(str::to_string),
        encoding: Some(Box::new(encoding)),
    })
}

fn encoding(_: TensorId, _: &[usize], place: &Place, parts: &mut Parts) -> Result<Option<Encoding>> {
    let kind = parts.values().find_map(|part| match part.spec.storage {
        Storage::Ggml(kind) => Some(kind),
        Storage::Plain(_) => None,
    });
    let Some(kind) = kind else { return Ok(None) };
    let scheme =
        scheme_of(kind).with_context(|| format!("no scheme is known for {kind:?} of `{}`", place.name))?;
    Ok(Some(Encoding { scheme, activations: Activations::Full, rounding: Activations::Full }))
}
