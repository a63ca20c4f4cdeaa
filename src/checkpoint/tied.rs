//! Tied models that store an output head, as transformers 5.17 reads them (`PreTrainedModel.tie_weights`): a
//! head that is the embedding table once more is left out; one with values of its own is used, whatever
//! `tie_word_embeddings` says; one without an embedding table serves as both.

use anyhow::{Context, Result};
use serde_json::Value;

use super::folder::same_bytes;
use crate::container::{Located, Storage};
use crate::dialect::opened::Folder;
use crate::tensor::floats_from_bytes;

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Settles what the stored head of a tied model is, in its tensors and its configuration. Returns what a user
/// must know.
pub(super) fn settle(opened: &mut Folder) -> Result<Option<String>> {
    let head = opened.tensors.iter().position(|tensor| tensor.spec.name.starts_with("lm_head."));
    let Some(head) = head.filter(|_| opened.config.tie_word_embeddings) else { return Ok(None) };
    let embed = opened.tensors.iter().find(|tensor| tensor.spec.name.starts_with("model.embed_tokens."));
    match embed {
        None if opened.tensors[head].spec.name == HEAD => {
            opened.tensors[head].spec.name = EMBED.to_string();
            Ok(None)
        }
        Some(embed) if same_values(opened, &opened.tensors[head], embed)? => {
            opened.tensors.remove(head);
            Ok(None)
        }
        _ => {
            opened.config.tie_word_embeddings = false;
            opened.config_json = untied(&opened.config_json)?;
            Ok(Some(format!(
                "`tie_word_embeddings` is true, but `{HEAD}` has values of its own and is used, as transformers does"
            )))
        }
    }
}

/// Whether two matrices hold the same numbers, be they of different types.
fn same_values(opened: &Folder, a: &Located, b: &Located) -> Result<bool> {
    let (Storage::Plain(x), Storage::Plain(y)) = (a.spec.storage, b.spec.storage) else { return Ok(false) };
    if x == y || !x.is_float() || !y.is_float() || a.spec.shape != b.spec.shape {
        return same_bytes(&opened.files, a, b);
    }
    let [rows, cols] = a.spec.shape[..] else { return Ok(false) };
    let mut found = [vec![0.0; cols], vec![0.0; cols]];
    for row in 0..rows as u64 {
        for (values, tensor, dtype) in [(0, a, x), (1, b, y)] {
            let bytes = (cols * dtype.bytes()) as u64;
            let read = opened.files[tensor.file].read(tensor.start + row * bytes, bytes)?;
            floats_from_bytes(dtype, &read, &mut found[values]);
        }
        if found[0] != found[1] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns a configuration for a head of its own: engines other than transformers trust the flag.
fn untied(config_json: &str) -> Result<String> {
    let mut json: Value = serde_json::from_str(config_json).context("config.json")?;
    json["tie_word_embeddings"] = false.into();
    Ok(format!("{json:#}\n"))
}
