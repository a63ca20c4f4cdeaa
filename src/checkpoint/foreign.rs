//! What stands at a path instead of a model that can be read, told by name with its cure: adapters,
//! checkpoints that other tools have quantized, folders of the hub's cache, links that lead nowhere.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::dialect::DIALECTS;

/// The cure for every quantized source.
const ORIGINAL: &str = "name the original model in BF16, F16 or F32 instead";

/// How tensors of quantized linears end: (suffix, who writes it). bitsandbytes/nn/modules.py, AutoGPTQ and
/// AutoAWQ `qlinear`, transformers' `FP8Linear`, mlx `QuantizedLinear`, quanto, HQQ.
const PARTS: [(&str, &str); 15] = [
    (".SCB", "bitsandbytes (8 bits)"),
    (".weight_format", "bitsandbytes (8 bits)"),
    (".weight.absmax", "bitsandbytes (4 bits)"),
    (".weight.quant_map", "bitsandbytes (4 bits)"),
    (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes (4 bits)"),
    (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes (4 bits)"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".weight_scale_inv", "FP8 in blocks"),
    (".scales", "GPTQ, AWQ or MLX"),
    (".biases", "MLX"),
    (".W_q", "HQQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors or FP8"),
];

/// Refuses folders that hold an adapter: transformers would add it to the model it was trained on.
pub(super) fn refuse_adapter(folder: &Path) -> Result<()> {
    let adapter = folder.join("adapter_config.json");
    ensure!(
        !adapter.is_file(),
        "{}: the folder holds an adapter (LoRA and kin); merge it into its base model with peft's `merge_and_unload()` and \
         `save_pretrained()`, and name that folder",
        adapter.display()
    );
    Ok(())
}

/// Refuses configurations of checkpoints that were quantized in a way that is not read.
pub(super) fn refuse_quantized(config: &Value) -> Result<()> {
    let method = |key: &str| config[key]["quant_method"].as_str();
    match method("quantization_config") {
        Some(method) if DIALECTS.iter().any(|dialect| dialect.quant_method() == Some(method)) => Ok(()),
        Some(method) => bail!(
            "the model is already quantized by `{method}` (`quantization_config`), which is not read; {ORIGINAL}"
        ),
        None if config["quantization"]["bits"].is_u64() => {
            bail!("the model is already quantized by MLX, which is not read; {ORIGINAL}")
        }
        None => Ok(()),
    }
}

/// Returns who quantized a model that holds tensors of those names, and the cure; `None` if nobody did.
pub(super) fn quantized_by<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let found = names.into_iter().find_map(|name| {
        let (_, method) = PARTS.iter().find(|(end, _)| name.ends_with(end))?;
        Some((name, method))
    });
    found.map(|(name, method)| {
        format!("`{name}` says that the model is already quantized by {method}, but `config.json` does not; {ORIGINAL}")
    })
}

/// Says what a folder without `config.json` is.
pub(super) fn no_config(folder: &Path, names: &[String]) -> String {
    let shown = folder.display();
    if let Ok(mut snapshots) = fs::read_dir(folder.join("snapshots"))
        && let Some(Ok(snapshot)) = snapshots.next()
    {
        let snapshot = snapshot.path();
        return format!(
            "{shown}: a repository's folder of the hub cache; name its snapshot: `{}`",
            snapshot.display()
        );
    }
    let has = |end: &str| names.iter().find(|name| name.ends_with(end));
    match (has(".gguf"), has("params.json"), has(".bin").or(has(".pth"))) {
        (Some(name), ..) => {
            format!("{shown}: a GGUF model is named by its file: `{}`", folder.join(name).display())
        }
        (None, Some(_), _) => format!(
            "{shown}: there is no `config.json`, but `params.json`: the original layout of Meta or Mistral; name the \
             Hugging Face one"
        ),
        _ => format!("{shown}: there is no `config.json`; copy it from the model's repository"),
    }
}

/// Refuses a link that leads nowhere among the files that are read: an interrupted download, or a cache half
/// copied.
pub(super) fn refuse_dangling(folder: &Path, name: &str) -> Result<()> {
    let path = folder.join(name);
    ensure!(
        path.exists() || path.symlink_metadata().is_err(),
        "{}: a link that leads nowhere (to `{}`); download the model again, or copy the folder with its links followed",
        path.display(),
        fs::read_link(&path).unwrap_or_default().display()
    );
    Ok(())
}
