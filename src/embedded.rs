//! The model and the text inside the binary: what every command uses when none is named, so that a fresh install can
//! run the whole pipeline with no download. Provenance and licence: `eval/README.md`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::container::output::temporary_in;

/// Name of the embedded model.
pub const MODEL_NAME: &str = "tiny-llama";

/// Evaluation text: prose, Rust documentation, Python, JSON, manual pages, arithmetic.
pub const EVAL_TEXT: &str = include_str!("../eval/eval.txt");

const FILES: [(&str, &[u8]); 6] = [
    ("config.json", include_bytes!("../eval/tiny-llama/config.json")),
    ("generation_config.json", include_bytes!("../eval/tiny-llama/generation_config.json")),
    ("tokenizer_config.json", include_bytes!("../eval/tiny-llama/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../eval/tiny-llama/chat_template.jinja")),
    ("tokenizer.json", include_bytes!("../eval/tiny-llama/tokenizer.json")),
    ("model.safetensors", include_bytes!("../eval/tiny-llama/model.safetensors")),
];

/// Returns a folder that holds the embedded model, written on first use: `$XDG_CACHE_HOME/quant` or `~/.cache/quant`,
/// else the system's temporary folder. The folder's name carries the content's hash, so versions never mix.
pub fn model_folder() -> Result<PathBuf> {
    let mut hash = Sha256::new();
    FILES.iter().for_each(|(_, bytes)| hash.update(bytes));
    let hash: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let cache = cache_folder().join("quant");
    let folder = cache.join(hash).join(MODEL_NAME);
    let complete = FILES
        .iter()
        .all(|(name, bytes)| fs::metadata(folder.join(name)).is_ok_and(|m| m.len() == bytes.len() as u64));
    if complete {
        return Ok(folder);
    }
    let context = || {
        format!(
            "{}: cannot write the embedded model; set XDG_CACHE_HOME to a writable folder",
            cache.display()
        )
    };
    fs::create_dir_all(&folder).with_context(context)?;
    for (name, bytes) in FILES {
        // Written beside and renamed, so that a second process never reads half a file.
        let mut file = temporary_in(&folder).with_context(context)?;
        std::io::Write::write_all(&mut file, bytes).with_context(context)?;
        file.persist(folder.join(name)).with_context(context)?;
    }
    Ok(folder)
}

fn cache_folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    from("XDG_CACHE_HOME").or_else(|| Some(from("HOME")?.join(".cache"))).unwrap_or_else(std::env::temp_dir)
}
